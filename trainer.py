"""The training loop that all trainings share: AdamW, EMA, clipping, ranks, signals, a log, a state that resumes.

    trainer = Trainer(folder, parameters, loss, settings, steps=2000, every=500, lr=5e-5, device=device)
    code = trainer.run(batches)                         0, or 128 + the number of the signal that stopped it

    batch ─► loss(batch): {"loss", further scalars} ─► backward ─► mean over ranks ─► clip ─► AdamW ─► EMA
    every `every` steps: validate() ─► log.csv, curves.png ─► export() ─► state.pt

What a step computes is the caller's: `loss`, and `batches(first)`, which yields the batches of the steps from `first`
on. Both depend on the step alone, so a run that was stopped or killed goes on as if it had not been.
"""
from __future__ import annotations

import contextlib
import json
import math
import signal
import sys
import time
from itertools import islice

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm

import runs
from photos.pictures import png, reason, write_bytes
from runs import UserError, average, ranks

READ = 20  # steps on a GPU after which their losses are read, for which the CPU has to wait
NAMED = ("name", "prompt", "t")  # of a batch: what is told of it where its loss is not finite


@contextlib.contextmanager
def holding(parameters, values):
    """A context within which the parameters have these values."""
    own = [p.detach().to("cpu", copy=True) for p in parameters]  # of memory a GPU may have none to spare
    copy(parameters, values)
    try:
        yield
    finally:
        copy(parameters, own)


@torch.no_grad()
def copy(parameters, values):
    for p, v in zip(parameters, values, strict=True):
        p.copy_(v)


class Flops(TorchDispatchMode):
    """A context that counts the FLOPs of matrix products and convolutions: `total`.

    FlopCounterMode counts the same, but rounds otherwise: it takes operators apart.
    """

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func._overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def knee(values, tolerance=0.05):
    """Index of the last good point of a falling curve: the first after which it gains no more to speak of.

    A running median of three removes single outliers. The knee is the first remaining value within `tolerance` of the
    whole fall (from the start to the least value) of the least value. So a curve that still falls has its knee at its
    end, one that oscillates or rises again has it before that, one that never falls at its start. On the curve of
    validation LPIPS a stage of LinearSR's training ends there (ESGF of arXiv 2510.08771, which gives no rule).
    """
    y = np.array(values, float)
    if len(y) > 2:
        y[1:-1] = np.median([y[:-2], y[1:-1], y[2:]], 0)
        y[-1] = np.median([y[-1], y[-2], 3 * y[-2] - 2 * y[-3]])  # Tukey's rule for the end
    return int(np.argmax(y <= y.min() + tolerance * (y[0] - y.min())))


def knee_of(rows, column, tolerance=0.05):
    """(steps of the validations among the rows of a log, the step of the knee of `column`); ([], None) without any."""
    rows = [row for row in rows if column in row]
    values = [row[column] * (-1 if "psnr" in column else 1) for row in rows]
    return [row["step"] for row in rows], rows[knee(values, tolerance)]["step"] if rows else None


def open_state(folder):
    """The state of the run in `folder`. Raises UserError."""
    return runs.load_state(folder / "state.pt", keys=("step", "settings", "options", "masters"))


def compare(path, saved, settings, mend="start anew under another --name"):
    """Raise UserError where what lies at `path` was begun with other settings. A key with a space is not an option."""
    changed = [f"{key} changed" if " " in key else f"--{key.replace('_', '-')} {value} (was {saved.get(key)})"
               for key, value in settings.items() if saved.get(key) != value]
    if changed:
        raise UserError(f"{path} was begun with other settings: {', '.join(changed)}; {mend}")


class Trainer:
    """One training in a folder: log.csv, curves.png, samples/, checkpoints/ (the caller's), state.pt."""

    def __init__(self, folder, parameters, loss, settings, *, steps, every, lr, device, samples, options=None,
                 terms=(), watched=(), warmup=0, decay=0.0, betas=(0.9, 0.999), weight_decay=1e-2, clip=1.0, ema=0.999,
                 accumulate=1, fp16=False, buffers=(), validate=None, export=None, backward=None, label="", watch=None,
                 patience=0, tolerance=0.05, resume="rerun to resume", wire=torch.float32):
        """parameters: {name: parameter}, all that is trained. Where one is of half precision, a float32 master moves.
        loss(batch): {"loss": scalar, **terms}; backward(batch), by default loss(batch)["loss"].backward(), leaves the
        gradients and returns the same. settings: what the run depends on; a state of other settings is refused.
        options: kept in the state besides. buffers: further tensors that `loss` changes. samples: of a step, on all
        ranks. every: steps between validations;
        validate(): ({column: number}, of `watched`, a picture for samples/ or None), with the EMA weights in place.
        export(step, {name: EMA weights}) writes the caller's files.
        warmup: steps; decay: the share of the steps at the end over which the rate falls to zero.
        patience: stop that many validations past the `knee` of the column `watch`; `knee_step` then names it.
        wire: the dtype in which ranks exchange gradients.
        Raises UserError where the folder's state is of other settings or does not fit.
        """
        self.folder, self.loss, self.label, self.resume = folder, loss, label, resume
        self.settings, self.options, self.samples = settings, options or {}, samples
        self.steps, self.every, self.lr, self.warmup, self.decay = steps, every, lr, warmup, decay
        self.clip, self.ema_decay, self.accumulate, self.device = clip, ema, accumulate, device
        self.validate, self.export, self.backward = validate, export, backward or self.eager
        self.watch, self.patience, self.tolerance, self.knee_step = watch, patience, tolerance, None
        self.wire, self.tflop = wire, None  # tflop: of a step on all ranks, once it is known
        self.names, self.parameters, self.buffers = list(parameters), list(parameters.values()), list(buffers)
        self.masters = [p.detach().float() for p in self.parameters]  # of a float32 parameter the same memory
        self.half = [(p, m) for p, m in zip(self.parameters, self.masters, strict=True) if p.dtype != m.dtype]
        self.ema = [m.clone() for m in self.masters]
        self.optimizer = torch.optim.AdamW(self.masters, lr, betas=betas, eps=1e-8, weight_decay=weight_decay,
                                           fused=device.type == "cuda" or None)
        self.scaler = torch.amp.GradScaler(device.type, init_scale=2.0 ** 12, enabled=fp16)
        self.columns = ["step", "loss", *terms, "grad_norm", *watched, "samples_per_s", "tflops", "memory_gb"]
        self.step, self.rows, self.main = 0, [], ranks()[0] == 0
        if (folder / "state.pt").exists():
            self.load(open_state(folder))
        self.saved = self.step
        if self.main:
            for part in ("checkpoints", "samples"):
                (folder / part).mkdir(parents=True, exist_ok=True)
            runs.write_csv(folder / "log.csv", self.columns, self.rows)

    # --- the state, and the files ---

    def load(self, state):
        compare(self.folder, state["settings"], self.settings)
        try:
            copy(self.masters, state["masters"])
            copy(self.ema, state["ema"])
            copy(self.buffers, state.get("buffers", []))
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"{self.folder}/state.pt does not fit this training ({reason(error)[:200]}); start anew "
                            "under another --name")
        copy(self.parameters, self.masters)
        self.step = state["step"]
        self.rows = [{k: row[k] for k in row if k in self.columns}
                     for row in runs.read_log(self.folder / "log.csv", self.step)]

    def save(self):
        """The caller's files, then the state: so what the state has reached exists, whenever the run is killed."""
        if self.main:
            mark = self.past_knee()[0] if self.watch else None
            write_bytes(self.folder / "curves.png", png(runs.curves(self.rows, self.columns[1:-3], mark)))
            if self.export:
                self.export(self.step, dict(zip(self.names, self.ema, strict=True)))
            runs.save_state(self.folder / "state.pt", {
                "step": self.step, "settings": self.settings, "options": self.options, "masters": self.masters,
                "ema": self.ema, "buffers": self.buffers, "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict()})
        self.saved = self.step

    def note(self, row):
        """Add a row to the log."""
        cells = {c: f"{row[c]:.6g}" for c in self.columns if c in row} | {"step": str(row["step"])}
        self.rows.append({c: float(text) for c, text in cells.items()} | {"step": row["step"]})  # as when resumed
        try:
            with open(self.folder / "log.csv", "a", newline="") as f:
                f.write(",".join(cells.get(c, "") for c in self.columns) + "\r\n")
        except OSError as error:
            raise UserError(f"{self.folder}/log.csv cannot be written ({reason(error)})")

    def look(self):
        """The columns of `validate`, by the EMA weights; writes its picture."""
        if not self.main or not self.validate:
            return {}
        with holding(self.parameters, self.ema), torch.no_grad():
            scores, picture = self.validate()
        if picture:
            write_bytes(self.folder / "samples" / f"{self.step:06d}.png", png(picture))
        return scores

    def past_knee(self):
        """(step of the knee of the watched column or None, whether it lies `patience` validations back)."""
        steps, bend = knee_of(self.rows, self.watch, self.tolerance)
        return bend, bend in steps[1:len(steps) - self.patience]

    def over(self):
        """Whether all steps are done, or the knee lies `patience` validations back: `knee_step` then names it."""
        bend, passed = runs.from_first(self.past_knee) if self.patience else (None, False)
        self.knee_step = bend if passed else None
        return passed or self.step >= self.steps

    # --- the loop ---

    def eager(self, batch):
        with Flops() if self.tflop is None else contextlib.nullcontext() as counter:
            values = self.loss(batch)
            self.scaler.scale(values["loss"] / self.accumulate).backward()
        if counter:
            self.tflop = counter.total * self.accumulate * ranks()[1] / 1e12
        return {name: value.detach() for name, value in values.items()}

    def gradients(self, stream):
        """Backward of a step's batches, the masters' gradients averaged over ranks and clipped.

        Returns (mean of the values, gradient norm, what is NAMED of the batches), or None where the batches have ended.
        """
        sums, seen = {}, []
        if self.backward == self.eager:  # a captured step writes its gradients where they are
            for p in self.parameters:
                p.grad = None
        for batch in islice(stream, self.accumulate):
            for name, value in self.backward(batch).items():
                sums[name] = sums.get(name, 0) + value / self.accumulate
            seen.append({key: batch[key] for key in NAMED if key in batch})  # what is kept until the losses are read
        if len(seen) < self.accumulate:
            return None
        for master, p in zip(self.masters, self.parameters, strict=True):
            master.grad = p.grad.float()
        average([m.grad for m in self.masters], self.wire)
        self.scaler.unscale_(self.optimizer)
        return sums, torch.nn.utils.clip_grad_norm_(self.masters, self.clip), seen

    def update(self):
        left = (self.steps - self.step) / max(self.decay * self.steps, 1e-9)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * min(1.0, (self.step + 1) / max(self.warmup, 1), left)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        for p, master in self.half:
            p.detach().copy_(master)
        self.step += 1
        # the decay is smaller at first, so that the untrained weights are soon forgotten
        torch._foreach_lerp_(self.ema, self.masters, 1 - min(self.ema_decay, self.step / (self.step + 10)))

    def check(self, step, row, batches):
        """Stop where a loss is not finite, and say on which samples."""
        overflow = self.scaler.is_enabled() and self.scaler.get_scale() > 1  # of fp16: the scaler skips the step
        if math.isfinite(row["loss"]) and (math.isfinite(row["grad_norm"]) or overflow):
            return
        about = {key: [str(v) for b in batches for v in (b[key].tolist() if torch.is_tensor(b[key]) else b[key])]
                 for key in batches[0]}
        path = self.folder / f"nan_rank{ranks()[0]}.json"
        write_bytes(path, json.dumps({"step": step, **{k: str(v) for k, v in row.items()}, **about}, indent=1))
        raise UserError(f"step {step}: loss {row['loss']:g}, gradient norm {row['grad_norm']:g}: stopped; {path} names "
                        f"the samples, the save of step {self.saved} is unharmed; try a smaller --lr")

    def run(self, batches):
        """Train to the last step. batches(first, signals): yields the batches of the steps from `first` on.

        A batch with "name" and "prompt" is named where its loss is not finite. Returns the exit code.
        """
        if self.over():
            self.save()  # makes files that are missing
            return 0
        if self.step == 0 and self.main and not self.rows:
            self.note({"step": 0} | self.look())
            self.save()
        bar = tqdm(total=self.steps, initial=self.step, desc=self.label or None, unit="step", disable=not self.main,
                   dynamic_ncols=True)
        try:
            with contextlib.closing(bar), runs.Signals() as signals:  # closed: an error begins on a line of its own
                stop = self.loop(batches(self.step, signals), signals, bar)
        except KeyboardInterrupt:
            print(f"stopped at once: steps after {self.saved} are lost; {self.resume}", file=sys.stderr)
            return 130
        if stop and self.main:
            print(f"interrupted; step {self.step} is saved, {self.resume}", flush=True)
        return 128 + stop if stop else 0

    def loop(self, stream, signals, bar):
        unread, started, read = [], time.perf_counter(), READ if self.device.type == "cuda" else 1
        while self.step < self.steps:
            result = self.gradients(stream)
            if result is None:  # a signal ended the loader
                self.save()
                return signals.caught
            values, norm, seen = result
            stats = {**values, "grad_norm": norm, "stop": torch.full_like(norm, signals.caught)}
            average(list(stats.values()))
            unread.append((self.step + 1, stats, seen))
            due = (self.step + 1) % self.every == 0 or self.step + 1 == self.steps
            if not due and len(unread) < read:
                self.update()
                bar.update()
                continue
            table = torch.stack([torch.stack([*s.values()]) for _, s, _ in unread]).tolist()  # waits for the device
            rows = [dict(zip(stats, row, strict=True)) for row in table]
            for (step, _, batch), row in zip(unread, rows, strict=True):
                self.check(step, row, batch)
            self.update()
            bar.update()
            stop = any([row.pop("stop") for row in rows])  # of any rank
            rate = len(rows) / (time.perf_counter() - started)
            also = {"samples_per_s": self.samples * rate, "memory_gb": runs.peak_memory(self.device) or 0.0}
            also |= {"tflops": self.tflop * rate} if self.tflop else {}
            rows = [{"step": step} | row | also for (step, *_), row in zip(unread, rows, strict=True)]
            bar.set_postfix({k: f"{v:.4g}" for k, v in rows[-1].items() if k != "step"}, refresh=False)
            if due:
                rows[-1] |= self.look()
            for row in rows if self.main else []:
                self.note(row)
            if due or stop:
                self.save()
            if stop:
                return signals.caught or signal.SIGTERM
            if due and self.over():
                return 0
            unread, started = [], time.perf_counter()
        return 0
