"""Trains SANA-SR's adapter from a folder of photos: Algorithm 1 of the paper.

    python train.py --data ./hq --steps 2000                              # the bundled model, on a laptop
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
import json
import math
import os
import signal
import sys
import time
from contextlib import closing, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from tqdm import tqdm

import weights
from fast import load_model
from metrics import LPIPS, METRICS
from metrics.score import evaluate, folder_pairs, mean
from objective import (
    LAMBDA,
    PROTOCOLS,
    Conditions,
    Latents,
    fill_defaults,
    in_autocast,
    in_float32,
    load_lpips,
    losses,
    prior,
)
from photos.degrade import enlarge, to_image, to_tensor
from photos.pairs import Pairs, digest, find_tags, hash_of, match_lq, photo_tags, scan, split, validation_pairs
from photos.pictures import bicubic, one_line, read_rgb, reason
from runs import (
    DTYPES,
    Run,
    Signals,
    UserError,
    average,
    batches,
    claimed,
    command,
    copy,
    curves,
    dtype_name,
    from_first,
    holding,
    knee,
    load_state,
    outlive_signals,
    peak_memory,
    pick_device,
    pick_dtype,
    ranks,
    read_log,
    save_state,
    workers,
    write_atomically,
    write_csv,
)
from sanasr import (
    build_prompt,
    fingerprint,
    inject_lora,
    load_lora,
    lora_modules,
    lora_parameters,
    one_step,
    read_lora,
    save_lora,
)

EMA = 0.999

# --- The files of a run ---

COLUMNS = ["step", "epoch", "loss", *LAMBDA, "grad_norm", "images_per_s", "memory_gb", "val_lpips", "val_psnr"]
CURVES = [name for name in COLUMNS[2:] if name not in ("images_per_s", "memory_gb")]


def load_run(folder):
    """The state of a run. Raises UserError in one line."""
    path = folder / "state.pt"
    state = load_state(path, keys=("step", "settings", "masters", "ema", "optimizer", "scaler"))
    if not {"data", "photos_sha256", "global_batch"} <= set(state["settings"]):
        raise UserError(f"{path} cannot be read (its settings are not whole); start anew under another --name")
    return state


def save_run(folder, state, model, adapter, metadata):
    """The state first, then what it can make again: a crash in between loses nothing."""
    save_state(folder / "state.pt", state)
    export(folder, state["step"], model, adapter, metadata)


def export(folder, step, model, adapter, metadata):
    """The adapter, under its name and as a checkpoint. A resumed run does it again: it may have been killed here."""
    for path in (folder / "adapter.safetensors", folder / "checkpoints" / f"{step:06d}.safetensors"):
        try:
            save_lora(model, path, metadata, adapter)
        except OSError as error:
            raise UserError(f"{path} cannot be written ({reason(error, path)}); {folder}/state.pt is whole")


# --- Validation, and the choice of a checkpoint ---


@torch.no_grad()
def validate(f, vae, pairs, conditions, tau, lpips):
    """(mean LPIPS (AlexNet), mean PSNR, a grid x_L | x̂ | x_H of the first six) over the 8-bit results of `pairs`.

    This PSNR is over R, G and B; eval.py's is over the luma Y, and some dB higher.
    """
    device, distances, psnrs, rows = next(lpips.parameters()).device, [], [], []
    for (_, lr, hr), (c, m) in zip(pairs, conditions, strict=True):
        x_l, x_h = enlarge(lr)[None].to(device), (to_tensor(hr) * 2 - 1)[None].to(device)
        x = vae.decode(one_step(f, vae.encode(x_l), torch.full((1,), tau, device=device), c, m))
        x = ((x.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
        distances.append(lpips(x, x_h).item())
        psnrs.append(10 * math.log10(4 / max((x - x_h).square().mean().item(), 1e-10)))
        rows.append(torch.cat([x_l, x, x_h], 3)[0].cpu() / 2 + 0.5)
    return sum(distances) / len(pairs), sum(psnrs) / len(pairs), to_image(torch.cat(rows[:6], 1))


def past_knee(run, patience):
    """If the knee lies `patience` validations back: copy its adapter to knee.safetensors, return a message; else ""."""
    rows = read_log(run.folder / "log.csv")
    steps, values = zip(*((row["step"], row["val_lpips"]) for row in rows if "val_lpips" in row), strict=True)
    k = knee(values)
    if not 0 < k <= len(values) - 1 - patience:
        return ""
    content = (run.folder / "checkpoints" / f"{steps[k]:06d}.safetensors").read_bytes()
    write_atomically(run.folder / "knee.safetensors", lambda f: f.write(content))
    return f"stopped past the knee of validation LPIPS, step {steps[k]} (knee.safetensors)"


def select(args):
    """Rank the checkpoints of a run by the mean of one metric and copy the best to best.safetensors.

    Scored are the run's validation pictures; `--lq DIR --data DIR` names others.
    """
    settings = load_run(args.run)["settings"]
    lr, hr = (args.lq, args.data[0]) if args.lq and args.data else (args.run / "val" / "lr", args.run / "val" / "hr")
    tagger = settings["tags"] if settings["tags"] in ("ram", "dape") else "none"
    scores = {}
    try:
        pairs = folder_pairs(lr, hr)
        prompts = find_tags(tagger, [p.name for p in pairs], lambda i: bicubic(read_rgb(pairs[i].lr)), args.device)
        for path in tqdm(sorted((args.run / "checkpoints").glob("*.safetensors")), "scoring checkpoints"):
            model = load_model(settings["model"], args.device, DTYPES[args.dtype], path, "auto")
            rows = evaluate(model, pairs, [args.select], device=args.device, prompts=prompts)
            scores[path] = mean(rows)[args.select]
    except (ValueError, weights.Unavailable) as error:
        raise UserError(f"--select: {one_line(error)}")
    if not scores:
        raise UserError(f"--select: {args.run}/checkpoints is empty; --resume writes the last one again")
    order = sorted(scores, key=scores.get, reverse=METRICS[args.select].better == "higher")
    write_csv(args.run / "select.csv", ["checkpoint", args.select],
              [{"checkpoint": path.name, args.select: scores[path]} for path in order])
    content = order[0].read_bytes()
    write_atomically(args.run / "best.safetensors", lambda f: f.write(content))
    print("\n".join(f"{path.stem}  {args.select} {scores[path]:.4f}" for path in order))
    print(f"best: {order[0].name}, copied to {args.run}/best.safetensors")
    return 0


# --- Training ---


def start_adapter(args, dit):
    """Inject the adapter that the settings and --init describe; fills in args.rank and args.lora_targets.

    The projections that --init holds keep its ranks; the others get --rank. Raises UserError in one line for an option
    that --init contradicts.
    """
    found = {}
    if args.init:
        try:
            state, _ = read_lora(args.init)
        except ValueError as error:
            raise UserError(f"{error}")
        found = {key.rpartition(".lora_")[0]: len(x) for key, x in state.items() if ".lora_A." in key}  # its rank
    ffn = any(".ff." in name for name in found)
    if ffn and args.lora_targets == "attn":
        raise UserError(f"--lora-targets attn: --init {args.init} adapts the Mix-FFN too; leave --lora-targets out")
    args.lora_targets = args.lora_targets or ("attn+ffn" if ffn else "attn")
    wanted, args.rank = args.rank, args.rank or max(found.values(), default=64)
    torch.manual_seed(args.seed)
    names = inject_lora(dit, args.rank, targets=args.lora_targets)
    if wanted and set(names) <= set(found) and wanted not in found.values():
        raise UserError(f"--rank {wanted}: --init {args.init} has rank {max(found.values())}; leave --rank out")
    if args.init:
        try:
            load_lora(dit, args.init)
        except ValueError as error:
            raise UserError(f"{error}")


def report_nan(path, step, names, prompts, t, values, norm):
    """Write the samples, prompts and losses of a step whose loss is not finite."""
    content = {"step": step, "samples": names, "prompts": prompts, "t": t.tolist(), "grad_norm": str(norm),
               "losses": {k: str(v.item()) for k, v in values.items()}}
    write_atomically(path, lambda f: f.write(json.dumps(content, indent=1).encode()))


def train(args, state=None):
    """The whole run, as the module's docstring says. state: of the run to resume, or None. Returns the exit code."""
    rank, world = ranks()
    device, say = args.device, partial(print, flush=True) if rank == 0 else lambda *a, **k: None
    asked = (state["settings"] if state else {}).get("asked", {k: getattr(args, k) for k in ("tags", "lpips")})
    # a resumed run repeats the uninterrupted one bit for bit on a CPU; on a GPU the backward pass of LPIPS's
    # max-pooling still adds in an arbitrary order
    torch.backends.cudnn.deterministic = True

    # the networks, of which only the adapter learns
    model = load_model(args.model, device, DTYPES[args.dtype], adapter=False)
    for part in (model.vae, model.dit):
        part.requires_grad_(False)
    model.dit.checkpointing = model.vae.decoder.checkpointing = args.checkpointing
    fill_defaults(args, model)
    judge = LPIPS.from_pretrained("alex").to(device)
    terms = {name: factor for name, factor in LAMBDA.items() if not getattr(args, f"no_{name}", False)}
    lpips, args.lpips = load_lpips(args.lpips) if "lpips" in terms else (None, "none")
    start_adapter(args, model.dit)
    adapter = lora_parameters(model.dit)
    ranks_used = " and ".join(map(str, sorted({len(m.lora_A.weight) for m in lora_modules(model.dit).values()})))
    masters = [p.detach().clone() for p in adapter.values()]  # float32: what the optimiser moves
    for p in adapter.values():
        p.data = p.data.to(next(model.dit.parameters()).dtype)  # what the network computes with
    parameters = list(adapter.values())
    f, f0, vae = in_float32(model.dit), prior(model.dit), Latents(model.vae, model.scaling_factor)
    lpips = lpips and in_autocast(lpips.to(device), device, vae.dtype)

    # the photos, their prompts, the validation set
    def look_at_data():
        photos, report = scan(args.data, args.crop, args.run / "data.json", args.workers)
        photos, held = split(photos)
        lq = match_lq(photos + held, args.lq) if args.lq else {}
        tags = photo_tags(args.tags, args.protocol, photos, lq, args.run / "tags.csv")
        pairs = validation_pairs(held[:args.val], lq, args.crop, args.seed, args.run / "val", args.mild)
        # of x_L, as at test time: the reference must not leak into the validation
        tagger = args.tags if args.tags in ("ram", "dape") and tags else "none"
        val_tags = find_tags(tagger, [name for name, *_ in pairs], lambda i: bicubic(pairs[i][1])) or [[]] * len(pairs)
        return photos, lq, tags, pairs, val_tags, f"{report}; {len(held)} held out, {len(pairs)} for validation"
    photos, lq, tags, pairs, val_tags, report = from_first(look_at_data)
    if tags is None:  # the tagger's weights are unavailable
        args.tags, tags = "none", [[]] * len(photos)
    prompts, val_prompts = ([build_prompt(line, args.suffix) for line in lines] for lines in (tags, val_tags))
    conditions = Conditions(model)
    from_first(lambda: conditions.prepare(sorted({*prompts, *val_prompts})))

    # the state
    ema = [m.clone() for m in masters]
    optimizer = torch.optim.AdamW(masters, args.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0 ** 12, enabled=args.dtype == "fp16")
    step, rows = 0, []
    settings = {k: v for k, v in vars(args).items() if k not in NOT_SETTINGS} | {
        "asked": asked, "global_batch": args.batch * world, "photos_sha256": digest(photos),
        "base_fingerprint": fingerprint(model.folder / "transformer"), "prompts_sha256": hash_of(prompts),
        "lq_sha256": hash_of([weights.sha256(Path(lq[p.path])) if p.path in lq else "" for p in photos])}
    if state:
        for key, what in (("photos_sha256", "the photos"), ("lq_sha256", "the LR pictures"),
                          ("prompts_sha256", "the tags"), ("base_fingerprint", "the model"),
                          ("global_batch", "--batch times the number of processes")):
            if state["settings"].get(key, settings[key]) != settings[key]:  # older runs have not noted all of them
                raise UserError(f"--resume: {what} changed since the run began; start anew under another --name")
        step = state["step"]
        try:
            copy(masters, state["masters"])
            copy(ema, state["ema"])
            optimizer.load_state_dict(state["optimizer"])
            scaler.load_state_dict(state["scaler"])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"{args.run}/state.pt does not fit the adapter of this run ({reason(error)[:200]}); "
                     "start anew under another --name")
        rows = read_log(args.run / "log.csv", step)
    copy(parameters, masters)
    run = Run(args.run, COLUMNS, rows) if rank == 0 else None
    tags_from = args.tags if args.tags in ("none", "ram", "dape") else "file"
    metadata = {k: str(v) for k, v in {
        "base": args.model, "base_fingerprint": settings["base_fingerprint"], "photos": len(photos),
        "terms": " ".join(terms), "ema": EMA, "tags": tags_from, "torch": torch.__version__,
        **{k: settings[k] for k in ("lora_targets", "protocol", "timestep", "suffix", "lpips", "crop", "global_batch",
                                    "lr", "clip", "usm", "mild", "seed", "dtype", "photos_sha256")}}.items()}

    low, high = PROTOCOLS[args.protocol][1]
    say(report + (f"; {len(lq)} have real LR pictures" if args.lq else ""))
    say(f"{args.model}: {sum(m.numel() for m in masters) / 1e6:.2f} M trained parameters (rank {ranks_used}, "
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

    def averaged():
        """(the EMA weights by key, what the file says of itself)."""
        return dict(zip(adapter, ema, strict=True)), metadata | {"step": str(step)}

    def save():
        if run:
            run.picture("curves.png", curves(read_log(args.run / "log.csv"), CURVES))
            save_run(args.run, {"step": step, "settings": settings, "masters": masters, "ema": ema, "scaler":
                     scaler.state_dict(), "optimizer": optimizer.state_dict()}, model.dit, *averaged())
    if run and state:
        export(args.run, step, model.dit, *averaged())

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
    with closing(bar), Signals() as signals:  # closed: an error begins on a line of its own
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
                raise UserError(f"step {step + 1}: loss {mean_loss}, gradient norm {norm}: stopped before the adapter "
                         f"changed; {args.run}/nan_rank*.json names the samples, the last save is whole")
            scaler.step(optimizer)
            scaler.update()
            copy(parameters, masters)
            step += 1
            decay = min(EMA, step / (step + 10))  # smaller at first, so that the untrained adapter is soon forgotten
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
    if stop:
        say(f"interrupted; step {step} is saved, `--name {args.name} --resume` goes on")
        return 128 + (signals.caught or signal.SIGTERM)
    say(f"{knee_passed or 'done'}: {args.run}/adapter.safetensors, step {step}")
    return 0


# --- The command ---

NOT_SETTINGS = ("run", "name", "device", "resume", "select")
# options that a resumed run may change: none of them changes what a step computes
CHANGEABLE = ("batch", "steps", "every", "workers", "checkpointing", "knee")  # batch × processes must stay the same


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
    add("--rank", type=int, help="of the adapter; its scale is 1 (default: that of --init, else 64)")
    add("--init", metavar="PATH", help="start from this adapter instead of from nothing: what it adapts keeps its rank")
    add("--lora-targets", choices=["attn", "attn+ffn"], help="(default: those of --init, else attn)")
    add("--protocol", choices=list(PROTOCOLS), default="hq", help="hq: τ 900, tags of x_H; lq: τ 999, tags of x_L")
    add("--timestep", type=float, metavar="N", help="another τ, in (0, 1000]")
    add("--tags", metavar="none|ram|dape|FILE.csv", help="tags of the photos: none, by a tagger, or from the columns "
        "image and tags of a file (default: ram; none for the bundled model)")
    add("--suffix", metavar="appendix|main|none|TEXT", help="quality words after the tags (default: appendix)")
    add("--lpips", choices=["vgg", "alex"], help="network of the LPIPS loss (default: vgg; alex for the bundled model)")
    for name in ("lpips", "align", "cons"):
        add(f"--no-{name}", action="store_true", help="without this loss")
    add("--usm", action="store_true", help="sharpen x_H first, as Real-ESRGAN does")
    add("--mild", type=float, default=0.0, metavar="SHARE", help="of the pairs, 0 to 1: only blurred, resized and "
        "finely JPEG-coded, where the rest is degraded twice over (default 0)")
    add("--val", type=int, default=8, metavar="N", help="validate on the first N of the photos that are held out (one "
        "in 16, by the hash of the file); val_psnr in log.csv is over R, G, B, not over the luma as in eval.py")
    add("--knee", type=int, default=0, metavar="N", help="stop N validations past the knee of validation LPIPS "
        "(LinearSR's early stopping)")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    add("--dtype", choices=["auto", *DTYPES], default="auto", help="auto: bf16 on a GPU that has it, else fp32")
    add("--checkpointing", action="store_true", help="less memory, more time: recompute activations")
    add("--workers", type=int, default=12, help="loader processes, never more than there are cores")
    add("--seed", type=int, default=0)
    return p


def parse(argv=None):
    """-> (arguments, state to resume or None). Raises UserError in one line for what does not fit."""
    p, state = parser(), None
    args = p.parse_args(argv)
    args.run = Path("runs") / args.name  # an absolute path as the name gives that path
    if args.resume:
        state = load_run(args.run)
        saved = {k: v for k, v in state["settings"].items() if hasattr(args, k)}
        p.set_defaults(**saved)
        args = p.parse_args(argv)
        args.run = Path("runs") / args.name
    elif not args.select and (args.run / "state.pt").exists():
        raise UserError(f"{args.run} holds a run: add --resume to go on, or choose another --name")
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
        if getattr(args, option) is not None and getattr(args, option) < 1:
            p.error(f"--{option} must be positive, not {getattr(args, option)}")
    args.device = pick_device(args.device, int(os.environ.get("LOCAL_RANK", 0)))
    args.dtype = dtype_name(pick_dtype(args.dtype, args.device))
    args.workers = workers(args.workers)
    if args.seed < 0:
        p.error(f"--seed must not be negative, not {args.seed}")
    if state:
        for option, value in state["settings"].get("asked", {}).items():
            if getattr(args, option) == value:  # again; it may not have been to be had when the run began
                setattr(args, option, saved[option])
        changed = [k for k in saved if k not in CHANGEABLE and getattr(args, k) != saved[k]]
        if changed:
            raise UserError("--resume goes on with the settings of the run; different: " + ", ".join(
                f"--{k.replace('_', '-')} {getattr(args, k)} (was {saved[k]})" for k in changed))
    return args, state


@command
def main(argv=None):
    args, state = parse(argv)
    if args.select:
        try:
            return select(args)
        except OSError as error:
            raise UserError(f"{one_line(error)}")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if args.device.type == "cuda":
            torch.cuda.set_device(args.device)
        dist.init_process_group("nccl" if args.device.type == "cuda" else "gloo", timeout=timedelta(days=1))
    try:
        with claimed(args.run) if ranks()[0] == 0 else nullcontext():
            if not state and (args.run / "state.pt").exists():
                raise UserError(f"{args.run} holds a run that has just ended: add --resume, or choose another --name")
            return train(args, state)
    except KeyboardInterrupt:  # before the first step, which nothing else catches
        print(f"interrupted; nothing of {args.run} is lost", file=sys.stderr)
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
