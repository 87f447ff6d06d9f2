"""Train the small SANA-SR that the repository carries, from photos alone: autoencoder, prior, adapter, the method.

    python -m weights.pretrain autoencoder --data ./hq        # Ctrl-C saves, the same line goes on
    python -m weights.pretrain decoder --data ./hq
    python -m weights.pretrain prior --data ./hq
    python -m weights.pretrain export                         # runs/pretrain -> weights/embedded, in fp16
    python -m weights.pretrain adapter --data ./hq            # the adapter's warm start, on the exported prior
    python -m weights.pretrain tags --data ./hq --to hq.csv   # simple tags, for train.py --tags and eval.py --tagger
    python train.py --data ./hq --tags hq.csv --init runs/pretrain/adapter.safetensors --lora-targets attn+ffn --rank 16
    python -m weights.pretrain export --adapter runs/NAME/adapter.safetensors

Stages (each saves as it goes under --out, continues from what it saved, on a CPU or a GPU alike):
    autoencoder   DC-AE, 32× per side, on clean photos: a linear coder by least squares, then L1 + LPIPS (AlexNet)
    decoder       its decoder alone, by LPIPS (VGG16) besides, which sees the fine grids that AlexNet's stride of 4
                  lets pass; latents stay what they are, so this may come last as well
    prior         LinearDiT by flow matching on its latents, jointly with a small Gemma-2 that reads the photos' tags;
                  the tokenizer is a byte-fallback BPE trained on RAM's list of tags
    adapter       the LoRA by least squares in latent space, a hundred times cheaper a step than train.py
Needs a folder of photos (searched recursively). Every 16th file, chosen by the hash of its name, is held out and never
trained on; validation is on those. Tags come from the file names (`inet_n01494475_hammerhead.webp`: hammerhead) and
from the photos' main colours.
"""
import argparse
import copy
import csv
import hashlib
import json
import os
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

import degrade
from metrics import DISTS, LPIPS
from sanasr import (
    DCAE,
    Gemma2,
    GemmaTokenizer,
    LinearDiT,
    SanaSR,
    adapters_off,
    build_prompt,
    inject_lora,
    lora_modules,
    lora_parameters,
    one_step,
    open_weights,
    save_lora,
    save_module,
    save_tensors,
    tokenize_prompt,
)
from train import align_loss
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
HERE = Path(__file__).resolve().parent

# ---------------------------------------------------------------------------------------------------------------------
# Photos
# ---------------------------------------------------------------------------------------------------------------------


def held_out(path):
    """Whether a photo belongs to the validation part: decided by its file name alone, so it never changes."""
    return hashlib.sha256(path.name.encode()).digest()[0] % 16 == 0


def held_out_by_content(path):
    """Whether a photo belongs to the validation part: one in 16, by the SHA-256 of the file."""
    return hashlib.sha256(path.read_bytes()).digest()[0] % 16 == 0


def photo_paths(folders):
    """All pictures in the folders, at any depth, sorted."""
    suffixes = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
    return sorted(p for d in folders for p in Path(d).rglob("*") if p.suffix.lower() in suffixes)


class Photos:
    """All photos of the folders in memory as uint8 H,W,3, as (train, validation) by `held_out`.

    Photos smaller than the crop are left out, or with `mirror` continued by their mirror image.
    """

    def __init__(self, folders, crop, mirror=False):
        self.train, self.val, small = [], [], 0
        for path in tqdm(photo_paths(folders), desc="reading photos", unit="", leave=False):
            image = np.asarray(Image.open(path).convert("RGB"))
            lacking = [max(0, crop - side) for side in image.shape[:2]]
            if any(lacking):
                small += 1
                if not mirror or max(lacking) > min(image.shape[:2]):
                    continue
                image = np.pad(image, [(n // 2, n - n // 2) for n in lacking] + [(0, 0)], mode="symmetric")
            (self.val if held_out(path) else self.train).append((path, image))
        if not self.train or not self.val:
            sys.exit(f"error: {', '.join(map(str, folders))}: too few photos of at least {crop} pixels per side")
        print(f"{len(self.train)} photos to train on, {len(self.val)} held out, {small} smaller than {crop} "
              f"({'mirrored' if mirror else 'left out'})")

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


def save(path, state):
    """Write to a temporary name, then rename: a crash leaves the previous state."""
    torch.save(state, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def load_state(path, device="cpu"):
    """A state that `fit` saved; ends the program with one line where there is none."""
    if not Path(path).exists():
        sys.exit(f"error: {path}: not there yet; run the stage `{Path(path).stem}` first")
    return torch.load(path, map_location=device, weights_only=True)


def fit(name, model, loss_fn, validate, args, steps, lr, weight_decay=0.01):
    """Minimise `loss_fn(model, step) -> (loss, {name: value})` over `steps`; returns the model with its EMA weights.

    The state lies in OUT/name.pt and is taken up where it ended; SIGTERM and Ctrl-C save. Every --validate-every steps
    a line with `validate(ema_model) -> {name: value}` goes to the screen and to OUT/name.csv.
    """
    path = Path(args.out) / f"{name}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    model.to(args.device).train()
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr, betas=(0.9, 0.98), weight_decay=weight_decay, fused=True)
    step, seconds = 0, 0.0
    if path.exists():
        state = load_state(path, args.device)
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds = state["step"], state["seconds"]
        print(f"{name}: continuing at step {step}")

    stop = []
    handlers = [signal.signal(s, lambda *_: stop.append(1)) for s in (signal.SIGINT, signal.SIGTERM)]
    bar = tqdm(total=steps, initial=step, desc=name, mininterval=2)
    while step < steps and not stop:
        start = time.monotonic()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, lr)
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
            decay = min(0.999, (step + 1) / (step + 10))
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
    bar.close()
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
    if not path.exists():
        chosen = np.random.default_rng(args.seed).integers(len(photos.train), size=args.latents)
        z = [encode(to_signed(np.stack([photos.crop(i, size, np.random.default_rng((args.seed, n)))])))
             for n, i in enumerate(tqdm(chosen, desc="encoding"))]
        save(path, dict(z=torch.cat(z).half(), photo=torch.from_numpy(chosen)))
    data = torch.load(path, weights_only=True)
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
# Stage 3: the adapter's warm start
# ---------------------------------------------------------------------------------------------------------------------


class Views:
    """Pairs of OUT/pairs/PART as the last two stages see them: crops of VIEW pixels with their latents, encoded once.

    Each pair gives `count` views, each at a random place of the 32-pixel grid, mirrored or turned: (name, left, top,
    turn) in `where`; z_L and z_T, VIEW/32 per side and scaled, in `z` (n,2,C,h,w in fp16). The target x_T is the
    teacher's picture of the LR picture; with `teacher` False it is x_H. Latents are kept in OUT/views_PART.pt: views of
    pairs that came since are added, `reload` takes them up.
    """

    VIEW = 288

    def __init__(self, args, part, model, count):
        self.args, self.part, self.model, self.count = args, part, model, count
        self.folder = Path(args.out) / "pairs" / part
        self.target = "hr" if args.no_teacher else "teacher"
        self.reload()

    def reload(self):
        path = Path(self.args.out) / f"views_{self.part}_{self.target}.pt"
        state = torch.load(path, weights_only=True) if path.exists() else dict(where=[], z=[])
        known = {row[0] for row in state["where"]}
        names = sorted(p.name for p in (self.folder / self.target).glob("[0-9]*.png") if p.name not in known)
        for name in tqdm(names, desc=f"encoding {self.part} views", leave=False):
            rng = np.random.default_rng((self.args.seed, self.part == "val", int(name.split("_")[0])))
            for _ in range(self.count):
                view = name, *(4 * rng.integers((PAIR - self.VIEW) // 4 + 1, size=2)).tolist(), int(rng.integers(8))
                state["where"].append(view)
                state["z"].append(self.encode(torch.stack([self.picture("lr", view), self.picture(self.target, view)])))
        if names:
            save(path, state)
        if not state["where"]:
            sys.exit(f"error: {self.folder / self.target}: no pictures; run the stage `pairs`, then a restorer over "
                     f"{self.folder / 'lr'} (or --no-teacher)")
        self.where, self.z = state["where"], torch.stack(state["z"])

    @torch.inference_mode()
    def encode(self, x):
        return (self.model.vae.encode(x.to(self.args.device)).float() * self.model.scaling_factor).half().cpu()

    def picture(self, kind, view):
        """x_L (`lr`, enlarged), x_H (`hr`) or x_T (`teacher`) of a view: 3,VIEW,VIEW in [-1, 1]."""
        name, left, top, turn = view
        image = Image.open(self.folder / kind / name)
        x = degrade.enlarge(image) if kind == "lr" else degrade.to_tensor(image) * 2 - 1
        x = x[:, top:top + self.VIEW, left:left + self.VIEW]
        x = x.rot90(turn % 4, (1, 2))
        return x.flip(2) if turn >= 4 else x

    def pictures(self, kind, indices):
        return torch.stack([self.picture(kind, self.where[i]) for i in indices]).to(self.args.device)

    def latents(self, indices):
        """(z_L, z_T) of these views, each n,C,h,w in float32."""
        return self.z[indices].float().to(self.args.device).unbind(1)

    def prompts(self):
        """A line of colours for each view: what can be said of it without a tagger."""
        lines = {}
        for name, *_ in self.where:
            if name not in lines:
                image = np.asarray(Image.open(self.folder / "lr" / name))
                lines[name] = build_prompt(tags(Path(name), image), "appendix")
        return [lines[name] for name, *_ in self.where]


def merged_weights(dit):
    """{key: W + (α/r) B A} of the adapted projections: at these sizes cheaper to train through than two products."""
    return {f"{name}.weight": module.weight
            + (module.adapter_scale * module.lora_B.weight @ module.lora_A.weight).view_as(module.weight)
            for name, module in lora_modules(dit).items()}


def update(dit, z, tau, c, m):
    """One step (Eq. 4) of the adapted transformer, with its adapters merged for the occasion."""
    weights_now = merged_weights(dit)
    with adapters_off(dit):
        return one_step(lambda *args: torch.func.functional_call(dit, weights_now, args), z,
                        torch.full((len(z),), tau, device=z.device), c, m)


@torch.no_grad()
def open_adapted(args, adapter):
    """The exported model in float32 with an adapter of --rank kept apart: new, or that of a file of the same or a lower
    rank, whose matrices become the first rows of A and the first columns of B (α = r in both)."""
    model = SanaSR.from_pretrained(args.to, args.device, torch.float32, adapter=False)
    torch.manual_seed(args.seed)
    inject_lora(model.dit, args.rank, targets="attn+ffn")
    if adapter:
        with open_weights(adapter) as file:
            for key, p in lora_parameters(model.dit).items():
                x = file.get_tensor(key)
                p[:x.shape[0], :x.shape[1]] = x
    return model


TAU = 900.0  # of the carried adapter


def train_adapter(args):
    """The update of Eq. 4 in latent space: ẑ is to equal z_T, the latents of what a teacher makes of x_L.

    A mean over all the details that x_H may have is blur; z_T is a function of x_L. The loss is the L1 distance, per
    channel in units of the mean |z_T − z_L|, and a tenth of Eq. 5 with the identity as prior, which keeps each
    channel's deviation. Reports ‖ẑ − z_T‖² / ‖z_L − z_T‖² on held-out pairs. Writes OUT/adapter.safetensors.
    """
    out, device = Path(args.out), args.device
    model = open_adapted(args, args.init)
    train, val = Views(args, "train", model, 4), Views(args, "val", model, 1)
    z_l, z_t = (z.float() for z in train.z.unbind(1))
    unit = (z_t - z_l).abs().mean((0, 2, 3))[:, None, None].to(device)
    lines, conditions, pad = [], {}, nn.utils.rnn.pad_sequence

    def look_for_pairs():
        train.reload()
        lines[:] = train.prompts()
        for line in {*lines, build_prompt([], "appendix")} - set(conditions):
            conditions[line] = tuple(x[0].clone() for x in model.encode_prompt(line))

    def text(chosen):
        return [pad(x, batch_first=True) for x in zip(*(conditions[line] for line in chosen), strict=True)]

    def loss_fn(dit, step):
        if not lines or step % 200 == 0:
            look_for_pairs()
        rng = np.random.default_rng((args.seed, step))
        pick = rng.integers(len(train.z), size=args.batch)
        z_l, z_t = train.latents(pick)
        z = update(dit, z_l, TAU, *text([lines[i] if rng.random() < 0.5 else build_prompt([], "appendix")
                                        for i in pick]))
        l1, align = ((z - z_t).abs() / unit).mean(), align_loss(z, z_t, eps=1e-3)
        return l1 + 0.1 * align, dict(l1=l1.item(), align=align.item())

    def validate(dit):
        z_l, z_t = val.latents(range(len(val.z)))
        c, m = (x.expand(len(z_l), *x.shape[1:]) for x in text([build_prompt([], "appendix")]))
        z = update(dit, z_l, TAU, c, m)
        ratio = (z - z_t).square().mean((1, 2, 3)) / (z_l - z_t).square().mean((1, 2, 3))
        deviation = (z.std((0, 2, 3)) / z_t.std((0, 2, 3))).quantile(torch.tensor([0.1, 0.5]))
        mild = torch.tensor(["mild" in name for name, *_ in val.where])
        return dict(val_strong=ratio[~mild].mean().item(), val_mild=ratio[mild].mean().item(),
                    deviation_10=deviation[0].item(), deviation_50=deviation[1].item())

    dit = fit("adapter", model.dit, loss_fn, validate, args, args.steps or 30_000, args.lr or 1e-3, weight_decay=0.0)
    save_lora(dit, out / "adapter.safetensors", dict(timestep=str(TAU), suffix="appendix"))
    print(f"wrote {out / 'adapter.safetensors'}: the stage `finish`, and train.py --init, take it up")


# ---------------------------------------------------------------------------------------------------------------------
# Stage 4: the decoder's finish
# ---------------------------------------------------------------------------------------------------------------------


class Restorer(nn.Module):
    """What the stage `finish` trains: the decoder, and the transformer's adapter with it."""

    def __init__(self, model):
        super().__init__()
        self.dit, self.decoder = model.dit, model.vae.decoder


def train_finish(args):
    """The decoder, and with it the adapter, on what the update makes of degraded photos, by pictures.

    Against the teacher's picture: L1, LPIPS (AlexNet, shifted by 0 to 7 pixels at each step, so that no grid hides from
    its stride of 4), with --dists the texture of one patch, and the latent L1 of the stage before. Half of every second
    batch is clean, D(z_H) against x_H, so that the autoencoder stays one. With --no-update the decoder alone learns,
    from z_L: the control. Reports LPIPS and PSNR
    against x_H on held-out pairs, and of D(E(x_H)). Writes OUT/NAME.pt and OUT/adapter_finished.safetensors.
    """
    out, device = Path(args.out), args.device
    model = open_adapted(args, out / "adapter.safetensors")
    train, val = Views(args, "train", model, 4), Views(args, "val", model, 1)
    net, lpips = Restorer(model), LPIPS.from_pretrained("alex").to(device)
    net.decoder.requires_grad_(True)
    dists = DISTS.from_pretrained().to(device) if args.dists else None
    c, m = (x.clone() for x in model.encode_prompt(build_prompt([], "appendix")))
    z_l, z_t = (z.float() for z in train.z.unbind(1))
    unit = (z_t - z_l).abs().mean((0, 2, 3))[:, None, None].to(device)
    name = "control" if args.no_update else "finish"

    def restored(net, z_l):
        if args.no_update:
            return z_l
        return update(net.dit, z_l, TAU, c.expand(len(z_l), -1, -1), m.expand(len(z_l), -1))

    def decode(net, z):
        return net.decoder((z / model.scaling_factor).contiguous(memory_format=torch.channels_last)).float()

    def loss_fn(net, step):
        if step % 500 == 0:
            train.reload()
        rng = np.random.default_rng((args.seed, step))
        pick = rng.integers(len(train.z), size=args.batch).tolist()
        clean = args.batch // 2 if step % 2 else 0
        x = torch.cat([train.pictures("hr", pick[:clean]), train.pictures(train.target, pick[clean:])]
                      if clean else [train.pictures(train.target, pick)])
        with torch.no_grad():
            z_h = [model.vae.encode(x[:clean]).float() * model.scaling_factor] if clean else []
        z_l, z_t = train.latents(pick[clean:])
        z = restored(net, z_l)
        y = decode(net, torch.cat([*z_h, z]))
        dy, dx = rng.integers(8, size=2)
        l1, perceptual = F.l1_loss(y, x), lpips(y[:, :, dy:, dx:], x[:, :, dy:, dx:]).mean()
        latent = ((z - z_t).abs() / unit).mean()
        loss = l1 + perceptual + (0 if args.no_update else 0.1 * latent)
        parts = dict(l1=l1.item(), lpips=perceptual.item(), latent=latent.item())
        if dists:
            top, left = rng.integers(Views.VIEW - 128 + 1, size=2)
            patches = (t[-1:, :, top:top + 128, left:left + 128] / 2 + 0.5 for t in (y, x))
            texture = dists(*patches).mean()
            loss, parts["dists"] = loss + args.dists * texture, texture.item()
        return loss, parts

    def validate(net):
        scores = {}
        for i in range(0, 48):
            x_h, (z_l, _) = val.pictures("hr", [i]), val.latents([i])
            kind = "mild" if "mild" in val.where[i][0] else "strong"
            y = decode(net, restored(net, z_l)).clamp(-1, 1)
            scores.setdefault(f"lpips_{kind}", []).append(lpips(y, x_h).item())
            scores.setdefault(f"psnr_{kind}", []).append(-10 * (y - x_h).square().mean().div(4).log10().item())
            if i % 4 == 0:
                z_h = model.vae.encode(x_h).float() * model.scaling_factor
                scores.setdefault("lpips_clean", []).append(lpips(decode(net, z_h).clamp(-1, 1), x_h).item())
        return {k: sum(v) / len(v) for k, v in scores.items()}

    net = fit(name, net, loss_fn, validate, args, args.steps or 20_000, args.lr or 2e-4)
    save_lora(net.dit, out / f"adapter_{name}.safetensors", dict(timestep=str(TAU), suffix="appendix"))


# ---------------------------------------------------------------------------------------------------------------------
# Pairs for the last stages, and the pictures that a teacher makes of them
# ---------------------------------------------------------------------------------------------------------------------

PAIR = 320  # pixels of x_H: a random crop of 256 then begins at any phase of the 32-pixel grid


def write_pairs(args):
    """OUT/pairs/{train,val}/{lr,hr}/NNNNN_{strong,mild}.png: crops of PAIR pixels and what `degrade` makes of them.

    Photos are drawn in proportion to their area, every fourth one at half size where it is large enough. Every other
    pair is mild. Pair n depends on --seed and n alone, and files that exist are kept, so a longer run adds to a shorter
    one. Any restorer may then fill OUT/pairs/{train,val}/teacher with pictures of the same names and of x_H's size.
    """
    out = Path(args.out) / "pairs"
    kept = [path for path in photo_paths(args.data) if min(Image.open(path).size) >= PAIR]
    parts = dict(train=([p for p in kept if not held_out_by_content(p)], args.latents),
                 val=([p for p in kept if held_out_by_content(p)], 128))
    for part, (paths, count) in parts.items():
        areas = np.array([np.prod(Image.open(p).size) for p in paths], float)
        for kind in ("lr", "hr"):
            (out / part / kind).mkdir(parents=True, exist_ok=True)
        for n in tqdm(range(count), desc=f"{part} pairs"):
            name = f"{n:05d}_{('strong', 'mild')[n % 2]}.png"
            if (out / part / "lr" / name).exists():
                continue
            rng = np.random.default_rng((args.seed, part == "val", n))
            image = Image.open(paths[rng.choice(len(paths), p=areas / areas.sum())]).convert("RGB")
            if rng.random() < 0.25 and min(image.size) >= 2 * PAIR:
                image = image.reduce(2)
            left, top = (int(rng.integers(side - PAIR + 1)) for side in image.size)
            hr = image.crop((left, top, left + PAIR, top + PAIR))
            lr = degrade.to_image(degrade.degrade(degrade.to_tensor(hr), rng, mild=n % 2))
            for kind, picture in (("hr", hr), ("lr", lr)):  # lr last: its name says that the pair is whole
                temporary = out / part / kind / f".{name}.tmp"
                picture.save(temporary, "PNG", compress_level=1)
                os.replace(temporary, out / part / kind / name)


def write_tags(args):
    """Write the `tags` of all photos of the folders as a CSV file with the columns image and tags."""
    rows = [(path.name, ", ".join(tags(path, np.asarray(Image.open(path).convert("RGB")))))
            for path in tqdm(photo_paths(args.data), desc="tags", leave=False)]
    with open(f"{args.to}.tmp", "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([("image", "tags"), *rows])
    os.replace(f"{args.to}.tmp", args.to)
    print(f"wrote {args.to}: {len(rows)} pictures")


def export(args):
    """runs/pretrain -> the official layout, in fp16: vae/, transformer/, text_encoder/, tokenizer/, and the adapter."""
    out, target = Path(args.out), Path(args.to)
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
    if args.adapter:
        with open_weights(args.adapter) as file:
            half = {key: file.get_tensor(key).half() for key in file.keys()}
            save_tensors(half, target / "adapter.safetensors", file.metadata())
    history = {name: dict(steps=state["step"], hours=round(state["seconds"] / 3600, 2))
               for name, state in states.items()}
    if args.adapter and (out / "adapter.pt").exists():
        state = load_state(out / "adapter.pt")
        history["adapter's warm start"] = dict(steps=state["step"], hours=round(state["seconds"] / 3600, 2))
    (target / "provenance.json").write_text(json.dumps(history, indent=2) + "\n")
    print(f"wrote {target}: {sum(f.stat().st_size for f in target.rglob('*') if f.is_file()) / 1e6:.1f} MB")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["autoencoder", "decoder", "prior", "pairs", "adapter", "finish", "export",
                                          "tags"])
    parser.add_argument("--data", nargs="+", help="folders of clean photos")
    parser.add_argument("--out", default="runs/pretrain", help="where states and logs go (default %(default)s)")
    parser.add_argument("--to", default=HERE / "embedded", help="export: the folder to write (default %(default)s); "
                        "tags: the CSV file")
    parser.add_argument("--adapter", help="export: the adapter that train.py left in runs/NAME")
    parser.add_argument("--init", metavar="FOLDER", help="autoencoder: start from this model's weights "
                        "(weights/embedded, say) where --out holds no state yet; adapter: from this adapter file")
    parser.add_argument("--steps", type=int, help="of the stage; the learning rate decays over the last quarter")
    parser.add_argument("--batch", type=int, default=4, help="crops a step (default %(default)s)")
    parser.add_argument("--crop", type=int, default=256, help="autoencoder, decoder: pixels per side, a multiple of "
                        "32. Small crops mislead: of 4×4 latents nearly all touch the border (default %(default)s)")
    parser.add_argument("--latents", type=int, default=8000, metavar="N",
                        help="prior, adapter: crops to encode (default %(default)s)")
    parser.add_argument("--no-teacher", action="store_true", help="adapter, finish: the targets are the clean photos")
    parser.add_argument("--dists", type=float, default=0.0, metavar="WEIGHT", help="finish: adds DISTS of one patch of "
                        "128² a step, which needs VGG16 (default %(default)s)")
    parser.add_argument("--no-update", action="store_true", help="finish: the decoder alone, on z_L: the control")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16", help="bf16: autocast; fp32 is faster on "
                        "CPUs without bfloat16 instructions (default %(default)s)")
    parser.add_argument("--rank", type=int, default=16, help="adapter: as train.py's (default %(default)s)")
    parser.add_argument("--lr", type=float, help="peak learning rate (default: the stage's own)")
    parser.add_argument("--validate-every", type=int, default=500, metavar="N", help="steps (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.stage == "export":
        return export(args)
    if not args.data and args.stage not in ("adapter", "finish"):
        parser.error("--data is needed: a folder of clean photos")
    if args.stage == "tags":
        return write_tags(args)
    if args.stage in ("pairs", "adapter", "finish"):
        return dict(pairs=write_pairs, adapter=train_adapter, finish=train_finish)[args.stage](args)
    photos = Photos(args.data, args.crop, mirror=args.stage == "prior")
    try:
        dict(autoencoder=train_autoencoder, decoder=train_autoencoder, prior=train_prior)[args.stage](photos, args)
    except Unavailable as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
