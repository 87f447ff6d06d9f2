"""Evidence from an NVIDIA GPU in three commands, each within ten minutes, on a machine without network or registries:

    python3 -m lab.gpu correctness --out runs/gpu    4 minutes: every operator in every dtype against float64, the GPU
                                                     tests, goldens, compute-sanitizer, pictures against the CPU's
    python3 -m lab.gpu timings --out runs/gpu        9 minutes, with the machine for itself: stages at 512, 1024 and
                                                     4096 pixels against diffusers, then each kernel
    python3 -m lab.gpu training --out runs/gpu       9 minutes: regional compilation, train.py, prune.py, LinearSR

A line of the report is what a command of this repository prints: pytest, kernels.bench, lab.bench, train.py, … Time
that a line leaves unused is the next one's. One that fails costs itself alone, and does not replace an earlier good one
of its name. gpu.json and gpu.md in --out are written after each.
--only NAME …: these lines. --rehearse: the same on a CPU, tiny, so that a mistake does not cost the run on a GPU.
"""
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import runs
from kernels.bench import OPS
from kernels.dispatch import triton
from kernels.timer import machine
from lab.bench import CONFIGS, seeded
from metrics.perceptual import VGG16
from photos.pictures import one_line, write_bytes
from runs import DTYPES, UserError, command, revision
from sanasr import DCAE, Gemma2, LinearDiT
from weights.files import save_module, save_tensors

ROOT = Path(__file__).resolve().parent.parent
SECONDS = {"correctness": 240, "timings": 540, "training": 540}


@dataclass
class Line:
    """One line of the report: commands in turn, and files that they write and that are shown with what they print."""
    name: str
    seconds: int
    commands: list
    files: tuple = ()
    env: dict = field(default_factory=dict)


# --- The lines ---


def make_model(folder, rehearse):
    """An official folder under seeded weights, in official size but for the text encoder, and photos beside it."""
    sys.path.insert(0, str(ROOT / "tests"))
    import tiny
    tiny.CONFIGS["transformer"][1]["num_layers"] = 3  # one to prune
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
    trunk = {key: value.half() for key, value in VGG16().state_dict().items()}
    save_tensors(trunk, folder.parent / "weights" / "vgg16.safetensors")
    print(f"{sum(f.stat().st_size for f in folder.rglob('*') if f.is_file()) / 1e9:.3f} GB of seeded weights")


def lines_of(what, scratch, rehearse):
    """The lines of a command."""
    device, dtype, found = *(("cpu", "fp32") if rehearse else ("cuda", "bf16")), []
    interpreter = {"TRITON_INTERPRET": "1"} if rehearse else {}

    def add(name, seconds, *commands, files=(), **env):
        found.append(Line(name, seconds, [shlex.split(line) for line in commands], files, env))

    def tests(name, file, names, **env):
        add(name, 240, f"-m pytest -rs -p no:cacheprovider tests/{file} -k '{names}'", **env)

    def bench(name, seconds, options):
        times = "1 --model embedded" if rehearse else "10"
        add(name, seconds, f"-m lab.bench --device {device} --dtype {dtype} --runs {times} {options}")
    if what == "correctness":
        for op in OPS:
            for kind in DTYPES:
                add(f"{op} {kind}", 240, f"-m kernels.bench --check --op {op} --dtype {kind}", **interpreter)
        for part in ("attention", "gate or mix", "norm or depthwise or join", "gpu"):
            tests(f"kernel tests, {part}", "test_kernels_triton.py", part, **interpreter)
        tests("graphs", "test_fast.py", "graph or dit or up_block")
        tests("goldens", "test_sanasr.py", "golden", SANASR_GOLDENS=device)
        for kind, quick in (("fp32", "off"), ("fp32", "on"), ("bf16", "on"), ("fp16", "off")):
            ours, theirs = scratch / f"{kind}-{quick}", scratch / f"{kind}-{quick}-CPU"
            add(f"pictures {kind}, fast {quick}", 240,
                f"eval.py examples --out {ours}/ --device {device} --dtype {kind} --fast {quick}",
                f"eval.py examples --out {theirs}/ --device cpu --fast off",
                f"eval.py --sr {ours} --hr {theirs} --metrics psnr")  # against the CPU's
        sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        add("compute-sanitizer", 240, f"! {sanitizer} --error-exitcode 9 {shlex.quote(sys.executable)} -m pytest "
            "tests/test_kernels_triton.py -k 'gate_sizes or norm_sizes or lengths or depthwise'")
    elif what == "timings":
        small, large, huge = ("64", "96", "128 --tile 96") if rehearse else ("512", "1024", "4096")
        ours = "plain,fast" if rehearse else "plain,fast,graphs"
        rivals = "--vs diffusers" if find_spec("diffusers") and not rehearse else ""
        add("card", 20, "! nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit,"
            "temperature.gpu --format=csv")
        bench("stages 512", 90, f"--size {small} --variants {ours} {rivals}" + " --profile" * (not rehearse))
        bench("stages 1024", 60, f"--size {large} --variants {ours} {rivals}")
        bench("compiled 512", 120, f"--size {small} --variants plain" + " --vs compiled" * bool(rivals))
        bench("stages 4096", 60, f"--size {huge} --variants fast {rivals}")
        bench("batch 8", 60, f"--size {small} --batch 8 --variants {ours} {rivals}")
        add("kernels", 130, "-m kernels.bench --no-compile" + " --tokens 256 --op linear_attention" * rehearse)
    else:
        add("model", 60, f"-m lab.gpu model --out {scratch}/model" + " --rehearse" * rehearse)
        common = (f"--data {scratch}/photos --model {scratch}/model --device {device} --dtype {dtype} --tags none "
                  f"--lpips alex --workers {1 if rehearse else 8} --crop {96 if rehearse else 512}")
        train = "--every 2 --steps 2 --batch 1" if rehearse else "--every 50 --steps 50 --batch 4"
        for name, options, env in (("train", "", {}), ("train, checkpointing", "--checkpointing all", {}),
                                   ("train, VGG-shaped LPIPS", "--lpips vgg",
                                    {"SANASR_WEIGHTS": str(scratch / "weights")}),
                                   ("train, reference kernels", "", {"SANASR_KERNELS": "torch"})):
            run = scratch / name.replace(" ", "-")
            add(name, 80, f"train.py {common} --name {run} --val 0 {train} {options}", files=(run / "log.csv",), **env)
        prune = "--steps 2 --keep 2" if rehearse else "--steps 20 --keep 16"
        add("prune", 60, f"prune.py {common} --out {scratch}/pruned {prune}", files=(scratch / "pruned/saliency.csv",))
        size, blocks, variants = ("64", 1, "plain") if rehearse else ("512", 16, "plain,regional")
        bench("pruned to 16 blocks", 50, f"--size {size} --variants fast --blocks {blocks}")
        add("LinearSR, 20 steps", 60, f"eval.py examples/cat.png --model linearsr-embedded --out {scratch}/cat.png "
            f"--device {device}")
        bench("regional compilation", 150, f"--size {size} --variants {variants}")
    return found


# --- The command ---

RUNNING = set()


def run(line, end, scratch):
    """(what was printed, the problem or None, seconds). A command that runs at `end` is killed with all it began."""
    env = os.environ | {"SANASR_CACHE": str(scratch / "cache"), "HF_HUB_OFFLINE": "1"} | line.env
    start, text, problem = time.monotonic(), b"", None
    for argv in line.commands:
        argv = argv[1:] if argv[0] == "!" else [sys.executable, *argv]
        try:
            process = subprocess.Popen(argv, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                       start_new_session=True)
        except OSError as error:
            return [], one_line(error), time.monotonic() - start
        RUNNING.add(process)
        try:
            text += process.communicate(timeout=max(0.1, end - time.monotonic()))[0]
            problem = problem or (f"exit code {process.returncode}" if process.returncode else None)
        except subprocess.TimeoutExpired:
            stop(process)
            text, problem = text + process.communicate()[0], "its time was up"
    text += b"".join(file.read_bytes() for file in line.files if file.exists())
    rows = (row.rstrip("\r").split("\r")[-1].rstrip() for row in text.decode(errors="replace").split("\n"))
    return [row for row in rows if row], problem, time.monotonic() - start  # of a progress bar its end


def stop(process):
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


def write(out, results):
    """gpu.json and gpu.md."""
    text = ["# A rehearsal on a CPU: no number here is a GPU's" if results["rehearsal"] else "# GPU", ""]
    for name, line in results["lines"].items():
        text += [f"## {name}", "", f"{line['about']}, {line['seconds']:.0f} s", ""]
        text += [f"Failed: {line[key]}\n" for key in ("problem", "since") if line.get(key)]
        text += [*(f"    {row}" for row in line["printed"]), ""]
    write_bytes(out / "gpu.json", json.dumps(results, indent=1) + "\n")
    write_bytes(out / "gpu.md", "\n".join(text))


@command
def main(argv=None):
    parser = runs.parser(__doc__)
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
            results = json.loads((args.out / "gpu.json").read_text())
            if results["rehearsal"] != args.rehearse:
                raise UserError(f"{args.out} holds {'a rehearsal' * results['rehearsal'] or 'results of a GPU'}: name "
                                "another --out")
        about = "no GPU" if args.rehearse else machine("cuda")
        about += f", {machine()}, torch {torch.__version__}, triton {triton and triton.__version__}, "
        about += f"revision {revision(ROOT)}, {time.strftime('%Y-%m-%d')}"
        factor, begin, problems, given = 20 if args.rehearse else 1, time.monotonic(), 0, 0
        workers = min(8, os.cpu_count()) if args.what == "correctness" else 1
        pool, jobs = ThreadPoolExecutor(workers), []
        for line in lines:  # time that those before leave is left to this one
            given += SECONDS[args.what] if workers > 1 else line.seconds
            jobs.append(pool.submit(run, line, begin + factor * min(given, SECONDS[args.what]), Path(folder)))
        try:
            for line, job in zip(lines, jobs, strict=True):
                shown, problem, seconds = job.result()
                problems += bool(problem)
                new = {"about": about, "seconds": seconds, "problem": problem, "printed": shown}
                before = results["lines"].get(line.name)
                if problem and before and not before["problem"]:  # a good result is kept
                    new = before | {"since": f"{problem} ({about})"}
                results["lines"][line.name] = new
                write(args.out, results)
                print(f"{line.name}: {problem or 'done'}", flush=True)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in RUNNING:
                stop(process)
    print(f"{args.out}/gpu.md: {problems} of {len(lines)} lines failed")


if __name__ == "__main__":
    main()
