"""Train the small SANA-SR that the repository carries, from photos alone: autoencoder, then prior, then the method.

    python -m weights.pretrain --data ./hq                    # every stage in turn; Ctrl-C saves, the same line goes on
    python -m weights.pretrain --data ./hq --stage autoencoder --steps 20000
    python -m weights.pretrain --stage export                 # runs/pretrain -> weights/embedded, fp16

Stages (each saves as it goes under --out, continues from what it saved, on a CPU or a GPU alike):
    autoencoder   DC-AE, 32× per side, clean photos: L1 + LPIPS (AlexNet)
Needs a folder of photos (searched recursively). Every 16th file, chosen by the hash of its name, is held out and never
trained on; validation is on those.
"""
import argparse
import copy
import csv
import hashlib
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from metrics import LPIPS
from sanasr import DCAE

VIT, RES = "EfficientViTBlock", "ResBlock"
WIDTHS = [16, 32, 64, 128, 256, 256]  # the first is unused: depth 0 makes conv_in a down-sampling block
AUTOENCODER = dict(
    in_channels=3, latent_channels=128, attention_head_dim=32,
    encoder_block_types=[RES, RES, RES, RES, RES, VIT], decoder_block_types=[RES, RES, RES, RES, RES, VIT],
    encoder_block_out_channels=WIDTHS, decoder_block_out_channels=WIDTHS,
    encoder_layers_per_block=[0, 1, 1, 2, 2, 2], decoder_layers_per_block=[0, 1, 2, 2, 2, 2],
    encoder_qkv_multiscales=[[], [], [], [], [], [5]], decoder_qkv_multiscales=[[], [], [], [], [], [5]],
    downsample_block_type="Conv", upsample_block_type="pixel_shuffle",
)

# ---------------------------------------------------------------------------------------------------------------------
# Photos
# ---------------------------------------------------------------------------------------------------------------------


def held_out(path):
    """Whether a photo belongs to the validation part: decided by its file name alone, so it never changes."""
    return hashlib.sha256(path.name.encode()).digest()[0] % 16 == 0


class Photos:
    """All photos of the folders in memory as uint8 H,W,3, as (train, validation) by `held_out`."""

    def __init__(self, folders, crop):
        suffixes = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
        paths = sorted(p for d in folders for p in Path(d).rglob("*") if p.suffix.lower() in suffixes)
        self.train, self.val, small = [], [], 0
        for path in tqdm(paths, desc="reading photos", unit="", leave=False):
            image = np.asarray(Image.open(path).convert("RGB"))
            if min(image.shape[:2]) < crop:
                small += 1
                continue
            (self.val if held_out(path) else self.train).append((path, image))
        if not self.train or not self.val:
            sys.exit(f"error: {', '.join(map(str, folders))}: too few photos of at least {crop} pixels per side")
        print(f"{len(self.train)} photos to train on, {len(self.val)} held out, {small} smaller than {crop}: left out")

    def crops(self, n, size, rng):
        """n random crops with flips of random training photos: n,3,size,size in [-1, 1]."""
        batch = np.empty((n, size, size, 3), np.uint8)
        for i in range(n):
            image = self.train[rng.integers(len(self.train))][1]
            y, x = (rng.integers(side - size + 1) for side in image.shape[:2])
            crop = image[y:y + size, x:x + size]
            batch[i] = crop[:, ::-1] if rng.random() < 0.5 else crop
        return to_signed(batch)

    def val_crops(self, size, limit):
        """The central crops of the first `limit` held-out photos that are large enough."""
        centre = [im[(im.shape[0] - size) // 2:, (im.shape[1] - size) // 2:][:size, :size]
                  for _, im in self.val if min(im.shape[:2]) >= size]
        return to_signed(np.stack(centre[:limit]))


def to_signed(batch):
    """uint8 n,H,W,3 -> float32 n,3,H,W in [-1, 1]."""
    return torch.from_numpy(batch).permute(0, 3, 1, 2).float() / 127.5 - 1


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


def fit(name, model, loss_fn, validate, args, steps, lr, weight_decay=0.01):
    """Minimise `loss_fn(model, step) -> (loss, {name: value})` over `steps`; returns the model with its EMA weights.

    State lies in OUT/name.pt and is taken up where it ended; SIGTERM and Ctrl-C save. Every --validate-every steps a
    line with `validate(ema_model) -> {name: value}` goes to the screen and to OUT/name.csv.
    """
    path = Path(args.out) / f"{name}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    model.to(args.device).train()
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.98), weight_decay=weight_decay, fused=True)
    step, seconds = 0, 0.0
    if path.exists():
        state = torch.load(path, map_location=args.device, weights_only=True)
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
        with torch.autocast(args.device, torch.bfloat16):
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


def new_autoencoder():
    """A DC-AE whose residual branches start near zero, so that it begins as its shortcuts alone (DC-AE §3.2)."""
    model = DCAE(AUTOENCODER)
    for name, p in model.named_parameters():
        if name.endswith(("norm.weight", "norm_out.weight")) and "decoder.norm_out" not in name:
            torch.nn.init.constant_(p, 0.1)
    return model


def train_autoencoder(photos, args):
    """L1 + 0.5 LPIPS on random crops; reports PSNR (RGB, dB) and LPIPS of held-out crops of 256²."""
    lpips = LPIPS.from_pretrained("alex").to(args.device)
    val = photos.val_crops(256, 32)

    def loss_fn(model, step):
        x = photos.crops(args.batch, args.crop, np.random.default_rng((args.seed, step))).to(args.device)
        y = model.decode(model.encode(x)).float()
        l1, perceptual = F.l1_loss(y, x), lpips(y, x).float().mean()
        return l1 + 0.5 * perceptual, dict(l1=l1.item(), lpips=perceptual.item())

    def validate(model):
        psnr, distance = [], []
        for x in val.split(8):
            x = x.to(args.device)
            y = model.decode(model.encode(x)).clamp(-1, 1)
            psnr += (-10 * torch.log10((y - x).square().mean((1, 2, 3)) / 4)).tolist()
            distance += lpips(y, x).tolist()
        return dict(val_psnr=float(np.mean(psnr)), val_lpips=float(np.mean(distance)))

    return fit("autoencoder", new_autoencoder(), loss_fn, validate, args, args.steps or 40_000, args.lr or 8e-4)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", help="folders of clean photos")
    parser.add_argument("--stage", default="autoencoder", choices=["autoencoder"])
    parser.add_argument("--out", default="runs/pretrain", help="where states and logs go (default %(default)s)")
    parser.add_argument("--steps", type=int, help="of the stage; the learning rate decays over the last quarter")
    parser.add_argument("--batch", type=int, default=8, help="crops a step (default %(default)s)")
    parser.add_argument("--crop", type=int, default=128, help="pixels per side, a multiple of 32 (default %(default)s)")
    parser.add_argument("--lr", type=float, help="peak learning rate (default: the stage's own)")
    parser.add_argument("--validate-every", type=int, default=500, metavar="N", help="steps (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    photos = Photos(args.data, args.crop)
    train_autoencoder(photos, args)


if __name__ == "__main__":
    main()
