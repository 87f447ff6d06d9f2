"""Finish the bundled model on degraded photos: E against compression, the adapter towards a teacher, then all in one.

    python -m lab.finish pairs --data ./hq --count 4000       # runs/pretrain/pairs/{train,val}/{lr,hr}
    python -m lab.finish encoder --batch 8 --soft 0.5 --jpeg 0.75 --drawn 0.4       # E against compression
    # any restorer now fills pairs/{train,val}/teacher: pictures of the LR pictures, of the same names, 4× the size
    python -m lab.finish adapter --init weights/embedded/adapter.safetensors --rank 64 --batch 16
    python -m lab.finish decoder --dists --no-teacher         # D and adapter; Ctrl-C saves, the same line goes on;
                                                              # with --gan 0.4 --soft 0.5, and on a GPU --batch 16
    python -m lab.finish control --dists --no-teacher         # the same without an update
    python -m lab.finish compare                              # what the update is worth, with intervals
    python -m lab.finish export                               # into weights/embedded

    x_L ── E ─► z_L ── one step ─► ẑ ── D ─► x̂
    x_T = teacher(LR),  z_T = E(x_T)                   a function of the input, where x_H is one of many answers

A mean over all the details that x_H may have is blur, so the adapter learns x_T. The bundled model's teacher is
Real-ESRGAN x4plus (BSD-3-Clause); without one, `--no-teacher` makes x_H the target. The model is read from --model;
what is trained lies under --out until `export`.
"""
import argparse
import copy
import json
import signal
import string
import sys
from functools import lru_cache, partial
from multiprocessing import Pool
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from tqdm import tqdm

import runs
import weights
from lab.ablation import bootstrap
from lab.pretrain import fit, load_state, tags
from linearsr.train import encoder_hash
from metrics import DISTS, LPIPS, NIQE
from metrics.perceptual import VGG16
from objective import Conditions, align_loss
from photos import degrade
from photos.pairs import held_out, photo_paths
from photos.pictures import one_line, write, write_bytes
from runs import UserError, command
from sanasr import (
    DCAE,
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
)

TAU = 900.0       # of the bundled adapter
VAL_PAIRS = 128
CROP = 192        # pixels of a view that DISTS judges
ZOOM = 1.0, 2.0   # of x_H, of the pairs that are soft
BLUR = 0.5, 4.5   # σ in pixels of x_H, of the pairs that are only blurred and reduced
QUALITY = 20, 95  # of JPEG, of those that are compressed as well
WARMUP = 200      # steps until the critic has its full weight
FASTER = 8        # times the learning rate of D, for the critic
PAIR = 320        # pixels of x_H in a pair; a view of 288 then begins at any phase of the 32-pixel grid

# --- Pairs, and the pictures that a teacher makes of them ---


def write_pairs(args):
    """OUT/pairs/{train,val}/{lr,hr}/NNNNN_{strong,mild}.png: crops of PAIR pixels and what `degrade` makes of them.

    Photos are drawn in proportion to their area; one draw in four takes the photo at half size where it is large
    enough. Every other pair is mild. Pair n depends on --seed and n alone. Files that exist are kept, so a longer run
    adds to a shorter one. Validation pairs come from the photos that `photos.held_out` names.
    """
    found = {path: weights.sha256(path) for path in tqdm(photo_paths(args.data), "reading photos", leave=False)}
    held, sizes = held_out(found.values()), {path: Image.open(path).size for path in found}
    kept = [path for path in found if min(sizes[path]) >= PAIR]
    parts = dict(val=([path for path in kept if found[path] in held], VAL_PAIRS),
                 train=([path for path in kept if found[path] not in held], args.count))
    with Pool(runs.workers(args.workers), start_worker) as pool:
        for part, (paths, count) in parts.items():
            if not paths:
                raise UserError(f"--data: no {part} photos of at least {PAIR} pixels per side")
            areas = np.array([np.prod(sizes[path]) for path in paths], float)
            job = partial(write_pair, Path(args.out) / "pairs" / part, paths, areas / areas.sum(), args.seed)
            list(tqdm(pool.imap(job, range(count), chunksize=8), f"{part} pairs", count))


def start_worker():
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def write_pair(folder, paths, shares, seed, n):
    """Pair n of `write_pairs`, into folder/lr and folder/hr; a photo is drawn by its share."""
    name = f"{n:05d}_{('strong', 'mild')[n % 2]}.png"
    if (folder / "lr" / name).exists():
        return
    rng = np.random.default_rng((seed, folder.name == "val", n))
    image = photo(paths[rng.choice(len(paths), p=shares)])
    if rng.random() < 0.25 and min(image.size) >= 2 * PAIR:
        image = image.reduce(2)
    left, top = (int(rng.integers(side - PAIR + 1)) for side in image.size)
    hr = image.crop((left, top, left + PAIR, top + PAIR))
    write(hr, folder / "hr" / name)
    write(degrade.to_image(degrade.degrade(degrade.to_tensor(hr), rng, mild=n % 2)), folder / "lr" / name)


@lru_cache(32)
def photo(path):
    return Image.open(path).convert("RGB")


def softened(x, zoom):
    """The corner of x: 3,H,W enlarged to the size of x: as soft as a camera's picture at its full size."""
    part = x[None, :, :round(x.shape[1] / zoom), :round(x.shape[2] / zoom)]
    y = F.interpolate(part, x.shape[1:], mode="bicubic", antialias=True)[0]
    return ((y.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def drawn(x, rng):
    """A drawing of the photo x: 3,H,W in [-1, 1], the same out, of 8-bit values: few colours, some with outlines, lines
    and letters on top. Drawn at twice the size, so that reducing it smooths its edges."""
    image = ImageEnhance.Color(degrade.to_image(x / 2 + 0.5)).enhance(rng.uniform(0.5, 3))
    image = ImageOps.autocontrast(image, cutoff=5).reduce(int(rng.integers(2, 6))).filter(ImageFilter.MedianFilter(5))
    image = image.resize((2 * x.shape[2], 2 * x.shape[1]), Image.Resampling.BICUBIC)
    image = image.quantize(int(rng.integers(3, 12)), dither=Image.Dither.NONE).convert("RGB")
    if rng.random() < 0.6:
        edges = ImageChops.difference(image, ImageChops.offset(image, 1, 1)).convert("L").point(lambda v: 255 * (v > 8))
        edges = ImageOps.expand(ImageOps.crop(edges, (1, 1, 0, 0)), (1, 1, 0, 0))  # the offset wraps
        wide = edges.filter(ImageFilter.MaxFilter(int(rng.choice([3, 5, 7, 9]))))
        image.paste(tuple(rng.integers(60, size=3).tolist()), mask=wide)
    pen = ImageDraw.Draw(image)
    for _ in range(rng.integers(6)):
        colour = (int(rng.choice([0, 255])),) * 3 if rng.random() < 0.5 else tuple(rng.integers(256, size=3).tolist())
        at = rng.uniform(0, image.size)
        if rng.random() < 0.4:
            letters = "".join(rng.choice(list(string.ascii_letters + string.digits + " "), rng.integers(3, 12)))
            pen.text((at[0] - 0.5 * image.width, at[1]), letters, colour, ImageFont.load_default(rng.uniform(36, 160)))
        else:
            line = np.cumsum([at, *rng.normal(0, 60, (rng.integers(1, 12), 2))], 0)
            pen.line(line.flatten().tolist(), colour, int(rng.integers(3, 24)), joint="curve")
    return degrade.to_tensor(image.reduce(2)).to(x) * 2 - 1


def blurred(x, sigmas, qualities=()):
    """What `degrade.enlarge` makes of x blurred (Gaussian, σ in pixels, one a picture) and reduced 4 times, without
    noise: x: B,3,H,W in [-1, 1], the same out, of 8-bit values. qualities: of JPEG, one a picture, 0 for none."""
    at = torch.arange(-16.0, 17, device=x.device)
    kernel = torch.softmax(-0.5 * (at / torch.as_tensor(sigmas, device=x.device)[:, None]).square(), 1)
    kernel = kernel.repeat_interleave(3, 0)[:, None, None]
    y = F.pad(x, (16, 16, 16, 16), mode="reflect").flatten(0, 1)[None]
    y = F.conv2d(F.conv2d(y, kernel, groups=len(kernel)), kernel.mT, groups=len(kernel))[0].unflatten(0, (-1, 3))
    y = ((F.avg_pool2d(y, degrade.SCALE) + 1) * 127.5).round()
    for small, quality in zip(y, qualities, strict=False):
        if quality:
            small.copy_(255 * degrade.jpeg(small.cpu() / 255, quality))
    y = F.interpolate(y, scale_factor=degrade.SCALE, mode="bicubic", antialias=True)  # with antialias it is Pillow's
    return y.round().clamp(0, 255) / 127.5 - 1


def plain_views(x_h, rng, args):
    """What x_H: B,3,H,W of plain pairs becomes first, with σ and quality of each for `blurred`: --soft of them are
    enlarged, --drawn become drawings, --jpeg are compressed, of the drawings at least four in five."""
    soft, drawings, chance = rng.random((3, len(x_h)))
    zooms, sigmas = rng.uniform(*ZOOM, len(x_h)), rng.uniform(*BLUR, len(x_h)).astype(np.float32)
    compressed = chance < np.where(drawings < args.drawn, max(0.8, args.jpeg), args.jpeg)
    x_h = x_h.clone()
    for i in range(len(x_h)):
        if soft[i] < args.soft:
            x_h[i] = softened(x_h[i], zooms[i])
        if drawings[i] < args.drawn:
            x_h[i] = drawn(x_h[i], rng)
    return x_h, sigmas, compressed * rng.integers(*QUALITY, len(x_h))


class Views:
    """Crops of VIEW pixels from the pairs of OUT/pairs/PART, `count` a pair; all pictures are in --device's memory.

    A view is (name, left, top, turn): its place, and which of the eight turns and mirrorings it takes; `where` lists
    them. The target is the teacher's picture; with --no-teacher it is x_H. A pair takes 0.6 MB, with a teacher 0.9.
    """

    VIEW = 288

    def __init__(self, args, part, count):
        self.args, self.part = args, part
        self.folder, self.target = Path(args.out) / "pairs" / part, "hr" if args.no_teacher else "teacher"
        names = sorted(p.name for p in (self.folder / self.target).glob("[0-9]*.png")
                       if (self.folder / "lr" / p.name).exists())
        if not names:
            raise UserError(f"{self.folder / self.target}: no pictures; run the stage `pairs`, then any restorer over "
                     f"{self.folder / 'lr'}, or give --no-teacher")

        def picture(path):
            image = Image.open(path)
            x = degrade.enlarge(image) if path.parent.name == "lr" else degrade.to_tensor(image) * 2 - 1
            if x.shape != (3, PAIR, PAIR):
                raise ValueError(f"{path} is {image.mode}, {image.width}×{image.height}: pictures are RGB, of {PAIR} "
                                 f"pixels a side, LR pictures of {PAIR // 4}")
            return ((x + 1) * 127.5).round().byte()
        self.pictures_of, kinds = {}, dict.fromkeys(("lr", "hr", self.target))
        with ThreadPool(runs.workers(args.workers)) as pool:
            for kind in kinds:
                paths = [self.folder / kind / name for name in names]
                found = tqdm(pool.imap(picture, paths), f"reading {part} {kind}", len(paths), leave=False)
                self.pictures_of[kind] = torch.stack(list(found)).to(args.device)
        self.where, self.index = [], {name: i for i, name in enumerate(names)}
        for name in names:
            rng = np.random.default_rng((args.seed, part == "val", int(name.split("_")[0])))
            self.where += [(name, *(4 * rng.integers((PAIR - self.VIEW) // 4 + 1, size=2)).tolist(),
                            int(rng.integers(8))) for _ in range(count)]
        self.mild = np.array(["mild" in name for name, *_ in self.where])

    def draw(self, step):
        """A step's random numbers, and the views of its batch."""
        rng = np.random.default_rng((self.args.seed, step))
        kinds = rng.random(self.args.batch) < self.args.mild
        kinds = [np.flatnonzero(self.mild == kind) for kind in kinds]
        return rng, [int(rng.choice(of if len(of) else len(self.mild))) for of in kinds]

    def pictures(self, kind, indices):
        """x_L (`lr`, enlarged), x_H (`hr`) or x_T (`teacher`) of these views: n,3,VIEW,VIEW in [-1, 1]."""
        def view(name, left, top, turn):
            x = self.pictures_of[kind][self.index[name], :, top:top + self.VIEW, left:left + self.VIEW]
            x = x.rot90(turn % 4, (1, 2))
            return x.flip(2) if turn >= 4 else x
        return torch.stack([view(*self.where[i]) for i in indices]).float() / 127.5 - 1

    def encode(self, model):
        """Encode all views once, into `z`: scaled z_L and z_T, n,2,C,VIEW/32,VIEW/32 in fp16. With --no-teacher z_T is
        z_H. They are kept in OUT/views_PART_TARGET.pt; only views of new pairs are encoded, or all by another E."""
        path, encoder = Path(self.args.out) / f"views_{self.part}_{self.target}.pt", encoder_hash(model.vae)
        state = torch.load(path, weights_only=True) if path.exists() else {}
        if state.get("encoder") != encoder:
            state = dict(where=[], z=[])
        known = dict(zip(map(tuple, state["where"]), state["z"], strict=True))
        lacking = [i for i, view in enumerate(self.where) if view not in known]
        try:
            for i in tqdm(lacking, f"encoding {self.part} views", leave=False):
                x = torch.cat([self.pictures(kind, [i]) for kind in ("lr", self.target)])
                with torch.no_grad():
                    known[self.where[i]] = (model.vae.encode(x).float() * model.scaling_factor).half().cpu()
        finally:
            if lacking:
                runs.save_state(path, dict(encoder=encoder, where=list(known), z=list(known.values())))
        self.z = torch.stack([known[view] for view in self.where])
        return self

    def latents(self, indices):
        """(z_L, z_T) of these views, each n,C,h,w in float32."""
        return self.z[indices].float().to(self.args.device).unbind(1)

    def prompts(self):
        """A line of colours for each view: what can be said of it without a tagger."""
        lines = {name: build_prompt(tags(Path(name), np.asarray(Image.open(self.folder / "lr" / name))), "appendix")
                 for name in self.index}
        return [lines[name] for name, *_ in self.where]


# --- The encoder ---


def train_encoder(args):
    """E on compressed pictures: E(x_L) is to equal what the E that it starts from makes of x_L before compression, and
    to stay what it is on all else.

    So the target is a function of the input, nearly, which x_H is not: E has no details to guess. Of eight views six
    are x_H blurred and reduced, as in the stage decoder (--soft, --jpeg, --drawn), one is a pair's x_L, one x_H. The
    loss is the L1 distance, per channel in units of what compression changes. Reports, on 16 held-out views each, the
    squared distance to the target of compressed photos and drawings, of plain ones, of the pairs' x_L and of x_H, all
    as a part of what compression changes in those photos. Writes OUT/vae, which the later stages take up.
    """
    args.no_teacher = True  # the target is made here
    model = SanaSR.from_pretrained(args.model, args.device, torch.float32, adapter=False)
    train, val = Views(args, "train", 4), Views(args, "val", 1)
    encoder = copy.deepcopy(model.vae.encoder).requires_grad_(True)

    def latents(x, encoder=model.vae.encoder):
        return encoder(x.contiguous(memory_format=torch.channels_last)).float()

    def held_out_views(**shares):
        x_h, rng = val.pictures("hr", range(min(16, len(val.where)))), np.random.default_rng(0)
        x_h, sigmas, qualities = plain_views(x_h, rng, argparse.Namespace(**{**vars(args), **shares}))
        return blurred(x_h, sigmas, qualities), blurred(x_h, sigmas)

    with torch.inference_mode():
        x_l, x_h = (val.pictures(kind, range(min(16, len(val.where)))) for kind in ("lr", "hr"))
        looks = dict(photos=held_out_views(jpeg=1, drawn=0), drawings=held_out_views(jpeg=1, drawn=1),
                     plain=held_out_views(jpeg=0, drawn=0), pairs=(x_l, x_l), clean=(x_h, x_h))
        looks = {key: (x, latents(target)) for key, (x, target) in looks.items()}
        x, target = looks["photos"]
        change = latents(x) - target
    unit, whole_change = change.abs().mean((0, 2, 3))[:, None, None].clone(), change.square().mean()

    def loss_fn(encoder, step):
        rng, pick = train.draw(step)
        x, x_l = train.pictures("hr", pick), train.pictures("lr", pick)
        clean = min(int(args.batch / 8 + rng.random()), (args.batch - 1) // 2)
        plain = slice(2 * clean, None)
        x[plain], sigmas, qualities = plain_views(x[plain], rng, args)
        x[clean:plain.start] = x_l[clean:plain.start]
        target = x.clone()
        x[plain], target[plain] = blurred(x[plain], sigmas, qualities), blurred(x[plain], sigmas)
        with torch.no_grad():
            target = latents(target)
        error = ((latents(x, encoder) - target).abs() / unit).mean((1, 2, 3))
        return error.mean(), dict(l1=error.mean().item())

    def validate(encoder):
        return {key: ((latents(x, encoder) - target).square().mean() / whole_change).item()
                for key, (x, target) in looks.items()}

    encoder = fit("encoder", encoder, loss_fn, validate, args, args.steps or 1000, args.lr or 4e-4)
    model.vae.encoder.load_state_dict(encoder.state_dict())
    save_module(model.vae, Path(args.out) / "vae", torch.float16)
    print(f"wrote {Path(args.out) / 'vae'}: the stages `adapter`, `decoder` and `control` take it up")


# --- The update ---


def update(dit, z, c, m):
    """One step (Eq. 4) of the adapted transformer through W + (α/r) B A: at this width cheaper than two products."""
    merged = {f"{name}.weight": module.weight
              + (module.adapter_scale * module.lora_B.weight @ module.lora_A.weight).view_as(module.weight)
              for name, module in lora_modules(dit).items()}
    with adapters_off(dit):
        return one_step(lambda *args: torch.func.functional_call(dit, merged, args), z,
                        torch.full((len(z),), TAU, device=z.device), c, m)


def with_encoder(model, args):
    """`model` with the autoencoder of the stage `encoder`, where OUT has one."""
    if (folder := Path(args.out) / "vae").exists():
        model.vae = DCAE.from_pretrained(folder, torch.float32, args.device)
    return model


@torch.no_grad()
def open_adapted(args, adapter):
    """--model in float32 with the encoder that OUT has, and an adapter of --rank, kept apart.

    The adapter starts from a file of the same or a lower rank, whose matrices become the first rows of A and the first
    columns of B (α = r in both); what it does not adapt, and everything where it is None, from zero output.
    """
    model = with_encoder(SanaSR.from_pretrained(args.model, args.device, torch.float32, adapter=False), args)
    torch.manual_seed(args.seed)
    inject_lora(model.dit, args.rank, targets="attn+ffn")
    if adapter:
        with open_weights(adapter) as file:
            there = set(file.keys())
            for key, p in lora_parameters(model.dit).items():
                if key not in there:
                    continue
                x = file.get_tensor(key)
                if x.shape[0] > p.shape[0] or x.shape[1] > p.shape[1]:
                    raise UserError(f"{adapter}: its rank is above --rank {args.rank}")
                p[:x.shape[0], :x.shape[1]] = x
    return model


def train_adapter(args):
    """The update of Eq. 4 in latent space: ẑ is to equal z_T, the latents of what a teacher makes of x_L.

    A mean over all the details that x_H may have is blur; z_T is a function of x_L. The loss is the L1 distance, per
    channel in units of the mean |z_T − z_L|, and a tenth of Eq. 5 with the identity as prior, which keeps each
    channel's deviation. Reports ‖ẑ − z_T‖² / ‖z_L − z_T‖² on held-out pairs. Writes OUT/adapter.safetensors.
    """
    out, device = Path(args.out), args.device
    model = open_adapted(args, args.init)
    train, val = Views(args, "train", 4).encode(model), Views(args, "val", 1).encode(model)
    z_l, z_t = (z.float() for z in train.z.unbind(1))
    unit = (z_t - z_l).abs().mean((0, 2, 3))[:, None, None].to(device)
    lines, conditions, plain = train.prompts(), Conditions(model), build_prompt([], "appendix")

    def loss_fn(dit, step):
        rng = np.random.default_rng((args.seed, step))
        pick = rng.integers(len(train.z), size=args.batch)
        z_l, z_t = train.latents(pick)
        z = update(dit, z_l, *conditions([lines[i] if rng.random() < 0.5 else plain for i in pick]))
        l1, align = ((z - z_t).abs() / unit).mean(), align_loss(z, z_t, eps=1e-3)
        return l1 + 0.1 * align, dict(l1=l1.item(), align=align.item())

    def validate(dit):
        z_l, z_t = val.latents(range(len(val.z)))
        z = update(dit, z_l, *conditions([plain] * len(z_l)))
        ratio = (z - z_t).square().mean((1, 2, 3)) / (z_l - z_t).square().mean((1, 2, 3))
        deviation = (z.std((0, 2, 3)) / z_t.std((0, 2, 3))).quantile(z.new_tensor([0.1, 0.5]))
        mild = torch.from_numpy(val.mild).to(device)
        return dict(val_strong=ratio[~mild].mean().item(), val_mild=ratio[mild].mean().item(),
                    deviation_10=deviation[0].item(), deviation_50=deviation[1].item())

    dit = fit("adapter", model.dit, loss_fn, validate, args, args.steps or 30_000, args.lr or 1e-3, weight_decay=0.0)
    save_lora(dit, out / "adapter.safetensors", dict(timestep=str(TAU), suffix="appendix"))
    print(f"wrote {out / 'adapter.safetensors'}: the stage `decoder`, and train.py --init, take it up")


# --- The decoder, and the update in front of it ---


def open_restorer(args):
    """--model in float32 with what OUT holds: the autoencoder of the stage `encoder`, the adapter of `adapter`. The
    adapter is kept apart; a model without one gets one of --rank with zero output."""
    adapter = Path(args.out) / "adapter.safetensors"
    model = SanaSR.from_pretrained(args.model, args.device, torch.float32, adapter if adapter.exists() else None, False)
    if not lora_modules(model.dit):
        torch.manual_seed(args.seed)
        inject_lora(model.dit, args.rank, targets="attn+ffn")
    with_encoder(model, args).vae.requires_grad_(False)
    return model


class Restorer(nn.Module):
    """What the stages decoder and control train: D, the LoRA matrices of the update in front of it (the control has no
    update), with encoder=True E, and with --gan a critic. x_L: B,3,H,W in [-1, 1] -> x̂ of the same shape; the first
    `clean` are not updated: D(E(x))."""

    def __init__(self, model, update, gan=False, freeze=False, encoder=False):
        super().__init__()
        self.encoder = model.vae.encoder.requires_grad_(encoder)
        self.decoder, self.scale = model.vae.decoder.requires_grad_(not freeze), model.scaling_factor
        self.critic = Critic().to(next(self.decoder.parameters()).device) if gan else None
        self.dit = model.dit.requires_grad_(False) if update else None
        for p in lora_parameters(model.dit).values() if update else ():
            p.requires_grad_(True)
        c, m = Conditions(model)([build_prompt([], "appendix")])
        self.register_buffer("c", c, persistent=False)
        self.register_buffer("m", m, persistent=False)

    def forward(self, x, clean=0):
        z = self.encoder(x.contiguous(memory_format=torch.channels_last)).float()
        if self.dit:
            n = len(z) - clean
            t = torch.full((n,), TAU, device=z.device)
            updated = one_step(self.dit, self.scale * z[clean:], t, self.c.expand(n, -1, -1), self.m.expand(n, -1))
            z = torch.cat([z[:clean], updated / self.scale])
        return self.decoder(z.contiguous(memory_format=torch.channels_last)).float()


class Critic(nn.Module):
    """Judges the VGG16 features that DISTS compares, of the first four stages: a map of verdicts from each, B,h,w, high
    where a picture looks like x_H. A critic of pixels learns next to nothing from batches of four; on features of a
    trained network it does (Sauer et al., "Projected GANs Converge Faster", NeurIPS 2021).

    Features have norm √C at every position, as in LPIPS, so that it sees faint patterns on flat walls, too.
    """

    def __init__(self, width=48):
        super().__init__()
        self.heads = nn.ModuleList()
        for c in VGG16.channels[:4]:
            layers = [nn.Conv2d(c, width, 1), nn.Conv2d(width, width, 3, 1, 1), nn.Conv2d(width, 1, 1)]
            layers = [m for conv in layers for m in (spectral_norm(conv), nn.LeakyReLU(0.2))]
            self.heads.append(nn.Sequential(*layers[:-1]))

    def forward(self, taps):
        """taps: of `DISTS.taps`, of pictures of at least 16 pixels per side."""
        return [head(F.normalize(tap, dim=1, eps=1e-3) * tap.shape[1] ** 0.5)[:, 0]
                for head, tap in zip(self.heads, taps[1:5], strict=True)]


def doubt(worse, better):
    """Σ of the heads, softplus(worse − better): B. Judged in pairs, since of one view x̂ and x_H differ in little else
    but what restoring has missed (Jolicoeur-Martineau, "The Relativistic Discriminator", ICLR 2019)."""
    return sum(F.softplus(a - b).mean((1, 2)) for a, b in zip(worse, better, strict=True))


def balanced(terms, y):
    """Σ w (∂l/∂y / ‖∂l/∂y‖) / B, the norm of every picture by itself: a gradient at y: B,C,H,W.

    terms: (w, l) each, l the losses of the pictures y: B. LPIPS and DISTS divide by features that are close to zero
    where a picture is flat: the gradient of a sky is several times that of a meadow, and either is fifty times L1's.
    """
    total = torch.zeros_like(y)
    for weight, values in terms:
        g, = torch.autograd.grad(values.sum(), y, retain_graph=True)
        total += weight * F.normalize(g.flatten(1)).view_as(g)
    return total / len(y)


def flatness(x, levels=4):
    """Where x is flat: B,3,H,W in [-1, 1] -> B,1,H,W, 1 without any texture, 1/2 where the deviation in 9×9 pixels is
    `levels` grey levels."""
    def mean(t):
        return F.avg_pool2d(F.pad(t, (4, 4, 4, 4), mode="replicate"), 9, 1)
    variance = (mean(x * x) - mean(x).square()).clamp(min=0).mean(1, keepdim=True)
    return 1 / (1 + variance * (127.5 / levels) ** 2)


def repeated(error, period=8, cells=4):
    """The norm of what of an error: B,C,H,W repeats from cell to cell, in windows of 4×4 cells of 8×8 pixels, the mean
    over windows: B. D upsamples by sub-pixels, and a critic of features likes what is sharp: without this loss it had
    D lay a lattice of dots, 4 pixels apart, over flat areas."""
    cell = F.avg_pool2d(F.pixel_unshuffle(error, period), cells, 1).unflatten(1, (-1, period * period))
    return ((cell - cell.mean(2, keepdim=True)).square().mean((1, 2)) + 2.5e-6).sqrt().mean((1, 2))


def train_decoder(args):
    """The stages decoder and control: D on ẑ of degraded photos, the adapter that makes ẑ, and with --encoder E.

    Losses, each balanced (see there): --lpips of LPIPS (AlexNet), 0.2 L1 and 0.2 L1 where the target is flat, with
    --dists 1 DISTS of a crop against x_H, with --gan its weight of a critic's verdict on that crop, next to x_H's, and
    0.3 of what of the error is a lattice. LPIPS and DISTS disagree about texture: at equal weights LPIPS wins, and
    DISTS gets worse. LPIPS sees both pictures shifted by 0 to 7 pixels, so that no grid hides from AlexNet's stride of
    4. An eighth of the views is clean, D(E(x_H)) against x_H, so that the autoencoder stays one. Of the others --plain
    are x_H blurred and reduced: `degrade` always adds noise and compression, a good camera's picture has neither; in
    --soft of these x_H is enlarged first, since photos that were made smaller are sharper than a camera's; --jpeg of
    them are compressed; and --drawn of them become drawings, since photos have few hard edges, around which compression
    rings most. --freeze trains the adapter alone, through the frozen D. The control has no update: D(E(x_L)).

    Reports LPIPS and PSNR (RGB) against x_H on 48 held-out pairs, of D(E(x_H)), of plain, soft and compressed ones,
    with --dists DISTS on a third and the NIQE of all plain ones side by side. Writes OUT/finish.pt, or control.pt.
    """
    model, device = open_restorer(args), args.device
    train, val = Views(args, "train", 4), Views(args, "val", 1)
    lpips = LPIPS.from_pretrained("alex").to(device)
    dists, niqe = DISTS.from_pretrained().to(device) if args.dists else None, NIQE(device)
    torch.manual_seed(args.seed)
    restorer = Restorer(model, args.stage != "control", args.gan > 0, args.freeze, args.encoder)
    if args.critic:
        state = runs.load_state(args.critic, "no such file", "give another --critic", device).get("model", {})
        try:
            restorer.critic.load_state_dict({k[7:]: x for k, x in state.items() if k.startswith("critic.")})
        except RuntimeError:
            raise ValueError(f"{args.critic} has no critic of this kind: give a finish.pt that --gan made") from None

    def loss_fn(restorer, step):
        rng, pick = train.draw(step)
        clean = int(args.batch / 8 + rng.random()) * (not args.freeze)
        plain = np.flatnonzero(rng.random(args.batch) < args.plain)
        x_h, x_l, x = (train.pictures(kind, pick) for kind in ("hr", "lr", train.target))
        if len(plain):
            x_h[plain], sigmas, qualities = plain_views(x_h[plain], rng, args)
            x[plain] = x_h[plain]  # the teacher saw another picture of them
            x_l[plain] = blurred(x_h[plain], sigmas, qualities)
        x_l[:clean] = x[:clean] = x_h[:clean]
        y = restorer(x_l, clean)
        leaf = y.detach().requires_grad_()
        (dy, dx), error = rng.integers(8, size=2), (leaf - x).abs()
        side = min(CROP, Views.VIEW)
        top, left = rng.integers(Views.VIEW - side + 1, size=2)
        crop, real = (t[:, :, top:top + side, left:left + side] for t in (leaf, x_h))
        terms = dict(l1=(0.2, error.mean((1, 2, 3))), flat=(0.2, (error * flatness(x)).mean((1, 2, 3))),
                     lpips=(args.lpips, lpips(leaf[:, :, dy:, dx:], x[:, :, dy:, dx:])))
        if dists:
            taps, real = dists.taps(crop / 2 + 0.5), dists.taps(real / 2 + 0.5)
            terms["dists"] = 1, dists.compare(taps, real)
        if args.gan:
            terms["grid"] = 0.3, repeated(leaf - x)
            true = restorer.critic(real)
            weight = args.gan if args.critic else args.gan * min(1, step / WARMUP)
            terms["gan"] = weight, doubt([t.detach() for t in true], restorer.critic(taps))
        loss = (y * balanced(terms.values(), leaf)).sum()
        parts = {key: values.mean().item() for key, (_, values) in terms.items()}
        if args.gan:
            judged = doubt(restorer.critic([t.detach() for t in taps]), true).mean()
            loss, parts["critic"] = loss + judged, judged.item()
        return 0.02 * loss, parts

    def validate(restorer):
        scores, plain = {}, []

        def note(kind, x_l, x, clean=0):
            y = restorer(x_l, clean).clamp(-1, 1)
            scores.setdefault(f"lpips_{kind}", []).append(lpips(y, x).item())
            scores.setdefault(f"psnr_{kind}", []).append(-10 * (y - x).square().mean().div(4).log10().item())
            if dists and i % 6 < 2:
                scores.setdefault(f"dists_{kind}", []).append(dists(y / 2 + 0.5, x / 2 + 0.5).item())
            return y
        for i in range(min(48, len(val.where))):
            x_h = val.pictures("hr", [i])
            note("mild" if val.mild[i] else "strong", val.pictures("lr", [i]), x_h)
            if i % 3 == 0:
                plain.append(note("plain", blurred(x_h, [sum(BLUR) / 2]), x_h))
                soft = softened(x_h[0], sum(ZOOM) / 2)[None]
                note("soft", blurred(soft, [sum(BLUR) / 2]), soft)
                note("jpeg", blurred(soft, [sum(BLUR) / 2], [sum(QUALITY) // 2]), soft)
                note("clean", x_h, x_h, 1)
        if dists:
            scores["niqe_plain"] = niqe(torch.cat(plain, 3) / 2 + 0.5).tolist()
        return {k: sum(v) / len(v) for k, v in scores.items()}

    fit("control" if args.stage == "control" else "finish", restorer, loss_fn, validate, args, args.steps or 20_000,
        args.lr or 1e-4, factors=dict(critic=FASTER))


def take(restorer, state, share):
    """Move a restorer that is as --model has it by `share` of the way to the averaged weights of finish.pt or
    control.pt; the critic's are not needed."""
    for key, x in restorer.state_dict().items():
        if key not in state["ema"] or state["ema"][key].shape != x.shape:
            raise ValueError(f"{key} of the state is not that of --model: give the --model and --rank of its training")
        x.lerp_(state["ema"][key], share)
    return restorer.eval()


@torch.inference_mode()
def compare(args):
    """What the update is worth: LPIPS of D(ẑ) less that of D(z_L), and less the control's, on all held-out pairs.

    Strong and mild pairs apart, each with the 95 % interval of 10 000 bootstrap means. Reads finish.pt and control.pt,
    EMA weights, and says after how many steps each was saved; without finish.pt --model is taken as it is, without
    control.pt its column is missing.
    """
    out, scores = Path(args.out), {}
    lpips, val = LPIPS.from_pretrained("alex").to(args.device), Views(args, "val", 1)
    for name in ("finish", "control"):
        there = (out / f"{name}.pt").exists()
        if name == "control" and not there:
            continue
        model = open_restorer(args)
        restorer = Restorer(model, name == "finish").eval()
        if there:
            state = load_state(out / f"{name}.pt", args.device)
            print(f"{name}: {state['step']} steps")
            take(restorer, state, args.share)
        else:
            print(f"{name}: {args.model} as it is")
        for row in {"finish": ("D(ẑ)", "D(z_L)"), "control": ("control",)}[name]:
            for i in tqdm(range(len(val.where)), row, leave=False):
                y = restorer(val.pictures("lr", [i]), clean=row == "D(z_L)").clamp(-1, 1)
                scores.setdefault(row, []).append(lpips(y, val.pictures("hr", [i])).item())
    for kind, chosen in (("strong", ~val.mild), ("mild", val.mild)):
        of = {row: np.array(values)[chosen] for row, values in scores.items()}
        print(f"{kind}, {chosen.sum()} pairs: " + ", ".join(f"{row} {v.mean():.4f}" for row, v in of.items()))
        for other in list(of)[1:]:
            gain = of["D(ẑ)"] - of[other]
            low, high = bootstrap(gain)
            print(f"    D(ẑ) − {other}: {gain.mean():+.4f}  [{low:+.4f}, {high:+.4f}]")


def export(args):
    """The autoencoder with finish.pt's averaged decoder, and the adapter, in fp16, into --model; the rest stays.

    With --share they are averaged with what --model has: between two good states of one training lies a better one
    (Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022).
    """
    out, target, model = Path(args.out), weights.folder(args.model), open_restorer(args)
    restorer = take(Restorer(model, True), load_state(out / "finish.pt", args.device), args.share)
    save_module(model.vae, target / "vae", torch.float16)
    save_lora(restorer.dit, target / "adapter.safetensors", dict(timestep=str(TAU), suffix="appendix"),
              {key: x.half() for key, x in lora_parameters(restorer.dit).items()})
    path = target / "provenance.json"
    history = json.loads(path.read_text()) if path.exists() else {}
    for name, title in (("encoder", "encoder against compression"), ("adapter", "adapter towards the teacher"),
                        ("finish", "adapter and decoder in one")):
        if (out / f"{name}.pt").exists():
            one = load_state(out / f"{name}.pt")
            history[title] = dict(steps=one["step"], hours=round(one["seconds"] / 3600, 2))
    write_bytes(path, json.dumps(history, indent=2) + "\n")
    print(f"wrote {target}: {sum(f.stat().st_size for f in target.rglob('*') if f.is_file()) / 1e6:.1f} MB")


STAGES = dict(pairs=write_pairs, encoder=train_encoder, adapter=train_adapter, decoder=train_decoder,
              control=train_decoder, compare=compare, export=export)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("stage", choices=list(STAGES))
    add("--data", nargs="+", metavar="DIR", help="pairs: folders of clean photos")
    add("--count", type=int, default=4000, metavar="N", help="pairs: for training (default %(default)s)")
    add("--out", default="runs/pretrain", metavar="DIR", help="where pairs, states and logs go (default %(default)s)")
    add("--model", default="embedded", metavar="NAME|FOLDER", help="the model to finish (default %(default)s)")
    add("--init", metavar="FILE", help="adapter: start from this adapter instead of from zero output")
    add("--no-teacher", action="store_true", help="the target is x_H, not the teacher's picture")
    add("--dists", action="store_true", help="decoder, control: DISTS as a loss, too; takes VGG16, and twice the time")
    add("--rank", type=int, default=64, help="of the adapter, on attention and FFN (default %(default)s)")
    add("--mild", type=float, default=0.5, metavar="SHARE", help="of mild pairs in a batch (default %(default)s)")
    add("--plain", type=float, default=0.5, metavar="SHARE", help="decoder, control: of LR pictures that are x_H, "
        "blurred and reduced (default %(default)s)")
    add("--soft", type=float, default=0.0, metavar="SHARE", help="all but the adapter: of these, with x_H "
        "first enlarged 1 to 2 times (default %(default)s)")
    add("--jpeg", type=float, default=0.0, metavar="SHARE", help="all but the adapter: of the plain ones, that "
        "are compressed, too (default %(default)s)")
    add("--drawn", type=float, default=0.0, metavar="SHARE", help="all but the adapter: of the plain ones, that "
        "become drawings; of these at least four in five are compressed (default %(default)s)")
    add("--encoder", action="store_true", help="decoder, control: train E, too")
    add("--freeze", action="store_true", help="decoder: train the adapter alone, through the frozen decoder")
    add("--lpips", type=float, default=0.25, metavar="WEIGHT", help="decoder, control: of LPIPS (default %(default)s)")
    add("--gan", type=float, default=0.0, metavar="WEIGHT", help="decoder, control: of a critic that is trained "
        "beside (default: none)")
    add("--critic", metavar="FILE", help="decoder, control: finish.pt of an earlier training, whose critic goes on")
    add("--share", type=float, default=1.0, metavar="S", help="compare, export: of the trained weights in the average "
        "with those of --model (default %(default)s)")
    add("--workers", type=int, default=16, help="processes that make pairs, threads that read them; never more than "
        "there are cores (default %(default)s)")
    add("--steps", type=int, help="of the stage; the learning rate decays over the last quarter")
    add("--batch", type=int, default=4, help="views a step (default %(default)s)")
    add("--lr", type=float, help="peak learning rate (default: the stage's own)")
    add("--ema", type=float, default=0.999, help="decay of the averaged weights (default %(default)s)")
    add("--validate-every", type=int, default=500, metavar="N", help="steps (default %(default)s)")
    add("--dtype", choices=["fp32", "bf16"], default="fp32", help="bf16: autocast, faster where the processor has it")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if args.gan and not args.dists:
        parser.error("--gan: its critic judges the features of DISTS; give --dists, too")
    if args.critic and not args.gan:
        parser.error("--critic: give the weight of its verdict, too: --gan 0.5")
    if args.stage == "encoder" and not args.jpeg:
        parser.error("encoder: it unlearns compression; give the share of compressed views, too: --jpeg 0.75")
    if args.stage == "pairs" and not args.data:
        parser.error("--data is needed: a folder of clean photos")
    return args


@command
def main(argv=None):
    args = parse(argv)
    try:
        STAGES[args.stage](args)
    except KeyboardInterrupt:
        sys.exit("interrupted; what was made is kept, the same command goes on")
    except (ValueError, OSError, FloatingPointError, weights.Unavailable) as error:
        raise UserError(f"{one_line(error)}")


if __name__ == "__main__":
    main()
