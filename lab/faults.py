"""Broken and odd inputs, killed processes, bad disks and hostile files, against every command. Linux only.

    python -m lab.faults --out runs/faults                 everything, in minutes; leaves faults.md and faults.json
    python -m lab.faults --out runs/faults --quick         a sample of each kind, as the tests run it
    python -m lab.faults --out runs/faults --only signals  a part: signals, machine, inputs or the name of a kind

Every case runs in a forked process that has the modules loaded already, on a tiny model, and is checked for this:

    no traceback, no hang, the right exit code and one line of error that names what is broken
    no input changed, no partial output: what lies under a final name is whole
    memory below a bound, no file opened outside of what was named, no network, no pickle, no program started

A killed run is resumed until it ends; its files then equal those of a run that was never stopped, bit for bit.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import torch
from PIL import Image
from safetensors import safe_open

import eval
import lab.finish
import prune
import sanasr
import train
import weights.files
from lab import pretrain
from lab.fault_inputs import (
    ROOT,
    TRAIN,
    model_cases,
    photo,
    picture_cases,
    prune_argv,
    table_cases,
    without_privileges,
)
from linearsr import train as train_linearsr
from photos import tagger
from photos.pictures import one_line
from runs import UserError, command, revision

SECONDS = 120  # then a case hangs

# --- Running a command in a process of its own ---


def api(argv):
    """SanaSR.from_pretrained(folder).restore(…), with the errors that it is documented to raise."""
    try:
        sanasr.SanaSR.from_pretrained(argv[0]).restore(Image.new("RGB", (8, 8), "teal"), "a tree")
    except (OSError, ValueError, weights.Unavailable) as error:
        raise UserError(f"{one_line(error)}")


def with_argv(main):
    """A main that reads sys.argv, as one that is given its arguments."""
    def run(argv):
        sys.argv = ["command", *argv]
        return main()
    return run


COMMANDS = {"eval.py": eval.main, "train.py": train.main, "prune.py": prune.main,
            "photos.tagger": with_argv(tagger.main),
            "SanaSR": api, "linearsr.train": train_linearsr.main, "lab.pretrain": with_argv(pretrain.main),
            "lab.finish": lab.finish.main}


def start(command, argv, cwd, log, env=None, prepare=None):
    """The process number of a fork that runs the command; what it prints goes to the files log.out and log.err."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.setsid()
        for number, name in ((1, "out"), (2, "err")):
            handle = os.open(f"{log}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, number)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
        os.chdir(cwd)
        os.environ.update(env or {})
        sys.argv = [command]
        torch.set_num_threads(1)  # makes the fork's thread pool, which two threads at once would not survive
        if prepare:
            prepare()
        code = COMMANDS[command]([str(a) for a in argv]) or 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def watched(report, allowed):
    """prepare() of a checked case: notes forbidden actions and the peak of memory in the file `report`."""
    def prepare():
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = status("VmRSS")
        limit = (status("VmSize") << 20) + (4 << 30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        signal.alarm(SECONDS)
        found, me = set(), os.getpid()

        def inside(path):
            path = os.path.abspath(os.fsdecode(path))
            return any(path == a or path.startswith(a.rstrip("/") + "/") for a in allowed)

        def hook(event, args):
            if event == "open" and not isinstance(args[0], int) and args[0] is not None and not inside(args[0]):
                found.add(f"opened {os.fsdecode(args[0])}")
            elif event in ("socket.connect", "pickle.find_class", "os.system", "subprocess.Popen", "os.exec"):
                found.add(f"{event} {str(args)[:80]}")

        opener = weights.files.safe_open

        def recorded(path, *args, **kwargs):  # it opens files in Rust, where no hook sees it
            hook("open", (path,))
            return opener(path, *args, **kwargs)
        weights.files.safe_open = recorded
        sys.addaudithook(hook)
        exit_ = os._exit

        def leave(code):
            if os.getpid() == me:
                Path(report).write_text(json.dumps({"memory": status("VmHWM") - before, "found": sorted(found)}))
            exit_(code)
        os._exit = leave
    return prepare


def status(key):
    """A line of /proc/self/status in MB."""
    return int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0]) // 1024


# --- What a folder holds ---


def problem_of(path):
    """Why a file is not whole, or None. Its suffix says what it should be."""
    try:
        suffix = path.suffix.lower()
        if suffix in (".png", ".jpg", ".webp", ".tif", ".bmp"):
            with Image.open(path) as image:
                image.load()
        elif suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                file.keys()
        elif suffix == ".pt":
            torch.load(path, weights_only=True)
        elif suffix == ".json":
            json.loads(path.read_text("utf-8"))
        elif suffix == ".csv":
            text = path.read_text("utf-8")
            if not text.endswith("\n") or len({line.count(",") for line in text.splitlines()}) > 1:
                return "a line is cut"
    except Exception as error:
        return one_line(error)
    return None


def files(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink()) if folder.is_dir() else []


def fingerprint(folder):
    """{file: hash of its content and permissions} below a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        info = path.lstat()
        data = path.read_bytes() if stat.S_ISREG(info.st_mode) and info.st_size < 1 << 28 else b""
        found[str(path)] = hashlib.sha256(data).hexdigest() + oct(info.st_mode)
    return found


TIMED = ("images_per_s", "samples_per_s", "memory_gb", "hours", "seconds")  # what differs from run to run


def content(path):
    """What has to be equal after a resumed run, as a comparable value."""
    def plain(x):
        if isinstance(x, torch.Tensor):
            data = x.contiguous().flatten().view(torch.uint8).numpy().tobytes()
            return str(x.dtype), tuple(x.shape), hashlib.sha256(data).hexdigest()
        if isinstance(x, dict):
            return {str(k): plain(v) for k, v in x.items() if k not in TIMED}
        return [plain(v) for v in x] if isinstance(x, list | tuple) else x
    if path.suffix == ".pt":
        return plain(torch.load(path, weights_only=True))
    if path.suffix == ".csv":
        rows = [line.split(",") for line in path.read_text("utf-8").splitlines()]
        drop = {i for i, name in enumerate(rows[0]) if name in TIMED}
        return [[v for i, v in enumerate(row) if i not in drop] for row in rows]
    return hashlib.sha256(path.read_bytes()).hexdigest()


def contents(folder):
    return {str(p.relative_to(folder)): content(p) for p in files(folder) if not p.name.startswith(".")}


# --- The check of one case ---


def lines_of_error(text):
    """The lines of stderr that are neither a progress bar, nor usage, nor a note."""
    lines = [part for line in text.replace("\x1b[A", "").split("\n") for part in line.split("\r")[-1:]]
    usage, found = False, []
    for line in lines:
        usage = line.startswith("usage:") or (usage and line.startswith(" "))
        if line.strip() and not usage and "%|" not in line and "?it/s" not in line and not line.startswith(
                ("note:", "kernels:", "no tags,", "skipped ")):
            found.append(line)
    return found


def traceback_in(text):
    """[the last line of a traceback], or []."""
    lines = [line for line in text.splitlines() if line.strip()]
    return [f"traceback: {lines[-1][:200]}"] if "Traceback" in text else []


def check(case, folder, shared):
    """[what is wrong], of a case run in `folder`; shared: the folder with the tiny model, photos and cache."""
    inputs, out = folder / "in", folder / "out"
    inputs.mkdir(parents=True)
    argv = case.setup(inputs)
    argv = [str(folder / a[1:]) if isinstance(a, str) and a.startswith("@") else str(a) for a in argv]  # @out, @in/x
    present = {p: p.read_bytes() for p in files(folder) if inputs not in p.parents}  # a run to resume
    before, common = fingerprint(inputs), fingerprint(shared / "model") | fingerprint(shared / "photos")
    allowed = [str(folder), str(shared), str(ROOT), sys.prefix, sys.base_prefix, "/usr", "/lib", "/proc", "/sys",
               "/dev", "/etc"]
    report = folder / "report.json"
    watch = watched(report, [*allowed, *{os.path.realpath(a) for a in allowed}])

    def prepare():
        watch()
        if case.prepare:
            case.prepare()
    env = {"SANASR_CACHE": str(shared / "cache"), "SANASR_WEIGHTS": str(shared / "nothing"), "HF_HUB_OFFLINE": "1",
           **{k: str(folder / v[1:]) if v.startswith("@") else v for k, v in case.env.items()}}
    pid = start(case.command, argv, folder, folder / "log", env, prepare)
    ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    text = (folder / "log.err").read_text("utf-8", "replace")
    wrong, errors = [], lines_of_error(text)
    if found := traceback_in(text):
        return found
    if ended == -signal.SIGALRM:
        return [f"hangs: not done after {SECONDS} s"]
    if ended < 0:
        return [f"dies of signal {-ended}"]
    if case.expect != "either" and (ended == 0) != (case.expect == "result"):
        wrong.append(f"exit code {ended}, expected {case.expect}: {' '.join(errors)[:160]}")
    if ended:
        if len(errors) != 1 or "error: " not in errors[0]:
            wrong.append(f"not one line of error: {errors[:3]}")
        elif case.names and not any(n in errors[0] for n in case.names):
            wrong.append(f"the line does not name {' or '.join(case.names)}: {errors[0][:160]}")
    elif any("error:" in line for line in errors):
        wrong.append(f"exit code 0 with an error: {errors[:1]}")
    made = [p for p in files(folder) if inputs not in p.parents and p.parent != folder
            and present.get(p) != p.read_bytes()]
    wrong += [f"a temporary file is left: {p.name}" for p in made if p.suffix[1:] == "tmp"]
    wrong += [f"{p.name} is not whole: {problem}" for p in made if (problem := problem_of(p))]
    count = case.outputs if case.outputs is not None else None if case.command != "eval.py" else int(ended == 0)
    if count is not None and len(files(out)) != count:
        wrong.append(f"{len(files(out))} files in out/, expected {count}")
    if fingerprint(inputs) != before:
        wrong.append("an input changed")
    if fingerprint(shared / "model") | fingerprint(shared / "photos") != common:
        wrong.append("the model or the photos changed")
    if (folder / "mark").exists():
        wrong.append("a pickle was executed")
    seen = json.loads(report.read_text()) if report.exists() else {"memory": 0, "found": ["ended without a report"]}
    wrong += seen["found"]
    if seen["memory"] > case.memory:
        wrong.append(f"took {seen['memory']} MB, at most {case.memory} are allowed")
    return wrong


# --- Killed processes ---


class Distance(torch.nn.Module):
    """In the place of DISTS, whose weights are not carried: the mean absolute difference of each picture."""

    def forward(self, y, x):
        return (y - x).abs().mean((1, 2, 3))


WIDTHS = [8, 8, 16, 16, 16, 32]
TINY_AUTOENCODER = pretrain.AUTOENCODER | dict(latent_channels=16, encoder_block_out_channels=WIDTHS,
                                               decoder_block_out_channels=WIDTHS)


def tiny_pretrain():
    """The networks of lab.pretrain in this process are tiny; AlexNet stands in for VGG16, which is not carried."""
    pretrain.AUTOENCODER = TINY_AUTOENCODER
    pretrain.PRIOR |= dict(in_channels=16, out_channels=16, num_layers=2, num_attention_heads=2, sample_size=4,
                           num_cross_attention_heads=2, cross_attention_dim=64, caption_channels=32)
    pretrain.TEXT_ENCODER |= dict(vocab_size=300, hidden_size=32, intermediate_size=64)
    plain = pretrain.LPIPS.from_pretrained
    pretrain.LPIPS.from_pretrained = lambda net="alex": plain("alex")
    pretrain.DISTS.from_pretrained = Distance


def stage(name, shared, out):
    more = ["--init", shared / "start"] if name == "autoencoder" else []  # the linear start takes a minute
    return [name, "--data", shared / "photos", "--out", out, "--steps", "6", "--validate-every", "2", "--batch", "1",
            "--crop", "96", "--latents", "6", *more]


def tiny_finish():
    """Views are small, and AlexNet is the only judge."""
    lab.finish.Views.VIEW = 96


def resumed(argv, out, *files):
    """argv, with --resume where a run has left one of the files."""
    return argv + ["--resume"] * any((out / file).exists() for file in files)


def runs(shared):
    """{name: (command, out -> arguments, prepare)} of what is killed. Every run takes about a second or two."""
    stages = {f"lab.pretrain {name}": ("lab.pretrain", lambda out, name=name: stage(name, shared, out), tiny_pretrain)
              for name in ("autoencoder", "decoder", "prior")}
    return {
        "train.py": ("train.py", lambda out: resumed(
            ["--data", shared / "photos", "--model", shared / "model", "--name", out, "--steps", "8", "--every", "2",
             "--workers", "1", *TRAIN], out, "state.pt"), None),
        "linearsr.train": ("linearsr.train", lambda out: [
            "--stage", "pretrain", "--data", shared / "photos", "--model", shared / "model", "--name", out, "--steps",
            "6", "--every", "2", "--batch", "1", "--pairs", "4", "--crop", "96", "--val", "1", "--workers", "0"], None),
        **stages,
        "lab.finish decoder": ("lab.finish", lambda out: [
            "decoder", "--model", shared / "model", "--out", out, "--steps", "6", "--validate-every", "2", "--batch",
            "1", "--rank", "2", "--no-teacher"], tiny_finish),
        "prune.py": ("prune.py", lambda out: resumed(prune_argv(shared, out), out, "calibration.pt", "transformer"),
                     quick_saves),
        "eval.py": ("eval.py", lambda out: [shared / "lr", "--out", f"{out}/", "--model", shared / "model"], None)}


def quick_saves():
    """prune.py saves after every second sample, not after every 50th."""
    prune.calibrate.__defaults__ = (2,)


def environment(shared):
    return {"SANASR_CACHE": str(shared / "cache"), "SANASR_WEIGHTS": str(shared / "nothing"), "HF_HUB_OFFLINE": "1"}


def ended(pid, seconds=SECONDS):
    """The exit code, minus the signal's number, or None where it still runs after so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, code = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(code)
        time.sleep(0.005)
    return None


def end_all(pid):
    """Ends a process and what it started."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def begin(shared, name, out):
    """Puts into `out` what an earlier stage leaves there."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    if name in ("lab.pretrain decoder", "lab.pretrain prior"):
        shutil.copyfile(shared / "autoencoder.pt", out / "autoencoder.pt")
    if name == "lab.finish decoder":
        shutil.copyfile(shared / "warm.safetensors", out / "adapter.safetensors")
        shutil.copytree(shared / "pairs", out / "pairs")


def finish(shared, name, out, log):
    """Runs to the end. [what is wrong]."""
    command, argv, prepare = runs(shared)[name]
    pid = start(command, argv(out), out.parent, log, environment(shared), prepare)
    code = ended(pid)
    end_all(pid)
    text = Path(f"{log}.err").read_text("utf-8", "replace")
    return [] if code == 0 else [f"does not end well when resumed, {code}: {' '.join(lines_of_error(text)[-2:])[:300]}"]


def differences(reference, out):
    """What a resumed run has that differs from an uninterrupted one. It may have saved more checkpoints."""
    got = contents(out)
    wrong = [f"{name} differs from the uninterrupted run's" for name in reference
             if name in got and got[name] != reference[name]]
    wrong += [f"{name} is missing" for name in reference if name not in got]
    return wrong + [f"{name} is not in the uninterrupted run" for name in got
                    if name not in reference and not name.startswith(("checkpoints/", "samples/"))]


def reference_of(shared, name, folder):
    """(contents of an uninterrupted run, its seconds, what is wrong)."""
    out = folder / "reference"
    begin(shared, name, out)
    before = time.monotonic()
    wrong = finish(shared, name, out, folder / "reference")
    return contents(out), time.monotonic() - before, wrong


def killed(shared, name, folder, moments, rng):
    """Rows of the process faults of one command."""
    command, argv, prepare = runs(shared)[name]
    folder.mkdir(parents=True)
    reference, seconds, wrong = reference_of(shared, name, folder)
    yield "uninterrupted", wrong
    if wrong:
        return
    out, chain = folder / "killed", 0
    begin(shared, name, out)
    while moments:
        number = rng.choice([signal.SIGKILL, signal.SIGTERM])
        pid = start(command, argv(out), folder, folder / "killed", environment(shared), prepare)
        code = ended(pid, rng.uniform(0, seconds))
        label = "ended before its signal"
        if code is None:
            moments, chain = moments - 1, chain + 1
            label = signal.Signals(number).name
            os.killpg(pid, number) if rng.random() < 0.5 else os.kill(pid, number)
            code = ended(pid)
            end_all(pid)
        text = (folder / "killed.err").read_text("utf-8", "replace")
        wrong = ["does not end after SIGTERM"] if code is None else []
        wrong += traceback_in(text)
        wrong += [f"{p.name} is not whole: {problem}" for p in files(out)
                  if not p.name.startswith(".") and (problem := problem_of(p))]
        if label == "ended before its signal" and code != 0:
            wrong.append(f"exit code {code}: {' '.join(lines_of_error(text)[-2:])[:300]}")
        if chain >= 10 or code == 0 or not moments or wrong:
            wrong = wrong or finish(shared, name, out, folder / "resumed") or differences(reference, out)
            if wrong:
                kept = folder / f"wrong{moments}"
                shutil.rmtree(kept, ignore_errors=True)
                shutil.copytree(out, kept)
            begin(shared, name, out)
            chain = 0
        yield label, wrong


# --- Disks, clocks, two at once ---


def bad_disks(shared, name, folder):
    """Rows (kind, what is wrong) for one command; None where this machine cannot make the fault."""
    command, argv, prepare = runs(shared)[name]
    folder.mkdir(parents=True)
    reference, seconds, wrong = reference_of(shared, name, folder)
    if wrong:
        yield "uninterrupted", wrong
        return
    out, log = folder / "out", folder / "log"

    def run(expect, more=None, env=None):
        """Runs once. [what is wrong]."""
        def before():
            for step in (prepare, more):
                if step:
                    step()
        pid = start(command, argv(out), folder, log, environment(shared) | (env or {}), before)
        code = ended(pid)
        end_all(pid)
        text = Path(f"{log}.err").read_text("utf-8", "replace")
        errors = lines_of_error(text)
        found = traceback_in(text)
        if (code == 0) != (expect == "result"):
            found.append(f"exit code {code}, expected {expect}: {' '.join(errors)[-200:]}")
        if code and not found and (not errors or any("error: " not in line for line in errors)
                                   or (command != "eval.py" and len(errors) > 1)):
            found.append(f"not one line of error: {errors[:3]}")
        return found + [f"{p.name} is not whole: {problem}" for p in files(out)
                        if not p.name.startswith(".") and (problem := problem_of(p))]

    for size in ("24k", "200k", "600k"):
        begin(shared, name, out)
        kept = {p.relative_to(out): p.read_bytes() for p in files(out)}
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", out], capture_output=True)
        if mounted.returncode:
            yield "full disk", None
            break
        try:
            try:
                for file, data in kept.items():
                    (out / file).parent.mkdir(parents=True, exist_ok=True)
                    (out / file).write_bytes(data)
            except OSError:
                continue
            wrong = run("error")
            if wrong and wrong[0].startswith("exit code 0"):  # it fits
                wrong = []
            subprocess.run(["mount", "-o", "remount,size=500m", out], check=True)
            if wrong:
                shutil.copytree(out, folder / f"full{size}", dirs_exist_ok=True)
            yield "full disk", wrong or finish(shared, name, out, log) or differences(reference, out)
        finally:
            subprocess.run(["umount", "-l", out], check=True)
    begin(shared, name, out)
    out.chmod(0o555)
    yield "read-only output", run("error", without_privileges)
    out.chmod(0o755)
    shutil.rmtree(out)
    out.write_text("a file")
    yield "a file in place of the output", run("error")
    out.unlink()
    cache = folder / "cache"
    for label, make in (("cache that cannot be written", lambda: cache.mkdir(0o555)), ("a file in place of the cache",
                        lambda: cache.write_text("x"))):
        begin(shared, name, out)
        make()
        yield label, run("result", without_privileges, {"SANASR_CACHE": str(cache)}) or differences(reference, out)
        cache.rmdir() if cache.is_dir() else cache.unlink()

    begin(shared, name, out)
    both = [start(command, argv(out), folder, folder / f"log{i}", environment(shared), prepare) for i in range(2)]
    codes = [ended(pid) for pid in both]
    for pid in both:
        end_all(pid)
    texts = [(folder / f"log{i}.err").read_text("utf-8", "replace") for i in range(2)]
    wrong = [found for text in texts for found in traceback_in(text)]
    if sorted(map(bool, codes)) == [True, True]:
        wrong.append(f"both end with {codes}")
    wrong += [f"not one line that refuses: {lines_of_error(text)[:3]}" for code, text in zip(codes, texts, strict=True)
              if code and [("error: " in line) for line in lines_of_error(text)] != [True]]
    yield "two at once", wrong or differences(reference, out)

    if command == "eval.py":
        return
    begin(shared, name, out)
    pid = start(command, argv(out), folder, log, environment(shared), prepare)
    if ended(pid, 0.7 * seconds) is None:
        end_all(pid)
        ended(pid)
    for path in out.rglob("*"):  # the same as a clock that was set back
        os.utime(path, (time.time() + 86400,) * 2)
    now = time.time
    yield "clock set back", run("result", lambda: setattr(time, "time", lambda: now() - 86400)) or differences(
        reference, out)
    shutil.rmtree(out)


# --- All of it ---


def make_shared(shared):
    """The tiny model, photos, an adapter, and runs to resume, below `shared`."""
    sys.path.insert(0, str(ROOT / "tests"))
    import tiny
    build, config = tiny.CONFIGS["transformer"]
    tiny.CONFIGS["transformer"] = build, config | {"num_layers": 3}  # so that there is a block to prune
    tiny.tiny_model(shared / "model")
    for folder, size, count in (("photos", (272, 264), 5), ("lr", (24, 20), 6)):
        (shared / folder).mkdir()
        for i in range(count):
            photo(*size, seed=i).save(shared / folder / f"{i}.png")
    for part, name in ((part, name) for part in ("train", "val") for name in ("00000_strong.png", "00001_mild.png")):
        for kind, size in (("lr", 80), ("hr", 320)):
            (shared / "pairs" / part / kind).mkdir(parents=True, exist_ok=True)
            photo(size, size, seed=size + len(part)).save(shared / "pairs" / part / kind / name)
    (shared / "nothing").mkdir()
    torch.manual_seed(0)
    sanasr.save_module(sanasr.DCAE(TINY_AUTOENCODER), shared / "start" / "vae")
    dit = sanasr.LinearDiT.from_pretrained(shared / "model" / "transformer")
    torch.manual_seed(0)
    sanasr.inject_lora(dit, 2)
    sanasr.save_lora(dit, shared / "adapter.safetensors", {"timestep": "900"})
    dit = sanasr.LinearDiT.from_pretrained(shared / "model" / "transformer")
    sanasr.inject_lora(dit, 2, targets="attn+ffn")
    sanasr.save_lora(dit, shared / "warm.safetensors", {})
    for name, folder in (("train.py", "run"), ("prune.py", "pruned"), ("lab.pretrain autoencoder", "autoencoder")):
        (shared / folder).mkdir()
        if wrong := finish(shared, name, shared / folder, shared / folder):
            raise UserError(f"{name} does not run at all: {wrong[0]}")
    shutil.move(shared / "autoencoder" / "autoencoder.pt", shared / "autoencoder.pt")
    shutil.rmtree(shared / "pruned" / "transformer")


def every_case(seed, shared):
    rng = random.Random(seed)
    for number, make in enumerate((picture_cases, model_cases, table_cases)):
        yield from make(random.Random(rng.random() + number), shared)


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/faults"), metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: the cores)")
    parser.add_argument("--moments", type=int, default=50, help="signals to each command (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one input in 20 of each kind, two signals a command")
    parser.add_argument("--only", default="", metavar="TEXT", help="of inputs: KIND, signals, machine: those that "
                        "contain this text; their files are kept")
    args = parser.parse_args(argv)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the cases' address space is limited, and runs are compared bit for bit
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="PIL")
    began, work = time.monotonic(), (args.out / "work").resolve()
    shutil.rmtree(work, ignore_errors=True)
    (work / "shared").mkdir(parents=True)
    shared = work / "shared"
    make_shared(shared)

    cases = [case for case in every_case(args.seed, shared) if args.only in f"inputs: {case.kind}"]
    if args.quick:
        seen = Counter()
        cases = [c for c in cases if (seen.update([c.kind]), (seen[c.kind] - 1) % 20 == 0)[1]]
    moments = 2 if args.quick else args.moments
    names = list(runs(shared))

    def tried(first):
        for n, case in enumerate(cases[first:first + 25], first):
            folder = work / f"{n:04d}"
            yield case.kind, case.command, case.name, check(case, folder, shared)

    def all_kills(name):
        for label, wrong in killed(shared, name, work / f"kill {name}", moments, random.Random(args.seed)):
            yield "signals", name, label, wrong

    def all_disks(name):
        for kind, wrong in bad_disks(shared, name, work / f"disk {name}"):
            yield f"machine: {kind}", name, kind, wrong
    units = [(tried, first) for first in range(0, len(cases), 25)]
    if args.only in "signals":
        units = [(all_kills, name) for name in names] + units
    if args.only in "machine":
        units = [(all_disks, name) for name in (names[:1] if args.quick else names)] + units
    rows = pooled(units, args.jobs, work)
    report(rows, args, time.monotonic() - began)
    if not args.only and not any(row["wrong"] for row in rows):
        shutil.rmtree(work)
    return int(any(row["wrong"] for row in rows))


def pooled(units, jobs, work):
    """The rows of all units, each unit in a process of its own, `jobs` at a time. Prints what is wrong."""
    waiting, running, rows = list(enumerate(units)), {}, []
    while waiting or running:
        while waiting and len(running) < jobs:
            n, (make, argument) = waiting.pop(0)
            sys.stdout.flush()
            pid = os.fork()
            if not pid:
                try:
                    with open(work / f"unit{n}.jsonl", "w") as f:
                        for kind, command, name, wrong in make(argument):
                            f.write(json.dumps(dict(kind=kind, command=command, name=name, wrong=wrong)) + "\n")
                            f.flush()
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)
            running[pid] = n, argument
        pid, code = os.wait()
        if pid not in running:
            continue
        n, argument = running.pop(pid)
        new = [json.loads(line) for line in (work / f"unit{n}.jsonl").read_text().splitlines()]
        if code:
            new.append(dict(kind="this program", command="lab.faults", name=str(argument), wrong=["failed, see above"]))
        rows += new
        for row in new:
            for wrong in row["wrong"] or []:
                print(f"{row['command']}, {row['kind']}, {row['name']}: {wrong}", flush=True)
        left = len(waiting) + len(running)
        print(f"{len(rows)} tried, {sum(bool(row['wrong']) for row in rows)} with faults, {left} of {len(units)} parts "
              "to go", flush=True)
    return rows


def report(rows, args, seconds):
    about = (f"Seed {args.seed}, revision {revision(ROOT)}, {time.strftime('%Y-%m-%d')}, "
             f"{seconds:.0f} s with {args.jobs} processes, torch {torch.__version__}.")
    table = {}
    for row in rows:
        line = table.setdefault(row["kind"], [0, 0, 0, set()])
        line[0] += row["wrong"] is not None
        line[1] += row["wrong"] is None
        line[2] += bool(row["wrong"])
        line[3].add(row["command"])
    lines = [f"`python -m lab.faults{' --quick' * args.quick}`: {about}", "", "| kind | tried | failures | commands |",
             "| --- | ---: | ---: | --- |"]
    lines += [f"| {kind} | {tried}{f' (and {skipped} that this machine cannot make)' * bool(skipped)} | {bad} | "
              f"{', '.join(sorted(commands))} |" for kind, (tried, skipped, bad, commands) in sorted(table.items())]
    lines.append(f"| all | {sum(x[0] for x in table.values())} | {sum(x[2] for x in table.values())} | |")
    (args.out / "faults.md").write_text("\n".join(lines) + "\n")
    (args.out / "faults.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
