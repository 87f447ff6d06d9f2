"""Broken and odd inputs, killed processes, bad disks and hostile files, against every command. Linux only.

    python -m lab.faults --out runs/faults                 everything, in minutes; leaves faults.md and faults.json
    python -m lab.faults --out runs/faults --sample 10     one input in ten of each kind, and fewer signals
    python -m lab.faults --out runs/faults --only signals  a part: signals, machine, inputs or the name of a kind

Every case runs in a forked process that has the modules loaded already, on a tiny model, and is checked for this:

    no traceback, no hang, the right exit code and one line of error that names what is broken
    no input changed, no partial output: what lies under a final name is whole
    memory below a bound, no file opened outside of what was named, no network, no pickle, no program started

A killed run is resumed until it ends; its weights, logs and pictures then equal those of a run that was never stopped.
"""
from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

import eval
import prune
import sanasr
import train
from lab.fault_inputs import PRUNE, ROOT, STEP, TRAIN, cases, photo
from linearsr import train as train_linearsr
from photos import tagger
from photos.pictures import write
from runs import UserError, command, revision

SECONDS = 120  # then a case hangs
COMMANDS = {"eval.py": eval.main, "train.py": train.main, "prune.py": prune.main, "photos.tagger": tagger.main,
            "linearsr.train": train_linearsr.main, "SanaSR": command(  # with the errors that it is documented to raise
                lambda argv: sanasr.SanaSR.from_pretrained(argv[0]).restore(Image.new("RGB", (8, 8)), "a tree"))}
RUNS = {  # what is killed: (arguments, the files from which it needs --resume)
    "train.py": ([*TRAIN, *"--steps 8 --every 2 --workers 1".split()], ["state.pt"]),
    "linearsr.train": ([*STEP, *"--stage pretrain --name @out --steps 6 --every 2 --batch 1 --pairs 4".split()], []),
    "prune.py": ([*PRUNE, "--steps", "60"], ["calibration.pt", "transformer"]),  # it saves at step 50
    "eval.py": (["@shared/lr", "--out", "@out/", "--model", "@shared/model"], [])}

# --- Running a command in a process of its own ---


def start(name, argv, folder, shared, env=(), memory=None):
    """The process number of a fork that runs the command in folder/in. Its stderr goes to the file log.err in `folder`.

    memory: bytes of address space that it may take, for a process that is watched.
    """
    def expand(text):
        return re.sub("^@(in|out|run)(?=/|$)", rf"{folder}/\1", re.sub("^@shared", str(shared), str(text)))
    (folder / "in").mkdir(parents=True, exist_ok=True)
    (folder / "log.err").touch()
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        sys.stdout, sys.stderr = open(os.devnull, "w"), open(folder / "log.err", "a", buffering=1)
        os.dup2(sys.stderr.fileno(), 2)
        os.chdir(folder / "in")
        os.environ |= {"SANASR_CACHE": f"{shared}/cache", "SANASR_WEIGHTS": f"{shared}/nothing", "HF_HUB_OFFLINE": "1"}
        os.environ |= {key: expand(value) for key, value in dict(env).items()}
        torch.set_num_threads(1)  # makes the fork's thread pool, which two threads at once would not survive
        if os.geteuid() == 0:  # from here on permissions hold, also for root
            ctypes.CDLL(None, use_errno=True).capset(struct.pack("Ii", 0x20080522, 0), bytes(24))
        if memory:
            watch([folder, shared, ROOT], folder / "noted", memory)
        code = COMMANDS[name]([expand(a) for a in argv])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int | None) else print(end.code, file=sys.stderr) or 1
    except BaseException:
        code = traceback.print_exc() or 70
    finally:
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0)


def watch(allowed, noted, memory):
    """From here on the address space is limited, and what a command may not do is written to the file `noted`."""
    allowed += [sys.prefix, sys.base_prefix, "/usr", "/lib", "/proc", "/sys", "/dev", "/etc"]
    allowed = [f"{path}/" for a in allowed for path in (a, os.path.realpath(a))]
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + memory
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    noted = os.open(noted, os.O_CREAT | os.O_WRONLY)

    def hook(event, args):
        if event == "open" and isinstance(args[0], str | bytes | os.PathLike):
            path = os.path.abspath(os.fsdecode(args[0]))
            if not f"{path}/".startswith((*allowed,)):
                os.write(noted, f"opened {path}\n".encode())
        elif event in ("socket.connect", "pickle.find_class", "os.system", "subprocess.Popen", "os.exec"):
            os.write(noted, f"{event} {str(args)[:80]}\n".encode())
    opener = sanasr.safe_open  # it opens files in Rust, where no hook sees it
    sanasr.safe_open = lambda path, *args, **kwargs: (hook("open", (path,)), opener(path, *args, **kwargs))[1]
    sys.addaudithook(hook)


def wait(pid, seconds=None):
    """The exit code, minus a signal's number; None where it runs for so many seconds. By default it is killed then."""
    end, found = time.monotonic() + (seconds or SECONDS), 0
    while not found and time.monotonic() < end:
        time.sleep(0.005)
        found, code = os.waitpid(pid, os.WNOHANG)
    if found or not seconds:
        send(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(code) if found else None if seconds else os.waitpid(pid, 0) and None


def send(pid, number):
    """Send a signal to a process and what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number)


# --- What has to hold afterwards ---

NOISE = re.compile(r"usage:| |note:|kernels:|no tags,|skipped |.*%\||.*\?it/s|$")  # in stderr, beside errors


def verdict(folder, code, expect, names=("",), most=1):
    """[what is wrong] with an exit code and what was printed on stderr; most: how many lines of error there may be."""
    text, wrong = (folder / "log.err").read_text("utf-8", "replace"), []
    (folder / "log.err").unlink()
    lines = [line.rpartition("\r")[2] for line in text.replace("\x1b[A", "").split("\n")]
    errors = [line for line in lines if not NOISE.match(line)]
    if "Traceback" in text or code is None or code < 0:
        return [f"ends with {code}: {' '.join(errors)[-200:]}"]
    if expect != "either" and (code == 0) != (expect == "result"):
        wrong.append(f"exit code {code}, expected {expect}: {' '.join(errors)[-200:]}")
    if bool(code) != (1 <= len(errors) <= most and all("error: " in line for line in errors)):
        wrong.append(f"not one line of error with exit code {code}: {errors[:3]}")
    elif code and not any(name in errors[0] for name in names):
        wrong.append(f"the line does not name {' or '.join(names)}: {errors[0][:160]}")
    return wrong


def content(path):
    """What has to be equal after a resumed run. Raises an error where the file is not whole."""
    data = path.read_bytes()
    if path.suffix == ".png":
        Image.open(path).load()
    elif path.suffix == ".safetensors":
        load_file(path)
    elif path.suffix == ".json":
        json.loads(data)
    elif path.suffix == ".pt":  # what counts in it shows in the weights
        return list(torch.load(path, weights_only=True))
    elif path.suffix == ".csv":
        names, *rows, end = (line.split(",") for line in data.decode().replace("\r", "").split("\n"))
        timed = {"images_per_s", "samples_per_s", "memory_gb", "hours", "seconds"}  # they differ from run to run
        return end == [""], [{k: v for k, v in zip(names, row, strict=True) if k not in timed} for row in rows]
    return data


def contents(folder):
    """({file: content}, [which are not whole]) below a folder, without hidden files: those are temporary."""
    found, wrong = {}, []
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name[0] != "."):
        try:
            found[str(path.relative_to(folder))] = content(path)
        except Exception as error:
            wrong.append(f"{path.name} is not whole: {error}")
    return found, wrong


def fingerprint(*folders):
    """{path: its permissions and content} of everything below the folders."""
    return {path: (path.lstat().st_mode, path.is_file() and not path.is_symlink() and
                   hashlib.sha256(path.read_bytes()).digest()) for folder in folders for path in folder.rglob("*")}


def check(case, folder, shared):
    """[what is wrong], of a case run in `folder`; shared: the folder with the tiny model, photos and cache."""
    for path, data in ((folder / path, data) for path, data in case.files.items()):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink() if path.is_file() else None
        data(path) if callable(data) else path.write_bytes(data)
    fixed = folder / "in", shared / "model", shared / "photos"
    before = fingerprint(*fixed)
    code = wait(start(case.command, case.argv, folder, shared, case.env, case.memory))
    wrong, (out, broken) = verdict(folder, code, case.expect, case.names), contents(folder / "out")
    if case.command == "eval.py" and "--hr" not in case.argv and len(out) != (code == 0):
        wrong.append(f"{len(out)} results")
    wrong += broken * ("out/data.json" not in case.files or code == 0)
    wrong += [f"a temporary file is left: {p.name}" for p in folder.rglob(".*.tmp")]
    wrong += ["an input, the model or the photos changed"] * (fingerprint(*fixed) != before)
    return wrong + sorted({*(folder / "noted").read_text().splitlines()})


# --- Killed processes, disks, two at once ---


class Run:
    """A command that can be killed and resumed, its output folder, and what it makes when it is left alone."""

    def __init__(self, name, folder, shared):
        self.name, self.folder, self.shared, self.out, self.reference = name, folder, shared, folder / "out", {}
        self.clear()
        before = time.monotonic()
        self.wrong = self.judged(wait(self.start()), "result", False)
        self.seconds, self.reference = time.monotonic() - before, contents(self.out)[0]

    def clear(self):
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir(parents=True)

    def start(self, **options):
        argv, states = RUNS[self.name]
        resume = ["--resume"] * any((self.out / state).exists() for state in states)
        return start(self.name, argv + resume, self.folder, self.shared, **options)

    def judged(self, code, expect, complete=None):
        """[what is wrong] with an exit code and the files. A complete run has the same as one that was left alone."""
        got, broken = contents(self.out)
        wrong = verdict(self.folder, code, expect, most=9 if self.name == "eval.py" else 1) + broken
        if not wrong and (code == 0 if complete is None else complete):  # it may have saved more checkpoints
            wrong = [f"{name} differs from the uninterrupted run's" for name in {**self.reference, **got}
                     if got.get(name) != self.reference.get(name)
                     and (name in self.reference or not name.startswith(("checkpoints/", "samples/")))]
        return wrong

    def resumed(self):
        return [f"when resumed: {wrong}" for wrong in self.judged(wait(self.start()), "result")]


def killed(run, args):
    """Rows (kind, label, what is wrong): signals at random moments, until the run has ended or got ten of them."""
    yield "signals", "uninterrupted", run.wrong
    run.clear()
    rng, moments, chain = random.Random(args.seed), -(-50 // args.sample), 0
    while moments and not run.wrong:
        number, label, pid = rng.choice([signal.SIGKILL, signal.SIGTERM]), "ended before its signal", run.start()
        code = wait(pid, rng.uniform(0.01, run.seconds))
        if code is None:
            moments, chain, label = moments - 1, chain + 1, number.name
            send(pid, number) if rng.random() < 0.5 else os.kill(pid, number)
            code = wait(pid)
            wrong = ["does not end"] * (code is None) + run.judged(0, "either", complete=False)
        else:
            wrong = run.judged(code, "result")
        if chain == 10 or code == 0 or not moments or wrong:
            wrong = wrong or run.resumed()
            run.clear()
            chain = 0
        yield "signals", label, wrong


SPOILT = {  # (what is done to the output or the cache, what has to follow)
    "read-only output": (lambda out, cache: out.chmod(0o555), "error"),
    "a file in place of the output": (lambda out, cache: [out.rmdir(), out.write_text("a file")], "error"),
    "cache that cannot be written": (lambda out, cache: cache.mkdir(0o555), "result"),
    "a file in place of the cache": (lambda out, cache: cache.write_text("x"), "result")}


def bad_machine(run, args):
    """Rows (kind, label, what is wrong); None where this machine cannot make the fault."""
    for label, (spoil, expect) in SPOILT.items():
        cache = run.folder / label
        run.clear()
        spoil(run.out, cache)
        pid = run.start(env={"SANASR_CACHE": str(cache)} if cache.exists() else {})
        yield f"machine: {label}", "", run.judged(wait(pid), expect)
        run.out.unlink() if run.out.is_file() else run.out.chmod(0o755)
    for size in ("24k", "200k", "600k"):
        run.clear()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=777", "tmpfs", run.out]
        if subprocess.run(mount, capture_output=True).returncode:
            yield "machine: full disk", size, None
            continue
        try:
            wrong = run.judged(wait(run.start()), "either")  # a result where it fits
            subprocess.run(["mount", "-o", "remount,size=500m", run.out], check=True)
            yield "machine: full disk", size, wrong or run.resumed()
        finally:
            subprocess.run(["umount", "-l", run.out], check=True)
    run.clear()
    codes = [wait(pid) for pid in [run.start(), run.start()]]
    wrong = run.judged(max(codes), "either", complete=True)
    yield "machine: two at once", "", wrong + ["both fail"] * all(codes)


# --- All of it ---


def make_shared(shared):
    """The tiny model, photos, weights of a tiny tagger, an adapter, and runs to resume, below `shared`."""
    sys.path.insert(0, str(ROOT / "tests"))
    import tiny
    tiny.CONFIGS["transformer"][1]["num_layers"] = 3  # so that there is a block to prune
    tiny.tiny_model(shared / "model")
    for i in range(6):
        write(photo(272, 264, i), shared / "photos" / f"{i}.png")
        write(photo(24, 20, i), shared / "lr" / f"{i}.png")
    small = tagger.Config(96, 8, (2, 2, 2, 2), (1, 2, 4, 8), 3, embed=8, hidden=8)
    tagger.Config = lambda: small
    torch.manual_seed(0)
    ram = {k: torch.randn(v.shape) / 8 for k, v in tagger.RAM().state_dict().items()}
    sanasr.save_tensors(ram, shared / "ram" / "ram_fp16.safetensors")
    torch.save({"model": ram}, shared / "ram" / "ram.pth")
    dit = sanasr.LinearDiT.from_pretrained(shared / "model" / "transformer")
    sanasr.inject_lora(dit, 2)
    sanasr.save_lora(dit, shared / "adapter.safetensors", {"timestep": "900"})
    for name, folder in (("train.py", "run"), ("prune.py", "pruned")):
        run = Run(name, shared / name, shared)
        if run.wrong:
            raise UserError(f"{name} does not run at all: {run.wrong[0]}")
        shutil.move(run.out, shared / folder)
    shutil.rmtree(shared / "pruned" / "transformer")


def all_rows(args, work):
    """(kind, command, name, [what is wrong] or None) of everything that was asked for."""
    shared, seen = work / "shared", Counter()
    for part, rows in (("signals", killed), ("machine", bad_machine)):
        for name in [*RUNS][:1 if args.sample > 50 else None] * (args.only in part):
            for kind, label, wrong in rows(Run(name, work / f"{part} {name}", shared), args):
                yield kind, name, label, wrong
    for n, case in enumerate(cases(random.Random(args.seed), shared)):
        seen[case.kind] += 1
        if args.only in f"inputs: {case.kind}" and seen[case.kind] % args.sample == 1 % args.sample:
            wrong = check(case, work / f"{n:04d}", shared)
            yield case.kind, case.command, case.name, wrong
            if not wrong:
                shutil.rmtree(work / f"{n:04d}")


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/faults"), metavar="DIR")
    add("--seed", type=int, default=0)
    add("--sample", type=int, default=1, metavar="N",
        help="one input in N of each kind, 50 / N signals to each command; above 50 only train.py is killed")
    add("--only", default="", metavar="TEXT", help="of signals, machine, inputs: KIND: those that contain this text")
    args = parser.parse_args(argv)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the cases' address space is limited, and runs are compared bit for bit
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="PIL")
    began, work, rows, table = time.monotonic(), (args.out / "work").resolve(), [], {}
    shutil.rmtree(work, ignore_errors=True)
    make_shared(work / "shared")
    for kind, name, label, wrong in all_rows(args, work):
        rows.append({"kind": kind, "command": name, "name": label, "wrong": wrong})
        for key in (kind, "all"):
            counts = {"tried": wrong is not None, "failed": bool(wrong), "skipped": wrong is None, name: 1}
            table.setdefault(key, Counter()).update(counts)
        if wrong:
            print(f"{name}, {kind}, {label}: {'; '.join(wrong)}", flush=True)
    about = (f"Seed {args.seed}, sample {args.sample}, revision {revision(ROOT)}, {time.strftime('%Y-%m-%d')}, "
             f"{time.monotonic() - began:.0f} s, torch {torch.__version__}.")
    lines = [about, "", "| kind | tried | failures | impossible here | commands |", "| --- | ---: | ---: | ---: | --- |"]
    for kind in sorted(table, key=lambda kind: (kind == "all", kind)):
        counts = " | ".join(str(table[kind][key]) for key in ("tried", "failed", "skipped"))
        lines.append(f"| {kind} | {counts} | {', '.join(sorted(COMMANDS.keys() & table[kind].keys()))} |")
    (args.out / "faults.md").write_text("\n".join(lines) + "\n")
    (args.out / "faults.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    print("\n".join(lines))
    return int(table["all"]["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main())
