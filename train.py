"""Trains SANA-SR's adapter from a folder of photos: Algorithm 1 of the paper.

    python train.py --data ./hq --steps 400 --lr 2e-4                     # the bundled model, on a laptop
    torchrun --nproc_per_node 8 train.py --data ./hq --model sana-600m-512 --name official --checkpointing all
    python train.py --name official --resume                              # after a stop or a kill
    python train.py --name official --select musiq                        # ranks its checkpoints, copies the best
    python train.py --learn autoencoder --data ./hq                       # see autoencoder.py

    x_H ── crop, flip ─► degrade ─► x_L           z_L = s·E(x_L), z_H = s·E(x_H)         DC-AE, frozen
    ẑ = z_L − σ_τ·f_θ(z_L, τ, c, m)               f_θ: frozen LinearDiT + LoRA, all that is trained
    x̂ = D(ẑ/s)                                    frozen, but the gradient passes through it
    L = MSE(x̂, x_H) + 2·LPIPS(x̂, x_H) + L_align + L_cons

Needs photos at least as large as the crop, any number of folders deep; `--lq DIR` adds real LR pictures of the same
names. Starts from the model's own adapter where it has one (--init none: from nothing). Leaves in runs/NAME:
adapter.safetensors (EMA weights), checkpoints/, samples/, log.csv, curves.png, state.pt (to resume), val/ (the fixed
validation pairs). Settings are the paper's Appendix B; 100 000 steps took it 8 GPUs.
"""
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import autoencoder
import objective
import runs
import weights
from fast import load_model
from metrics import LPIPS, METRICS
from metrics.score import evaluate, folder_pairs, mean
from objective import PROTOCOLS, TERMS
from photos.degrade import enlarge, to_image, to_tensor
from photos.pairs import Pairs, TrainingData, absolute, add_data_options, find_tags
from photos.pictures import bicubic, read_rgb, write_bytes
from runs import DTYPES, UserError, ranks
from sanasr import inject_lora, load_lora, lora_modules, lora_parameters, one_step, read_lora, save_lora
from trainer import Trainer, compare, open_state
from weights.files import fingerprint

EMA, CLIP, WEIGHT_DECAY = 0.999, 1.0, 1e-2
WATCHED = ("val_lpips", "val_psnr", "val_lattice")
GAIN, LOSS = 0.01, 0.2  # of LPIPS, the least that counts as better; of PSNR in dB, the most that may be lost

# --- Training ---


def start_adapter(args, model):
    """Inject the adapter that the settings and --init describe; fills in args.rank and args.lora_targets.

    The projections that --init holds keep its ranks; the others get --rank. Returns the metadata of --init.
    Raises UserError for an option that --init contradicts.
    """
    own, found, metadata = model.folder / "adapter.safetensors", {}, {}
    args.init = args.init or (str(own) if own.is_file() else "none")
    if args.init != "none":
        state, metadata = read_lora(args.init)
        found = {key.rpartition(".lora_")[0]: len(x) for key, x in state.items() if ".lora_A." in key}  # its rank
    ffn = any(".ff." in name for name in found)
    if ffn and args.lora_targets == "attn":
        raise UserError(f"--lora-targets attn: --init {args.init} adapts the Mix-FFN too; leave --lora-targets out, or "
                        "start from nothing by --init none")
    args.lora_targets = args.lora_targets or ("attn+ffn" if ffn else "attn")
    wanted, args.rank = args.rank, args.rank or max(found.values(), default=64)
    torch.manual_seed(args.seed)
    names = inject_lora(model.dit, args.rank, targets=args.lora_targets)
    if wanted and set(names) <= set(found) and wanted not in found.values():
        raise UserError(f"--rank {wanted}: --init {args.init} has rank {max(found.values())}; leave --rank out, or "
                        "start from nothing by --init none")
    if found:
        load_lora(model.dit, args.init)
    return metadata


class Networks:
    """The networks of Algorithm 1, of which only the adapter learns; fills in the arguments that depend on them."""

    def __init__(self, args):
        self.args, self.model = args, load_model(args.model, args.device, DTYPES[args.dtype], adapter=False)
        model = self.model
        lambdas = objective.fill_defaults(args, model, start_adapter(args, model))
        if args.latent:
            lambdas = {"latent": 1.0} | {name: lambdas[name] for name in ("align", "cons")}
        self.terms = {name: value for name, value in lambdas.items() if value and not getattr(args, f"no_{name}")}
        if not self.terms:
            raise UserError(f"no loss is left: leave out one of {' '.join(f'--no-{name}' for name in lambdas)}")
        model.vae.requires_grad_(False)
        model.vae.decoder.checkpointing = args.checkpointing != "none"
        model.dit.checkpointing = args.checkpointing == "all"
        self.adapter, self.conditions = lora_parameters(model.dit), objective.Conditions(model)
        self.f, self.f0 = objective.in_float32(model.dit), objective.prior(model.dit)
        self.vae = objective.Latents(model.vae, model.scaling_factor)
        self.lpips, args.lpips = (objective.load_lpips(args.lpips, args.device, self.vae.dtype)
                                  if "lpips" in self.terms else (None, "none"))
        self.judge = LPIPS.from_pretrained("alex").to(args.device)

    def loss(self, batch):
        """A batch of `training_batches` -> {"loss": scalar, term: scalar, …}."""
        batch |= {k: v.to(self.args.device, non_blocking=True) for k, v in batch.items() if torch.is_tensor(v)}
        c, m = self.conditions(batch["prompt"])
        return objective.losses(self.f, self.f0, self.vae, batch | {"c": c, "m": m}, self.args.timestep, self.lpips,
                                self.terms)

    @torch.no_grad()
    def validate(self, pairs, prompts):
        """({mean LPIPS (AlexNet), PSNR, lattice over the 8-bit results of `pairs`}, a grid x_L | x̂ | x_H of six).

        This PSNR is over R, G and B; eval.py's is over the luma Y, and some dB higher. See `objective.lattice`.
        """
        device, scores, rows = self.args.device, [], []
        for (_, lr, hr), prompt in zip(pairs, prompts, strict=True):
            x_l, x_h = enlarge(lr)[None].to(device), (to_tensor(hr) * 2 - 1)[None].to(device)
            tau = torch.full((1,), self.args.timestep, device=device)
            x = self.vae.decode(one_step(self.f, self.vae.encode(x_l), tau, *self.conditions([prompt])))
            x, psnr, lpips, row = objective.judged(x, x_l, x_h, self.judge)
            scores.append((lpips, psnr, objective.lattice(x - x_h)))
            rows.append(row)
        means = [sum(column) / len(pairs) for column in zip(*scores, strict=True)]
        return dict(zip(WATCHED, means, strict=True)), to_image(torch.cat(rows[:6], 1))


def train(args):
    """The whole run, as the module's docstring says. Returns the exit code."""
    runs.set_flags(repeatable=True, tf32=True)
    batch = args.batch * args.accumulate * ranks()[1]

    # the networks, the photos, and what a resumed run compares
    networks = Networks(args)
    data = TrainingData(args, args.run, args.protocol, val_folder=args.run / "val")
    networks.conditions.prepare(sorted({*data.prompts, *data.val_prompts}))
    settings = {k: getattr(args, k) for k in SETTINGS} | data.fingerprints | {
        "the model": fingerprint(networks.model.folder / "transformer"),
        "the first adapter": weights.sha256(args.init) if args.init != "none" else "none",
        "the losses": networks.terms, "the constants": [EMA, CLIP, WEIGHT_DECAY],
        "--batch times --accumulate times the processes": batch}
    about = metadata(args, settings, data, networks.terms, batch)

    def export(step, averaged):
        for path in (args.run / "checkpoints" / f"{step:06d}.safetensors", args.run / "adapter.safetensors"):
            save_lora(networks.model.dit, path, about | {"step": str(step)}, averaged)

    # the loop
    validate = partial(networks.validate, data.pairs, data.val_prompts) if data.pairs else None
    trainer = Trainer(
        args.run, networks.adapter, networks.loss, settings, options=args.options, steps=args.steps, every=args.every,
        lr=args.lr, device=args.device, terms=networks.terms, watched=WATCHED, weight_decay=WEIGHT_DECAY, clip=CLIP,
        ema=EMA, validate=validate, accumulate=args.accumulate, fp16=args.dtype == "fp16", samples=batch, export=export,
        watch="val_lpips", patience=args.knee, resume=f"`--name {args.name} --resume` resumes")
    if trainer.main:
        introduce(args, networks, data, batch)
    code = trainer.run(partial(training_batches, args, networks.model, data))
    if code or not trainer.main:
        return code
    if trainer.knee_step is not None:
        knee = args.run / "checkpoints" / f"{trainer.knee_step:06d}.safetensors"
        write_bytes(args.run / "knee.safetensors", knee.read_bytes())
        print(f"stopped past the knee of validation LPIPS, step {trainer.knee_step} (knee.safetensors)")
    print("; ".join(filter(None, (f"{args.run}/adapter.safetensors, step {trainer.step}", verdict(trainer.rows)))))
    return 0


def metadata(args, settings, data, terms, batch):
    """What an adapter's file says of itself, {str: str}."""
    names = ("lora_targets", "protocol", "timestep", "suffix", "lpips", "crop", "lr", "usm", "mild", "seed", "dtype")
    about = {"base": args.model, "base_fingerprint": settings["the model"], "photos": len(data.photos),
             "photos_sha256": settings["the photos"], "terms": " ".join(terms), "ema": EMA, "torch": torch.__version__,
             "global_batch": batch, "tags": args.tags if args.tags in ("none", "ram", "dape") else "file"}
    return {k: str(v) for k, v in (about | {k: settings[k] for k in names}).items()}


def introduce(args, networks, data, batch):
    """Print what is about to be trained."""
    used = sorted({len(m.lora_A.weight) for m in lora_modules(networks.model.dit).values()})
    low, high = PROTOCOLS[args.protocol][1]
    losses = " + ".join(f"{value:g} {name}" for name, value in networks.terms.items())
    print(f"{data.report}\n{args.model}: {sum(p.numel() for p in networks.adapter.values()) / 1e6:.2f} M parameters "
          f"(rank {' and '.join(map(str, used))}, {args.lora_targets}), from {Path(args.init).name}; τ "
          f"{args.timestep:g}, t {low} to {high}; loss {losses}, LPIPS {args.lpips}\n{batch} crops of {args.crop} a "
          f"step; {args.dtype} on {args.device}; seed {args.seed}; torch {torch.__version__}; "
          f"{len(set(data.prompts))} prompts; {args.run}", flush=True)


def training_batches(args, model, data, first, signals):
    """This rank's batches of the steps from `first` on."""
    side, steps = args.crop // model.vae.factor, range(first * args.accumulate, args.steps * args.accumulate)
    pairs = Pairs(data.photos, data.prompts, args.crop, (model.dit.config["in_channels"], side, side),
                  PROTOCOLS[args.protocol][1], args.seed, data.lq, args.usm, args.mild, getattr(args, "cache", None))
    return runs.batches(pairs, args.batch, steps, args.workers, signals, args.device.type == "cuda")


# --- The choice of a checkpoint ---


def select(args):
    """Rank the checkpoints of a run by the mean of one metric and copy the best to best.safetensors.

    Scored are the run's validation pictures; `--lq DIR --data DIR` names others.
    """
    settings = open_state(args.run)["settings"]
    if "crop" not in settings:
        raise UserError(f"--select: {args.run} is of --learn autoencoder, which keeps its last weights alone")
    lr, hr = (args.lq, args.data[0]) if args.lq else (args.run / "val" / "lr", args.run / "val" / "hr")
    tagger = settings["tags"] if settings["tags"] in ("ram", "dape") else "none"
    pairs = folder_pairs(lr, hr)
    prompts = find_tags(tagger, [p.name for p in pairs], lambda i: bicubic(read_rgb(pairs[i].lr)), args.device)
    scores = {}
    for path in tqdm(sorted((args.run / "checkpoints").glob("*.safetensors")), "scoring checkpoints"):
        model = load_model(settings["model"], args.device, DTYPES[args.dtype], path, "auto")
        rows = evaluate(model, pairs, [args.select], device=args.device, prompts=prompts)
        scores[path] = mean(rows)[args.select]
    if not scores:
        raise UserError(f"--select: {args.run}/checkpoints is empty; --resume writes the next one")
    order = sorted(scores, key=lambda path: METRICS[args.select].sign * scores[path], reverse=True)
    runs.write_csv(args.run / "select.csv", ["checkpoint", args.select],
                   [{"checkpoint": path.name, args.select: scores[path]} for path in order])
    write_bytes(args.run / "best.safetensors", order[0].read_bytes())
    print("\n".join(f"{path.stem}  {args.select} {scores[path]:.4f}" for path in order))
    print(f"best: {order[0].name}, copied to {args.run}/best.safetensors")
    return 0


def verdict(rows):
    """What the validations of a log say of the training: a line, "" where there are fewer than two."""
    seen = [row for row in rows if "val_lpips" in row]
    if len(seen) < 2:
        return ""
    first, last = seen[0], seen[-1]
    text = (f"held-out LPIPS {first['val_lpips']:.4f} to {last['val_lpips']:.4f}, PSNR {first['val_psnr']:.2f} to "
            f"{last['val_psnr']:.2f} dB, lattice {first['val_lattice']:.4f} to {last['val_lattice']:.4f}")
    gained = first["val_lpips"] - last["val_lpips"] >= GAIN and first["val_psnr"] - last["val_psnr"] <= LOSS
    return text + ("" if gained else ": nothing was gained; keep the model as it was, or train longer")


# --- The command ---

# what a step computes depends on these; a resumed run may change the other options
SETTINGS = ("data", "lq", "model", "crop", "lr", "rank", "lora_targets", "protocol", "timestep", "tags",
            "suffix", "lpips", "usm", "mild", "val", "dtype", "seed")
FOREIGN = {  # options that --learn … does not take
    "adapter": ("teacher", "pairs", "perceptual", "texture", "adapter"),
    "autoencoder": ("lq", "crop", "tags", "suffix", "val", "cache", "accumulate", "knee", "checkpointing", "rank",
                    "lora_targets", "protocol", "timestep", "lpips", "usm", "mild", *(f"no_{name}" for name in TERMS))}
NOT_OPTIONS = ("run", "name", "device", "resume", "select")


def parser():
    p = runs.parser(__doc__)
    add = p.add_argument_group("photos").add_argument
    add_data_options(add)
    add("--cache", metavar="DIR", help="keep the photos there, cut into tiles, which are read faster than large photos")
    add = p.add_argument_group("the run").add_argument
    add("--learn", choices=["adapter", "autoencoder"], default="adapter", help="what is trained")
    add("--model", default="embedded", metavar="NAME|FOLDER", help="the prior, see `python -m weights`")
    add("--name", default="default", help="the run is kept in runs/NAME")
    add("--resume", action="store_true", help="go on with the run of that name, with its settings")
    add("--select", choices=list(METRICS), metavar="METRIC", help="copy the best checkpoint by this metric of eval.py")
    add("--steps", type=int, default=100_000, help="of the optimiser")
    add("--every", type=int, default=1000, metavar="N", help="validate, draw samples and save every N steps")
    add("--batch", type=int, help="per process (default: 4, autoencoder 8)")
    add("--accumulate", type=int, default=1, metavar="N", help="batches a step: 8 on one card make the paper's 32")
    add("--knee", type=int, default=0, metavar="N", help="stop N validations past the knee of validation LPIPS")
    add("--checkpointing", choices=["none", "decoder", "all"], default="none", help="recompute; all for cards of 24 GB")
    runs.add_device_options(add, workers=12)
    add = p.add_argument_group("the method").add_argument
    add("--lr", type=float, help="(default: 5e-5, autoencoder 3e-4)")
    add("--rank", type=int, help="of the adapter; its scale is 1 (default: that of --init, else 64)")
    add("--init", metavar="PATH|none", help="start from this adapter, whose projections keep their rank, or from "
        "nothing (default: the model's own adapter, if it has one)")
    add("--lora-targets", choices=["attn", "attn+ffn"], help="(default: those of --init, else attn)")
    add("--protocol", choices=list(PROTOCOLS), default="hq", help="hq: τ 900, tags of x_H; lq: τ 999, tags of x_L")
    add("--timestep", type=float, metavar="N", help="another τ, in (0, 1000]")
    add("--lpips", choices=["vgg", "alex"], help="network of the LPIPS loss (default: vgg; alex for the bundled model)")
    for name in TERMS:
        add(f"--no-{name}", action="store_true", help="without this loss")
    add("--latent", action="store_true", help="the squared distance of ẑ to z_H in the place of the losses of "
        "pictures, without the decoder: a faster start; with --learn autoencoder E alone learns, E(x_L) ─► E(x_H)")
    add("--usm", action="store_true", help="sharpen x_H first, as Real-ESRGAN does")
    add("--mild", type=float, default=0.0, metavar="SHARE", help="of the pairs, 0 to 1: only blurred, resized and "
        "finely JPEG-coded, where the rest is degraded twice over")
    add = p.add_argument_group("--learn autoencoder: E and D end to end; --init names a vae folder").add_argument
    add("--teacher", metavar="DIR", help="pictures that a restorer made of runs/pairs/KEY/lr, of the same names")
    add("--pairs", type=int, default=20_000, metavar="N", help="pairs to make ahead of time, 0.2 MB each")
    add("--perceptual", type=float, default=0.1, metavar="W", help="weight of LPIPS, with --teacher of its views")
    add("--texture", type=float, default=0.0, metavar="W", help="weight of DISTS and a critic, which take VGG16; the "
        "decoder alone learns. 0.3 is usual")
    add("--adapter", metavar="FILE", help="the decoder alone learns, on what this adapter makes of the latents")
    return p


def parse(argv=None):
    """The arguments, with the options of the run that --resume names as defaults. Raises UserError."""
    p = parser()
    args = p.parse_args(argv)
    run = Path("runs") / args.name  # an absolute path as the name gives that path
    if args.resume:
        state = open_state(run)
        p.set_defaults(**{k: v for k, v in state["options"].items() if hasattr(args, k)})
        args = p.parse_args(argv)
        absolute(args)
        for option in {"tags", "lpips"} & {*state["settings"]}:  # what was unavailable when the run began stays away
            if getattr(args, option) == state["options"][option]:
                setattr(args, option, state["settings"][option])
            compare(run, state["settings"], {option: getattr(args, option)})
        args.lpips = None if args.lpips == "none" else args.lpips
    elif not args.select and (run / "state.pt").exists():
        raise UserError(f"{run} holds a run: add --resume to go on, or choose another --name")
    if args.select and bool(args.lq) != bool(args.data):
        p.error("--select takes other pairs by --lq DIR --data DIR, both of them")
    if not args.data and not args.select:
        p.error("--data names the folders of photos")
    if foreign := [option for option in FOREIGN[args.learn] if getattr(args, option) != p.get_default(option)]:
        p.error(f"--learn {args.learn} does not take --{' --'.join(foreign).replace('_', '-')}")
    default = {"adapter": (4, 5e-5), "autoencoder": (8, 3e-4)}[args.learn]
    args.batch = default[0] if args.batch is None else args.batch
    args.lr = default[1] if args.lr is None else args.lr
    runs.check_ranges(args)
    absolute(args)
    args.options = {k: v for k, v in vars(args).items() if k not in NOT_OPTIONS}
    runs.resolve_device(args, fp16=args.learn == "adapter")
    args.run = run
    return args


@runs.command
def main(argv=None):
    args = parse(argv)
    if args.select:
        return select(args)
    with runs.process_group(args.device), runs.claimed(args.run) if ranks()[0] == 0 else nullcontext():
        if not args.resume and (args.run / "state.pt").exists():
            raise UserError(f"{args.run} holds a run that has just ended: add --resume, or choose another --name")
        return autoencoder.train(args) if args.learn == "autoencoder" else train(args)


if __name__ == "__main__":
    sys.exit(main())
