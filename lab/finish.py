"""Finish the carried model on degraded photos: encoder and adapter towards a teacher, then the decoder behind both.

    python -m lab.finish pairs --data ./hq --count 4000       # runs/pretrain/pairs/{train,val}/{lr,hr}
    # any restorer now fills pairs/{train,val}/teacher: pictures of the LR pictures, of the same names, 4× the size
    python -m lab.finish encoder --batch 4 --lr 5e-4          # E towards the teacher
    python -m lab.finish adapter --init weights/embedded/adapter.safetensors --rank 64 --batch 16
    python -m lab.finish decoder --dists --no-teacher         # D on ẑ; Ctrl-C saves, the same line goes on
    python -m lab.finish control --dists --no-teacher         # the same without an update
    python -m lab.finish compare                              # what the update is worth, with intervals
    python -m lab.finish export                               # into weights/embedded

    x_L ── E ─► z_L ── one step ─► ẑ ── D ─► x̂         each stage trains one of the three
    x_T = teacher(LR),  z_T = E(x_T)                   a function of the input, where x_H is one of many answers

A mean over all the details that x_H may have is blur, so E and the adapter learn x_T. The carried model's teacher is
Real-ESRGAN x4plus (BSD-3-Clause); without one, `--no-teacher` makes x_H the target. Stages take up the pairs whose
teacher's picture has come since. The model is read from --model; what is trained lies under --out until `export`.
"""
import argparse
import copy
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from tqdm import tqdm

import degrade
import weights
from lab.pretrain import fit, load_state, tags
from metrics import DISTS, LPIPS
from objective import Conditions, align_loss
from photos import held_out, photo_paths
from pictures import whole, write, write_bytes
from runs import save_state
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
    save_tensors,
)

TAU = 900.0       # of the carried adapter
VAL_PAIRS = 128
CROP = 192        # pixels of a view that DISTS judges
BLUR = 0.5, 4.5   # σ in pixels of x_H, of the pairs that are only blurred and reduced
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
    parts = dict(train=([path for path in kept if found[path] not in held], args.count),
                 val=([path for path in kept if found[path] in held], VAL_PAIRS))
    for part, (paths, count) in parts.items():
        if not paths:
            sys.exit(f"error: --data: no {part} photos of at least {PAIR} pixels per side")
        folder, areas = Path(args.out) / "pairs" / part, np.array([np.prod(sizes[path]) for path in paths], float)
        for n in tqdm(range(count), f"{part} pairs"):
            name = f"{n:05d}_{('strong', 'mild')[n % 2]}.png"
            if (folder / "lr" / name).exists():
                continue
            rng = np.random.default_rng((args.seed, part == "val", n))
            image = Image.open(paths[rng.choice(len(paths), p=areas / areas.sum())]).convert("RGB")
            if rng.random() < 0.25 and min(image.size) >= 2 * PAIR:
                image = image.reduce(2)
            left, top = (int(rng.integers(side - PAIR + 1)) for side in image.size)
            hr = image.crop((left, top, left + PAIR, top + PAIR))
            write(hr, folder / "hr" / name)
            write(degrade.to_image(degrade.degrade(degrade.to_tensor(hr), rng, mild=n % 2)), folder / "lr" / name)


class Views:
    """Crops of VIEW pixels from the pairs of OUT/pairs/PART, with their latents, which are encoded once.

    Each pair gives `count` views. A view is (name, left, top, turn): its place, and which of the eight turns and
    mirrorings it takes. `where` lists the views; `z` holds their scaled z_L and z_T, n,2,C,VIEW/32,VIEW/32 in fp16.
    The target is the teacher's picture; with --no-teacher it is x_H, and z_T is z_H. Latents are kept in
    OUT/views_PART_TARGET.pt. `reload` adds the views of pairs that have come since.
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
            save_state(path, state)
        if not state["where"]:
            sys.exit(f"error: {self.folder / self.target}: no pictures; run the stage `pairs`, then any restorer over "
                     f"{self.folder / 'lr'}, or give --no-teacher")
        self.where, self.z = state["where"], torch.stack(state["z"])

    def draw(self, step):
        """A step's random numbers, and the views of its batch; every 500th step looks for new pairs."""
        if step % 500 == 0:
            self.reload()
        rng, mild = np.random.default_rng((self.args.seed, step)), np.array(["mild" in name for name, *_ in self.where])
        kinds = rng.random(self.args.batch) < self.args.mild
        kinds = [np.flatnonzero(mild == kind) for kind in kinds]
        return rng, [int(rng.choice(of if len(of) else len(mild))) for of in kinds]

    @torch.inference_mode()
    def encode(self, x):
        return (self.model.vae.encode(x.to(self.args.device)).float() * self.model.scaling_factor).half().cpu()

    def picture(self, kind, view, blur=0.0):
        """x_L (`lr`, enlarged), x_H (`hr`) or x_T (`teacher`) of a view: 3,VIEW,VIEW in [-1, 1].

        blur: instead of the pair's LR picture take x_H, blurred by so many pixels (σ) and reduced, without noise.
        """
        name, left, top, turn = view
        image = Image.open(self.folder / ("hr" if blur else kind) / name).convert("RGB")
        if blur:
            image = image.filter(ImageFilter.GaussianBlur(blur)).reduce(4)
        x = degrade.enlarge(image) if kind == "lr" else degrade.to_tensor(image) * 2 - 1
        x = x[:, top:top + self.VIEW, left:left + self.VIEW]
        x = x.rot90(turn % 4, (1, 2))
        return x.flip(2) if turn >= 4 else x

    def pictures(self, kind, indices, blurs=None):
        views = zip((self.where[i] for i in indices), blurs or [0.0] * len(indices), strict=True)
        return torch.stack([self.picture(kind, view, blur) for view, blur in views]).to(self.args.device)

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


# --- The encoder ---


def train_encoder(args):
    """E on degraded photos: E(x_L) is to equal z_T, and E(x_H) to stay z_H, both made by the E that it starts from.

    The loss is the L1 distance, per channel in units of the mean |z_T − z_L|; one view in four is clean. E sees pixels,
    so what is the same at every phase of the 32-pixel grid it learns once. Reports ‖E(x_L) − z_T‖² / ‖z_L − z_T‖² on
    32 held-out pairs, and LPIPS of D(E(·)) against x_H on 16. Writes OUT/vae, which the later stages take up.
    """
    out, device = Path(args.out), args.device
    model = SanaSR.from_pretrained(args.model, device, torch.float32, adapter=False)
    train, val = Views(args, "train", model, 4), Views(args, "val", model, 1)
    z_l, z_t = (z.float() for z in train.z.unbind(1))
    unit = (z_t - z_l).abs().mean((0, 2, 3))[:, None, None].to(device)
    lpips, encoder = LPIPS.from_pretrained("alex").to(device), copy.deepcopy(model.vae.encoder).requires_grad_(True)

    def encode(encoder, x):
        return encoder(x.contiguous(memory_format=torch.channels_last)).float() * model.scaling_factor

    def loss_fn(encoder, step):
        _, pick = train.draw(step)
        clean = args.batch // 4
        x_h = train.pictures("hr", pick)[:clean]
        with torch.no_grad():
            z_h = [encode(model.vae.encoder, x_h)] if clean else []
        target = torch.cat([*z_h, train.latents(pick[clean:])[1]])
        error = (encode(encoder, torch.cat([x_h, train.pictures("lr", pick[clean:])])) - target).abs() / unit
        return error.mean(), dict(l1=error.mean().item())

    def validate(encoder):
        scores = {}
        for i in range(min(32, len(val.z))):
            kind, (z_l, z_t) = "mild" if "mild" in val.where[i][0] else "strong", val.latents([i])
            z, x_h = encode(encoder, val.pictures("lr", [i])), val.pictures("hr", [i])
            ratio = (z - z_t).square().mean() / (z_l - z_t).square().mean()
            scores.setdefault(f"ratio_{kind}", []).append(ratio.item())
            for name, code in ((kind, z), ("clean", encode(encoder, x_h))) if i < 16 else ():
                y = model.vae.decode(code / model.scaling_factor).clamp(-1, 1)
                scores.setdefault(f"lpips_{name}", []).append(lpips(y, x_h).item())
        return {k: sum(v) / len(v) for k, v in scores.items()}

    encoder = fit("encoder", encoder, loss_fn, validate, args, args.steps or 20_000, args.lr or 3e-4)
    model.vae.encoder.load_state_dict(encoder.state_dict())
    save_module(model.vae, out / "vae", torch.float16)
    print(f"wrote {out / 'vae'}: the stages `adapter`, `decoder` and `control` take it up")


# --- The update ---


def update(dit, z, c, m):
    """One step (Eq. 4) of the adapted transformer through W + (α/r) B A: at this width cheaper than two products."""
    merged = {f"{name}.weight": module.weight
              + (module.adapter_scale * module.lora_B.weight @ module.lora_A.weight).view_as(module.weight)
              for name, module in lora_modules(dit).items()}
    with adapters_off(dit):
        return one_step(lambda *args: torch.func.functional_call(dit, merged, args), z,
                        torch.full((len(z),), TAU, device=z.device), c, m)


@torch.no_grad()
def open_adapted(args, adapter):
    """--model in float32 with an adapter of --rank, kept apart.

    The adapter starts from a file of the same or a lower rank, whose matrices become the first rows of A and the first
    columns of B (α = r in both), or, where that is None, from zero output.
    """
    model = SanaSR.from_pretrained(args.model, args.device, torch.float32, adapter=False)
    torch.manual_seed(args.seed)
    inject_lora(model.dit, args.rank, targets="attn+ffn")
    if adapter:
        with open_weights(adapter) as file:
            for key, p in lora_parameters(model.dit).items():
                x = file.get_tensor(key)
                if x.shape[0] > p.shape[0] or x.shape[1] > p.shape[1]:
                    sys.exit(f"error: {adapter}: its rank is above --rank {args.rank}")
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
    train, val = Views(args, "train", model, 4), Views(args, "val", model, 1)
    z_l, z_t = (z.float() for z in train.z.unbind(1))
    unit = (z_t - z_l).abs().mean((0, 2, 3))[:, None, None].to(device)
    lines, conditions, plain = [], Conditions(model), build_prompt([], "appendix")

    def loss_fn(dit, step):
        if not lines or step % 200 == 0:
            train.reload()
            lines[:] = train.prompts()
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
        deviation = (z.std((0, 2, 3)) / z_t.std((0, 2, 3))).quantile(torch.tensor([0.1, 0.5]))
        mild = torch.tensor(["mild" in name for name, *_ in val.where])
        return dict(val_strong=ratio[~mild].mean().item(), val_mild=ratio[mild].mean().item(),
                    deviation_10=deviation[0].item(), deviation_50=deviation[1].item())

    dit = fit("adapter", model.dit, loss_fn, validate, args, args.steps or 30_000, args.lr or 1e-3, weight_decay=0.0)
    save_lora(dit, out / "adapter.safetensors", dict(timestep=str(TAU), suffix="appendix"))
    print(f"wrote {out / 'adapter.safetensors'}: the stage `decoder`, and train.py --init, take it up")


# --- The decoder ---


def open_restorer(args):
    """--model in float32 with what OUT holds: the autoencoder of the stage `encoder`, the adapter of `adapter`."""
    out, adapter = Path(args.out), Path(args.out) / "adapter.safetensors"
    model = SanaSR.from_pretrained(args.model, args.device, torch.float32, adapter if adapter.exists() else None)
    if (out / "vae").exists():
        model.vae = DCAE.from_pretrained(out / "vae", torch.float32, args.device)
    model.vae.requires_grad_(False)
    return model


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


def train_decoder(args):
    """The stages decoder and control: D on ẑ of degraded photos, behind the frozen E and the frozen update.

    Losses, each balanced (see there): 0.25 LPIPS (AlexNet), 0.2 L1 and 0.2 L1 where the target is flat, with --dists 1
    DISTS of a crop against x_H. LPIPS and DISTS disagree about texture: at equal weights LPIPS wins, and DISTS gets
    worse. LPIPS sees both pictures shifted by 0 to 7 pixels, so that no grid hides from AlexNet's stride of 4. An
    eighth of the views is clean, D(E(x_H)) against x_H, so that the autoencoder stays one. Of the others --plain are
    x_H blurred and reduced: `degrade` always adds noise and compression, a good camera's picture has neither. The
    control has no update: D(E(x_L)). Reports LPIPS and PSNR (RGB) against x_H on 48 held-out pairs, of D(E(x_H)) and
    of plain ones, with --dists DISTS on a third. Writes OUT/finish.pt, or control.pt.
    """
    model = open_restorer(args)
    train, val = Views(args, "train", model, 4), Views(args, "val", model, 1)
    decoder, lpips = model.vae.decoder.requires_grad_(True), LPIPS.from_pretrained("alex").to(args.device)
    dists = DISTS.from_pretrained().to(args.device) if args.dists else None
    restore = restoration(model, update=args.stage != "control")

    def loss_fn(decoder, step):
        rng, pick = train.draw(step)
        clean, plain = int(args.batch / 8 + rng.random()), rng.random(args.batch) < args.plain
        blurs = (plain * rng.uniform(*BLUR, args.batch)).tolist()
        x_h = train.pictures("hr", pick)
        x = torch.cat([x_h[:clean], train.pictures(train.target, pick[clean:])])
        with torch.no_grad():
            z = restore(torch.cat([x_h[:clean], train.pictures("lr", pick[clean:], blurs[clean:])]), clean)
        y = decoder(z.contiguous(memory_format=torch.channels_last)).float()
        leaf = y.detach().requires_grad_()
        (dy, dx), error = rng.integers(8, size=2), (leaf - x).abs()
        terms = dict(l1=(0.2, error.mean((1, 2, 3))), flat=(0.2, (error * flatness(x)).mean((1, 2, 3))),
                     lpips=(0.25, lpips(leaf[:, :, dy:, dx:], x[:, :, dy:, dx:])))
        if dists:
            top, left = rng.integers(Views.VIEW - CROP + 1, size=2)
            terms["dists"] = 1, dists(*(t[:, :, top:top + CROP, left:left + CROP] / 2 + 0.5 for t in (leaf, x_h)))
        loss = 0.02 * (y * balanced(terms.values(), leaf)).sum()
        return loss, {key: values.mean().item() for key, (_, values) in terms.items()}

    def validate(decoder):
        scores = {}

        def note(kind, z, x):
            y = decoder(z).clamp(-1, 1)
            scores.setdefault(f"lpips_{kind}", []).append(lpips(y, x).item())
            scores.setdefault(f"psnr_{kind}", []).append(-10 * (y - x).square().mean().div(4).log10().item())
            if dists and i % 6 < 2:
                scores.setdefault(f"dists_{kind}", []).append(dists(y / 2 + 0.5, x / 2 + 0.5).item())
        for i in range(min(48, len(val.where))):
            x_h = val.pictures("hr", [i])
            note("mild" if "mild" in val.where[i][0] else "strong", restore(val.pictures("lr", [i])), x_h)
            if i % 3 == 0:
                note("plain", restore(val.pictures("lr", [i], [sum(BLUR) / 2])), x_h)
                note("clean", model.vae.encode(x_h), x_h)
        return {k: sum(v) / len(v) for k, v in scores.items()}

    fit("control" if args.stage == "control" else "finish", decoder, loss_fn, validate, args, args.steps or 20_000,
        args.lr or 1e-4)


def restoration(model, update=True):
    """(x_L: B,3,H,W in [-1, 1], clean=0) -> what D is given: ẑ / s, of the first `clean` pictures, or without the
    update of all, z_L / s."""
    c, m = Conditions(model)([build_prompt([], "appendix")])

    def restore(x, clean=0):
        z = model.vae.encode(x).float()
        if not update:
            return z
        t, s = torch.full((len(z),), TAU, device=z.device), model.scaling_factor
        updated = one_step(model.dit, s * z, t, c.expand(len(z), -1, -1), m.expand(len(z), -1)) / s
        return torch.cat([z[:clean], updated[clean:]])
    return restore


@torch.inference_mode()
def compare(args):
    """What the update is worth: LPIPS of D(ẑ) less that of D(z_L), and less the control's, on all held-out pairs.

    Strong and mild pairs apart, each with the 95 % interval of 10 000 bootstrap means. Reads finish.pt and control.pt,
    EMA weights, and says after how many steps each was saved; without control.pt its column is missing.
    """
    out, model, scores = Path(args.out), open_restorer(args), {}
    lpips, val = LPIPS.from_pretrained("alex").to(args.device), Views(args, "val", model, 1)
    for name in ("finish", "control"):
        if name == "control" and not (out / "control.pt").exists():
            continue
        state = load_state(out / f"{name}.pt")
        print(f"{name}: {state['step']} steps")
        model.vae.decoder.load_state_dict(state["ema"])
        rows = {"D(ẑ)": True, "D(z_L)": False} if name == "finish" else {"control": False}
        for row, update in rows.items():
            restore = restoration(model, update)
            for i in tqdm(range(len(val.where)), row, leave=False):
                y = model.vae.decode(restore(val.pictures("lr", [i]))).clamp(-1, 1)
                scores.setdefault(row, []).append(lpips(y, val.pictures("hr", [i])).item())
    mild = np.array(["mild" in name for name, *_ in val.where])
    for kind, chosen in (("strong", ~mild), ("mild", mild)):
        of = {row: np.array(values)[chosen] for row, values in scores.items()}
        print(f"{kind}, {chosen.sum()} pairs: " + ", ".join(f"{row} {v.mean():.4f}" for row, v in of.items()))
        for other in list(of)[1:]:
            gain = of["D(ẑ)"] - of[other]
            means = gain[np.random.default_rng(0).integers(len(gain), size=(10_000, len(gain)))].mean(1)
            low, high = np.quantile(means, [0.025, 0.975])
            print(f"    D(ẑ) − {other}: {gain.mean():+.4f}  [{low:+.4f}, {high:+.4f}]")


def export(args):
    """The autoencoder with finish.pt's averaged decoder, and the adapter, in fp16, into --model; the rest stays."""
    out, target, model = Path(args.out), weights.folder(args.model), open_restorer(args)
    model.vae.decoder.load_state_dict(load_state(out / "finish.pt")["ema"])
    save_module(model.vae, target / "vae", torch.float16)
    if (out / "adapter.safetensors").exists():
        with open_weights(out / "adapter.safetensors") as file:
            save_tensors({key: file.get_tensor(key).half() for key in file.keys()}, target / "adapter.safetensors",
                         file.metadata())
    path = target / "provenance.json"
    history = json.loads(path.read_text()) if path.exists() else {}
    for name, title in (("encoder", "encoder towards the teacher"), ("adapter", "adapter towards the teacher"),
                        ("finish", "decoder on the update")):
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
    add("--steps", type=int, help="of the stage; the learning rate decays over the last quarter")
    add("--batch", type=int, default=4, help="views a step (default %(default)s)")
    add("--lr", type=float, help="peak learning rate (default: the stage's own)")
    add("--ema", type=float, default=0.999, help="decay of the averaged weights (default %(default)s)")
    add("--validate-every", type=int, default=500, metavar="N", help="steps (default %(default)s)")
    add("--dtype", choices=["fp32", "bf16"], default="fp32", help="bf16: autocast, faster where the processor has it")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if args.stage == "pairs" and not args.data:
        parser.error("--data is needed: a folder of clean photos")
    return args


def main(argv=None):
    args = parse(argv)
    try:
        STAGES[args.stage](args)
    except (ValueError, OSError, FloatingPointError, weights.Unavailable) as error:
        sys.exit(f"error: {whole(error)}")


if __name__ == "__main__":
    main()
