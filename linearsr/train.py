"""Trains LinearSR stage by stage: flow matching on encoded pairs, no loss on pictures.

    python -m linearsr.train --stage pretrain --data ./hq --steps 20000     one network, from the prior of --model
    python -m linearsr.train --stage experts --steps 4000                   each expert, on its own interval of t alone
    python -m linearsr.train --stage finetune --data ./best --steps 1000    each expert again, on the best photos
    python -m linearsr.train --stage export --to linearsr                   a folder for eval.py --model
    torchrun --nproc_per_node 8 -m linearsr.train --stage pretrain --data ./hq --model sana-600m-512 --name official

    z_H = s·E(x_H) and the LR picture x are made once and kept                      runs/pairs
    z_t = (1 − t)·z_H + t·ε,  t = 3u / (1 + 2u),  u uniform on the interval         the sampler's steps, equally likely
    L = ‖ v_θ(z_t, t, E_conv(x), c, m) − (ε − z_H) ‖²

A stage starts at the knee of the one before (ESGF of arXiv 2510.08771; the rule: `runs.knee`), and takes over the
settings that it is not given. An expert is a low-rank difference from the pretrained network, which stays as it is. Ten
per cent of the prompts are empty, for classifier-free guidance, forty are the suffix alone.

The same line goes on where the run was stopped or killed. Leaves in runs/NAME/STAGE, for experts in one folder each:
checkpoints/ (EMA weights), samples/, log.csv, curves.png (the knee is marked), state.pt (to go on), settings.json.
"""
from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import sys
import time
from copy import deepcopy
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

import weights
from fast import load_model
from linearsr import BOUNDARIES, STRIDE, SYSTEM, Stem, check_boundaries, expert_of, sample, shifted, unshifted
from metrics import LPIPS
from objective import Conditions, Latents, put
from photos.degrade import MIN_SIZE, to_image, to_tensor
from photos.pairs import Pairs, digest, find_tags, match_lq, photo_tags, scan, split, validation_pairs
from photos.pictures import bicubic, one_line, write_bytes
from runs import (
    Run,
    Signals,
    UserError,
    average,
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
)
from sanasr import (
    adapters_off,
    build_prompt,
    inject_lora,
    load_lora,
    lora_parameters,
    open_weights,
    save_lora,
    save_module,
    save_tensors,
)

STAGES = ["pretrain", "experts", "finetune"]
LR = {"pretrain": 3e-4, "experts": 3e-4, "finetune": 5e-5}
EMA, WARMUP, CLIP = 0.999, 200, 1.0
EMPTY, UNTAGGED = 0.1, 0.4  # shares of prompts that are empty, and that are the suffix alone
SHARD = 256  # pairs in a file
READ = 20  # steps of a CUDA graph after which their losses are read, for which the CPU has to wait
TOLERANCE = 0.02  # of `knee`: validation LPIPS falls by some 0.4 from the untrained network, 0.008 of that is noise

# --- The network, its loss, and what is watched ---


class Network(nn.Module):
    """Transformer and stem, all that LinearSR trains; t in [0, 1], lr: B,3,8h,8w in [-1, 1]."""

    def __init__(self, dit, stem):
        super().__init__()
        self.dit, self.stem = dit, stem

    def forward(self, z, t, c, m, lr):
        return self.dit(z, 1000 * t, c, m, self.stem(lr))


def flow_loss(network, z, t, noise, c, m, lr):
    """‖v − (ε − z_H)‖² per value, one for each sample: B."""
    s = t[:, None, None, None]
    v = network((1 - s) * z + s * noise, t, c, m, lr).float()
    return (v - (noise - z)).square().mean((1, 2, 3))


def interval(k, boundaries):
    """(lower, upper) end of expert k's interval of t."""
    edges = 0.0, *boundaries, 1.0
    return edges[k], edges[k + 1]


def times(u, ends):
    """u, uniform in [0, 1), to t in the interval `ends`, as often as the sampler's steps fall there."""
    low, high = (unshifted(t) for t in ends)
    return shifted(low + u * (high - low))


class Held:
    """Pairs that are never trained on, with what is drawn for them, the same at every validation."""

    def __init__(self, pairs, prompts, latents, conditions, device):
        """pairs: [(name, LR image, HR image)], all of one size; prompts: one each."""
        self.lr = torch.stack([to_tensor(lr) * 2 - 1 for _, lr, _ in pairs]).to(device)
        self.hr = torch.stack([to_tensor(hr) * 2 - 1 for _, _, hr in pairs])
        self.z = torch.cat([latents.encode(x[None].to(device)) for x in self.hr])
        self.latents, (self.c, self.m) = latents, conditions(prompts)

    def parts(self, size=16):
        """Slices of at most `size` pairs."""
        return [slice(i, min(i + size, len(self.z))) for i in range(0, len(self.z), size)]

    @torch.no_grad()
    def flow(self, network, ends, draws=1):
        """Losses of `network` at `draws` times in the interval `ends` for each pair: pairs,draws."""
        generator = torch.Generator().manual_seed(0)
        losses = []
        for part in self.parts():
            z, n = self.z[part], part.stop - part.start
            columns = []
            for d in range(draws):
                u = (torch.arange(n) + n * d + torch.rand(n, generator=generator)) / (n * draws)
                noise = torch.randn(z.shape, generator=generator).to(z.device)
                columns.append(flow_loss(network, z, times(u, ends).to(z.device), noise, self.c[part], self.m[part],
                                         self.lr[part]))
            losses.append(torch.stack(columns, 1))
        return torch.cat(losses).cpu()

    @torch.no_grad()
    def restored(self, velocity, steps):
        """Pictures in [-1, 1] as `LinearSR.restore` makes them, of 8 bits. velocity: (z, t, c, m, lr) -> v."""
        noise, pictures = torch.randn(self.z.shape, generator=torch.Generator().manual_seed(0)), []
        for part in self.parts():
            v = partial(velocity, c=self.c[part], m=self.m[part], lr=self.lr[part])
            z = sample(v, noise[part].to(self.z.device), steps)
            pictures += [self.latents.decode(row[None]).clamp(-1, 1).cpu() for row in z]
        return ((torch.cat(pictures) + 1) * 127.5).round() / 127.5 - 1

    @torch.no_grad()
    def judged(self, pictures, lpips):
        """Mean PSNR (RGB) and LPIPS of `pictures`, and a grid LR | restored | HR of the first six."""
        device = next(lpips.parameters()).device
        psnr = -10 * torch.log10((pictures - self.hr).square().mean((1, 2, 3)).clamp(min=1e-10) / 4)
        distance = [lpips(x[None].to(device), y[None].to(device)).item()
                    for x, y in zip(pictures, self.hr, strict=True)]
        rows = [torch.cat([to_tensor(bicubic(to_image(lr.cpu() / 2 + 0.5))), x / 2 + 0.5, y / 2 + 0.5], 2)
                for lr, x, y in zip(self.lr[:6], pictures, self.hr, strict=False)]
        scores = {"val_psnr": psnr.mean().item(), "val_lpips": sum(distance) / len(distance)}
        return scores, to_image(torch.cat(rows, 1))


# --- The encoded pairs ---


class Crops(Dataset):
    """Pair n of `Pairs` as 8-bit pictures, with the index of its photo."""

    def __init__(self, pairs):
        self.pairs = pairs

    def __getitem__(self, n):
        i, _, lr, hr = self.pairs.sample(n)
        return {"lr": (lr * 255).round().byte(), "hr": (hr * 255).round().byte(), "photo": i}


class EncodedPairs:
    """z_H, LR picture and photo of every pair: made once, kept in files of SHARD pairs, held in the device's memory."""

    def __init__(self, pairs, count, folder, latents, device, workers):
        """pairs: `Pairs`. What a run was killed in is made again. With several ranks each makes its share."""
        rank, world = ranks()
        parts = [range(first, min(first + SHARD, count)) for first in range(0, count, SHARD)]
        files = [folder / f"{part.start:06d}-{part.stop:06d}.safetensors" for part in parts]
        lacking = from_first(lambda: [k for k, file in enumerate(files) if not file.exists()])[rank::world]
        for k in tqdm(lacking, f"encoding {count} pairs", unit="file", disable=rank > 0 or not lacking):
            loader = DataLoader(Subset(Crops(pairs), parts[k]), 8, num_workers=workers, worker_init_fn=outlive_signals)
            rows = [(self.encode(latents, batch.pop("hr"), device), batch["lr"], batch["photo"]) for batch in loader]
            z, lr, photo = map(torch.cat, zip(*rows, strict=True))
            save_tensors(dict(z=z, lr=lr, photo=photo), files[k])
        if world > 1:
            dist.barrier()
        opened = [open_weights(file) for file in files]
        self.z, self.lr, self.photo = (torch.cat([f.get_tensor(key) for f in opened]) for key in ("z", "lr", "photo"))
        self.count, self.device, self.z, self.lr = count, device, self.z.to(device), self.lr.to(device)

    @staticmethod
    @torch.inference_mode()
    def encode(latents, hr, device):
        return latents.encode(hr.to(device).float() / 127.5 - 1).half().cpu()

    def __getitem__(self, indices):
        """indices: B -> z: B,C,h,w float32; lr: B,3,8h,8w in [-1, 1], both on the device; photo: B, in host memory."""
        indices = torch.as_tensor(indices)
        here = put(indices, self.device)
        return self.z[here].float(), self.lr[here].float() / 127.5 - 1, self.photo[indices]


def encoder_hash(vae):
    """Changes with the encoder: the kept latents do not depend on the decoder."""
    hashed = hashlib.sha256(str(vae.config["scaling_factor"]).encode())
    for x in vae.encoder.state_dict().values():
        hashed.update(x.float().cpu().numpy().tobytes())
    return hashed.hexdigest()[:16]


# --- Where a stage starts ---


def expert_folders(args, stage):
    """The folders of a stage's trainings: one for pretrain, one an expert else."""
    folder = args.root / stage
    return ([Path(args.pretrained or folder)] if stage == "pretrain"
            else [folder / str(k) for k in range(len(args.boundaries) + 1)])


def validations(folder, watch):
    """(steps of a training's validations, the one of its knee)."""
    rows = [row for row in read_log(folder / "log.csv") if watch in row]
    values = [row[watch] * (-1 if watch == "val_psnr" else 1) for row in rows]
    steps = [row["step"] for row in rows]
    if not steps:
        raise UserError(f"{folder / 'log.csv'} has no validations: raise --steps, the next one is noted there")
    return steps, steps[knee(values, TOLERANCE)]


def starting_point(folder, args):
    """The checkpoint of `folder` that the next stage starts from: the one at the knee, or the last (--start end).

    Raises UserError where there is none.
    """
    if not (folder / "log.csv").is_file() or not any((folder / "checkpoints").glob("*.safetensors")):
        raise UserError(f"{folder} holds no training: run the stages in the order {', '.join(STAGES)} under one "
                 "--name, or name the folder of the pretraining by --pretrained")
    steps, bend = validations(folder, args.watch)
    step = steps[-1] if args.start == "end" else bend
    path = folder / "checkpoints" / f"{step:06d}.safetensors"
    if not path.is_file():
        raise UserError(f"{path} is missing: {args.watch} has its {args.start or 'knee'} there")
    print(f"{path}: {'the end' if args.start == 'end' else 'the knee of ' + args.watch}, step {step} of {steps[-1]}",
          flush=True)
    return str(path)


def load_network(network, path):
    """Give `network` the weights of a checkpoint. Raises ValueError naming file and key where they do not fit."""
    with open_weights(path) as file:
        state = {key: file.get_tensor(key).float() for key in file.keys()}
    own = network.state_dict()
    for key in sorted({*own, *state}):
        if key not in own or key not in state or own[key].shape != state[key].shape:
            here, there = (list(d[key].shape) if key in d else "absent" for d in (own, state))
            raise ValueError(f"{path}: {key} is {there}, but {here} in this model: it was trained from another prior; "
                             "take that one as --model, or pretrain anew")
    network.load_state_dict(state)


def prepare(network, args, start, k):
    """Make `network` what a stage starts from. Returns {name: parameter} of what it trains."""
    network.requires_grad_(False)
    if args.stage == "pretrain":
        network.requires_grad_(True)
        return dict(network.named_parameters())
    load_network(network, start["network"])
    if start["adapter"]:
        load_lora(network.dit, start["adapter"], system=SYSTEM)
    else:
        torch.manual_seed(args.seed + k)
        inject_lora(network.dit, args.rank, targets=args.lora_targets)
    return {f"dit.{key}": p for key, p in lora_parameters(network.dit).items()}


# --- One training: the shared network, or one expert ---


class Backward:
    """loss(*inputs).backward(), from gradients of None. Returns the loss, detached, which the next call may overwrite.

    graph: one CUDA graph does it, captured at the first call: a step is one launch instead of thousands. The inputs
    must keep their shapes then, and the parameters their memory; the gradients lie where the graph writes them. Where
    it cannot be captured, a line says why, and the steps are launched one kernel at a time.
    """

    def __init__(self, loss, parameters, graph=False):
        self.loss, self.parameters, self.wanted, self.graph = loss, parameters, graph, None

    def __call__(self, *inputs):
        if self.wanted and self.graph is None:
            try:
                self.capture([x.clone() for x in inputs])
            except Exception as error:  # whatever the driver, Triton or a kernel raises
                self.wanted, self.graph = False, None
                print(f"no CUDA graph, which makes the training slower: {one_line(error)[:300]}", flush=True)
        if self.graph is None:
            return self.eager(inputs)
        torch._foreach_copy_(self.inputs, inputs)
        self.graph.replay()
        return self.value

    def eager(self, inputs):
        for p in self.parameters:
            p.grad = None
        value = self.loss(*inputs)
        value.backward()
        return value.detach()

    def capture(self, inputs):
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # warm up first, so that one-time initialisation is not captured
            for _ in range(3):
                self.eager(inputs)
        torch.cuda.current_stream().wait_stream(side)
        for p in self.parameters:
            p.grad = None  # the warm-up's memory is given back before the graph takes its own
        now = torch.cuda.current_stream()
        with torch.cuda.stream(now), torch.cuda.graph(graph):  # the stream is `now` again, even if the capture fails
            value = self.eager(inputs)
        self.graph, self.inputs, self.value = graph, inputs, value


def capturable(args):
    """Whether forward and backward can be one CUDA graph."""
    return args.device.type == "cuda" and ranks()[1] == 1 and not args.checkpointing


def columns(boundaries):
    """Of log.csv, those drawn in curves.png first. val_flow_K: held-out loss on the interval of expert K; val_flow: on
    that of the training; val_psnr (RGB), val_lpips (AlexNet): of restorations in --val-steps steps."""
    return ["step", "loss", "grad_norm", "val_flow", *(f"val_flow_{k}" for k in range(len(boundaries) + 1)), "val_psnr",
            "val_lpips", "samples_per_s", "memory_gb"]


def fit(folder, k, args, network, start, pairs, prompts, conditions, held, judge):
    """Train `network` on the interval of expert k (None: on [0, 1]) in `folder`. Returns a signal's number, or 0.

    prompts: of the photos, with tags.
    """
    rank, world = ranks()
    device, boundaries = args.device, args.boundaries
    state = load_state(folder / "state.pt", device=device, keys=("step", "parameters", "ema", "optimizer")) \
        if (folder / "state.pt").exists() else None
    if state and state["step"] >= args.steps:
        return 0
    names, parameters = map(list, zip(*prepare(network, args, start, k or 0).items(), strict=True))
    trained = [p.detach() for p in parameters]  # the same memory
    ema = [p.clone() for p in trained]
    optimizer = torch.optim.AdamW(parameters, args.lr, betas=(0.9, 0.999), weight_decay=1e-2,
                                  fused=device.type == "cuda" or None)
    step, rows = 0, []
    if state:
        step, rows = state["step"], read_log(folder / "log.csv", state["step"])
        try:
            copy(parameters, state["parameters"])
            copy(ema, state["ema"])
            optimizer.load_state_dict(state["optimizer"])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"{folder / 'state.pt'} does not fit this network ({one_line(error)[:200]}); start anew "
                            "under another --name")
    run = Run(folder, columns(boundaries), rows) if rank == 0 else None
    ends = (0.0, 1.0) if k is None else interval(k, boundaries)
    label = args.stage if k is None else f"{args.stage} {k}"
    if rank == 0:
        print(f"{label}: {sum(p.numel() for p in parameters) / 1e6:.2f} M parameters, t in {ends}, batch {args.batch} "
              f"× {world}, {dtype_name(args.dtype)} on {device}, torch {torch.__version__}; {folder}", flush=True)

    def velocity(z, t, c, m, lr):
        """The network being trained; with an expert, on its interval only, the shared network elsewhere."""
        foreign = k is not None and expert_of(t, boundaries) != k
        with adapters_off(network.dit) if foreign else contextlib.nullcontext():
            return network(z, torch.full(z.shape[:1], t, device=device), c, m, lr).float()

    def look():
        """Validate the EMA weights: columns for the log, and a picture."""
        if not run:
            return {}
        with holding(parameters, ema), torch.autocast(device.type, args.dtype, args.dtype != torch.float32):
            flow = [held.flow(network, interval(j, boundaries)).mean().item() for j in range(len(boundaries) + 1)]
            pictures = held.restored(velocity, args.val_steps)
        scores, grid = held.judged(pictures, judge)
        run.picture(f"samples/{step:06d}.png", grid)
        own = held_flow(flow, boundaries) if k is None else flow[k]
        return {"val_flow": own, **{f"val_flow_{j}": v for j, v in enumerate(flow)}, **scores}

    def save_checkpoint():
        """Before state.pt is written: so what that has reached exists, whenever the run is killed."""
        path = folder / "checkpoints" / f"{step:06d}.safetensors"
        values = dict(zip(names, ema, strict=True))
        if args.stage == "pretrain":
            save_tensors({key: x.half().cpu() for key, x in values.items()}, path)
        else:
            save_lora(network.dit, path, {"system": SYSTEM, "expert": str(k), "interval": f"{ends[0]:g} {ends[1]:g}"},
                      {key.removeprefix("dit."): x for key, x in values.items()})
        _, mark = validations(folder, args.watch)
        run.picture("curves.png", curves(read_log(folder / "log.csv"), columns(boundaries)[1:-2], mark))

    def loss_of(*inputs):
        with torch.autocast(device.type, args.dtype, args.dtype != torch.float32, cache_enabled=not graph):
            return flow_loss(network, *inputs).mean()

    if step == 0 and run:
        run.note({"step": 0} | look())
        save_checkpoint()
    bar = tqdm(total=args.steps, initial=step, desc=label, unit="step", disable=rank > 0, dynamic_ncols=True)
    plain = build_prompt("", args.suffix)
    graph = capturable(args)
    length = conditions.longest({"", plain, *prompts}) if graph else None  # one shape
    every = READ if graph else 1
    backward, generator = Backward(loss_of, parameters, graph), torch.Generator(device)
    stop, unread, started = 0, [], time.perf_counter()
    with Signals() as signals:
        while step < args.steps and not stop:
            rng = np.random.default_rng((args.seed, STAGES.index(args.stage), k or 0, step))
            total, mine = args.batch * world, slice(rank * args.batch, (rank + 1) * args.batch)
            chosen = rng.integers(pairs.count, size=total)[mine]
            u = ((np.arange(total) + rng.random(total)) / total)[mine]  # stratified: less variance
            kind = rng.random(total)[mine]
            z, lr, photo = pairs[chosen]
            generator.manual_seed(int(rng.integers(2**63)))
            noise = torch.randn((total, *z.shape[1:]), generator=generator, device=device)[mine]
            texts = ["" if r < EMPTY else plain if r < EMPTY + UNTAGGED else prompts[i]
                     for r, i in zip(kind, photo.tolist(), strict=True)]
            t = put(times(torch.from_numpy(u), ends).float(), device)
            loss = backward(z, t, noise, *conditions(texts, length), lr)
            average([p.grad for p in parameters])
            norm = nn.utils.clip_grad_norm_(parameters, CLIP)
            unread.append(torch.stack([loss, norm, torch.full_like(norm, signals.caught)]))
            average(unread[-1:])
            due = (step + 1) % args.every == 0 or step + 1 == args.steps
            values = torch.stack(unread).tolist() if due or len(unread) >= every else []  # waits for the device
            for at, (mean_loss, mean_norm, caught) in enumerate(values, step + 2 - len(values)):
                if not np.isfinite(mean_norm):
                    bar.close()
                    raise UserError(f"{label}, step {at}: loss {mean_loss}, gradient norm {mean_norm}: stopped, the "
                             f"last save in {folder} is whole; try a smaller --lr under another --name")
                stop = stop or caught
            for group in optimizer.param_groups:
                group["lr"] = args.lr * min(1, (step + 1) / WARMUP)
            optimizer.step()
            step += 1
            torch._foreach_lerp_(ema, trained, 1 - min(EMA, step / (step + 10)))
            bar.update()
            if not values:
                continue
            also = {"memory_gb": peak_memory(device) or 0.0,
                    "samples_per_s": total * len(values) / (time.perf_counter() - started)}
            rows = [{"step": at, "loss": mean_loss, "grad_norm": mean_norm} | also
                    for at, (mean_loss, mean_norm, _) in enumerate(values, step + 1 - len(values))]
            bar.set_postfix({key: f"{rows[-1][key]:.4g}" for key in ("loss", "samples_per_s")}, refresh=False)
            if due:
                rows[-1] |= look()
            if run:
                for row in rows:
                    run.note(row)
            if run and due:
                save_checkpoint()
            if run and (due or stop):
                save_state(folder / "state.pt", dict(step=step, parameters=parameters, ema=ema,
                                                     optimizer=optimizer.state_dict()))
            unread, started = [], time.perf_counter()
    bar.close()
    return signals.caught or int(bool(stop))


def held_flow(flow, boundaries):
    """The loss over [0, 1] of those of the intervals, each weighted by its share of u."""
    share = [unshifted(b) - unshifted(a) for a, b in (interval(k, boundaries) for k in range(len(flow)))]
    return sum(a * b for a, b in zip(flow, share, strict=True))


# --- A stage ---


def run_stage(args):
    """Train what the stage names. Returns the exit code."""
    rank, _ = ranks()
    device = args.device
    torch.backends.cudnn.deterministic = True  # a resumed run repeats the one that was not interrupted
    model = load_model(args.model, device, torch.float32, adapter=False)
    if model.vae.factor != 4 * STRIDE:
        raise UserError(f"--model {args.model}: its latents are {model.vae.factor} times smaller, not {4 * STRIDE}")
    args.crop = args.crop or model.dit.config["sample_size"] * model.vae.factor
    if args.crop % model.vae.factor or args.crop < MIN_SIZE:
        raise UserError(f"--crop {args.crop}: it must be a multiple of {model.vae.factor} and at least {MIN_SIZE}")
    model.vae.requires_grad_(False)
    latents, judge = Latents(model.vae, model.scaling_factor), LPIPS.from_pretrained("alex").to(device)

    def look_at_data():
        photos, report = scan(args.data, max(args.crop, args.min_side), args.root / "data.json", args.workers)
        photos, held = split(photos)
        lq = match_lq(photos + held, args.lq) if args.lq else {}
        tags = photo_tags(args.tags, "lq", photos, lq, args.root / "tags.csv")
        pairs = validation_pairs(held[:args.val], lq, args.crop, 0, None, args.mild)
        held_tags = tags and find_tags(args.tags, [p.path for p in held[:args.val]], lambda i: bicubic(pairs[i][1]))
        return photos, lq, tags, pairs, held_tags, f"{report}; {len(held)} held out, {len(pairs)} for validation"
    photos, lq, tags, val_pairs, val_tags, report = from_first(look_at_data)
    if not val_pairs:
        raise UserError("--data: at least two photos are needed, one of them to be held out")
    if tags is None:  # the tagger's weights are unavailable
        args.tags = "none"
    tags, val_tags = tags or [[]] * len(photos), val_tags or [[]] * len(val_pairs)
    prompts, val_prompts = ([build_prompt(line, args.suffix) for line in lines] for lines in (tags, val_tags))
    conditions = Conditions(model)
    from_first(lambda: conditions.prepare(sorted({"", build_prompt("", args.suffix), *prompts, *val_prompts})))
    if rank == 0:
        print(report, flush=True)

    # the pairs are drawn by a seed of their own: other trainings use them, too
    made_of = dict(encoder=encoder_hash(model.vae), photos=digest(photos), crop=args.crop, mild=args.mild,
                   lq=args.lq and [weights.sha256(Path(lq[p.path])) for p in photos if p.path in lq])
    made_of |= {"seed": args.pairs_seed} if args.pairs_seed else {}
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:12]
    drawn = Pairs(photos, prompts, args.crop, None, None, args.pairs_seed, lq, mild=args.mild)
    pairs = EncodedPairs(drawn, args.pairs, Path("runs") / "pairs" / key, latents, device, args.workers)
    held = Held(val_pairs, val_prompts, latents, conditions, device)

    folders = expert_folders(args, args.stage)
    for k, folder in enumerate(folders):
        if args.expert is not None and k != args.expert:
            continue
        start = from_first(lambda folder=folder, k=k: starts(folder, args, k, digest(photos)))
        torch.manual_seed(args.seed)
        dit = deepcopy(model.dit)
        dit.checkpointing = args.checkpointing
        network = Network(dit, Stem({"width": dit.config["cross_attention_dim"]}).to(device))
        with claimed(folder) if rank == 0 else contextlib.nullcontext():
            stop = fit(folder, None if args.stage == "pretrain" else k, args, network, start, pairs, prompts,
                       conditions, held, judge)
        network = dit = None
        if stop:
            if rank == 0:
                print(f"interrupted; {folder} is saved, the same command goes on")
            return 128 + stop
        if rank == 0:
            steps, bend = validations(folder, args.watch)
            print(f"{folder}: step {steps[-1]}; the knee of {args.watch} is at step {bend}", flush=True)
    return 0


def starts(folder, args, k, photos):
    """What a training starts from: {"network": checkpoint or None for the prior, "adapter": checkpoint or None}.

    It is found when the training begins, and noted in settings.json. Raises UserError where the settings have changed
    since then, or where the stage before is missing or has other intervals.
    """
    path = folder / "settings.json"
    settings = {key: getattr(args, key) for key in (*SETTINGS, "lr")} | {
        "photos_sha256": photos, "global_batch": args.batch * ranks()[1], "boundaries": list(args.boundaries)}
    if path.is_file():
        noted = json.loads(path.read_text())
        before = {"pairs_seed": 0} | noted["settings"]
        fixed = [key for key in settings if key not in ("data", "batch", "watch")]  # photos_sha256, global_batch tell
        if changed := [key for key in fixed if settings[key] != before[key]]:
            raise UserError(f"{folder} was begun with other settings: " + ", ".join(
                f"{key} {before[key]}, now {settings[key]}" for key in changed) + "; choose another --name")
        if args.start not in (None, at := noted["start"].get("at", args.start)):
            raise UserError(f"{folder} was begun with --start {at}; choose another --name")
        return noted["start"]
    start = {"network": None, "adapter": None, "at": args.start or "knee"}
    if args.stage == "experts":
        start["network"] = starting_point(*expert_folders(args, "pretrain"), args)
    elif args.stage == "finetune":
        experts = expert_folders(args, "experts")[k]
        start["adapter"] = starting_point(experts, args)
        start["network"] = settings_of(experts, args.boundaries)["start"]["network"]
    write_bytes(path, json.dumps({"settings": settings, "start": start}, indent=1))
    return start


def settings_of(folder, boundaries=None):
    """settings.json of a training. Raises UserError where it, an expert's, was made for other boundaries."""
    noted = json.loads((folder / "settings.json").read_text())
    made = noted["settings"]["boundaries"]
    if boundaries is not None and made != list(boundaries):
        raise UserError(f"{folder} was trained with --boundaries {' '.join(map(str, made))}")
    return noted


def export(args):
    """Write the folder that `LinearSR.from_pretrained` reads, in fp16."""
    target = Path(args.to)
    stage = args.of or next((s for s in reversed(STAGES[1:]) if expert_folders(args, s)[0].is_dir()), "pretrain")
    folders = expert_folders(args, stage)
    points = [starting_point(folder, args) for folder in folders]
    notes = [settings_of(folder, None if stage == "pretrain" else args.boundaries) for folder in folders]
    shared = {points[0]} if stage == "pretrain" else {note["start"]["network"] for note in notes}
    if len(shared) > 1:
        raise UserError(f"{folders[0].parent}: the experts belong to different networks: {', '.join(sorted(shared))}")
    model = load_model(args.model, torch.device("cpu"), torch.float32, adapter=False)
    network = Network(model.dit, Stem({"width": model.dit.config["cross_attention_dim"]}))
    load_network(network, shared.pop())
    (target / "config.json").unlink(missing_ok=True)  # of an earlier export, as the experts are: no model until the end
    for file in (target / "experts").glob("*.safetensors"):
        file.unlink()
    with contextlib.suppress(OSError):
        (target / "experts").rmdir()
    save_module(network.dit, target / "transformer", torch.float16)
    save_module(network.stem, target / "stem", torch.float16)
    for k, point in enumerate(points if stage != "pretrain" else []):
        with open_weights(point) as file:
            save_tensors({key: file.get_tensor(key).half() for key in file.keys()},
                         target / "experts" / f"{k}.safetensors", file.metadata())
    base = args.model if args.model in weights.MODELS else os.path.relpath(model.folder, target)
    boundaries = [] if stage == "pretrain" else list(args.boundaries)
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

# What a stage takes over from the one before where the command line does not say otherwise
SETTINGS = ("data", "lq", "min_side", "model", "crop", "tags", "suffix", "mild", "pairs", "pairs_seed", "boundaries",
            "batch", "rank", "lora_targets", "watch", "val", "val_steps", "seed")


def parser():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], epilog=__doc__.split("\n\n", 1)[1],
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--stage", choices=[*STAGES, "export"], required=True)
    add("--data", nargs="+", metavar="DIR", help="folders of photos, searched recursively")
    add("--lq", metavar="DIR", help="real LR pictures of the same names, a quarter of the size")
    add("--min-side", type=int, default=0, metavar="N", help="only photos whose sides have N pixels or more")
    add("--model", default="embedded", metavar="NAME|FOLDER", help="the prior, with autoencoder and text encoder")
    add("--name", default="linearsr", help="the run is kept in runs/NAME")
    add("--pretrained", metavar="DIR", help="the folder of the pretraining (default: runs/NAME/pretrain)")
    add("--start", choices=["knee", "end"], help="where the stage before is taken up, export: the last (default: knee)")
    add("--watch", choices=["val_lpips", "val_psnr", "val_flow"], default="val_lpips", help="the curve with the knee")
    add("--boundaries", nargs="*", type=float, default=list(BOUNDARIES), metavar="T", help="of the experts' intervals; "
        "none: one expert (default: %(default)s)")
    add("--expert", type=int, metavar="K", help="train this one only (default: all, one after the other)")
    add("--steps", type=int, default=20_000, help="of each training")
    add("--every", type=int, default=1000, metavar="N", help="validate and save every N steps")
    add("--batch", type=int, default=16, help="per process")
    add("--pairs", type=int, default=12_000, metavar="N", help="to encode and keep; on the device one takes 28 KB "
        "with the embedded model: 16 KB of latents, 12 KB of LR picture")
    add("--pairs-seed", type=int, default=0, metavar="N", help="draw other pairs than the stage before, which may "
        "know its own by heart (default: the same)")
    add("--crop", type=int, help="pixels (default: what the prior was trained at)")
    add("--lr", type=float, help="learning rate (default: " + ", ".join(f"{k} {v:g}" for k, v in LR.items()) + ")")
    add("--rank", type=int, default=16, help="of an expert's difference")
    add("--lora-targets", choices=["attn", "attn+ffn"], default="attn+ffn")
    add("--tags", metavar="none|ram|dape|FILE.csv", default="none", help="of the LR pictures, as train.py's")
    add("--suffix", default="appendix", metavar="appendix|main|none|TEXT", help="quality words after the tags")
    add("--mild", type=float, default=0.0, metavar="SHARE", help="of the pairs, 0 to 1, as train.py's")
    add("--val", type=int, default=32, metavar="N", help="held-out photos to validate on")
    add("--val-steps", type=int, default=12, metavar="N", help="of the validation's restorations; fewer than 12 never "
        "reach the last interval")
    add("--to", metavar="DIR", help="export: the folder to write")
    add("--of", choices=STAGES, help="export: of this stage (default: the last one there is)")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    add("--dtype", choices=["auto", "fp32", "bf16"], default="auto", help="bf16: autocast, for GPUs")
    add("--checkpointing", action="store_true", help="less memory, more time: recompute activations")
    add("--workers", type=int, default=12, help="loader processes while encoding, never more than there are cores")
    add("--seed", type=int, default=0)
    return p


def parse(argv=None):
    """-> arguments, completed by the settings of the stage before. Raises UserError in one line."""
    p = parser()
    args = p.parse_args(argv)
    args.root = Path("runs") / args.name
    stages = [args.stage, *(stage for stage in reversed(STAGES) if stage != args.stage)]
    folders = [args.root / stage for stage in stages] + [Path(path) for path in [args.pretrained] if path]
    noted = [path for folder in folders for path in sorted(folder.glob("**/settings.json"))]
    if noted:
        settings = json.loads(noted[0].read_text())["settings"]
        own = ["lr"] if folders[0] in noted[0].parents else []
        p.set_defaults(**{key: settings[key] for key in (*SETTINGS, *own) if key in settings})
        args = argparse.Namespace(**vars(p.parse_args(argv)), root=args.root)
    try:
        args.boundaries = check_boundaries(args.boundaries)
    except ValueError as error:
        p.error(f"--boundaries: {error}")
    if args.stage == "export":
        if not args.to:
            p.error("--to names the folder to write")
        return args
    if not args.data:
        p.error("--data names the folders of photos")
    args.data = [str(Path(folder).resolve()) for folder in args.data]
    for option in ("lq", "tags"):
        if getattr(args, option) not in (None, "none", "ram", "dape"):
            setattr(args, option, str(Path(getattr(args, option)).resolve()))
    for option in ("steps", "every", "batch", "pairs", "rank", "val", "val_steps"):
        if getattr(args, option) < 1:
            p.error(f"--{option.replace('_', '-')} must be positive, not {getattr(args, option)}")
    if not 0 <= args.mild <= 1:
        p.error(f"--mild must lie in [0, 1], not {args.mild:g}")
    if args.stage == "pretrain" and (args.expert is not None or args.pretrained):
        p.error("--expert and --pretrained belong to the later stages")
    if args.expert is not None and not 0 <= args.expert <= len(args.boundaries):
        p.error(f"--expert must be 0 to {len(args.boundaries)}, not {args.expert}")
    args.lr = args.lr or LR[args.stage]
    args.device = pick_device(args.device, int(os.environ.get("LOCAL_RANK", 0)))
    args.dtype = pick_dtype(args.dtype, args.device)
    args.workers = workers(args.workers)
    return args


@command
def main(argv=None):
    args = parse(argv)
    try:
        if args.stage == "export":
            return export(args)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            if args.device.type == "cuda":
                torch.cuda.set_device(args.device)
            dist.init_process_group("nccl" if args.device.type == "cuda" else "gloo", timeout=timedelta(days=1))
        return run_stage(args)
    except KeyboardInterrupt:
        sys.exit("interrupted; what was encoded or saved is kept, the same command goes on")
    except (OSError, ValueError) as error:
        raise UserError(f"{one_line(error).rpartition(' OSError: ')[2]}")  # of a loader's traceback the last line
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
