"""Trains the autoencoder to restore: encoder and decoder end to end on degraded photos, one encoder for all.

    python train.py --learn autoencoder --data ./hq --name pixels --perceptual 0 --steps 2500
    python train.py --learn autoencoder --data ./hq --name sharp --init runs/pixels/vae --teacher DIR --steps 20000
    python train.py --learn autoencoder --data ./hq --name latent --init runs/sharp/vae --latent --steps 4000
    python train.py --learn autoencoder --data ./hq --name texture --init runs/latent/vae --texture 0.3 --steps 5000

    x_H ── one of four kinds (photos/kinds.py) ─► x_L;     x̂ = D(E(x_L)) ─► x_H, or the teacher's picture of x_L
    one view in eight is clean: D(E(x_H)) ─► x_H
    L = L1 + repeated(x̂ − x_H) + p·LPIPS (AlexNet, shifted) + w·(DISTS(x̂, x_H) + doubt(x̂, x_H) / 50)
        + 0.02·drift, how far E(x_H) of the clean views is from where it was at the start
    --teacher DIR: LPIPS of the teacher's pictures alone; towards x_H it has D draw canvas and hatches (T63, T74)
    --adapter FILE: x̂ = D(ẑ), ẑ what the model's transformer with this adapter makes of E(x_L); E(x_H) stays as it is
    --latent: L = how far E(x_L) is from where E(x_H) was at the start; E alone learns, twice the views a second

The paper's introduction asks for a degradation-aware autoencoder; its §3.1 takes SANA's as it is. The official weights
stay as they are; how the bundled model's were trained: weights/embedded/README.md. The order matters: pixels
until structure stands, then the pictures of a teacher, a function of x_L where x_H is one of many answers, then texture
by DISTS and a critic, which see x_H. Of that the decoder alone learns: a prior trained on E(x_H) stays valid. The
teacher is any restorer that was run over runs/pairs/KEY/lr and wrote pictures of the same names. What has no picture
there learns x_H.
Leaves in runs/NAME: vae/ (EMA weights, an official folder), samples/, log.csv, curves.png, state.pt (--resume).
"""
import hashlib
import json
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.data import Dataset

import weights
from fast import load_model
from metrics import DISTS, LPIPS
from metrics.perceptual import VGG16
from objective import judged
from photos.degrade import DEGRADE_VERSION, SCALE, enlarge, to_image, to_tensor
from photos.kinds import KINDS, PAIRS_VERSION, SIDE, write_pairs
from photos.pairs import digest, scan, split
from photos.pictures import read
from runs import DTYPES, UserError, batches, from_first, ranks, set_flags
from sanasr import DCAE, build_prompt, conditioning, one_step
from trainer import Trainer, holding
from weights.files import fingerprint, save_module

WINDOW = 224            # pixels of a view: it begins at any phase of the 32-pixel grid
ALIGNED = 0.3           # share of views that begin where the picture does, as the blocks of a JPEG do
REPEATED = 1.0          # weight of `repeated`
DRIFT = 0.02            # weight of `Restoration.drift`: the priors of the first encoder's latents stay of use
DOUBT = 1 / 50          # weight of the critic's verdict in --texture
ALONE = 2000            # views that the critic learns from before D hears it (docs/training.md, T72)
WARMUP, DECAY, EMA = 50, 0.25, 0.998
HELD, VAL = 256, 64     # held-out pairs that are made, of all kinds alike, and those that validations see

# --- Views of the pairs ---


class Views(Dataset):
    """View n of the endless stream: x_L and its target, 3,WINDOW,WINDOW in [-1, 1], a function of (seed, n)."""

    def __init__(self, folder, names, teacher, seed, clean, real=False):
        self.folder, self.names, self.seed, self.clean, self.real = Path(folder), names, seed, clean, real
        self.teacher = Path(teacher) if teacher else None

    def __getitem__(self, n):
        rng = np.random.default_rng((self.seed, 1, n))
        name = self.names[int(rng.integers(len(self.names)))]
        clean = rng.random() < self.clean
        taught = not clean and self.teacher is not None and (self.teacher / name).is_file()
        left, top = (0, 0) if rng.random() < ALIGNED else rng.integers((SIDE - WINDOW) // SCALE + 1, size=2).tolist()
        turn, flip = int(rng.integers(4)), rng.random() < 0.5

        def view(path, scale=SCALE):
            box = [scale * v for v in (left, top, left + WINDOW // SCALE, top + WINDOW // SCALE)]
            image = read(path).rgb.crop(box)
            x = (enlarge(image) if scale == 1 else to_tensor(image) * 2 - 1).rot90(turn, (1, 2))
            return (x.flip(2) if flip else x).contiguous()
        x_h = view((self.teacher if taught else self.folder / "hr") / name)
        sample = {"x_H": x_h, "x_L": x_h if clean else view(self.folder / "lr" / name, 1), "name": name,
                  "clean": clean, "seen": taught or self.teacher is None, "shift": rng.integers(32, size=2),
                  "late": n >= ALONE}
        return sample | ({"real": view(self.folder / "hr" / name) if taught else x_h} if self.real else {})


# --- The critic ---


class Critic(nn.Module):
    """Judges VGG16's features of the first three stages: from each a map of verdicts, B,h,w, high where a picture is
    like x_H.

    A critic of pixels learns next to nothing from small batches; on features of a trained network it does
    (Sauer et al., "Projected GANs Converge Faster", NeurIPS 2021).

    Features have norm √C at every position, as in LPIPS, so that it sees faint patterns on flat walls, too.
    """

    STAGES, SIDE = 3, 128  # pixels of the crops that it sees

    def __init__(self, width=48):
        super().__init__()
        self.heads = nn.ModuleList()
        for c in VGG16.channels[:self.STAGES]:
            layers = [nn.Conv2d(c, width, 1), nn.Conv2d(width, width, 3, 1, 1), nn.Conv2d(width, 1, 1)]
            layers = [m for conv in layers for m in (spectral_norm(conv), nn.LeakyReLU(0.2))]
            self.heads.append(nn.Sequential(*layers[:-1]))

    def forward(self, taps):
        """taps: VGG16's features of pictures of at least 8 pixels per side."""
        return [head(F.normalize(tap, dim=1, eps=1e-3) * tap.shape[1] ** 0.5)[:, 0]
                for head, tap in zip(self.heads, taps, strict=True)]


def doubt(worse, better):
    """Σ of the heads, softplus(worse − better): scalar. Judged in pairs, since of one view x̂ and x_H differ in little
    else but what restoring has missed (Jolicoeur-Martineau, "The Relativistic Discriminator", ICLR 2019)."""
    return sum(F.softplus(a - b).mean() for a, b in zip(worse, better, strict=True))


def repeated(error, period=8, cells=4):
    """The norm of what of an error: B,C,H,W repeats from cell to cell, in windows of 4×4 cells of 8×8 pixels, the mean
    over windows. D upsamples by sub-pixels. Without this loss AlexNet's LPIPS had it weave a canvas over flat areas,
    and a critic of features lay a lattice of dots, 4 pixels apart."""
    cell = F.avg_pool2d(F.pixel_unshuffle(error, period), cells, 1).unflatten(1, (-1, period * period))
    return ((cell - cell.mean(2, keepdim=True)).square().mean((1, 2)) + 2.5e-6).sqrt().mean()


# --- The training ---


def decoder_alone(args):
    """Whether E is frozen: clean latents then stay where they are, and the prior valid."""
    return bool(args.texture or args.adapter)


class Restoration:
    """The loss of a batch: {"loss", "l1", "lpips", "dists", "doubt", "critic", "drift"}, those that have a weight."""

    def __init__(self, args, net):
        self.args, self.net, self.critic = args, net, None
        self.origin = deepcopy(net).requires_grad_(False) if not decoder_alone(args) else None
        self.judge = LPIPS.from_pretrained("alex").to(args.device)
        if args.texture:
            self.critic, self.dists = Critic().to(args.device), DISTS.from_pretrained().to(args.device)
        self.model = None
        if args.adapter:
            self.model = load_model(args.model, args.device, torch.float32, args.adapter)
            self.prompt = self.model.encode_prompt(build_prompt("", conditioning(self.model.metadata)["suffix"]))

    def autocast(self):
        return torch.autocast(self.args.device.type, DTYPES[self.args.dtype], self.args.dtype != "fp32")

    def encode(self, x, clean):
        """E(x), or with --adapter ẑ of it where `clean`: B is False."""
        with self.autocast():
            z = self.net.encode(x)
            if not self.model:
                return z
            with torch.no_grad():
                s, t = self.model.scaling_factor, torch.full((len(x),), self.model.timestep, device=x.device)
                c, m = (v.expand(len(x), *v.shape[1:]) for v in self.prompt)
                return torch.where(clean[:, None, None, None], z, one_step(self.model.dit, s * z.float(), t, c, m) / s)

    def restore(self, x, clean=False):
        z = self.encode(x, torch.full((len(x),), clean, device=x.device))
        with self.autocast():
            return self.net.decode(z).float()

    def drift(self, z, x_h):
        """‖z − E₀(x_H)‖² / ‖E₀(x_H)‖², E₀ the encoder that the training began with: scalar."""
        with torch.no_grad(), self.autocast():
            z0 = self.origin.encode(x_h).float()
        return (z.float() - z0).square().mean() / z0.square().mean()

    def texture(self, x, x_h, shift):
        """(DISTS, doubt of x, doubt of x_H): scalars, by a crop of half of the views, the other half the next time.
        The second's gradient is for x, the third's for the critic."""
        half = slice(shift[0] % 2, None, 2) if len(x) > 1 else slice(None)
        top, left = (shift * (WINDOW - Critic.SIDE) // 31).tolist()
        x, x_h = (v[half, :, top:top + Critic.SIDE, left:left + Critic.SIDE] / 2 + 0.5 for v in (x, x_h))
        with self.autocast():
            taps = self.dists.taps(x)
            with torch.no_grad():
                target = self.dists.taps(x_h)
        taps, target = ([tap.float() for tap in v] for v in (taps, target))
        seen, real = (v[1:1 + Critic.STAGES] for v in (taps, target))
        true = self.critic(real)
        return (self.dists.distance(taps, target).mean(), doubt([v.detach() for v in true], self.critic(seen)),
                doubt(self.critic([v.detach() for v in seen]), true))

    def __call__(self, batch):
        batch = {k: v.to(self.args.device) for k, v in batch.items() if torch.is_tensor(v)}
        x_l, x_h, clean = batch["x_L"], batch["x_H"], batch["clean"]
        z = self.encode(x_l, clean)
        if self.args.latent:
            drift = self.drift(z, x_h)
            return {"loss": drift, "drift": drift.detach()}
        with self.autocast():
            y = self.net.decode(z).float()
        leaf = y.detach().requires_grad_()  # the critic must not learn from what moves D
        terms = {"l1": (leaf - x_h).abs().mean()}
        weighted = terms["l1"] + REPEATED * repeated(leaf - x_h)
        if self.args.perceptual:
            top, left = batch["shift"][0].tolist()
            x, y_h = (v[batch["seen"], :, top:, left:] for v in (leaf.clamp(-1, 1), x_h))
            terms["lpips"] = self.judge(x, y_h).sum() / len(leaf) if len(x) else leaf.new_zeros(())
            weighted = weighted + self.args.perceptual * terms["lpips"]
        verdict = 0
        if self.critic:
            terms["dists"], terms["doubt"], verdict = self.texture(leaf, batch["real"], batch["shift"][0])
            weighted = weighted + self.args.texture * (terms["dists"] + DOUBT * batch["late"].all() * terms["doubt"])
            terms["critic"] = verdict
        gradient, = torch.autograd.grad(weighted, leaf)
        loss = (y * gradient).sum() + verdict
        if self.origin and clean.any():
            drift = DRIFT * self.drift(z[clean], x_h[clean])
            loss, weighted = loss + drift, weighted + drift.detach()
        return {"loss": loss + (weighted - loss).detach()} | terms  # the value is the weighted sum, the gradient loss's

    def validate(self, pairs):
        """({column: score}, a grid x_L | x̂ | x_H of two of each kind); pairs: [(kind, lr, hr)]. val_clean:
        of D(E(x_H))."""
        scores, rows = {}, []
        self.net.eval()
        for kind, lr, hr in pairs:
            x_l, x_h = (x[None].to(self.args.device) for x in (enlarge(lr), to_tensor(hr) * 2 - 1))
            _, psnr, lpips, row = judged(self.restore(x_l), x_l, x_h, self.judge)
            scores.setdefault(f"val_{kind}", []).append(lpips)
            scores.setdefault("val_psnr", []).append(psnr)
            if len(scores[f"val_{kind}"]) <= 2:
                rows.append(row)
            if kind == "soft":
                clean = self.restore(x_h, clean=True).clamp(-1, 1)
                scores.setdefault("val_clean", []).append(self.judge(clean, x_h).item())
        self.net.train()
        means = {name: sum(values) / len(values) for name, values in scores.items()}
        means["val_lpips"] = sum(sum(scores[f"val_{kind}"]) for kind in KINDS if f"val_{kind}" in scores) / len(pairs)
        return means, to_image(torch.cat(rows, 1))


def prepare_pairs(args):
    """(folder of the pairs, names to train on, held-out pairs [(kind, lr, hr)]); made where they are missing."""
    photos, report = scan(args.data, SIDE, args.run / "data.json", args.workers)
    photos, held = split(photos)
    if not held:
        raise UserError("--data: at least two photos are needed, one of them to be held out")
    key = json.dumps([digest(photos), digest(held), PAIRS_VERSION, DEGRADE_VERSION])
    folder = Path("runs") / "pairs" / hashlib.sha256(key.encode()).hexdigest()[:12]
    names = write_pairs(folder, photos, args.pairs, 0, args.workers)
    even = dict.fromkeys(KINDS, 1 / len(KINDS))
    val = write_pairs(folder / "val", held, HELD, 1, args.workers, even)
    print(f"{report}; {len(held)} held out; {len(names)} pairs in {folder}", flush=True)
    pairs = [(name.split("_")[1][:-4], *(read(folder / "val" / part / name).rgb for part in ("lr", "hr")))
             for name in val[:VAL]]
    return folder, names, pairs


def taught(args, folder, names):
    """How many of the pairs have a teacher's picture. Raises UserError where none has, or one is of another size."""
    found = [path for path in (Path(args.teacher) / name for name in names) if path.is_file()]
    if not found:
        raise UserError(f"--teacher {args.teacher} holds no picture of a name as in {folder / 'lr'}, {names[0]} say")
    if (size := read(found[0]).rgb.size) != (SIDE, SIDE):
        raise UserError(f"{found[0]} is {size[0]}×{size[1]}; a teacher's picture is {SIDE}×{SIDE}")
    print(f"{len(found)} of the pairs have a teacher's picture", flush=True)
    return len(found)


def train(args):
    """The whole run, as the module's docstring says. Returns the exit code."""
    if args.latent and decoder_alone(args):
        raise UserError("--latent: the encoder alone learns, --texture and --adapter: the decoder alone; leave out one")
    set_flags(repeatable=True, tf32=True)
    world = ranks()[1]
    torch.manual_seed(args.seed)
    first = Path(args.init or weights.folder(args.model) / "vae")
    net = DCAE.from_pretrained(first, torch.float32, args.device)
    net.train().requires_grad_(True).to(memory_format=torch.channels_last)
    net.encoder.requires_grad_(not decoder_alone(args))
    net.decoder.requires_grad_(not args.latent)
    loss = Restoration(args, net)
    folder, names, pairs = from_first(lambda: prepare_pairs(args))
    parameters = {key: p for key, p in net.named_parameters() if p.requires_grad}
    if loss.critic:
        parameters |= {f"critic.{key}": p for key, p in loss.critic.named_parameters()}
    settings = {key: getattr(args, key) for key in SETTINGS} | {
        "the first autoencoder": fingerprint(first), "the adapter": args.adapter and weights.sha256(args.adapter),
        "the number of teacher's pictures": args.teacher and from_first(lambda: taught(args, folder, names)),
        "the pairs": folder.name, "the constants": [WINDOW, ALIGNED, REPEATED, DRIFT, DOUBT, ALONE, WARMUP, DECAY, EMA],
        "--batch times the processes": args.batch * world}

    def export(step, averaged):
        with holding(trainer.parameters, averaged.values()):
            save_module(net, args.run / "vae", torch.float16)

    def training_batches(first, signals):
        views = Views(folder, names, args.teacher, args.seed, 1 / 8, real=bool(args.texture))
        return batches(views, args.batch, range(first, args.steps), args.workers, signals)

    watched = ["val_lpips", *(f"val_{kind}" for kind in KINDS), "val_clean", "val_psnr"]
    terms = ["l1"] + ["lpips"] * bool(args.perceptual) + ["dists", "doubt", "critic"] * bool(args.texture)
    trainer = Trainer(args.run, parameters, loss, settings, options=args.options, steps=args.steps, every=args.every,
                      lr=args.lr, device=args.device, samples=args.batch * world, watched=watched, warmup=WARMUP,
                      terms=["drift"] if args.latent else terms, decay=DECAY, betas=(0.9, 0.99), weight_decay=0.0,
                      ema=EMA, buffers=loss.critic.buffers() if loss.critic else (), export=export,
                      validate=partial(loss.validate, pairs), resume=f"`--name {args.name} --resume` resumes")
    return trainer.run(training_batches)


# what a step computes depends on these
SETTINGS = ("data", "init", "model", "teacher", "adapter", "pairs", "perceptual", "texture", "latent", "lr", "dtype",
            "seed")
