"""Evidence from an NVIDIA GPU in three commands, each within ten minutes, on a machine without network or registries:

    python3 -m lab.gpu correctness --out runs/gpu    4 minutes: every operator in every dtype against float64, the GPU
                                                     tests, goldens, compute-sanitizer, pictures against the CPU's
    python3 -m lab.gpu timings --out runs/gpu        9 minutes, with the machine for itself: stages at 512, 1024 and
                                                     4096 pixels against diffusers, then each kernel
    python3 -m lab.gpu training --out runs/gpu       9 minutes: regional compilation, train.py, prune.py, LinearSR

A line of the report is a command of this repository. What is specific to GPUs lies there: in tests/, kernels.bench and
lab.bench. Time that a command leaves unused is the next one's; one that fails costs its own line, and what it said
before, under the same name, is kept. gpu.json and gpu.md in --out are written after each.
--only NAME …: these lines. --rehearse: the same on a CPU, tiny, so that a mistake does not cost the run on a GPU.
"""
from __future__ import annotations

import argparse
import csv
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from kernels.bench import OPS
from kernels.dispatch import triton
from lab.bench import CONFIGS, seeded
from photos.pictures import write_bytes
from runs import DTYPES, UserError, command, cpu_name, revision
from sanasr import DCAE, Gemma2, LinearDiT, save_module

ROOT = Path(__file__).resolve().parent.parent
SECONDS = {"correctness": 240, "timings": 540, "training": 540}


@dataclass
class Line:
    """One line of the report: commands in turn, and read(their output, the scratch folder) -> dicts of columns."""
    name: str
    seconds: int
    commands: list
    read: object
    env: dict


def printed(text, scratch):
    return [{"result": t.strip("= ")} for t in text.splitlines() if t.strip("= ")]


def last_line(text, scratch):
    return printed(text, scratch)[-1:]


# --- What the commands write ---


def operator(name, text, scratch):
    content = json.loads((scratch / f"{name}.json").read_text())
    return [{"op": op, "relative error": error} for op, error in content["errors"].items()]


def kernel_rows(text, scratch):
    content, rows = json.loads((scratch / "kernels.json").read_text()), []
    for row in (row for row in content["rows"] if row["ms"]):
        *_, last = row["ms"].values()
        rate = row["bytes"] / last[1] * 1e3
        rows.append({"op": row["op"], "where": row["where"], "batch": row["batch"], "pass": row["pass"], "MB":
                     row["bytes"] / 1e6, **{f"{label} ms": ms[1] for label, ms in row["ms"].items()}, "GB/s":
                     rate / 1e9, "of the copy": rate / content["copy_rate"].get(str(row["bytes"]), float("nan"))})
    return rows


def bench_rows(name, text, scratch):
    rows = json.loads((scratch / f"{name}.json").read_text())["rows"]
    notes = [line for line in text.splitlines() if "left out" in line or " busy" in line or "first calls" in line]
    return [{"variant": row["variant"], "stage": row["stage"], "p50 ms": 1e3 * row["p50"], "p95 ms": 1e3 * row["p95"],
             "share of the product": row["share"], "peak GB": (row["peak"] or 0) / 1e9, "error": row["error"]}
            for row in rows] + [{"variant": note} for note in notes]


def train_rows(name, text, scratch):
    with open(scratch / name / "log.csv", newline="") as f:
        rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(f)][1:]
    return [{"steps": len(rows), "images/s": statistics.median(row["images_per_s"] for row in rows[len(rows) // 2:]),
             "GB": max(row["memory_gb"] for row in rows), "first loss": rows[0]["loss"], "last": rows[-1]["loss"]}]


def prune_rows(text, scratch):
    rates = re.findall(r"([\d.]+)(s/it|it/s)", text)[:-1]  # the last is the mean, with the start and compilation
    rate, unit = rates[-1] if rates else ("nan", "it/s")
    with open(scratch / "pruned" / "saliency.csv", newline="") as f:
        dropped = " ".join(row["block"] for row in csv.DictReader(f) if row["kept"] == "0")
    return [{"samples/s": float(rate) if unit == "it/s" else 1 / float(rate), "dropped blocks": dropped}]


def compared(name, allowed, text, scratch):
    """How far the pictures are from the CPU's, of 255."""
    worst = []
    for path in sorted((scratch / name).glob("*.png")):
        ours, cpu = (np.asarray(Image.open(p), float) for p in (path, scratch / f"{name} cpu" / path.name))
        worst.append((np.abs(ours - cpu).mean(), np.abs(ours - cpu).max()))
    mean, largest = (max(values) for values in zip(*worst, strict=True))
    if not mean <= allowed:
        raise ValueError(f"not the CPU's pictures: they differ by {mean:.3g} of 255 in the mean")
    return [{"pictures": len(worst), "mean difference of 255": mean, "largest": largest}]


# --- The lines ---


def make_model(folder, rehearse):
    """An official folder under seeded weights, in official size but for the text encoder, and photos beside it."""
    sys.path.insert(0, str(ROOT / "tests"))
    import tiny
    tiny.tiny_model(folder)  # on a GPU for its tokenizer
    if not rehearse:
        for cls, name in ((DCAE, "vae"), (LinearDiT, "transformer"), (Gemma2, "text_encoder")):
            config = (tiny.CONFIGS[name][1] | {"hidden_size": 2304, "num_hidden_layers": 1} if cls is Gemma2 else
                      json.loads((CONFIGS / f"{name}.config.json").read_text()))
            shutil.rmtree(folder / name)
            save_module(seeded(cls, config, torch.bfloat16, "cuda"), folder / name)
    side, rng = 160 if rehearse else 640, np.random.default_rng(0)
    (folder.parent / "photos").mkdir()
    for i in range(8):
        small = Image.fromarray(rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8))
        small.resize((side, side), Image.Resampling.BICUBIC).save(folder.parent / "photos" / f"{i}.png")


def lines_of(what, scratch, rehearse):
    """The lines of a command."""
    device, model, photos = "cpu" if rehearse else "cuda", scratch / "model", scratch / "photos"
    found = []

    def add(name, seconds, *commands, read=last_line, **env):
        found.append(Line(name, seconds, [list(map(str, argv)) for argv in commands], read, env))

    def bench(name, seconds, *options):
        small = ["--blocks", 1] if rehearse else []
        add(name, seconds, ["-m", "lab.bench", "--device", device, "--dtype", "fp32" if rehearse else "bf16", "--json",
                            scratch / f"{name}.json", "--runs", 1 if rehearse else 10, *options, *small],
            read=partial(bench_rows, name))

    def tests(name, seconds, *options, **env):
        add(name, seconds, ["-m", "pytest", "-q", "-p", "no:cacheprovider", *options], **env)
    interpreter = {"TRITON_INTERPRET": "1"} if rehearse else {}
    if what == "correctness":
        for op in OPS:
            for dtype in DTYPES:
                name = f"{op} {dtype}"
                add(name, 240, ["-m", "kernels.bench", "--check", "--op", op, "--dtype", dtype, "--json",
                                scratch / f"{name}.json"], read=partial(operator, name), **interpreter)
        for part in ("attention", "gate or mix", "norm"):
            tests(f"kernel tests, {part}", 240, "tests/test_kernels_triton.py", "-k", part, **interpreter)
        tests("graphs", 240, "tests/test_fast.py", "-k", "graph or dit")
        tests("goldens", 240, "tests/test_gpu.py", "-k", "golden", SANASR_GOLDENS=device)
        for dtype, fast, allowed in (("fp32", "off", 1), ("fp32", "on", 1), ("bf16", "on", 3), ("fp16", "off", 3)):
            name = f"pictures {dtype}, fast {fast}"
            evals = [["eval.py", ROOT / "examples", "--out", scratch / f"{name}{end}/", "--device", where, "--dtype",
                      kind, "--fast", how] for end, where, kind, how in
                     (("", device, dtype, fast), (" cpu", "cpu", "fp32", "off"))]
            add(name, 240, *evals, read=partial(compared, name, allowed))
        sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        add("compute-sanitizer", 240, ["!", sanitizer, "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q",
                                       "tests/test_kernels_triton.py", "-k", "gate_sizes or norm_sizes or lengths"])
    elif what == "timings":
        small, large = ("64", "96") if rehearse else ("512", "1024")
        ours = "plain,fast" if rehearse else "plain,fast,graphs"
        rivals = ["--vs", "diffusers"] if find_spec("diffusers") and not rehearse else []
        add("card", 20, ["!", "nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit,"
                         "temperature.gpu", "--format=csv"], read=printed)
        bench("stages 512", 90, "--size", small, "--variants", ours, *rivals, *["--profile"] * (not rehearse))
        bench("stages 1024", 60, "--size", large, "--variants", ours, *rivals)
        bench("compiled 512", 120, "--size", small, "--variants", "plain", *["--vs", "compiled"] * bool(rivals))
        bench("stages 4096", 60, "--size", "128" if rehearse else "4096", "--variants", "fast", *rivals,
              *["--tile", "96"] * rehearse)
        bench("batch 8", 60, "--size", small, "--batch", "8", "--variants", ours, *rivals)
        add("kernels", 150, ["-m", "kernels.bench", "--no-compile", "--json", scratch / "kernels.json",
                             *(["--tokens", 256, "--op", "linear_attention"] if rehearse else [])], read=kernel_rows)
    else:
        add("model", 60, ["-m", "lab.gpu", "model", "--out", model, *["--rehearse"] * rehearse])
        common = ["--data", photos, "--model", model, "--device", device, "--dtype", "fp32" if rehearse else "bf16",
                  "--tags", "none", "--lpips", "alex", "--workers", 1 if rehearse else 8,
                  "--crop", 96 if rehearse else 512]
        for name, options, env in (("train", [], {}), ("train, checkpointing", ["--checkpointing"], {}),
                                   ("train, reference kernels", [], {"SANASR_KERNELS": "torch"})):
            steps = 2 if rehearse else 50
            add(name, 80, ["train.py", *common, "--name", scratch / name, "--steps", steps, "--every", steps, "--val",
                           0, "--batch", 1 if rehearse else 4, *options], read=partial(train_rows, name), **env)
        add("prune", 60, ["prune.py", *common, "--out", scratch / "pruned", "--steps", 2 if rehearse else 20, "--keep",
                          2 if rehearse else 16], read=prune_rows)
        bench("pruned to 16 blocks", 50, "--size", "64" if rehearse else "512", "--variants", "fast", "--blocks", "16")
        add("LinearSR, 20 steps", 60, ["eval.py", ROOT / "examples" / "cat.png", "--model", "linearsr-embedded",
                                       "--out", scratch / "cat.png", "--device", device], read=printed)
        bench("regional compilation", 150, "--size", "64" if rehearse else "512", "--variants",
              "plain" if rehearse else "plain,regional")
    return found


# --- The command ---


RUNNING = set()


def run(line, end, scratch):
    """(rows, why there are none or not all, seconds). A command that runs at `end` is killed with all that it began."""
    env = os.environ | {"SANASR_CACHE": str(scratch / "cache"), "HF_HUB_OFFLINE": "1"} | line.env
    start, text, rows, problem = time.monotonic(), "", [], None
    for argv in line.commands:
        argv = argv[1:] if argv[0] == "!" else [sys.executable, *argv]
        try:
            process = subprocess.Popen(argv, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE,
                                       stderr=subprocess.STDOUT, start_new_session=True)
            RUNNING.add(process)
            text += process.communicate(timeout=max(1, end - time.monotonic()))[0]
            if process.returncode:
                problem = f"exit code {process.returncode}: " + " ".join(t["result"] for t in last_line(text, scratch))
        except subprocess.TimeoutExpired:
            problem = "its time was up"
            stop(process)
        except OSError as error:
            problem = str(error)
    try:  # what a benchmark wrote before it was ended is a result, too
        rows = line.read(text, scratch)
    except Exception as error:  # the line's problem alone
        problem = problem or " ".join(f"{type(error).__name__}: {error}".split())
    return rows, problem and problem[:300], time.monotonic() - start


def stop(process):
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


def cell(value):
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value).replace("|", "\\|")


def write(out, results):
    """gpu.json and gpu.md."""
    text = ["# A rehearsal on a CPU: no number here is a GPU's" if results["rehearsal"] else "# GPU", ""]
    for name, line in results["lines"].items():
        text += [f"## {name}", "", f"{line['about']}, {line['seconds']:.0f} s", ""]
        text += [f"Failed: {line[key]}\n" for key in ("problem", "since") if line.get(key)]
        if columns := list(dict.fromkeys(key for row in line["rows"] for key in row)):
            text += ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
            text += ["| " + " | ".join(cell(row.get(key, "")) for key in columns) + " |" for row in line["rows"]] + [""]
    write_bytes(out / "gpu.json", json.dumps(results, indent=1) + "\n")
    write_bytes(out / "gpu.md", "\n".join(text))


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*SECONDS, "model"], help="model: what `training` trains, into --out")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), metavar="DIR")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these lines")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, tiny")
    args = parser.parse_args(argv)
    if not args.rehearse and not torch.cuda.is_available():
        raise UserError(f"PyTorch {torch.__version__} finds no NVIDIA GPU here; --rehearse runs the same on a CPU")
    if args.what == "model":
        return make_model(args.out, args.rehearse)
    with tempfile.TemporaryDirectory(prefix="sanasr-gpu-") as folder:
        lines = lines_of(args.what, Path(folder), args.rehearse)
        names = [line.name for line in lines]
        if unknown := set(args.only or ()) - set(names):
            raise UserError(f"--only {', '.join(sorted(unknown))}: no such line; there are {', '.join(names)}")
        lines = [line for line in lines if line.name in (args.only or names)]
        args.out.mkdir(parents=True, exist_ok=True)
        results = {"rehearsal": args.rehearse, "lines": {}}
        if (args.out / "gpu.json").exists():
            before = json.loads((args.out / "gpu.json").read_text())
            results = before if before["rehearsal"] == args.rehearse else results
        about = "no GPU" if args.rehearse else torch.cuda.get_device_name()
        about += f", {cpu_name()}, torch {torch.__version__}, triton {triton and triton.__version__}, "
        about += f"revision {revision(ROOT)}, {time.strftime('%Y-%m-%d')}"
        factor, begin, problems, given = 20 if args.rehearse else 1, time.monotonic(), 0, 0
        workers = min(8, os.cpu_count()) if args.what == "correctness" else 1
        pool, jobs = ThreadPoolExecutor(workers), []
        for line in lines:  # time that those before leave is left to this one
            given += SECONDS[args.what] if workers > 1 else line.seconds
            jobs.append(pool.submit(run, line, begin + factor * min(given, SECONDS[args.what]), Path(folder)))
        try:
            for line, job in zip(lines, jobs, strict=True):
                rows, problem, seconds = job.result()
                problems += bool(problem)
                new = {"about": about, "seconds": seconds, "rows": rows, "problem": problem}
                before = results["lines"].get(line.name)
                if problem and before and not before["problem"]:  # a good result is kept
                    new = before | {"since": f"{problem} ({about})"}
                results["lines"][line.name] = new
                write(args.out, results)
                print(f"{line.name}: {problem or f'{len(rows)} rows'}", flush=True)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in RUNNING:
                stop(process)
    print(f"{args.out}/gpu.md: {problems} of {len(lines)} lines failed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
