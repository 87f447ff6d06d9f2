"""Trains LinearSR stage by stage: flow matching on encoded pairs, no loss on pictures.

    python -m linearsr.train --stage pretrain --data ./hq --steps 20000     one network, from the prior of --model
    python -m linearsr.train --stage experts --steps 4000                   each expert, on its own interval of t alone
    python -m linearsr.train --stage finetune --data ./best --steps 1000    each expert again, on the best photos
    python -m linearsr.train --stage export --to runs/mine                   a folder for eval.py --model
    torchrun --nproc_per_node 8 -m linearsr.train --stage pretrain --data ./hq --model sana-600m-512 --name official

The loss is linearsr/flow.py's. The latents and LR pictures of the pairs are made once and kept in runs/pairs. A stage
starts at the knee of the one before (ESGF of arXiv 2510.08771; the rule: `trainer.knee`). Settings that it is not given
are those of the stages before it; without those --tags is none, --suffix appendix, --val 32. An expert is a low-rank
difference from the pretrained network, which stays as it is. Ten per cent of the prompts are empty, for classifier-free
guidance, forty are the suffix alone.

Rerun a command to resume. Leaves in runs/NAME/STAGE, for experts in one folder each: checkpoints/ (EMA weights),
samples/, log.csv, curves.png (a red line marks the knee), state.pt (to resume), settings.json.
"""
from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import torch

import runs
import weights
from fast import load_model
from fast.graphs import graphed_backward
from linearsr import BOUNDARIES, STRIDE, SYSTEM, Stem, check_boundaries, expert_of
from linearsr.flow import EightBitPairs, EncodedPairs, Held, Network, flow_loss, held_flow, interval, pairs_key, times
from metrics import LPIPS
from objective import Conditions, Latents, fill_crop, put
from photos.pairs import TrainingData, absolute, add_data_options
from photos.pictures import reason, write_bytes
from runs import DTYPES, UserError, from_first, ranks
from sanasr import adapters_off, build_prompt, inject_lora, load_lora, lora_parameters, save_lora
from trainer import Trainer, knee_of
from weights.files import fingerprint, open_weights, save_module, save_tensors

STAGES = ["pretrain", "experts", "finetune"]
LR = {"pretrain": 3e-4, "experts": 3e-4, "finetune": 5e-5}
WARMUP = 200  # steps
EMPTY, UNTAGGED = 0.1, 0.4  # shares of prompts that are empty, and that are the suffix alone
TOLERANCE = 0.02  # of `knee`: validation LPIPS falls by some 0.4 from the untrained network, 0.008 of that is noise

# --- Where a stage starts ---


def expert_folders(args, stage):
    """The folders of a stage's trainings: one for pretrain, one an expert else."""
    folder = args.root / stage
    return ([Path(args.pretrained or folder)] if stage == "pretrain"
            else [folder / str(k) for k in range(len(args.boundaries) + 1)])


def validations(folder, watch):
    """(steps of a training's validations, the one of its knee). Raises UserError where there are none."""
    steps, bend = knee_of(runs.read_log(folder / "log.csv"), watch, TOLERANCE)
    if not steps:
        raise UserError(f"{folder / 'log.csv'} has no validations: raise --steps, the next one is noted there")
    return steps, bend


def starting_point(folder, args):
    """The checkpoint of `folder` that the next stage starts from: the one at the knee, or the last (--start end).

    Raises UserError where there is none.
    """
    if not (folder / "log.csv").is_file() or not any((folder / "checkpoints").glob("*.safetensors")):
        raise UserError(f"{folder} holds no training: run the stages in the order {', '.join(STAGES)} under one "
                        "--name, or name the folder of the pretraining by --pretrained")
    steps, bend = validations(folder, args.watch)
    step, place = (steps[-1], "the end") if args.start == "end" else (bend, f"the knee of {args.watch}")
    path = folder / "checkpoints" / f"{step:06d}.safetensors"
    if not path.is_file():
        raise UserError(f"{path} is missing: {place}")
    print(f"{path}: {place}, step {step} of {steps[-1]}", flush=True)
    return str(path)


def starts(folder, args, k, data):
    """What a training starts from: {"network": checkpoint or None for the prior, "adapter": checkpoint or None}.

    It is found when the training begins, and noted in settings.json. Raises UserError where the stage before is missing
    or has other intervals.
    """
    if (folder / "state.pt").exists():
        start = settings_of(folder)["start"]
        return start | {"at": args.start or start["at"]}
    start = {"network": None, "adapter": None, "at": args.start or "knee"}
    if args.stage == "experts":
        start["network"] = starting_point(*expert_folders(args, "pretrain"), args)
    elif args.stage == "finetune":
        experts = expert_folders(args, "experts")[k]
        start["adapter"] = starting_point(experts, args)
        start["network"] = settings_of(experts, args.boundaries)["start"]["network"]
    settings = {key: getattr(args, key) for key in (*SETTINGS, *OWN)} | {
        "photos_sha256": data.fingerprints["the photos"], "global_batch": args.batch * ranks()[1]}
    write_bytes(folder / "settings.json", json.dumps({"settings": settings, "start": start}, indent=1))
    return start


def settings_of(folder, boundaries=None):
    """settings.json of a training. Raises UserError where it, an expert's, was made for other boundaries."""
    noted = json.loads((folder / "settings.json").read_text())
    made = noted["settings"]["boundaries"]
    if boundaries is not None and made != boundaries:
        raise UserError(f"{folder} was trained with --boundaries {' '.join(map(str, made))}")
    return noted


def load_network(network, path):
    """Give `network` the weights of a checkpoint. Raises ValueError that names the file where they do not fit."""
    with open_weights(path) as file:
        state = {key: file.get_tensor(key) for key in file.keys()}
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path} was trained from another prior: take that one as --model, or pretrain anew "
                         f"({reason(error)[:200]})") from None


def prepare(model, args, start, k):
    """(the `Network` that a stage starts from, {name: parameter} of what it trains)."""
    torch.manual_seed(args.seed)
    dit = deepcopy(model.dit).to(args.device)
    dit.checkpointing = args.checkpointing
    network = Network(dit, Stem({"width": dit.config["cross_attention_dim"]}).to(args.device))
    network.requires_grad_(k is None)
    if k is None:
        return network, dict(network.named_parameters())
    load_network(network, start["network"])
    if start["adapter"]:
        load_lora(dit, start["adapter"], system=SYSTEM)
    else:
        torch.manual_seed(args.seed + k)
        inject_lora(dit, args.rank, targets=args.lora_targets)
    return network, {f"dit.{key}": p for key, p in lora_parameters(dit).items()}


# --- One training: the shared network, or one expert ---


def capturable(args):
    """Whether forward and backward can be one CUDA graph."""
    return args.device.type == "cuda" and not args.checkpointing


def batches(args, k, data, pairs, conditions, length, first, signals):
    """This rank's batches of the steps from `first` on. length: tokens that all prompts are padded to, or None."""
    rank, world = ranks()
    total, mine = args.batch * world, slice(rank * args.batch, (rank + 1) * args.batch)
    ends, plain, generator = interval(k, args.boundaries), build_prompt("", args.suffix), torch.Generator(args.device)
    for step in range(first, args.steps):
        rng = np.random.default_rng((args.seed, STAGES.index(args.stage), k or 0, step))
        chosen = rng.integers(pairs.count, size=total)[mine]
        u = ((np.arange(total) + rng.random(total)) / total)[mine]  # stratified: less variance
        kind = rng.random(total)[mine]
        z, lr, photo = pairs[chosen]
        generator.manual_seed(int(rng.integers(2**63)))
        noise = torch.randn((total, *z.shape[1:]), generator=generator, device=args.device)[mine]
        texts = ["" if r < EMPTY else plain if r < EMPTY + UNTAGGED else data.prompts[i]
                 for r, i in zip(kind, photo.tolist(), strict=True)]
        c, m = conditions(texts, length)
        t = put(times(torch.from_numpy(u), ends).float(), args.device)
        seen = put(torch.from_numpy(rng.random(total)[mine] >= args.unconditional), args.device)
        yield {"z": z, "t": t, "noise": noise, "c": c, "m": m, "lr": lr, "seen": seen, "prompt": texts,
               "name": [data.photos[i].path for i in photo.tolist()]}


def fit(folder, k, args, model, start, data, pairs, conditions, held, judge):
    """Train on the interval of expert k (None: on [0, 1]) in `folder`. Returns the exit code."""
    device, boundaries, dtype = args.device, args.boundaries, DTYPES[args.dtype]
    (network, parameters), graph, ends = prepare(model, args, start, k), capturable(args), interval(k, boundaries)
    autocast = partial(torch.autocast, device.type, dtype, dtype != torch.float32)

    def loss(batch):
        with autocast(cache_enabled=not graph):
            return {"loss": flow_loss(network, *(batch[x] for x in ("z", "t", "noise", "c", "m", "lr", "seen"))).mean()}

    def velocity(z, t, c, m, lr):  # with an expert on its interval only, the shared network elsewhere
        foreign = k is not None and expert_of(t, boundaries) != k
        with adapters_off(network.dit) if foreign else contextlib.nullcontext():
            return network(z, torch.full(z.shape[:1], t, device=device), c, m, lr).float()

    def look():
        """Columns of the log and a picture: held-out losses, on the interval of expert K and on this training's own."""
        with autocast():
            flow = [held.flow(network, interval(j, boundaries)).mean().item() for j in range(len(boundaries) + 1)]
            scores, grid = held.restored(velocity, args.val_steps, torch.autocast(device.type, enabled=False)(judge))
        own = held_flow(flow, boundaries) if k is None else flow[k]
        return {"val_flow": own, **{f"val_flow_{j}": v for j, v in enumerate(flow)}, **scores}, grid

    def export(step, averaged):
        path = folder / "checkpoints" / f"{step:06d}.safetensors"
        if args.stage == "pretrain":
            save_tensors({key: x.half().cpu() for key, x in averaged.items()}, path)
        else:
            save_lora(network.dit, path, {"system": SYSTEM, "expert": str(k), "interval": f"{ends[0]:g} {ends[1]:g}"},
                      {key.removeprefix("dit."): x for key, x in averaged.items()})

    label = args.stage if k is None else f"{args.stage} {k}"
    settings = {key: getattr(args, key) for key in (*SETTINGS, *OWN)
                if key not in ("data", "batch", "watch")}
    trainer = Trainer(
        folder, parameters, loss, settings | data.fingerprints | {
            "dtype": args.dtype, "start": start["at"], "--batch times the processes": args.batch * ranks()[1]},
        steps=args.steps, every=args.every, lr=args.lr, warmup=WARMUP, device=device, samples=args.batch * ranks()[1],
        watched=["val_flow", *(f"val_flow_{j}" for j in range(len(boundaries) + 1)), "val_psnr", "val_lpips"],
        watch=args.watch, tolerance=TOLERANCE, validate=look, export=export, label=label,
        backward=graphed_backward(loss, parameters.values()) if graph else None, wire=dtype)
    if trainer.main and trainer.step < args.steps:
        print(f"{label}: {sum(p.numel() for p in parameters.values()) / 1e6:.2f} M parameters, t in {ends}, batch "
              f"{trainer.samples}, {args.dtype} on {device}, torch {torch.__version__}; {folder}", flush=True)
    # a graph needs one shape
    length = conditions.longest({"", build_prompt("", args.suffix), *data.prompts}) if graph else None
    return trainer.run(partial(batches, args, k, data, pairs, conditions, length))


# --- A stage ---


def run_stage(args):
    """Train what the stage names. Returns the exit code."""
    device, main = args.device, ranks()[0] == 0
    runs.set_flags(repeatable=True, tf32=True)
    model = load_model(args.model, device, torch.float32, adapter=False)
    if model.vae.factor != 4 * STRIDE:
        raise UserError(f"--model {args.model}: its latents are {model.vae.factor} times smaller, not {4 * STRIDE}")
    fill_crop(args, model)
    model.dit.cpu()  # each training has a copy of its own
    model.vae.requires_grad_(False)
    latents, judge = Latents(model.vae, model.scaling_factor), LPIPS.from_pretrained("alex").to(device)

    data = TrainingData(args, args.root, "lq", args.min_side, pairs_seed=0)
    if not data.pairs:
        raise UserError("--data, --val: at least two photos are needed, one of them to be held out")
    conditions = Conditions(model)
    prompts = sorted({"", build_prompt("", args.suffix), *data.prompts, *data.val_prompts})
    from_first(lambda: conditions.prepare(prompts))
    if main:
        print(data.report, flush=True)
    drawn = EightBitPairs(data.photos, data.prompts, args.crop, None, None, args.pairs_seed, data.lq, mild=args.mild)
    folder = Path("runs") / "pairs" / pairs_key(model.vae, args, data)
    data.fingerprints |= {f"the model's {part}": fingerprint(model.folder / part) for part in ("vae", "transformer")}
    pairs = EncodedPairs(drawn, args.pairs, folder, latents, device, args.workers)
    held = Held(data.pairs, data.val_prompts, latents, conditions, device)

    for k, folder in enumerate(expert_folders(args, args.stage)):
        if args.expert not in (None, k):
            continue
        start = from_first(lambda folder=folder, k=k: starts(folder, args, k, data))
        expert = None if args.stage == "pretrain" else k
        with runs.claimed(folder) if main else contextlib.nullcontext():
            code = fit(folder, expert, args, model, start, data, pairs, conditions, held, judge)
        if code:
            return code
        if main:
            steps, bend = validations(folder, args.watch)
            print(f"{folder}: step {steps[-1]}; the knee of {args.watch} is at step {bend}", flush=True)
    return 0


def export(args):
    """Write the folder that `LinearSR.from_pretrained` reads, in fp16."""
    target = Path(args.to)
    stage = args.of or next((s for s in reversed(STAGES[1:]) if (args.root / s).is_dir()), "pretrain")
    alone, folders = stage == "pretrain", expert_folders(args, stage)
    points = [starting_point(folder, args) for folder in folders]
    notes = [settings_of(folder, None if alone else args.boundaries) for folder in folders]
    shared = {points[0]} if alone else {note["start"]["network"] for note in notes}
    if len(shared) > 1:
        raise UserError(f"{folders[0].parent}: the experts belong to different networks: {', '.join(sorted(shared))}")
    model = load_model(args.model, torch.device("cpu"), torch.float32, adapter=False)
    if (target / "vae").exists():  # a whole model, whose transformer would be replaced
        raise UserError(f"--to {target} is the folder of a model of SANA-SR: name another one")
    network = Network(model.dit, Stem({"width": model.dit.config["cross_attention_dim"]}))
    load_network(network, shared.pop())
    (target / "config.json").unlink(missing_ok=True)  # of an earlier export, as the experts are: no model until the end
    for file in (target / "experts").glob("*.safetensors"):
        file.unlink()
    with contextlib.suppress(OSError):
        (target / "experts").rmdir()
    shutil.rmtree(target / "transformer", ignore_errors=True)
    save_module(network.dit, target / "transformer", torch.float16)
    if fingerprint(target / "transformer") == fingerprint(model.folder / "transformer"):
        shutil.rmtree(target / "transformer")  # the model's own
    save_module(network.stem, target / "stem", torch.float16)
    for k, point in enumerate([] if alone else points):
        with open_weights(point) as file:
            save_tensors({key: file.get_tensor(key).half() for key in file.keys()},
                         target / "experts" / f"{k}.safetensors", file.metadata())
    base = args.model if args.model in weights.MODELS else os.path.relpath(model.folder.resolve(), target.resolve())
    boundaries = [] if alone else args.boundaries
    settings = {key: value for key, value in notes[-1]["settings"].items() if key not in ("data", "lq", "model")}
    if settings["tags"] not in ("none", "ram", "dape"):
        settings["tags"] = "file"  # no path of this machine
    config = dict(system=SYSTEM, base=base, boundaries=boundaries, suffix=settings["suffix"], _provenance=dict(
        stage=stage, start=args.start or "knee", steps=[int(Path(point).stem) for point in points], settings=settings))
    write_bytes(target / "config.json", json.dumps(config, indent=2) + "\n")  # last: without it there is no model
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    print(f"wrote {target}: {stage}, {len(boundaries) + 1} expert(s), {size / 1e6:.1f} MB, on {base}")
    return 0


# --- The command ---

# what a stage takes over from those before it, where the command line does not say otherwise
SETTINGS = ("data", "lq", "min_side", "model", "crop", "tags", "suffix", "mild", "pairs", "pairs_seed", "boundaries",
            "batch", "rank", "lora_targets", "watch", "val", "val_steps", "seed")
OWN = ("lr", "unconditional")  # what only a rerun of the same stage takes over


def parser():
    p = runs.parser(__doc__)
    p.add_argument("--stage", choices=[*STAGES, "export"], required=True)
    add = p.add_argument_group("photos").add_argument
    add_data_options(add, tags="none", suffix="appendix")
    add("--min-side", type=int, default=0, metavar="N", help="only photos whose sides have N pixels or more")
    add("--mild", type=float, default=0.0, metavar="SHARE", help="of the pairs, 0 to 1, as train.py's")
    add("--pairs", type=int, default=12_000, metavar="N", help="to encode and keep on the device (embedded: 28 KB)")
    add("--pairs-seed", type=int, default=0, metavar="N", help="draw other pairs than the stage before, known by heart")
    add = p.add_argument_group("the run").add_argument
    add("--model", default="embedded", metavar="NAME|FOLDER", help="the prior, with autoencoder and text encoder")
    add("--name", default="linearsr", help="the run is kept in runs/NAME")
    add("--pretrained", metavar="DIR", help="the folder of the pretraining (default: runs/NAME/pretrain)")
    add("--start", choices=["knee", "end"], help="where the stage before is taken up, export: the last (default: knee)")
    add("--watch", choices=["val_lpips", "val_psnr", "val_flow"], default="val_lpips", help="the curve with the knee")
    add("--steps", type=int, default=20_000, help="of each training")
    add("--every", type=int, default=1000, metavar="N", help="validate and save every N steps")
    add("--batch", type=int, default=16, help="per process")
    add("--checkpointing", action="store_true", help="less memory, more time: recompute activations")
    add("--to", metavar="DIR", help="export: the folder to write")
    add("--of", choices=STAGES, help="export: of this stage (default: the last one there is)")
    runs.add_device_options(add, workers=12)
    add = p.add_argument_group("the method").add_argument
    add("--boundaries", nargs="*", type=float, default=list(BOUNDARIES), metavar="T", help="of the experts' intervals; "
        "none: one expert")
    add("--unconditional", type=float, default=0.0, metavar="SHARE", help="pretrain: of the samples without "
        "the LR picture, 0 to 1: the transformer stays a prior, which a model of SANA-SR can share")
    add("--expert", type=int, metavar="K", help="train this one only (default: all, one after the other)")
    add("--lr", type=float, help="(default: " + ", ".join(f"{k} {v:g}" for k, v in LR.items()) + ")")
    add("--rank", type=int, default=16, help="of an expert's difference")
    add("--lora-targets", choices=["attn", "attn+ffn"], default="attn+ffn", help="where an expert differs")
    add("--val-steps", type=int, default=12, metavar="N", help="of restorations; from 12 on they reach each interval")
    p.set_defaults(tags="none", suffix="appendix", val=32)
    return p


def parse(argv=None):
    """-> arguments, completed by the settings of the stages before. Raises UserError in one line."""
    p = parser()
    args = p.parse_args(argv)
    root, last = Path("runs") / args.name, args.of if args.stage == "export" else args.stage
    stages = STAGES[:STAGES.index(last) + 1] if last else STAGES
    folders = [Path(args.pretrained or root / s) if s == "pretrain" else root / s for s in reversed(stages)]
    noted = [path for folder in folders for path in sorted(folder.glob("**/settings.json"))]
    if noted:
        settings = json.loads(noted[0].read_text())["settings"]
        own = OWN if root / args.stage in noted[0].parents else []
        p.set_defaults(**{key: settings[key] for key in (*SETTINGS, *own)  # --lq is of the photos in --data
                          if key in settings and not (key == "lq" and args.data)})
        args = p.parse_args(argv)
    args.root = root
    args.boundaries = list(check_boundaries(args.boundaries))
    if args.stage == "export":
        if not args.to:
            p.error("--to names the folder to write")
        return args
    if not args.data:
        p.error("--data names the folders of photos")
    runs.check_ranges(args)
    absolute(args)
    if args.stage == "pretrain" and (args.expert is not None or args.pretrained):
        p.error("--expert and --pretrained belong to the later stages")
    if args.stage != "pretrain" and args.unconditional:
        p.error("--unconditional belongs to the stage pretrain")
    if args.expert is not None and not 0 <= args.expert <= len(args.boundaries):
        p.error(f"--expert must be 0 to {len(args.boundaries)}, not {args.expert}")
    args.lr = args.lr or LR[args.stage]
    runs.resolve_device(args)
    return args


@runs.command
def main(argv=None):
    args = parse(argv)
    if args.stage == "export":
        return export(args)
    with runs.process_group(args.device):
        return run_stage(args)


if __name__ == "__main__":
    sys.exit(main())
