"""What the commands share: errors, options, devices, states that resume, tables and charts, ranks, signals."""
import argparse
import contextlib
import csv
import errno
import functools
import itertools
import math
import os
import pickle
import signal
import subprocess
import sys
import time
import warnings
from datetime import timedelta
from io import StringIO

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader

import weights
from photos.pictures import atomically, one_line, reason, write_bytes
from weights.dtypes import choose_dtypes

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# --- Errors, and the end of a command ---


class UserError(Exception):
    """What a user can mend: one line that names the file or option and the mend."""


def out_of_memory(error):
    """Whether an exception says that memory ran out; without CUDA PyTorch raises a plain RuntimeError."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        words in str(error) for words in ("allocate memory", "out of memory"))


def command(main):
    """Decorates a command's main(argv), which returns the exit code, or nothing for 0: what a user can mend ends it
    with one line `error: …` and exit code 1, Ctrl-C with exit code 130."""
    @functools.wraps(main)
    def run(argv=None):
        for stream in (sys.stdout, sys.stderr):  # a file's name may hold what the terminal cannot show
            with contextlib.suppress(AttributeError):  # a stand-in
                stream.reconfigure(errors="backslashreplace")
        try:
            return main(argv) or 0
        except (UserError, OSError, ValueError, weights.Unavailable) as error:
            sys.exit(f"error: {one_line(error).rpartition(' OSError: ')[2]}")  # of a loader's traceback the last line
        except KeyboardInterrupt:  # outside the loops, which save
            print("interrupted; every file is whole", file=sys.stderr)
            sys.exit(130)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            sys.exit(f"error: there is not enough memory ({one_line(error)[:200]})")
    return run


# --- Device, dtype ---

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The device for cpu, cuda, mps or auto (the best there is). Raises UserError for one that is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(n for n in there if there[n])
    if not there[name]:
        raise UserError(f"--device {name}: PyTorch {torch.__version__} finds none here; use --device cpu")
    return torch.device(name, local_rank % torch.cuda.device_count()) if name == "cuda" else torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The transformer's dtype for fp32, bf16, fp16 or auto on `device`, see `choose_dtypes`."""
    return choose_dtypes(device, DTYPES.get(name))[0]


def set_flags(repeatable=False, tf32=False):
    """PyTorch's global switches for GPUs. Each command sets them here, first of all; `evaluate` does for its scores.

    repeatable: a resumed run repeats an uninterrupted one: for trainings. Else cuDNN tries its algorithms at the first
    convolution of a shape, and takes the fastest.
    tf32: float32 matrix products and convolutions with 10 bits of mantissa, several times as fast: for trainings.
    """
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = repeatable, not repeatable
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32


def dtype_name(dtype: torch.dtype) -> str:
    """fp32, bf16 or fp16."""
    return next(name for name, d in DTYPES.items() if d == dtype)


def workers(wanted):
    """Loader processes for this rank: `wanted`, but never more than its share of the cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(wanted, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def revision(folder):
    """The short name of the commit in `folder`, or "unknown"."""
    try:
        done = subprocess.run(["git", "-C", folder, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    except OSError:  # there is no git
        return "unknown"
    return done.stdout.strip() or "unknown"


def peak_memory(device):
    """Gigabytes: of GPU memory since the last reset, else of the whole process since its start; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


# --- Options ---


class Help(argparse.RawDescriptionHelpFormatter):
    """Names the default of every option that has one and does not speak of it."""

    def _get_help_string(self, action):
        silent = "default" in action.help or str(action.default) in ("None", "False", "", argparse.SUPPRESS)  # not 0
        return action.help + " (default: %(default)s)" * (not silent)


def parser(doc):
    """A parser whose help is the docstring of a command's module."""
    summary, _, rest = doc.partition("\n\n")
    return argparse.ArgumentParser(description=summary, epilog=rest, formatter_class=Help)


RANGES = {  # option: (least, most); where the least is a string, the number lies above it
    **dict.fromkeys(("steps", "every", "batch", "accumulate", "rank", "pairs", "val_steps", "samples", "draws",
                     "limit", "fine_steps", "latents", "sample"), (1, math.inf)),
    **dict.fromkeys(("workers", "val", "knee", "heal", "min_side", "tile", "cfg"), (0, math.inf)),
    **dict.fromkeys(("lr", "eps_p"), ("0", math.inf)), "timestep": ("0", 1000), "share": ("0", 1),
    **dict.fromkeys(("mild", "unconditional"), (0, 1)),
    **dict.fromkeys(("seed", "pairs_seed"), (0, 2**64 - 1))}


def check_ranges(args):
    """Raise UserError where a number among the arguments lies outside its range."""
    for option, (low, high) in RANGES.items():
        value = getattr(args, option, None)
        above = isinstance(low, str)
        if isinstance(value, int | float) and not (float(low) <= value <= high and (value != 0 or not above)):
            bounds = f"above {low}" if above else f"at least {low}"
            bounds += "" if high == math.inf else f" and at most {high}"
            raise UserError(f"--{option.replace('_', '-')} must be {bounds}, not {value:g}")


def add_device_options(add, workers=None):
    """--device and --dtype, where workers is a number also --workers and --seed, by a parser's `add_argument`."""
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="auto: a GPU where there is one")
    add("--dtype", choices=["auto", *DTYPES], default="auto", help="auto: bf16 on a GPU that has it, else fp32")
    if workers is not None:
        add("--workers", type=int, default=workers, help="loader processes, never more than there are cores")
        add("--seed", type=int, default=0, help="of all that is drawn at random")


def resolve_device(args, fp16=False):
    """Make of --device, --dtype and --workers what is used: a torch.device, fp32, bf16 or fp16, a number.

    Raises UserError for fp16 where the command does not take it.
    """
    args.device = pick_device(args.device, int(os.environ.get("LOCAL_RANK", 0)))
    args.dtype = dtype_name(pick_dtype(args.dtype, args.device))
    if args.dtype == "fp16" and not fp16:
        raise UserError("--dtype fp16: gradients here lie below its range; take bf16 or fp32")
    args.workers = workers(args.workers)


@contextlib.contextmanager
def process_group(device):
    """A context with torch.distributed set up under torchrun, and nothing without it."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=1),
                            device_id=device if device.type == "cuda" else None)
    try:
        yield
    finally:
        dist.destroy_process_group()


# --- Files of a run ---


def save_state(path, state):
    """Write a state that `load_state` reads. Raises UserError, with the old file unharmed."""
    try:
        with atomically(path) as temporary, open(temporary, "wb") as f:
            torch.save(state, f)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        raise UserError(f"{path} cannot be written ({reason(error)}); what was there before is unharmed")


def load_state(path, damaged="start anew under another --name", keys=()):
    """A state that `save_state` wrote, a dict with these keys at least. No pickle in it is executed.

    Raises UserError in one line, which tells what to do: `damaged`.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # about pickles, in several lines
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: there is nothing to resume; check --name or leave out --resume")
    except pickle.UnpicklingError:
        raise UserError(f"{path} cannot be read (it holds more than tensors and numbers); {damaged}")
    except Exception as error:  # a damaged archive raises anything
        raise UserError(f"{path} cannot be read ({reason(error)[:200]}); {damaged}")
    if not isinstance(state, dict) or not set(keys) <= set(state):
        raise UserError(f"{path} cannot be read (it is no state of this command); {damaged}")
    return state


def write_csv(path, columns, rows, digits=".6g", end="\r\n"):
    """Write dicts as a CSV file with these columns; `digits` formats the floats; cells that a row lacks are empty.

    The file is written atomically. Raises OSError.
    """
    text = StringIO(newline="")
    out = csv.DictWriter(text, columns, lineterminator=end)
    out.writeheader()
    out.writerows({k: format(v, digits) if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    write_bytes(path, text.getvalue())


@contextlib.contextmanager
def claimed(folder):
    """A context in which no other process may claim `folder`. The folder is made if missing.

    The claim ends with the process, however that ends. Where the file system knows no locks, all are let in.
    Raises UserError in one line where another process has the folder, or where it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a")
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({reason(error)})")
    with lock:
        try:
            if fcntl:  # lockf: worker processes do not inherit it, so one that outlives a killed run blocks nothing
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(f"{folder} is in use by another process: wait until it ends, or choose another name")
        yield


def read_log(path, last=math.inf):
    """The rows of log.csv up to step `last`, as dicts of numbers; empty cells are left out. Without the file, none.

    Raises UserError in one line for a damaged file.
    """
    try:
        with open(path, newline="") as f:
            rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(f)]
        return [row | {"step": int(row["step"])} for row in rows if row["step"] <= last]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, KeyError, csv.Error):
        raise UserError(f"{path} is damaged; delete it: the run goes on without the rows of the log")


def curves(rows, names, mark=None, width=360, height=200):
    """A picture of the columns `names` of the log against the step: the values in grey, their running mean in blue.

    mark: a step, such as the knee's, where a red line is drawn.
    """
    names = [n for n in names if any(n in row for row in rows)]
    canvas = Image.new("RGB", (3 * width, -(-max(len(names), 1) // 3) * height), "white")
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
        if mark is not None:
            at = left + (min(max(mark, x[0]), x[-1]) - x[0]) / max(x[-1] - x[0], 1) * w
            draw.line((at, top, at, top + h), "#c01010", 2)
        draw.text((left, top - 16), f"{name} {smooth[-1]:.4g}   (axis {low:.4g} to {high:.4g}, "
                                    f"steps {x[0]:.0f} to {x[-1]:.0f})", "black")
    return canvas


# --- Several processes ---

MEASURED = 20, 60  # from and to which batch the waiting for loader processes is measured: they have started before


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


def average(tensors, wire=torch.float32, most=2**25):
    """Replace each tensor by its mean over all ranks, in messages of dtype `wire` and of some `most` values."""
    if ranks()[1] == 1:
        return
    message = (end // most for end in itertools.accumulate(t.numel() for t in tensors))  # the number of each tensor's
    for _, part in itertools.groupby(tensors, lambda _: next(message)):
        part = list(part)
        flat = torch.cat([t.flatten().to(wire) for t in part])
        dist.all_reduce(flat)
        for t, mean in zip(part, flat.div_(ranks()[1]).split([t.numel() for t in part]), strict=True):
            t.copy_(mean.view_as(t))


# --- Signals ---


class Signals:
    """A context in which Ctrl-C and SIGTERM set `caught`, for the loop to stop after its step.

    A second signal raises KeyboardInterrupt at once.
    """

    caught = 0

    def __enter__(self):
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
    """worker_init_fn of a DataLoader: its workers ignore Ctrl-C and survive SIGTERM until the run ends them.

    A signal to the process group reaches the workers, too. A worker killed while holding a lock or mid-transfer would
    hang the run. Python also ends the workers of a failed run by SIGTERM, so a worker exits 5 s after one.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(5))


def batches(dataset, size, steps, workers, signals, pin_memory=False):
    """This rank's batches of `size` samples of an endless dataset: yields one for each of `steps`, a range.

    A signal may end a worker that has just started: then the batches end without an error. pin_memory: on a GPU, where
    a line says so if it waits for too few workers.
    """
    rank, world = ranks()
    mine = ([(n * world + rank) * size + i for i in range(size)] for n in steps)
    loader = DataLoader(dataset, batch_sampler=mine, num_workers=workers, worker_init_fn=outlive_signals,
                        pin_memory=pin_memory)
    waited = begun = last = 0.0
    try:
        for n, batch in enumerate(loader):
            now = time.perf_counter()
            waited += now - last
            if n == MEASURED[0]:
                waited, begun = 0.0, now
            if n == MEASURED[1] and pin_memory and rank == 0 and waited > 0.1 * (now - begun):
                need = math.ceil(max(workers, 1) * (now - begun) / (now - begun - waited))
                print(f"note: the GPU waits for photos: it needs --workers {need}, not {workers}", file=sys.stderr)
            yield batch
            last = time.perf_counter()
    except RuntimeError:
        if not signals.caught:
            raise
