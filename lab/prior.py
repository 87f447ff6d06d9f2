"""Trains a small prior on an autoencoder's latents, from photos alone: the bundled model's LinearDiT and Gemma-2.

    python -m lab.prior train --data ./hq --vae weights/embedded --out runs/prior       # rerun to resume
    python -m lab.prior export --out runs/prior --to runs/model    # a model's folder, for train.py --model
    python -m lab.prior tags --data ./hq --to hq.csv               # simple tags, for train.py --tags, eval.py --tagger

    z_t = (1 − σ)·z + σ·ε,  σ = t / 1000,  t logit-normal         L = ‖ f(z_t, t, text) − (ε − z) ‖²

The text encoder learns with the transformer. Its tokenizer is a byte-fallback BPE trained on RAM's list of tags. The
photos' tags come from their file names (`inet_n01494475_hammerhead.webp`: hammerhead) and their main colours. Random
crops of 256 pixels are encoded once. Photos of 128 pixels or more are continued by their mirror image. Validated are
held-out photos (one in 16, see `photos.pairs.held_out`) with right, empty and shuffled prompts. The first bundled prior
took --batch 32 --lr 1e-3 --steps 1000 --latents 5000 and 14 minutes on two CPU cores.
"""
import itertools
import json
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

import runs
import weights
from objective import noised
from photos.degrade import to_tensor
from photos.pairs import digest, photo_paths, scan, split
from photos.pictures import read, write_bytes
from runs import DTYPES, UserError
from sanasr import DCAE, Gemma2, GemmaTokenizer, LinearDiT, build_prompt, tokenize_prompt
from trainer import Trainer, open_state
from weights.files import fingerprint, save_module

PRIOR = dict(
    in_channels=128, out_channels=128, num_layers=12, num_attention_heads=5, attention_head_dim=32,
    num_cross_attention_heads=5, cross_attention_head_dim=32, cross_attention_dim=160, caption_channels=128,
    mlp_ratio=2.5, sample_size=8,
)
TEXT_ENCODER = dict(
    vocab_size=2048, hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, query_pre_attn_scalar=32,
)
WARMUP, DECAY = 200, 0.25  # the rate rises over so many steps and falls over this share of the steps at the end
VALIDATED = 64  # held-out photos

# --- Tokenizer and tags ---


def train_tokenizer(lines, size):
    """A byte-fallback BPE in Gemma's format: the dict of a tokenizer.json with `size` tokens.

    A word is "▁" and what follows up to the next space; merges stay within words and take the most frequent pair.
    """
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    words = Counter(word for line in lines for text in (line, f" {line},")
                    for word in re.findall("▁?[^▁]+", text.lower().replace(" ", "▁")))
    vocab = [*special, *(f"<0x{b:02X}>" for b in range(256)), *sorted({char for word in words for char in word})]
    words = {" ".join(word): count for word, count in words.items()}  # pieces are split by spaces
    merges = []
    while len(vocab) < size:
        pairs = Counter()
        for word, count in words.items():
            for pair in itertools.pairwise(word.split(" ")):
                pairs[pair] += count
        if not pairs:
            break
        a, b = min(pairs, key=lambda pair: (-pairs[pair], pair))
        vocab += [a + b] if a + b not in vocab else []  # another merge may have made the same piece
        merges.append([a, b])
        pair = re.compile(rf"(?<!\S){re.escape(f'{a} {b}')}(?!\S)")
        words = {pair.sub(lambda _, merged=a + b: merged, word): count for word, count in words.items()}
    vocab = {piece: i for i, piece in enumerate(vocab)}
    return dict(version="1.0", added_tokens=[dict(id=vocab[p], content=p, special=True) for p in special],
                model=dict(type="BPE", unk_token="<unk>", byte_fallback=True, vocab=vocab, merges=merges))


HUES = dict(red=0, orange=25, yellow=55, green=110, blue=220, purple=275, pink=325)  # degrees


def tags(path, image):
    """What can be said of a photo without a tagger: the words of its file name, then its colours, as RAM's tags.

    path of `inet_n01494475_hammerhead.webp`, its RGB picture -> ["hammerhead", "blue", "dark"].
    """
    collection, _, name = Path(path).stem.partition("_")
    kinds = dict(bsds=["photo"], urban=["building", "city"], sunhays=["scenery"])
    name = re.sub(r"^n\d+_|_?by_.*", "", name, flags=re.IGNORECASE)
    words = kinds.get(collection, [])
    if collection in ("inet", "debian") and re.search("[A-Za-z]", name):
        words = [re.sub(r"(?<=[a-z])(?=[A-Z])|_|-", " ", name).lower().strip()]
    hsv = np.asarray(image.resize((32, 32), Image.Resampling.BOX).convert("HSV"), np.float32)
    hue, saturation, value = hsv[..., 0] * 360 / 255, hsv[..., 1] / 255, hsv[..., 2] / 255
    distance = np.abs((hue[..., None] - np.array([*HUES.values()]) + 180) % 360 - 180)
    coloured = (saturation > 0.25) & (value > 0.2)
    shares = {h: (coloured & (distance.argmin(-1) == i)).mean() for i, h in enumerate(HUES)}
    shares["gray"] = ((saturation < 0.12) & (value > 0.2)).mean()
    shares["brown"], shares["orange"] = [shares["orange"] * f for f in ((1, 0) if value.mean() < 0.5 else (0, 1))]
    words = words + sorted((w for w in shares if shares[w] > 0.2), key=lambda w: -shares[w])
    return words + ["dark"] * bool(value.mean() < 0.35) + ["bright"] * bool(value.mean() > 0.65)


def write_tags(args):
    """Write the `tags` of all photos of the folders as a CSV file with the columns image and tags."""
    if Path(args.to).is_dir():
        raise UserError(f"--to {args.to} is a folder; name the CSV file to write")
    rows, bad = [], 0
    for path in tqdm(photo_paths(args.data), "tags", leave=False):
        try:
            rows.append({"image": path.name, "tags": ", ".join(tags(path, read(path).rgb))})
        except Exception:  # on broken files the decoders raise anything
            bad += 1
    runs.write_csv(args.to, ["image", "tags"], rows)
    print(f"wrote {args.to}: {len(rows)} pictures" + (f", {bad} unreadable" if bad else ""))


# --- The network and its latents ---


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


def flow_loss(model, z, t, noise, ids, mask):
    """Mean of ‖f(z_t, t, text) − (ε − z)‖². z, noise: B,C,h,w; t: B in [0, 1000]; ids, mask: B,T."""
    return nn.functional.mse_loss(model(noised(z, t, noise), t, ids, mask).float(), noise - z)


def mirrored(x, side):
    """x: 3,H,W, continued by its mirror image to `side` at least."""
    lacking = [max(0, side - n) for n in x.shape[1:]]
    return torch.from_numpy(np.pad(x.numpy(), [(0, 0), *((n // 2, n - n // 2) for n in lacking)], "symmetric"))


def crop(x, side, rng=None):
    """A square of x, 3,H,W: by rng anywhere, flipped or not; without it the central one. In [-1, 1]."""
    top, left = (int(rng.integers(n - side + 1)) if rng else (n - side) // 2 for n in x.shape[1:])
    x = x[:, top:top + side, left:left + side] * 2 - 1
    return x.flip(-1) if rng and rng.random() < 0.5 else x


def make_latents(args, vae, photos, held, side):
    """{"z", "photo": latents of --latents random crops and the photo of each; "val_z": of the held-out photos' central
    crops; "words", "val_words": all photos' tags}."""
    dtype = DTYPES[args.dtype]

    @torch.inference_mode()
    def encode(pictures):
        with torch.autocast(args.device.type, dtype, dtype != torch.float32):
            return torch.cat([vae.encode(x[None].to(args.device)).float().cpu() for x in pictures])

    chosen = np.random.default_rng(args.seed).integers(len(photos), size=args.latents)
    z, words, val_z, val_words = {}, [], [], []
    for i, photo in enumerate(tqdm(photos, "encoding", unit="photo")):
        image = read(photo.path).rgb
        words.append(tags(photo.path, image))
        x, wanted = mirrored(to_tensor(image), side), np.flatnonzero(chosen == i).tolist()
        if wanted:
            z |= zip(wanted, encode(crop(x, side, np.random.default_rng((args.seed, n))) for n in wanted), strict=True)
    for photo in held:
        image = read(photo.path).rgb
        val_words.append(tags(photo.path, image))
        val_z.append(encode([crop(mirrored(to_tensor(image), side), side)]))
    return {"z": torch.stack([z[n] for n in range(args.latents)]).half(), "photo": torch.from_numpy(chosen),
            "words": words, "val_z": torch.cat(val_z), "val_words": val_words}


# --- Training ---


def train(args):
    """Train the prior in --out. Returns the exit code."""
    device, dtype = args.device, DTYPES[args.dtype]
    runs.set_flags(repeatable=True, tf32=True)
    folder = weights.folder(args.vae) / "vae"
    vae = DCAE.from_pretrained(folder, torch.float32, device)
    side = PRIOR["sample_size"] * vae.factor
    photos, report = scan(args.data, side // 2, args.out / "data.json", args.workers)
    photos, held = split(photos)
    if not held:
        raise UserError("--data: at least two photos are needed, one of them to be held out")
    print(f"{report}; {len(held)} held out", flush=True)
    settings = {"the photos": digest(photos + held), "the autoencoder": fingerprint(folder), "latents": args.latents,
                "seed": args.seed, "batch": args.batch, "lr": args.lr, "dtype": args.dtype}
    path = args.out / "latents.pt"
    made_of = [settings[key] for key in ("the photos", "the autoencoder", "latents", "seed", "dtype")]
    data = runs.load_state(path, damaged="delete it") if path.exists() else {}
    if data.get("made_of") != made_of:
        data = make_latents(args, vae, photos, held[:VALIDATED], side) | {"made_of": made_of}
        runs.save_state(path, data)
    scale = 1 / data["z"].float().std().item()
    if not (args.out / "tokenizer" / "tokenizer.json").exists():
        lines = (weights.HERE / "ram" / "tags.txt").read_text(encoding="utf-8").split("\n")
        bpe = train_tokenizer(lines, TEXT_ENCODER["vocab_size"])
        write_bytes(args.out / "tokenizer" / "tokenizer.json", json.dumps(bpe, ensure_ascii=False))
    tokenizer = GemmaTokenizer(args.out / "tokenizer")

    def tokens(words, suffix="appendix"):
        ids = [torch.tensor(tokenize_prompt(tokenizer, build_prompt(w, suffix))[0]) for w in words]
        mask = [torch.ones_like(i) for i in ids]
        return [nn.utils.rnn.pad_sequence(x, batch_first=True).to(device) for x in (ids, mask)]

    def batches(first, signals):
        for step in range(first, args.steps):
            rng, generator = np.random.default_rng((args.seed, step)), torch.Generator().manual_seed(args.seed + step)
            pick = rng.integers(len(data["z"]), size=args.batch)
            prompts = [data["words"][i] if rng.random() > 0.1 else [] for i in data["photo"][pick].tolist()]
            suffix = "appendix" if rng.random() < 0.5 else "none"
            z = data["z"][pick].float() * scale
            t = 1000 * torch.randn(args.batch, generator=generator).sigmoid()  # logit-normal, as SANA trains
            noise = torch.randn(z.shape, generator=generator)
            yield {"z": z, "t": t, "noise": noise, "prompt": [build_prompt(w, suffix) for w in prompts],
                   "tokens": tokens(prompts, suffix)}

    def loss(batch):
        with torch.autocast(device.type, dtype, dtype != torch.float32):
            return {"loss": flow_loss(model, *(batch[key].to(device) for key in ("z", "t", "noise")), *batch["tokens"])}

    def look():
        z, words = data["val_z"].to(device) * scale, data["val_words"]
        noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0)).to(device)
        t = torch.linspace(50, 950, len(z), device=device)
        prompts = {"right": words, "empty": [[]] * len(z), "shuffled": words[1:] + words[:1]}
        return {f"val_{k}": flow_loss(model, z, t, noise, *tokens(v)).item() for k, v in prompts.items()}, None

    torch.manual_seed(args.seed)
    model = Prior().to(device)
    options = {"vae": str(folder.resolve()), "scale": scale}
    return Trainer(args.out, dict(model.named_parameters()), loss, settings, options=options, steps=args.steps,
                   every=args.every, lr=args.lr, warmup=WARMUP, decay=DECAY, betas=(0.9, 0.98), device=device,
                   samples=args.batch, fp16=args.dtype == "fp16", watched=("val_right", "val_empty", "val_shuffled"),
                   validate=look, label="prior").run(batches)


def export(args):
    """The training in --out -> --to, the official layout in fp16: vae/, transformer/, text_encoder/, tokenizer/.

    An adapter of another transformer is removed. train.py takes the bundled model's losses for it.
    """
    state, target = open_state(args.out), Path(args.to)
    old = fingerprint(target / "transformer") if (target / "transformer").is_dir() else None
    vae, model = DCAE.from_pretrained(state["options"]["vae"], torch.float32), Prior()
    vae.config = vae.config | {"scaling_factor": round(state["options"]["scale"], 5)}
    for p, value in zip(model.parameters(), state["ema"], strict=True):
        p.data = value
    for part, name in ((vae, "vae"), (model.dit, "transformer"), (model.text, "text_encoder")):
        save_module(part, target / name, torch.float16)
    if args.transformer:
        shutil.copytree(args.transformer, target / "transformer", dirs_exist_ok=True)
    (target / "tokenizer").mkdir(exist_ok=True)
    shutil.copy(args.out / "tokenizer" / "tokenizer.json", target / "tokenizer")
    if old not in (None, fingerprint(target / "transformer")):
        (target / "adapter.safetensors").unlink(missing_ok=True)
    losses = json.loads((weights.folder("embedded") / "provenance.json").read_text())["training"]
    about = {"training": losses, "prior": {"steps": state["step"]} | state["settings"]}
    write_bytes(target / "provenance.json", json.dumps(about, indent=2) + "\n")
    print(f"wrote {target}: {sum(f.stat().st_size for f in target.rglob('*') if f.is_file()) / 1e6:.1f} MB")


@runs.command
def main(argv=None):
    parser = runs.parser(__doc__)
    add = parser.add_argument
    add("command", choices=["train", "export", "tags"])
    add("--data", nargs="+", metavar="DIR", help="folders of clean photos, searched recursively")
    add("--vae", default="embedded", metavar="NAME|FOLDER", help="the model whose autoencoder makes the latents")
    add("--out", type=Path, default=Path("runs/prior"), metavar="DIR", help="the run")
    add("--to", metavar="PATH", help="export: the folder to write; tags: the CSV file")
    add("--transformer", metavar="DIR", help="export: this transformer in the place of the run's")
    add("--latents", type=int, default=8000, metavar="N", help="crops to encode")
    add("--steps", type=int, default=30_000, help="the learning rate falls over the last quarter")
    add("--every", type=int, default=500, metavar="N", help="validate and save every N steps")
    add("--batch", type=int, default=4, help="latents a step")
    add("--lr", type=float, default=5e-4, help="peak learning rate")
    runs.add_device_options(add, workers=4)
    args = parser.parse_args(argv)
    if args.command != "export" and not args.data:
        parser.error("--data is needed: a folder of clean photos")
    if args.command != "train" and not args.to:
        parser.error("--to names what to write")
    runs.check_ranges(args)
    if args.command != "train":
        return {"export": export, "tags": write_tags}[args.command](args)
    runs.resolve_device(args, fp16=True)
    with runs.claimed(args.out):
        return train(args)


if __name__ == "__main__":
    sys.exit(main())
