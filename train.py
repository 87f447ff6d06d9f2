"""Trains SANA-SR's adapter from a folder of photos: Algorithm 1 of the paper.

    python train.py --data ./hq --steps 2000                              # the carried model, on a laptop
    torchrun --nproc_per_node 8 train.py --data ./hq --model sana-600m-512 --name official --checkpointing
    python train.py --name official --resume                              # goes on where it was stopped or killed
    python train.py --name official --select musiq                        # ranks its checkpoints, copies the best

    x_H ── crop, flip ─► degrade ─► x_L           z_L = s·E(x_L), z_H = s·E(x_H)         DC-AE, frozen
    ẑ = z_L − σ_τ·f_θ(z_L, τ, c, m)               f_θ: frozen LinearDiT + LoRA, all that is trained
    x̂ = D(ẑ/s)                                    frozen, but the gradient passes through it
    L = MSE(x̂, x_H) + 2·LPIPS(x̂, x_H) + L_align + L_cons

Needs photos at least as large as the crop, any number of folders deep; `--lq DIR` adds real LR pictures of the same
names. Leaves in runs/NAME: adapter.safetensors (EMA weights), checkpoints/, samples/, log.csv, curves.png, state.pt
(to resume), val/ (the fixed validation pairs). Settings are the paper's Appendix B; 100 000 steps took it 8 GPUs.
"""
import argparse
import csv
import hashlib
import json
import math
import os
import re
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from functools import lru_cache, partial
from io import BytesIO, StringIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors import SafetensorError
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import eval as evaluator
import weights
from degrade import MIN_SIZE, SCALE, degrade, enlarge, pair, sharpen, to_image, to_tensor
from eval import DTYPES, peak_memory, pick_device, pick_dtype, picture_suffixes, read, read_tags, why
from metrics import LPIPS, METRICS
from sanasr import (
    SanaSR,
    adapters_off,
    build_prompt,
    fingerprint,
    inject_lora,
    load_lora,
    lora_parameters,
    one_step,
    save_lora,
    sigma,
)

LAMBDA = {"mse": 1.0, "lpips": 2.0, "align": 1.0, "cons": 1.0}
PROTOCOLS = {"hq": (900, (70, 650)), "lq": (999, (20, 980))}  # τ, and the range of t, both ends included
EMA = 0.999

# ---------------------------------------------------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------------------------------------------------


def mse(x, target):
    """‖x̂ − x_H‖² per value, on pictures in [-1, 1] that are not clamped."""
    return F.mse_loss(x, target)


def align_loss(q, q_target, eps=1e-6):
    """Frozen-prior alignment (Eq. 5): the divergence of two Gaussians per sample and channel, B,C,h,w -> scalar.

        1/(2BC) Σ [ log((s_H+ε)/(s_ẑ+ε)) + (s_ẑ + (μ_ẑ−μ_H)²)/(s_H+ε) − 1 ]

    μ and s: spatial mean and population variance of the prior's answers to ẑ (q) and to z_H (q_target), both noised
    by the same t and ε.
    """
    var, mean = torch.var_mean(q, (2, 3), correction=0)                        # B,C
    var_t, mean_t = torch.var_mean(q_target, (2, 3), correction=0)
    ratio = (var + (mean - mean_t).square()) / (var_t + eps)
    return 0.5 * (torch.log((var_t + eps) / (var + eps)) + ratio - 1).mean()


def consistency_loss(f, q):
    """Adapter consistency (Eq. 6): mean squared difference of the adapted and the frozen network's answers."""
    return F.mse_loss(f, q)


def noised(z, t, noise):
    """z̃ = (1−σ_t)·z + σ_t·ε for z, noise: B,C,h,w and t: B."""
    s = sigma(t).view(-1, 1, 1, 1)
    return (1 - s) * z + s * noise


def losses(f, f0, vae, batch, tau, lpips=None, terms=LAMBDA):
    """The terms of Algorithm 1 for one batch, each a scalar, as {name: value} of those named in `terms`.

    f, f0:  (z, t, c, m) -> prediction, the adapted and the frozen network, float32 outside (see `in_float32`)
    vae:    a `Latents`
    batch:  x_L, x_H: B,3,H,W in [-1, 1]; c: B,T,Dt and m: B,T; t: B; noise: B,C,H/32,W/32
    Gradients flow through ẑ into every term, through f0 as well; f0's weights do not move and z_H's side is a target.
    """
    x_h, c, m, t = batch["x_H"], batch["c"], batch["m"], batch["t"]
    with torch.no_grad():
        z_l, z_h = vae.encode(batch["x_L"]), vae.encode(x_h)
    z = one_step(f, z_l, torch.full_like(t, tau), c, m)
    x = vae.decode(z)
    values = {"mse": mse(x, x_h)}
    if "lpips" in terms:
        values["lpips"] = lpips(x, x_h).mean()
    if "align" in terms or "cons" in terms:
        z_noised = noised(z, t, batch["noise"])
        q = f0(z_noised, t, c, m)
    if "align" in terms:
        with torch.no_grad():
            q_h = f0(noised(z_h, t, batch["noise"]), t, c, m)
        values["align"] = align_loss(q, q_h)
    if "cons" in terms:
        values["cons"] = consistency_loss(f(z_noised, t, c, m), q)
    return values


# ---------------------------------------------------------------------------------------------------------------------
# The frozen networks, as the losses see them
# ---------------------------------------------------------------------------------------------------------------------


def in_float32(dit):
    """dit as a function with float32 latents outside, whatever dtype its weights have."""
    dtype = next(dit.parameters()).dtype
    return lambda z, t, c, m: dit(z.to(dtype), t, c.to(dtype), m).float()


def prior(dit):
    """f0: the same network with its adapters off."""
    f = in_float32(dit)

    def f0(*args):
        with adapters_off(dit):
            return f(*args)
    return f0


class Latents:
    """The DC-AE between pictures and scaled latents, float32 outside."""

    def __init__(self, vae, scale):
        self.vae, self.scale, self.dtype = vae, scale, next(vae.parameters()).dtype

    def encode(self, x):
        return self.vae.encode(x.to(self.dtype)).float() * self.scale

    def decode(self, z):
        return self.vae.decode((z / self.scale).to(self.dtype)).float()


def in_autocast(lpips, device, dtype):
    """lpips with its convolutions in dtype: in bfloat16 VGG16's, most of a step's work, take half the time."""
    def f(x, y):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return lpips(x, y)
    return f


class Conditions:
    """Prompts -> text states, from the disk where `SanaSR.encode_prompt` keeps them; the latest stay in memory."""

    def __init__(self, model):
        self.model, self.one = model, lru_cache(64)(self._one)

    def _one(self, prompt):
        return tuple(x[0].clone() for x in self.model.encode_prompt(prompt))  # no longer inference-mode tensors

    def prepare(self, prompts, chunk=64):
        """Encodes what the disk does not have yet; the text encoder is loaded once a chunk, and only if needed."""
        for i in tqdm(range(0, len(prompts), chunk), "encoding prompts", leave=False, disable=len(prompts) <= chunk):
            self.model.encode_prompt(prompts[i:i + chunk])

    def __call__(self, prompts):
        """-> c: B,T,Dt and m: B,T, padded on the right to the longest, the padding masked."""
        pairs = [self.one(prompt) for prompt in prompts]
        pad = torch.nn.utils.rnn.pad_sequence
        return pad([c for c, _ in pairs], batch_first=True), pad([m for _, m in pairs], batch_first=True)


# ---------------------------------------------------------------------------------------------------------------------
# Photos
# ---------------------------------------------------------------------------------------------------------------------


class Photo(NamedTuple):
    """A file that was read once from end to end; size and time tell later whether it is still the same."""
    path: str
    bytes: int
    mtime_ns: int
    sha256: str
    width: int
    height: int


def inspect(path):
    """Path -> Photo, or None where the file is no picture that can be decoded."""
    try:
        stat, data = path.stat(), path.read_bytes()
        rgb = read(BytesIO(data)).rgb
    except Exception:  # on broken files the decoders raise anything
        return None
    return Photo(str(path), stat.st_size, stat.st_mtime_ns, hashlib.sha256(data).hexdigest(), *rgb.size)


def scan(folders, crop, index, workers):
    """All different photos of at least crop x crop below the folders, in the order of their hashes, and the report.

    index: a JSON file that remembers what was read, so that a second scan reads only new files.
    Raises SystemExit where a folder is missing or nothing is left.
    """
    known = {}
    if index.is_file():
        known = {row[0]: Photo(*row) for row in json.loads(index.read_text())}
    suffixes, paths = picture_suffixes(Image.OPEN), []
    for folder in map(Path, folders):
        if not folder.is_dir():
            sys.exit(f"error: --data {folder}: no such folder")
        paths += [p for p in folder.rglob("*") if p.suffix.lower() in suffixes and not p.name.startswith(".")]
    paths = sorted({p.resolve() for p in paths if p.is_file()})

    def look(path):
        old, stat = known.get(str(path)), path.stat()
        return old if old and (old.bytes, old.mtime_ns) == (stat.st_size, stat.st_mtime_ns) else inspect(path)

    with ThreadPoolExecutor(max(workers, 1)) as pool:  # decoding and hashing leave the interpreter lock
        found = list(tqdm(pool.map(look, paths), "reading photos", len(paths), leave=False, disable=len(paths) < 100))
    readable = [p for p in found if p]
    write_atomically(index, lambda f: f.write(json.dumps(readable).encode()))
    distinct = sorted({p.sha256: p for p in reversed(readable)}.values(), key=lambda p: p.sha256)
    photos = [p for p in distinct if min(p.width, p.height) >= crop]
    report = (f"{len(photos)} photos of {len(paths)} files; skipped: {len(readable) - len(distinct)} duplicates, "
              f"{len(paths) - len(readable)} unreadable, {len(distinct) - len(photos)} smaller than {crop} pixels")
    if not photos:
        sys.exit(f"error: --data {' '.join(map(str, folders))}: {report}")
    return photos, report


def bare_name(path):
    """What a photo and its real LR picture share: the file name without suffix and without _HR, _LR, _LR4."""
    return re.sub(r"_(HR|LR\d?)$", "", Path(path).stem, flags=re.IGNORECASE)


def match_lq(photos, folder):
    """{path of a photo: path of its LR picture in `folder`}. Raises SystemExit for a pair that is not 1 : 4."""
    suffixes = picture_suffixes(Image.OPEN)
    by_name = {bare_name(p): p for p in sorted(Path(folder).rglob("*")) if p.suffix.lower() in suffixes}
    pairs = {p.path: by_name[bare_name(p.path)] for p in photos if bare_name(p.path) in by_name}
    if not pairs:
        sys.exit(f"error: --lq {folder}: no picture there has the name of a photo")
    for photo in photos:
        if photo.path in pairs:
            with Image.open(pairs[photo.path]) as image:
                if (image.width * SCALE, image.height * SCALE) != (photo.width, photo.height):
                    sys.exit(f"error: {pairs[photo.path]} is {image.width}x{image.height}, but {photo.path} is "
                             f"{photo.width}x{photo.height}, not {SCALE} times that")
            pairs[photo.path] = str(pairs[photo.path])
    return pairs


class Pairs(Dataset):
    """Sample n of the endless stream of training pairs: photo `order[n]` of epoch n // len(photos).

    A sample is a function of (seed, epoch, photo): the same for any number of workers, ranks and restarts. It also
    carries what Algorithm 1 draws for it, t and ε.
    """

    def __init__(self, photos, prompts, crop, latent, t_range, seed, lq=None, usm=False, mild=0.0):
        self.photos, self.prompts, self.lq, self.mild = photos, prompts, lq or {}, mild
        self.crop, self.latent, self.t_range, self.seed, self.usm = crop, latent, t_range, seed, usm
        self.epoch = None, None

    def place(self, n):
        """n -> (epoch, index of the photo): every epoch takes each photo once, in an order of its own."""
        epoch, position = divmod(n, len(self.photos))
        if self.epoch[0] != epoch:
            self.epoch = epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.photos))
        return epoch, int(self.epoch[1][position])

    def __getitem__(self, n):
        epoch, i = self.place(n)
        rng = np.random.default_rng((self.seed, epoch, i))
        photo, crop = self.photos[i], self.crop
        left, top = (int(rng.integers((size - crop) // SCALE + 1)) * SCALE for size in (photo.width, photo.height))
        flip = rng.random() < 0.5
        hr, lr = crop_pair(photo.path, self.lq.get(photo.path), left, top, crop)
        if flip:
            hr, lr = hr.flip(-1), None if lr is None else lr.flip(-1)
        x_l, x_h = pair(sharpen(hr) if self.usm else hr, rng, lr, self.mild)
        low, high = self.t_range
        return {"x_L": x_l, "x_H": x_h, "t": np.float32(rng.integers(low, high, endpoint=True)),
                "noise": rng.standard_normal(self.latent, dtype=np.float32),
                "prompt": self.prompts[i], "name": photo.path}


def crop_pair(path, lq_path, left, top, crop):
    """(hr, lr): 3,crop,crop in [0, 1] and the same part of the real LR picture, or None without one."""
    box = left, top, left + crop, top + crop
    try:
        hr = to_tensor(read(path).rgb.crop(box))
        lr = to_tensor(read(lq_path).rgb.crop([v // SCALE for v in box])) if lq_path else None
    except Exception as error:  # it could be read when the run began; of a loader only the last line is shown
        raise OSError(f"{path} (or its LR picture) can no longer be read: {why(error)}") from error
    return hr, lr


def validation_pairs(photos, lq, crop, seed, folder, mild=0.0):
    """[(name, LR image, HR image)] of the photos' central crops, the same in every run; also written to `folder`."""
    pairs = []
    for i, photo in enumerate(photos):
        left, top = ((size - crop) // 2 // SCALE * SCALE for size in (photo.width, photo.height))
        hr, lr = crop_pair(photo.path, lq.get(photo.path), left, top, crop)
        lr = degrade(hr, (seed, 2 ** 32 - 1, i), mild=mild) if lr is None else lr  # an epoch that no training reaches
        name = f"{i:02d}_{bare_name(photo.path)}.png"
        pairs.append((name, to_image(lr), to_image(hr)))
    for kind, k in (("lr", 1), ("hr", 2)) if folder else ():
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for row in pairs:
            write_atomically(folder / kind / row[0], lambda f, image=row[k]: image.save(f, "PNG"))
    return pairs


# ---------------------------------------------------------------------------------------------------------------------
# Prompts
# ---------------------------------------------------------------------------------------------------------------------


def find_tags(kind, protocol, photos, lq, cache):
    """The tags of each training photo, "tag, tag, …": none, those of a CSV file, or what RAM (DAPE) finds.

    They describe x_H in the hq protocol, x_L in the lq protocol: there the whole photo's LR picture, enlarged, made by
    the degradation seeded with its hash where no real one exists. Tagged once: `cache` is a CSV file as well.
    """
    if kind == "none":
        return [""] * len(photos)
    if kind not in ("ram", "dape"):
        tags = read_tags(kind)
        names = [Path(p.path).name for p in photos]
        if missing := sum(name not in tags for name in names):
            print(f"--tags {kind}: {missing} of {len(names)} photos have no line there and get no tags")
        return [tags.get(name, "") for name in names]
    known = {}
    if cache.is_file():
        with open(cache, newline="", encoding="utf-8") as f:
            known = {row["sha256"]: row["tags"] for row in csv.DictReader(f)}
    if any(p.sha256 not in known for p in photos):
        tagger = open_tagger(kind)
        if not tagger:
            return [""] * len(photos)
        for photo in tqdm(photos, "tagging", leave=False):
            if photo.sha256 not in known:
                known[photo.sha256] = tagger(x_h_or_x_l(photo, lq.get(photo.path), protocol))
        rows = [{"image": Path(p.path).name, "tags": known[p.sha256], "sha256": p.sha256} for p in photos]
        write_csv(cache, ["image", "tags", "sha256"], rows)
    return [known[p.sha256] for p in photos]


def x_h_or_x_l(photo, lq_path, protocol):
    """The picture that the tags of a training photo come from."""
    image = read(photo.path).rgb
    if protocol == "hq":
        return image
    if lq_path:
        return to_image(enlarge(read(lq_path).rgb) / 2 + 0.5)
    hr = to_tensor(image.crop((0, 0, image.width // SCALE * SCALE, image.height // SCALE * SCALE)))
    return to_image(enlarge(degrade(hr, int(photo.sha256[:16], 16))) / 2 + 0.5)


def tag_images(lrs, kind):
    """The tags of the validation pictures: what the tagger finds in their x_L, none without a tagger."""
    if kind not in ("ram", "dape"):
        return [""] * len(lrs)
    tagger = open_tagger(kind)
    return [tagger(to_image(enlarge(lr) / 2 + 0.5)) if tagger else "" for lr in lrs]


def open_tagger(kind):
    """A function from a picture to "tag, tag, …"; None where the tagger's weights cannot be had, which a line on
    stderr says. Raises SystemExit for a broken file of weights."""
    import tagger
    try:
        net = tagger.open_tagger(kind)
    except (ValueError, OSError) as error:
        sys.exit(f"error: --tags {kind}: {why(error)}")
    return net and (lambda image: tagger.joined(net.tags(image)))


# ---------------------------------------------------------------------------------------------------------------------
# Files of a run
# ---------------------------------------------------------------------------------------------------------------------


def write_atomically(path, save):
    """save(f) into a file beside `path` that then takes its name. Raises SystemExit, with the old file unharmed."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as f:
            save(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        temporary.unlink(missing_ok=True)
        sys.exit(f"error: {path} cannot be written ({why(error, temporary)}); what was there before is unharmed")


def write_csv(path, columns, rows):
    """Dicts as a CSV file with these columns; numbers with six digits, what a row lacks is empty."""
    def save(f):
        text = StringIO(newline="")
        out = csv.DictWriter(text, columns)
        out.writeheader()
        out.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
        f.write(text.getvalue().encode())
    write_atomically(path, save)


COLUMNS = ["step", "epoch", "loss", *LAMBDA, "grad_norm", "images_per_s", "memory_gb", "val_lpips", "val_psnr"]


def read_log(path, last=math.inf):
    """The rows of log.csv up to step `last`, as dicts of numbers; empty cells are left out."""
    with open(path, newline="") as f:
        rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(f)]
    return [row | {"step": int(row["step"])} for row in rows if row["step"] <= last]


def curves(rows, width=360, height=200):
    """A picture of every column of the log against the step: the values in grey, their running mean in blue."""
    names = [n for n in COLUMNS[2:] if n not in ("images_per_s", "memory_gb") and any(n in row for row in rows)]
    canvas = Image.new("RGB", (3 * width, -(-len(names) // 3) * height), "white")
    draw = ImageDraw.Draw(canvas)
    for k, name in enumerate(names):
        x, y = np.array([(row["step"], row[name]) for row in rows if name in row]).T
        left, top, w, h = k % 3 * width + 10, k // 3 * height + 24, width - 20, height - 40
        window = max(len(y) // 50, 1)
        smooth = np.convolve(np.pad(y, (window - 1, 0), "edge"), np.ones(window) / window, "valid")
        low, high = y.min(), np.percentile(y, 99) if len(y) > 200 else y.max()  # a few peaks shall not flatten the rest
        for values, colour in ((y, "#c8c8c8"), (smooth, "#1040c0")):
            across = left + (x - x[0]) / max(x[-1] - x[0], 1) * w
            up = ((values - low) / max(high - low, 1e-12)).clip(0, 1) * h
            draw.line(list(zip(across, top + h - up, strict=True)), colour)
        draw.rectangle((left, top, left + w, top + h), outline="#808080")
        draw.text((left, top - 16), f"{name} {smooth[-1]:.4g}   (axis {low:.4g} to {high:.4g}, "
                                    f"steps {x[0]:.0f} to {x[-1]:.0f})", "black")
    return canvas


class Run:
    """The folder runs/NAME; only the first rank has one."""

    def __init__(self, folder, rows):
        self.folder = folder
        for sub in ("checkpoints", "samples"):
            (folder / sub).mkdir(parents=True, exist_ok=True)
        write_csv(folder / "log.csv", COLUMNS, rows)  # without the steps that the state does not have

    def note(self, row):
        """Adds a row to the log."""
        try:
            with open(self.folder / "log.csv", "a", newline="") as f:
                f.write(",".join(f"{row[c]:.6g}" if c in row else "" for c in COLUMNS) + "\r\n")
        except OSError as error:
            sys.exit(f"error: {self.folder}/log.csv cannot be written ({why(error)})")

    def picture(self, name, image):
        write_atomically(self.folder / name, lambda f: image.save(f, "PNG"))

    def save(self, state, model, adapter, metadata):
        """The state first, then what it can make again: a crash in between loses nothing."""
        write_atomically(self.folder / "state.pt", partial(torch.save, state))
        for path in (self.folder / "adapter.safetensors",
                     self.folder / "checkpoints" / f"{state['step']:06d}.safetensors"):
            try:
                save_lora(model, path, metadata, adapter)
            except (OSError, SafetensorError) as error:
                sys.exit(f"error: {path} cannot be written ({why(error, path)}); {self.folder}/state.pt is whole")


def load_state(folder):
    """The resumable state of a run. Raises SystemExit in one line."""
    try:
        return torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    except FileNotFoundError:
        sys.exit(f"error: {folder}/state.pt: there is nothing to resume; check --name or leave out --resume")
    except Exception as error:  # a damaged archive raises anything
        sys.exit(f"error: {folder}/state.pt cannot be read ({why(error)}); start anew under another --name")


# ---------------------------------------------------------------------------------------------------------------------
# Several processes, and being stopped
# ---------------------------------------------------------------------------------------------------------------------


def ranks():
    """(rank, number of ranks), with or without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def from_first(make):
    """make() on the first rank, its result on all."""
    if ranks()[1] == 1:
        return make()
    box = [make() if ranks()[0] == 0 else None]
    dist.broadcast_object_list(box)
    return box[0]


def average(tensors):
    """Replaces each tensor by its mean over all ranks, in one message."""
    if ranks()[1] > 1:
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        for t, mean in zip(tensors, (flat / ranks()[1]).split([t.numel() for t in tensors]), strict=True):
            t.copy_(mean.view_as(t))


class Signals:
    """Ctrl-C and SIGTERM set `caught`, for the loop to stop after the step; a second one interrupts at once."""

    def __enter__(self):
        self.caught = 0
        self.before = {s: signal.signal(s, self) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __call__(self, number, frame):
        if self.caught:
            raise KeyboardInterrupt
        self.caught = number

    def __exit__(self, *exception):
        for s, handler in self.before.items():
            signal.signal(s, handler)


def outlive_signals(worker):
    """Ctrl-C and a SIGTERM to the whole group reach the loader's workers too; they go on until the run ends them.

    One that died while it held a lock, or half of a batch was handed over, would leave the run waiting for ever. But
    SIGTERM is also how Python ends the workers of a run that failed, hence the alarm: 5 s later they are gone.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(5))


def batches(loader, signals):
    """The loader's batches; where a signal ended a worker that had just begun, they end, which is no error."""
    try:
        yield from loader
    except RuntimeError:
        if not signals.caught:
            raise


# ---------------------------------------------------------------------------------------------------------------------
# Validation and the choice of a checkpoint
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def validate(f, vae, pairs, conditions, tau, lpips):
    """(mean LPIPS (AlexNet), mean PSNR, a grid x_L | x̂ | x_H of the first six) over the 8-bit results of `pairs`."""
    device, distances, psnrs, rows = next(lpips.parameters()).device, [], [], []
    for (_, lr, hr), (c, m) in zip(pairs, conditions, strict=True):
        x_l, x_h = enlarge(lr)[None].to(device), (to_tensor(hr) * 2 - 1)[None].to(device)
        x = vae.decode(one_step(f, vae.encode(x_l), torch.full((1,), tau, device=device), c, m))
        x = ((x.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
        distances.append(lpips(x, x_h).item())
        psnrs.append(10 * math.log10(4 / max((x - x_h).square().mean().item(), 1e-10)))
        rows.append(torch.cat([x_l, x, x_h], 3)[0].cpu() / 2 + 0.5)
    return sum(distances) / len(pairs), sum(psnrs) / len(pairs), to_image(torch.cat(rows[:6], 1))


def knee(values):
    """The index where a falling curve stops falling fast: the point farthest below the line from its start to its end.

    On the curve of validation LPIPS it is where LinearSR's ESGF (arXiv 2510.08771) ends a stage, before the training
    goes on to trade generality for the training set; the definition is Kneedle's (Satopää et al. 2011).
    """
    y = np.asarray(values, float)
    return int(np.argmax(np.linspace(y[0], y[-1], len(y)) - y))


def past_knee(run, patience):
    """Where the knee lies `patience` validations back, copies its adapter to knee.safetensors and says so; else ""."""
    rows = read_log(run.folder / "log.csv")
    steps, values = zip(*((row["step"], row["val_lpips"]) for row in rows if "val_lpips" in row), strict=True)
    k = knee(values)
    if not 0 < k <= len(values) - 1 - patience:
        return ""
    content = (run.folder / "checkpoints" / f"{steps[k]:06d}.safetensors").read_bytes()
    write_atomically(run.folder / "knee.safetensors", lambda f: f.write(content))
    return f"stopped past the knee of validation LPIPS, step {steps[k]} (knee.safetensors)"


def select(args):
    """Ranks the checkpoints of a run by the mean of one metric and copies the best to best.safetensors.

    The evaluator restores and scores, by default the run's validation pictures; `--lq DIR --data DIR` names others.
    """
    settings = load_state(args.run)["settings"]
    lr, hr = (args.lq, args.data[0]) if args.lq and args.data else (args.run / "val" / "lr", args.run / "val" / "hr")
    tagger = settings["tags"] if settings["tags"] in ("ram", "dape") else "none"
    paths = sorted((args.run / "checkpoints").glob("*.safetensors"))
    scores = {}
    with tempfile.TemporaryDirectory() as scratch:
        for path in tqdm(paths, "scoring checkpoints"):
            table = Path(scratch) / f"{path.stem}.csv"
            with redirect_stdout(StringIO()):
                evaluator.main([str(a) for a in (
                    lr, "--hr", hr, "--metrics", args.select, "--csv", table, "--out", f"{scratch}/{path.stem}/",
                    "--model", settings["model"], "--adapter", path, "--suffix", settings["suffix"], "--tagger", tagger,
                    "--device", args.device.type, "--dtype", args.dtype)])
            with open(table, newline="") as f:
                scores[path] = next(float(row[args.select]) for row in csv.DictReader(f) if row["image"] == "mean")
    order = sorted(scores, key=scores.get, reverse=METRICS[args.select].better == "higher")
    write_csv(args.run / "select.csv", ["checkpoint", args.select],
              [{"checkpoint": path.name, args.select: scores[path]} for path in order])
    content = order[0].read_bytes()
    write_atomically(args.run / "best.safetensors", lambda f: f.write(content))
    print("\n".join(f"{path.stem}  {args.select} {scores[path]:.4f}" for path in order))
    print(f"best: {order[0].name}, copied to {args.run}/best.safetensors")
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def load_model(args):
    """The prior without an adapter. Raises SystemExit in one line."""
    try:
        model = SanaSR.from_pretrained(args.model, args.device, DTYPES[args.dtype], adapter=False)
    except (OSError, ValueError, weights.Unavailable) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    for part in (model.vae, model.dit):
        part.requires_grad_(False)
    model.dit.checkpointing = model.vae.decoder.checkpointing = args.checkpointing
    return model


def load_lpips(net):
    """(LPIPS, its network): VGG16 as in the paper, or AlexNet, which is carried along, where that cannot be had."""
    if net == "vgg":
        try:
            return LPIPS.from_pretrained("vgg"), "vgg"
        except weights.Unavailable as error:
            print(f"note: the LPIPS loss uses AlexNet: {why(error)}", file=sys.stderr)
    return LPIPS.from_pretrained("alex"), "alex"


def complete(args, model):
    """Fills in the settings that depend on the model. Raises SystemExit for a crop that does not fit it."""
    embedded = args.model == "embedded"
    args.crop = args.crop or model.dit.config["sample_size"] * model.vae.factor
    if args.crop % model.vae.factor or args.crop < MIN_SIZE:
        sys.exit(f"error: --crop {args.crop}: it must be a multiple of {model.vae.factor} and at least {MIN_SIZE}")
    args.timestep = float(PROTOCOLS[args.protocol][0] if args.timestep is None else args.timestep)
    args.tags = args.tags or ("none" if embedded else "ram")
    args.lpips = args.lpips or ("alex" if embedded else "vgg")


@contextmanager
def holding(parameters, values):
    """The parameters have these values for a while."""
    own = [p.detach().clone() for p in parameters]
    copy(parameters, values)
    try:
        yield
    finally:
        copy(parameters, own)


@torch.no_grad()
def copy(parameters, values):
    for p, v in zip(parameters, values, strict=True):
        p.copy_(v)


def report_nan(path, step, names, prompts, t, values, norm):
    """Writes what a step that went wrong was made of."""
    content = {"step": step, "samples": names, "prompts": prompts, "t": t.tolist(), "grad_norm": str(norm),
               "losses": {k: str(v.item()) for k, v in values.items()}}
    write_atomically(path, lambda f: f.write(json.dumps(content, indent=1).encode()))


def train(args, state=None):
    """The whole run, see the top of the file; `state` is what a former one left. Returns the exit code."""
    rank, world = ranks()
    device, say = args.device, partial(print, flush=True) if rank == 0 else lambda *a, **k: None
    # a resumed run is to repeat the one that was not interrupted: bit for bit on a CPU; on a GPU the backward pass of
    # the LPIPS network's max-pooling still adds in any order
    torch.backends.cudnn.deterministic = True

    # the networks, of which only the adapter learns
    model = load_model(args)
    complete(args, model)
    judge = LPIPS.from_pretrained("alex").to(device)
    terms = {name: factor for name, factor in LAMBDA.items() if not getattr(args, f"no_{name}", False)}
    lpips, args.lpips = load_lpips(args.lpips) if "lpips" in terms else (None, "none")
    torch.manual_seed(args.seed)
    inject_lora(model.dit, args.rank, targets=args.lora_targets)
    if args.init:
        try:
            load_lora(model.dit, args.init)
        except ValueError as error:
            sys.exit(f"error: {error}")
    adapter = lora_parameters(model.dit)
    masters = [p.detach().clone() for p in adapter.values()]  # float32: what the optimiser moves
    for p in adapter.values():
        p.data = p.data.to(next(model.dit.parameters()).dtype)  # what the network computes with
    parameters = list(adapter.values())
    f, f0, vae = in_float32(model.dit), prior(model.dit), Latents(model.vae, model.scaling_factor)
    lpips = lpips and in_autocast(lpips.to(device), device, vae.dtype)

    # the photos, their prompts, the validation set
    def look_at_data():
        photos, report = scan(args.data, args.crop, args.run / "data.json", args.workers)
        held = min(args.val, len(photos) // 2)
        lq = match_lq(photos, args.lq) if args.lq else {}
        tags = find_tags(args.tags, args.protocol, photos[held:], lq, args.run / "tags.csv")
        pairs = validation_pairs(photos[:held], lq, args.crop, args.seed, args.run / "val", args.mild)
        # of x_L, as at test time: the reference must not leak into the validation
        val_tags = tag_images([lr for _, lr, _ in pairs], args.tags if any(tags) else "none")
        return photos[held:], lq, tags, pairs, val_tags, report
    photos, lq, tags, pairs, val_tags, report = from_first(look_at_data)
    if args.tags in ("ram", "dape") and not any(tags):  # the tagger's weights cannot be had
        args.tags = "none"
    prompts, val_prompts = ([build_prompt(re.split(r"\s*,\s*", line), args.suffix) for line in lines]
                            for lines in (tags, val_tags))
    conditions = Conditions(model)
    from_first(lambda: conditions.prepare(sorted({*prompts, *val_prompts})))

    # the state
    ema = [m.clone() for m in masters]
    optimizer = torch.optim.AdamW(masters, args.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0 ** 12, enabled=args.dtype == "fp16")
    step, rows = 0, []
    digest = hashlib.sha256("".join(p.sha256 for p in photos).encode()).hexdigest()
    settings = {k: v for k, v in vars(args).items() if k not in NOT_SETTINGS} | {
        "global_batch": args.batch * world, "photos_sha256": digest}
    if state:
        for key, what in (("photos_sha256", "the photos"), ("global_batch", "--batch times the number of processes")):
            if state["settings"][key] != settings[key]:
                sys.exit(f"error: --resume: {what} changed since the run began; start anew under another --name")
        step = state["step"]
        copy(masters, state["masters"])
        copy(ema, state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        rows = read_log(args.run / "log.csv", step)
    copy(parameters, masters)
    run = Run(args.run, rows) if rank == 0 else None
    tags_from = args.tags if args.tags in ("none", "ram", "dape") else "file"
    metadata = {k: str(v) for k, v in {
        "base": args.model, "base_fingerprint": fingerprint(model.folder / "transformer"), "photos": len(photos),
        "terms": " ".join(terms), "ema": EMA, "tags": tags_from, "torch": torch.__version__,
        **{k: settings[k] for k in ("lora_targets", "protocol", "timestep", "suffix", "lpips", "crop", "global_batch",
                                    "lr", "clip", "usm", "mild", "seed", "dtype", "photos_sha256")}}.items()}

    low, high = PROTOCOLS[args.protocol][1]
    say(f"{report}; {len(pairs)} held out for validation" + (f"; {len(lq)} have real LR pictures" if args.lq else ""))
    say(f"{args.model}: {sum(m.numel() for m in masters) / 1e6:.2f} M trained parameters (rank {args.rank}, "
        f"{args.lora_targets}); τ {args.timestep:g}, t {low} to {high}; losses {' '.join(terms)}, LPIPS {args.lpips}")
    say(f"effective batch {args.batch} × {world} = {args.batch * world} crops of {args.crop}; {args.dtype} on "
        f"{device}; seed {args.seed}; torch {torch.__version__}; {len(set(prompts))} prompts; {args.run}")

    def look():
        """Validates the EMA weights: columns for the log, and a picture."""
        if not run or not pairs:
            return {}
        with holding(parameters, ema):
            distance, psnr, grid = validate(f, vae, pairs, [conditions([p]) for p in val_prompts], args.timestep, judge)
        run.picture(f"samples/{step:06d}.png", grid)
        return {"val_lpips": distance, "val_psnr": psnr}

    def save():
        if run:
            run.picture("curves.png", curves(read_log(args.run / "log.csv")))
            run.save({"step": step, "settings": settings, "masters": masters, "ema": ema, "scaler": scaler.state_dict(),
                      "optimizer": optimizer.state_dict()}, model.dit, dict(zip(adapter, ema, strict=True)),
                     metadata | {"step": str(step)})

    # the loop
    latent = model.dit.config["in_channels"], args.crop // model.vae.factor, args.crop // model.vae.factor
    mine = ([(s * world + rank) * args.batch + i for i in range(args.batch)] for s in range(step, args.steps))
    loader = DataLoader(Pairs(photos, prompts, args.crop, latent, (low, high), args.seed, lq, args.usm, args.mild),
                        batch_sampler=mine, num_workers=args.workers, worker_init_fn=outlive_signals,
                        pin_memory=device.type == "cuda")
    if step == 0 and run:
        run.note({"step": 0} | look())
    bar = tqdm(total=args.steps, initial=step, unit="step", disable=rank > 0, dynamic_ncols=True)
    started, stop, knee_passed = time.perf_counter(), 0, ""
    with Signals() as signals:
        for batch in batches(loader, signals):
            names, texts = batch.pop("name"), batch.pop("prompt")
            batch = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
            batch["c"], batch["m"] = conditions(texts)
            values = losses(f, f0, vae, batch, args.timestep, lpips, terms)
            loss = sum(terms[k] * v for k, v in values.items())
            scaler.scale(loss).backward()
            for master, p in zip(masters, parameters, strict=True):
                master.grad, p.grad = p.grad.float(), None
            average([m.grad for m in masters])
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(masters, args.clip)
            stats = torch.stack([loss.new_tensor(float(signals.caught)), loss, *values.values()]).detach()
            average([stats])
            stop, mean_loss, *means = stats.tolist()
            norm = norm.item()
            overflow = scaler.is_enabled() and scaler.get_scale() > 1  # of fp16 gradients: the scaler skips the step
            if not math.isfinite(mean_loss) or not (math.isfinite(norm) or overflow):
                if math.isfinite(mean_loss) or not math.isfinite(loss.item()):
                    report_nan(args.run / f"nan_rank{rank}.json", step + 1, names, texts, batch["t"], values, norm)
                bar.close()
                sys.exit(f"error: step {step + 1}: loss {mean_loss}, gradient norm {norm}: stopped before the adapter "
                         f"changed; {args.run}/nan_rank*.json names the samples, the last save is whole")
            scaler.step(optimizer)
            scaler.update()
            copy(parameters, masters)
            step += 1
            decay = min(EMA, step / (step + 10))  # so that a short run does not remember the untrained adapter
            for average_, master in zip(ema, masters, strict=True):
                average_.lerp_(master, 1 - decay)

            now = time.perf_counter()
            row = {"step": step, "epoch": step * args.batch * world / len(photos), "loss": mean_loss,
                   **dict(zip(values, means, strict=True)), "grad_norm": norm,
                   "images_per_s": args.batch * world / (now - started), "memory_gb": peak_memory(device) or 0.0}
            bar.set_postfix({k: f"{row[k]:.4g}" for k in ("loss", *values, "images_per_s", "memory_gb")}, refresh=False)
            bar.update()
            due = step % args.every == 0 or step == args.steps
            if due:
                row |= look()
            if run:
                run.note(row)
            if due or stop:
                save()
            if due and args.knee and pairs:
                knee_passed = from_first(lambda: past_knee(run, args.knee))
            if stop or knee_passed:
                break
            started = time.perf_counter()
        else:
            if stop := signals.caught:
                save()
    bar.close()
    if stop:
        say(f"interrupted; step {step} is saved, `--name {args.name} --resume` goes on")
        return 128 + (signals.caught or signal.SIGTERM)
    say(f"{knee_passed or 'done'}: {args.run}/adapter.safetensors, step {step}")
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------

NOT_SETTINGS = ("run", "name", "device", "resume", "select")
# what a resumed run may be given anew: how long and how it runs, but not what it computes
CHANGEABLE = ("batch", "steps", "every", "workers", "checkpointing", "knee")  # batch: times the processes it is fixed


def parser():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], epilog=__doc__.split("\n\n", 1)[1],
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--data", nargs="+", metavar="DIR", help="folders of photos, searched recursively")
    add("--lq", metavar="DIR", help="real LR pictures of the same names, a quarter of the size")
    add("--model", default="embedded", metavar="NAME|FOLDER", help="the prior, see `python -m weights`")
    add("--name", default="default", help="the run is kept in runs/NAME")
    add("--resume", action="store_true", help="go on with the run of that name, with its settings")
    add("--select", choices=list(METRICS), metavar="METRIC", help="rank the run's checkpoints by a metric of "
        "eval.py, copy the best to best.safetensors")
    add("--steps", type=int, default=100_000)
    add("--every", type=int, default=1000, metavar="N", help="validate, draw samples and save every N steps")
    add("--batch", type=int, default=4, help="per process")
    add("--crop", type=int, help="pixels (default: what the model was trained at, 512 for SANA-0.6B)")
    add("--lr", type=float, default=5e-5)
    add("--clip", type=float, default=1.0, help="largest norm of the gradient")
    add("--rank", type=int, default=64, help="of the adapter; its scale is 1")
    add("--init", metavar="PATH", help="start from this adapter instead of from nothing")
    add("--lora-targets", choices=["attn", "attn+ffn"], default="attn")
    add("--protocol", choices=list(PROTOCOLS), default="hq", help="hq: τ 900, tags of x_H; lq: τ 999, tags of x_L")
    add("--timestep", type=float, metavar="N", help="another τ, in (0, 1000]")
    add("--tags", metavar="none|ram|dape|FILE.csv", help="tags of the photos: none, by a tagger, or from the columns "
        "image and tags of a file (default: ram; none for the carried model)")
    add("--suffix", default="appendix", metavar="appendix|main|none|TEXT", help="quality words after the tags")
    add("--lpips", choices=["vgg", "alex"], help="network of the LPIPS loss (default: vgg; alex for the carried model)")
    for name in ("lpips", "align", "cons"):
        add(f"--no-{name}", action="store_true", help="without this loss")
    add("--usm", action="store_true", help="sharpen x_H first, as Real-ESRGAN does")
    add("--mild", type=float, default=0.0, metavar="SHARE", help="of the pairs, 0 to 1: only blurred, resized and "
        "finely JPEG-coded, where the rest is degraded twice over (default 0)")
    add("--val", type=int, default=8, metavar="N", help="photos held out for validation")
    add("--knee", type=int, default=0, metavar="N", help="stop N validations past the knee of validation LPIPS "
        "(LinearSR's early stopping)")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    add("--dtype", choices=["auto", *DTYPES], default="auto", help="auto: bf16 on a GPU that has it, else fp32")
    add("--checkpointing", action="store_true", help="less memory, more time: recompute activations")
    add("--workers", type=int, default=12, help="loader processes, never more than there are cores")
    add("--seed", type=int, default=0)
    return p


def parse(argv=None):
    """-> (arguments, state to resume or None). Raises SystemExit in one line for what does not fit."""
    p, state = parser(), None
    args = p.parse_args(argv)
    args.run = Path("runs") / args.name  # a path as a name stays that path
    if args.resume:
        state = load_state(args.run)
        saved = {k: v for k, v in state["settings"].items() if hasattr(args, k)}
        p.set_defaults(**saved)
        args = p.parse_args(argv)
        args.run = Path("runs") / args.name
    elif not args.select and (args.run / "state.pt").exists():
        sys.exit(f"error: {args.run} holds a run: add --resume to go on, or choose another --name")
    if args.data:
        args.data = [str(Path(folder).resolve()) for folder in args.data]
    elif not args.select:
        p.error("--data names the folders of photos")
    for option in ("lq", "tags", "init"):
        if getattr(args, option) not in (None, "none", "ram", "dape"):
            setattr(args, option, str(Path(getattr(args, option)).resolve()))
    if args.timestep is not None and not 0 < args.timestep <= 1000:
        p.error(f"--timestep must lie in (0, 1000], not {args.timestep:g}")
    if not 0 <= args.mild <= 1:
        p.error(f"--mild must lie in [0, 1], not {args.mild:g}")
    for option in ("steps", "every", "batch", "rank"):
        if getattr(args, option) < 1:
            p.error(f"--{option} must be positive, not {getattr(args, option)}")
    args.device = pick_device(args.device, int(os.environ.get("LOCAL_RANK", 0)))
    args.dtype = next(name for name, dtype in DTYPES.items() if dtype == pick_dtype(args.dtype, args.device))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    args.workers = min(args.workers, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if state:
        changed = [k for k in saved if k not in CHANGEABLE and getattr(args, k) != saved[k]]
        if changed:
            sys.exit("error: --resume goes on with the settings of the run; different: " + ", ".join(
                f"--{k.replace('_', '-')} {getattr(args, k)} (was {saved[k]})" for k in changed))
    return args, state


def main(argv=None):
    args, state = parse(argv)
    if args.select:
        return select(args)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if args.device.type == "cuda":
            torch.cuda.set_device(args.device)
        dist.init_process_group("nccl" if args.device.type == "cuda" else "gloo", timeout=timedelta(days=1))
    args.run.mkdir(parents=True, exist_ok=True)
    try:
        return train(args, state)
    except OSError as error:
        sys.exit(f"error: {str(error).strip().splitlines()[-1].removeprefix('OSError: ')}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
