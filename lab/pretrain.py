"""Train the small SANA-SR that the repository carries, from photos alone: autoencoder, prior, adapter, the method.

    python -m lab.pretrain autoencoder --data ./hq        # Ctrl-C saves, the same line goes on
    python -m lab.pretrain decoder --data ./hq
    python -m lab.pretrain prior --data ./hq
    python -m lab.pretrain export                         # runs/pretrain -> weights/embedded, in fp16
    python -m lab.pretrain tags --data ./hq --to hq.csv   # simple tags, for train.py --tags and eval.py --tagger
    python -m lab.finish …                                # the adapter and the decoder behind it, on degraded photos
    python -m lab.pretrain export --adapter runs/NAME/adapter.safetensors     # with an adapter of train.py, say

Stages (each saves as it goes under --out, continues from what it saved, on a CPU or a GPU alike):
    autoencoder   DC-AE, 32× per side, on clean photos: a linear coder by least squares, then L1 + LPIPS (AlexNet)
    decoder       its decoder alone, by LPIPS (VGG16) besides, which sees the fine grids that AlexNet's stride of 4
                  lets pass; latents stay what they are, so this may come last as well
    prior         LinearDiT by flow matching on its latents, jointly with a small Gemma-2 that reads the photos' tags;
                  the tokenizer is a byte-fallback BPE trained on RAM's list of tags
Needs a folder of photos (searched recursively). One file in 16, chosen by its hash (`photos.held_out`), is held out and
never trained on; validation is on those. Tags come from the file names (`inet_n01494475_hammerhead.webp`: hammerhead)
and from the photos' main colours.
"""
import argparse
import copy
import csv
import json
import re
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

import runs
import weights
from metrics import DISTS, LPIPS
from photos.pairs import hash_of, held_out, photo_paths
from photos.pictures import one_line, read, write_bytes
from runs import UserError, command, write_csv
from runs import save_state as save
from sanasr import (
    DCAE,
    Gemma2,
    GemmaTokenizer,
    LinearDiT,
    build_prompt,
    fingerprint,
    open_weights,
    save_module,
    save_tensors,
    tokenize_prompt,
)
from weights import Unavailable

VIT, RES = "EfficientViTBlock", "ResBlock"
WIDTHS = [16, 32, 64, 128, 256, 256]  # the first is unused: depth 0 makes conv_in a down-sampling block
AUTOENCODER = dict(
    in_channels=3, latent_channels=128, attention_head_dim=32,
    encoder_block_types=[RES, RES, RES, RES, RES, VIT], decoder_block_types=[RES, RES, RES, RES, RES, VIT],
    encoder_block_out_channels=WIDTHS, decoder_block_out_channels=WIDTHS,
    encoder_layers_per_block=[0, 1, 1, 1, 1, 1], decoder_layers_per_block=[0, 1, 2, 2, 2, 1],
    encoder_qkv_multiscales=[[], [], [], [], [], [5]], decoder_qkv_multiscales=[[], [], [], [], [], [5]],
    downsample_block_type="Conv", upsample_block_type="pixel_shuffle",
)
PRIOR = dict(
    in_channels=128, out_channels=128, num_layers=12, num_attention_heads=5, attention_head_dim=32,
    num_cross_attention_heads=5, cross_attention_head_dim=32, cross_attention_dim=160, caption_channels=128,
    mlp_ratio=2.5, sample_size=8,
)
TEXT_ENCODER = dict(
    vocab_size=2048, hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, query_pre_attn_scalar=32,
)
HERE = weights.HERE

# ---------------------------------------------------------------------------------------------------------------------
# Photos
# ---------------------------------------------------------------------------------------------------------------------


class Photos:
    """All photos of the folders in memory as uint8 H,W,3, as (train, validation) by `photos.held_out`.

    Photos smaller than the crop are left out, or with `mirror` continued by their mirror image.
    """

    def __init__(self, folders, crop, mirror=False):
        found, small, bad = [], 0, 0  # (SHA-256 of the file, path, image)
        for path in tqdm(photo_paths(folders), desc="reading photos", unit="", leave=False):
            try:
                image = np.asarray(read(path).rgb)
            except Exception:  # on broken files the decoders raise anything
                bad += 1
                continue
            lacking = [max(0, crop - side) for side in image.shape[:2]]
            if any(lacking):
                small += 1
                if not mirror or max(lacking) > min(image.shape[:2]):
                    continue
                image = np.pad(image, [(n // 2, n - n // 2) for n in lacking] + [(0, 0)], mode="symmetric")
            found.append((weights.sha256(path), path, image))
        held = held_out(sha256 for sha256, *_ in found)
        self.sha256 = hash_of(sha256 for sha256, *_ in found)
        self.train = [(path, image) for sha256, path, image in found if sha256 not in held]
        self.val = [(path, image) for sha256, path, image in found if sha256 in held]
        if not self.train or not self.val:
            raise UserError(f"{', '.join(map(str, folders))}: too few photos of at least {crop} pixels per side")
        print(f"{len(self.train)} photos to train on, {len(self.val)} held out, {small} smaller than {crop} "
              f"({'mirrored' if mirror else 'left out'})" + (f", {bad} unreadable" if bad else ""))

    def crops(self, n, size, rng):
        """n random crops with flips of random training photos: n,3,size,size in [-1, 1]."""
        batch = np.empty((n, size, size, 3), np.uint8)
        for i in range(n):
            batch[i] = self.crop(rng.integers(len(self.train)), size, rng)
        return to_signed(batch)

    def crop(self, i, size, rng):
        """A random crop of training photo i, flipped or not: uint8 size,size,3."""
        image = self.train[i][1]
        y, x = (rng.integers(side - size + 1) for side in image.shape[:2])
        crop = image[y:y + size, x:x + size]
        return crop[:, ::-1] if rng.random() < 0.5 else crop

    def val_crops(self, size, limit):
        """The central crops of the first `limit` held-out photos that are large enough."""
        centre = [im[(im.shape[0] - size) // 2:, (im.shape[1] - size) // 2:][:size, :size]
                  for _, im in self.val if min(im.shape[:2]) >= size]
        return to_signed(np.stack(centre[:limit]))


def to_signed(batch):
    """uint8 n,H,W,3 -> float32 n,3,H,W in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(batch)).permute(0, 3, 1, 2).float() / 127.5 - 1


# ---------------------------------------------------------------------------------------------------------------------
# One training loop for all stages
# ---------------------------------------------------------------------------------------------------------------------


def learning_rate(step, steps, peak, warmup=200):
    """Linear warm-up, a plateau, and a linear decay to a twentieth over the last quarter."""
    return peak * min(1, (step + 1) / warmup, max(0.05, (steps - step) / (0.25 * steps)))


def load_state(path, device="cpu"):
    """A state that `fit` saved; ends the program with one line where there is none."""
    return runs.load_state(Path(path), f"not there yet; run the stage `{Path(path).stem}` first",
                           "delete it to start the stage anew", device)


def cut_log(path, step):
    """Remove the rows after `step`, which a killed run has logged but not saved."""
    if path.exists():
        header, *rows = path.read_text().splitlines(keepends=True)
        write_bytes(path, "".join([header, *(row for row in rows if int(row.split(",")[0]) <= step)]))


def fit(name, model, loss_fn, validate, args, steps, lr, weight_decay=0.01, factors=None):
    """Minimise `loss_fn(model, step) -> (loss, {name: value})` over `steps`; returns the model with its EMA weights.

    factors: {child of the model: factor of its learning rate}, 1 for those it does not name.

    The state lies in OUT/name.pt and is taken up where it ended; SIGTERM and Ctrl-C save. Every --validate-every steps
    a line with `validate(ema_model) -> {name: value}` goes to the screen and to OUT/name.csv.
    """
    with runs.claimed(Path(args.out), name):
        return _fit(name, model, loss_fn, validate, args, steps, lr, weight_decay, factors or {})


def _fit(name, model, loss_fn, validate, args, steps, lr, weight_decay, factors):
    path = Path(args.out) / f"{name}.pt"
    torch.backends.cudnn.benchmark = True  # all batches of a stage have one size
    model.to(args.device).train()
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    trained = {}  # factor: parameters
    for key, p in model.named_parameters():
        if p.requires_grad:
            trained.setdefault(factors.get(key.split(".")[0], 1), []).append(p)
    groups = [dict(params=params) for params in trained.values()]
    optimizer = torch.optim.AdamW(groups, lr, betas=(0.9, 0.98), weight_decay=weight_decay, fused=True)
    step, seconds = 0, 0.0
    if path.exists():
        state = load_state(path, args.device)
        try:
            model.load_state_dict(state["model"])
            ema.load_state_dict(state["ema"])
            optimizer.load_state_dict(state["optimizer"])
            step, seconds = state["step"], state["seconds"]
        except (KeyError, RuntimeError, TypeError, ValueError):
            raise UserError(f"{path} does not fit the networks of this stage; delete it to start the stage anew")
        print(f"{name}: continuing at step {step}")
    cut_log(path.with_suffix(".csv"), step)

    stop = []
    handlers = [signal.signal(s, lambda *_: stop.append(1)) for s in (signal.SIGINT, signal.SIGTERM)]
    with tqdm(total=steps, initial=step, desc=name, mininterval=2) as bar:
        while step < steps and not stop:
            start = time.monotonic()
            for factor, group in zip(trained, optimizer.param_groups, strict=True):
                group["lr"] = factor * learning_rate(step, steps, lr)
            torch.manual_seed(args.seed + step)
            with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bf16"):
                loss, parts = loss_fn(model, step)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if not torch.isfinite(norm):
                raise FloatingPointError(f"{name}: loss {loss.item()} at step {step}; the last saved state is {path}")
            optimizer.step()
            with torch.no_grad():
                decay = min(args.ema, (step + 1) / (step + 10))
                torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
            step += 1
            seconds += time.monotonic() - start
            bar.update()
            if step % 20 == 0:
                bar.set_postfix({k: f"{v:.4f}" for k, v in parts.items()})
            if step % args.validate_every == 0 or step == steps:
                with torch.inference_mode():
                    row = dict(step=step, hours=round(seconds / 3600, 3), **parts, **validate(ema))
                new = not path.with_suffix(".csv").exists()
                with open(path.with_suffix(".csv"), "a", newline="") as f:
                    writer = csv.DictWriter(f, row)
                    writer.writeheader() if new else None
                    writer.writerow(row)
                bar.write("  ".join(f"{k} {v:.4g}" for k, v in row.items()))
            if step % args.validate_every == 0 or step == steps or stop:
                save(path, dict(model=model.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict(),
                                step=step, seconds=seconds))
    for s, handler in zip((signal.SIGINT, signal.SIGTERM), handlers, strict=True):
        signal.signal(s, handler)
    if stop:
        sys.exit(f"{name}: stopped at step {step}, saved to {path}; the same command continues")
    return ema


# ---------------------------------------------------------------------------------------------------------------------
# Stage 1: the autoencoder
# ---------------------------------------------------------------------------------------------------------------------


def ridge(x, target):
    """The 3×3 convolution (weight, bias) that takes x to target with the least squared error: n,C,H,W -> n,K,H,W."""
    n = max(8, 150_000 // x[0, 0].numel())  # enough positions
    rows = F.unfold(x[:n], 3, padding=1).transpose(1, 2).flatten(0, 1)
    rows = torch.cat([rows, torch.ones(len(rows), 1)], 1)
    gram, moment = rows.T @ rows, rows.T @ target[:n].permute(0, 2, 3, 1).flatten(0, 2)
    gram += 1e-4 * gram.diagonal().mean() * torch.eye(len(gram))
    solution = torch.linalg.solve(gram.double(), moment.double()).float().T
    return solution[:, :-1].unflatten(1, (-1, 3, 3)), solution[:, -1]


@torch.no_grad()
def linear_start(model, x):
    """Make the autoencoder the best linear coder of the pictures x (n,3,H,W), stage by stage, before it trains.

    Encoder: each halving takes 2×2 patches to their principal components. Decoder: each doubling is the least-squares
    inverse. All residual blocks start at zero gain. A DC-AE that starts from noise needs some ten thousand steps to get
    where this begins.
    """
    for name, p in model.named_parameters():
        if name.endswith(("norm.weight", "norm_out.weight")) and "decoder.norm_out" not in name:
            nn.init.zeros_(p)
    encoder, decoder = model.encoder, model.decoder
    scale, codes = torch.ones(3), [x]
    for down in [encoder.conv_in] + [stage[-1] for stage in encoder.down_blocks[1:-1]]:
        out, channels = down.conv.weight.shape[:2]
        used = len(scale)
        patches = F.pixel_unshuffle(codes[-1][:, :used], 2) * scale.repeat_interleave(4)[:, None, None]
        rows = patches[: max(8, 300_000 // patches[0, 0].numel())].transpose(0, 1).flatten(1)
        mean = rows.mean(1)
        variance, basis = torch.linalg.eigh(torch.cov(rows).double())
        kept = min(out, 4 * used)
        std, basis = variance.flip(0)[:kept].clamp(min=1e-8).sqrt().float(), basis.flip(1)[:, :kept].T.float()
        new_scale = std.sqrt() * std.mean().sqrt()  # halfway to whitening, unit variance on average
        weight = torch.zeros(kept, channels, 4)
        weight[:, :used] = (basis / new_scale[:, None] * scale.repeat_interleave(4)).unflatten(1, (used, 4))
        if down.shortcut:
            weight -= torch.eye(out).repeat_interleave(4 * channels // out, 1)[:kept].unflatten(1, (channels, 4)) \
                / (4 * channels // out)
        down.conv.weight[:kept] = 0
        down.conv.weight[:kept, :, 1:, 1:] = weight.unflatten(2, (2, 2))
        down.conv.bias[:kept] = -(basis @ mean) / new_scale
        scale = new_scale
        codes.append(torch.cat([down(c) for c in codes[-1].split(32)]))
    pick = torch.eye(encoder.latent_channels, len(scale))
    pick -= torch.eye(encoder.latent_channels).repeat_interleave(len(scale) // encoder.latent_channels, 1) \
        / (len(scale) // encoder.latent_channels)
    encoder.conv_out.weight.zero_()
    encoder.conv_out.weight[:, :, 1, 1], encoder.conv_out.bias[:] = pick, 0
    z = codes[-1][:, :encoder.latent_channels]
    repeats = decoder.repeats
    decoder.conv_in.weight[:], decoder.conv_in.bias[:] = ridge(z, codes.pop() - z.repeat_interleave(repeats, 1))
    y = torch.cat([decoder.conv_in(c) + c.repeat_interleave(repeats, 1) for c in z.split(32)])
    for stage in reversed(decoder.up_blocks[1:-1]):
        up, target = stage[0], codes.pop()
        target = target[:, :min(target.shape[1], 3 * 4 ** (len(codes)))]
        if len(codes) == 1:  # a sign each for the ReLU that follows, and a constant that keeps its norm from acting
            target = torch.cat([target, -target, torch.full_like(target[:, :1], 32)], 1) / 4
        kept = target.shape[1]
        weight, bias = ridge(y, F.pixel_unshuffle(target, 2) - y.repeat_interleave(up.repeats, 1)[:, :4 * kept])
        up.conv.weight[:4 * kept], up.conv.bias[:4 * kept] = weight, bias
        y = torch.cat([up(part) for part in y.split(32)])
    decoder.norm_out.weight.fill_(y.square().mean(1).sqrt().mean())
    decoder.norm_out.bias.zero_()
    y = F.relu(decoder.norm_out(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
    decoder.conv_out.conv.weight[:], decoder.conv_out.conv.bias[:] = ridge(y, F.pixel_unshuffle(x, 2))


def train_autoencoder(photos, args):
    """The stages autoencoder and decoder; reports PSNR (RGB, dB), LPIPS (AlexNet) and, of the latter, DISTS on held-out
    crops of 256².
    """
    judges = dict(val_lpips=LPIPS.from_pretrained("alex").to(args.device))
    lpips = [judges["val_lpips"]]
    if args.stage == "decoder":
        lpips.append(LPIPS.from_pretrained("vgg").to(args.device))
        dists = DISTS.from_pretrained().to(args.device)
        judges["val_dists"] = lambda y, x: dists(y / 2 + 0.5, x / 2 + 0.5)
    val = photos.val_crops(256, 32)

    def loss_fn(model, step):
        x = photos.crops(args.batch, args.crop, np.random.default_rng((args.seed, step))).to(args.device)
        y = model.decode(model.encode(x)).float()
        l1, perceptual = F.l1_loss(y, x), sum(judge(y, x).float().mean() for judge in lpips)
        return l1 + perceptual, dict(l1=l1.item(), lpips=perceptual.item())

    def validate(model):
        results = []
        for x in val.to(args.device).split(8):
            y = model.decode(model.encode(x)).clamp(-1, 1)
            psnr = -10 * torch.log10((y - x).square().mean((1, 2, 3)) / 4)
            results.append(torch.stack([psnr, *(judge(y, x) for judge in judges.values())], 1))
        return dict(zip(["val_psnr", *judges], torch.cat(results).mean(0).tolist(), strict=True))

    model = DCAE(AUTOENCODER)
    if args.stage == "decoder":
        model.load_state_dict(load_state(Path(args.out) / "autoencoder.pt")["ema"])
        model.encoder.requires_grad_(False)
        return fit("decoder", model, loss_fn, validate, args, args.steps or 20_000, args.lr or 2e-4)
    if args.init:
        model.load_state_dict(DCAE.from_pretrained(Path(args.init) / "vae", torch.float32).state_dict())
    elif not (Path(args.out) / "autoencoder.pt").exists():
        print("autoencoder: the linear start, about a minute")
        linear_start(model, photos.crops(512, 256, np.random.default_rng(args.seed)))
    return fit("autoencoder", model, loss_fn, validate, args, args.steps or 40_000, args.lr or 8e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Stage 2: the prior, with its text encoder and tokenizer
# ---------------------------------------------------------------------------------------------------------------------


def train_tokenizer(lines, size):
    """A byte-fallback BPE in Gemma's format: the dict of a tokenizer.json with `size` tokens.

    A word is "▁" and what follows up to the next space; merges stay within words and take the most frequent pair.
    """
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    words = Counter(word for line in lines for text in (line, f" {line},")
                    for word in re.findall("▁?[^▁]+", text.lower().replace(" ", "▁")))
    words = {tuple(word): count for word, count in words.items()}
    vocab = [*special, *(f"<0x{b:02X}>" for b in range(256)), *sorted({char for word in words for char in word})]
    merges = []
    while len(vocab) < size:
        pairs = Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:], strict=False):
                pairs[pair] += count
        if not pairs:
            break
        a, b = min(pairs, key=lambda pair: (-pairs[pair], pair))
        vocab += [a + b] if a + b not in vocab else []  # another merge may have made the same piece
        merges.append([a, b])
        merged = {}
        for word, count in words.items():
            parts, i = [], 0
            while i < len(word):
                step = 2 if word[i:i + 2] == (a, b) else 1
                parts.append("".join(word[i:i + step]))
                i += step
            merged[tuple(parts)] = merged.get(tuple(parts), 0) + count
        words = merged
    vocab = {piece: i for i, piece in enumerate(vocab)}
    return dict(version="1.0", added_tokens=[dict(id=vocab[p], content=p, special=True) for p in special],
                model=dict(type="BPE", unk_token="<unk>", byte_fallback=True, vocab=vocab, merges=merges))


HUES = dict(red=0, orange=25, yellow=55, green=110, blue=220, purple=275, pink=325)  # degrees


def tags(path, image):
    """What can be said of a photo without a tagger: the words of its file name, then its colours, as RAM's tags.

    path of `inet_n01494475_hammerhead.webp`, image uint8 H,W,3 -> ["hammerhead", "blue", "dark"].
    """
    collection, _, name = path.stem.partition("_")
    kinds = dict(bsds=["photo"], urban=["building", "city"], sunhays=["scenery"])
    name = re.sub(r"^n\d+_|_?by_.*", "", name, flags=re.IGNORECASE)
    words = kinds.get(collection, [])
    if collection in ("inet", "debian") and re.search("[A-Za-z]", name):
        words = [re.sub(r"(?<=[a-z])(?=[A-Z])|_|-", " ", name).lower().strip()]
    hsv = np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BOX).convert("HSV"), np.float32)
    hue, saturation, value = hsv[..., 0] * 360 / 255, hsv[..., 1] / 255, hsv[..., 2] / 255
    distance = np.abs((hue[..., None] - np.array([*HUES.values()]) + 180) % 360 - 180)
    coloured = (saturation > 0.25) & (value > 0.2)
    shares = {h: (coloured & (distance.argmin(-1) == i)).mean() for i, h in enumerate(HUES)}
    shares["gray"] = ((saturation < 0.12) & (value > 0.2)).mean()
    shares["brown"], shares["orange"] = [shares["orange"] * f for f in ((1, 0) if value.mean() < 0.5 else (0, 1))]
    words = words + sorted((w for w in shares if shares[w] > 0.2), key=lambda w: -shares[w])
    return words + ["dark"] * bool(value.mean() < 0.35) + ["bright"] * bool(value.mean() > 0.65)


class Prior(nn.Module):
    """LinearDiT and the text encoder that learns with it."""

    def __init__(self):
        super().__init__()
        self.dit, self.text = LinearDiT(PRIOR), Gemma2(TEXT_ENCODER)
        nn.init.normal_(self.text.embed_tokens.weight, std=TEXT_ENCODER["hidden_size"] ** -0.5)  # Gemma scales it by √D
        nn.init.normal_(self.dit.time_embed.linear.weight, std=0.02)
        for zero in [self.dit.proj_out] + [block.attn2.to_out[0] for block in self.dit.transformer_blocks]:
            nn.init.zeros_(zero.weight)

    def forward(self, z, t, ids, mask):
        return self.dit(z, t, self.text(ids, mask), mask)


def train_prior(photos, args):
    """Flow matching: f(x_t, t, text) -> ε − x_0. Reports the held-out loss with right, empty and shuffled prompts."""
    out, device = Path(args.out), args.device
    vae = DCAE(AUTOENCODER)
    vae.load_state_dict(load_state(out / "autoencoder.pt")["ema"])
    vae.to(device).eval().requires_grad_(False)
    if not (out / "tokenizer" / "tokenizer.json").exists():
        (out / "tokenizer").mkdir(parents=True, exist_ok=True)
        lines = (HERE / "ram" / "tags.txt").read_text(encoding="utf-8").split("\n")
        bpe = json.dumps(train_tokenizer(lines, TEXT_ENCODER["vocab_size"]), ensure_ascii=False)
        (out / "tokenizer" / "tokenizer.json").write_text(bpe, encoding="utf-8")
    tokenizer = GemmaTokenizer(out / "tokenizer")

    def tokens(words, suffix="appendix"):
        ids = [torch.tensor(tokenize_prompt(tokenizer, build_prompt(w, suffix))[0]) for w in words]
        mask = [torch.ones_like(i) for i in ids]
        return [nn.utils.rnn.pad_sequence(x, batch_first=True).to(device) for x in (ids, mask)]

    @torch.inference_mode()
    @torch.autocast(args.device, torch.bfloat16)
    def encode(x):
        return torch.cat([vae.encode(part.to(device)).float().cpu() for part in x.split(8)])

    # many random crops are encoded once: the encoder would cost more than the prior itself
    path, size = out / "latents.pt", PRIOR["sample_size"] * vae.factor
    made_of = [photos.sha256, weights.sha256(out / "autoencoder.pt"), args.seed, args.latents]
    if not path.exists():
        chosen = np.random.default_rng(args.seed).integers(len(photos.train), size=args.latents)
        z = [encode(to_signed(np.stack([photos.crop(i, size, np.random.default_rng((args.seed, n)))])))
             for n, i in enumerate(tqdm(chosen, desc="encoding"))]
        save(path, dict(z=torch.cat(z).half(), photo=torch.from_numpy(chosen), made_of=made_of))
    data = torch.load(path, weights_only=True)
    if data.get("made_of", made_of) != made_of:
        raise UserError(f"{path} is of other photos, another autoencoder, --seed or --latents; delete it and "
                 f"{out / 'prior.pt'}")
    scale = 1 / data["z"].float().std().item()
    print(f"{len(data['z'])} latents, scaling factor {scale:.5f}")
    val_z = encode(photos.val_crops(size, 64)) * scale
    words = [tags(*photo) for photo in photos.train]
    val_words = [tags(*photo) for photo in photos.val][:64]

    def flow_loss(model, z, t, noise, ids, mask):
        sigma = (t / 1000)[:, None, None, None]
        return F.mse_loss(model((1 - sigma) * z + sigma * noise, t, ids, mask).float(), noise - z)

    def loss_fn(model, step):
        rng = np.random.default_rng((args.seed, step))
        pick = rng.integers(len(data["z"]), size=args.batch)
        z = data["z"][pick].float().to(device) * scale
        prompts = [words[i] if rng.random() > 0.1 else [] for i in data["photo"][pick].tolist()]
        t = (1000 * torch.randn(args.batch).sigmoid()).to(device)  # logit-normal, as SANA trains
        suffix = "appendix" if rng.random() < 0.5 else "none"
        loss = flow_loss(model, z, t, torch.randn_like(z), *tokens(prompts, suffix))
        return loss, dict(flow=loss.item())

    def validate(model):
        generator, z = torch.Generator().manual_seed(0), val_z.to(device)
        noise = torch.randn(val_z.shape, generator=generator).to(device)
        t = torch.linspace(50, 950, len(z), device=device)
        prompts = dict(right=val_words, empty=[[]] * len(z), shuffled=val_words[1:] + val_words[:1])
        return {f"val_{k}": flow_loss(model, z, t, noise, *tokens(v)).item() for k, v in prompts.items()}

    return fit("prior", Prior(), loss_fn, validate, args, args.steps or 30_000, args.lr or 5e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Tags, and the official layout
# ---------------------------------------------------------------------------------------------------------------------


def write_tags(args):
    """Write the `tags` of all photos of the folders as a CSV file with the columns image and tags."""
    if Path(args.to).is_dir():
        raise UserError(f"--to {args.to} is a folder; name the CSV file to write")
    rows, bad = [], 0
    for path in tqdm(photo_paths(args.data), desc="tags", leave=False):
        try:
            rows.append({"image": path.name, "tags": ", ".join(tags(path, np.asarray(read(path).rgb)))})
        except Exception:  # on broken files the decoders raise anything
            bad += 1
    write_csv(args.to, ["image", "tags"], rows)
    print(f"wrote {args.to}: {len(rows)} pictures" + (f", {bad} unreadable" if bad else ""))


def export(args):
    """runs/pretrain -> the official layout, in fp16: vae/, transformer/, text_encoder/, tokenizer/, and the adapter."""
    out, target = Path(args.out), Path(args.to)
    if args.adapter:
        open_weights(args.adapter)  # before anything is written
    old = fingerprint(target / "transformer") if (target / "transformer").is_dir() else None
    states = {name: load_state(out / f"{name}.pt") for name in ("autoencoder", "decoder", "prior")
              if name != "decoder" or (out / "decoder.pt").exists()}
    scale = 1 / torch.load(out / "latents.pt", weights_only=True)["z"].float().std().item()
    vae, model = DCAE(AUTOENCODER | dict(scaling_factor=round(scale, 5))), Prior()
    vae.load_state_dict(states.get("decoder", states["autoencoder"])["ema"])
    model.load_state_dict(states["prior"]["ema"])
    for part, name in ((vae, "vae"), (model.dit, "transformer"), (model.text, "text_encoder")):
        save_module(part, target / name, torch.float16)
    (target / "tokenizer").mkdir(exist_ok=True)
    shutil.copy(out / "tokenizer" / "tokenizer.json", target / "tokenizer")
    if old not in (None, fingerprint(target / "transformer")):
        (target / "adapter.safetensors").unlink(missing_ok=True)  # it belongs to the transformer that lay here
    if args.adapter:
        with open_weights(args.adapter) as file:
            half = {key: file.get_tensor(key).half() for key in file.keys()}
            save_tensors(half, target / "adapter.safetensors", file.metadata())
    history = {name: dict(steps=state["step"], hours=round(state["seconds"] / 3600, 2))
               for name, state in states.items()}
    (target / "provenance.json").write_text(json.dumps(history, indent=2) + "\n")
    print(f"wrote {target}: {sum(f.stat().st_size for f in target.rglob('*') if f.is_file()) / 1e6:.1f} MB")


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["autoencoder", "decoder", "prior", "export", "tags"])
    parser.add_argument("--data", nargs="+", help="folders of clean photos")
    parser.add_argument("--out", default="runs/pretrain", help="where states and logs go (default %(default)s)")
    parser.add_argument("--to", default=HERE / "embedded", help="export: the folder to write (default %(default)s); "
                        "tags: the CSV file")
    parser.add_argument("--adapter", help="export: the adapter that train.py left in runs/NAME")
    parser.add_argument("--init", metavar="FOLDER", help="autoencoder: start from this model's weights "
                        "(weights/embedded, say) where --out holds no state yet")
    parser.add_argument("--steps", type=int, help="of the stage; the learning rate decays over the last quarter")
    parser.add_argument("--batch", type=int, default=4, help="crops a step (default %(default)s)")
    parser.add_argument("--crop", type=int, default=256, help="autoencoder, decoder: pixels per side, a multiple of "
                        "32. Small crops mislead: of 4×4 latents nearly all touch the border (default %(default)s)")
    parser.add_argument("--latents", type=int, default=8000, metavar="N",
                        help="prior: crops to encode (default %(default)s)")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16", help="bf16: autocast; fp32 is faster on "
                        "processors without bfloat16 (default %(default)s)")
    parser.add_argument("--lr", type=float, help="peak learning rate (default: the stage's own)")
    parser.add_argument("--ema", type=float, default=0.999, help="decay of the averaged weights (default %(default)s)")
    parser.add_argument("--validate-every", type=int, default=500, metavar="N", help="steps (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if args.stage != "export" and not args.data:
        parser.error("--data is needed: a folder of clean photos")
    try:
        if args.stage in ("export", "tags"):
            return dict(export=export, tags=write_tags)[args.stage](args)
        photos = Photos(args.data, args.crop, mirror=args.stage == "prior")
        dict(autoencoder=train_autoencoder, decoder=train_autoencoder, prior=train_prior)[args.stage](photos, args)
    except (OSError, ValueError, FloatingPointError, Unavailable) as error:
        raise UserError(f"{one_line(error)}")


if __name__ == "__main__":
    main()
