"""Broken and odd inputs, killed processes, bad disks and hostile files, against every command. Linux only.

    python -m lab.faults --out runs/faults                 everything, in minutes; leaves faults.md and faults.json
    python -m lab.faults --out runs/faults --only signals  a part: signals, machine, inputs or the name of a kind

Every case runs in a forked process that has the modules loaded already, on a tiny model, and is checked for this:

    no traceback, no hang, the right exit code and one line of error that names what is broken
    no input changed, no partial output: what lies under a final name is whole
    memory below a bound, no file opened outside of what was named, no network, no pickle, no program started

A killed run is resumed until it ends; its weights, logs and pictures then equal those of an uninterrupted run.
"""
import contextlib
import ctypes
import json
import os
import pickle
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
import zlib
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import autoencoder
import eval
import prune
import runs
import sanasr
import train
from linearsr import train as train_linearsr
from photos import tagger
from photos.pictures import write_bytes
from runs import UserError, command, revision
from weights.files import save_tensors

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 120  # then a case hangs
EVAL = ["@in/x.png", "--out", "@out/", "--model", "@shared/model"]
STEP = ["--data", "@shared/photos", "--model", "@shared/model", *"--crop 96 --val 1 --workers 0 --steps 1".split()]
TRAIN = [*STEP, "--name", "@out", *"--tags none --lpips alex --batch 1 --rank 2".split()]
PRUNE = [*STEP, "--out", "@out", *"--tags none --lpips alex --keep 2".split()]
ARGV = {"eval.py": EVAL, "train.py": TRAIN, "prune.py": PRUNE}
FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP", "tif": "TIFF", "gif": "GIF", "bmp": "BMP", "ppm": "PPM"}
COMMANDS = {"eval.py": eval.main, "train.py": train.main, "--learn autoencoder": train.main, "prune.py": prune.main,
            "photos.tagger": tagger.main, "linearsr.train": train_linearsr.main, "SanaSR": command(
                lambda argv: sanasr.SanaSR.from_pretrained(argv[0]).restore(Image.new("RGB", (8, 8)), "a tree"))}
RUNS = {  # what is killed: (arguments, the files from which it needs --resume)
    "train.py": ([*TRAIN, *"--steps 8 --every 2 --workers 1".split()], ["state.pt"]),
    "--learn autoencoder": ([*"--learn autoencoder --data @shared/photos --model @shared/model --name @out".split(),
                             *"--batch 1 --workers 0 --steps 6 --every 2 --pairs 8".split()], ["state.pt"]),
    "linearsr.train": ([*STEP, *"--stage pretrain --name @out --steps 6 --every 2 --batch 1 --pairs 4".split()], []),
    "prune.py": ([*PRUNE, "--steps", "60"], ["calibration.pt", "transformer"]),  # it saves at step 50
    "eval.py": (["@shared/lr", "--out", "@out/", "--model", "@shared/model"], [])}


@dataclass
class Case:
    """One input."""
    kind: str
    name: str
    command: str
    argv: list                               # @in, @out, @run: folders of the case; @shared: what make_shared makes
    files: dict                              # {path below the case's folder: bytes, or a function of the path}
    expect: str = "error"                    # or "result", or "either" where the decoder decides
    names: tuple = ("",)                     # the line of error has to contain one of them
    env: dict = field(default_factory=dict)
    memory: int = 1 << 30                    # bytes of address space that it may take beyond the loaded modules


def photo(width=24, height=20, seed=0, suffix="png", **options):
    """The file of a smooth random picture."""
    rgb, f = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8), BytesIO()
    Image.fromarray(rgb).resize((width, height), Image.Resampling.BICUBIC).save(f, FORMATS[suffix], **options)
    return f.getvalue()


def photos(folder, width, height, count=3):
    return {f"in/{folder}/{i}.png": photo(width, height, i) for i in range(count)}


def png(width, height, kind=b"IEND", data=b""):
    """An RGB PNG of this size with one chunk and no valid pixels."""
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (kind, data), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)


def places(shared):
    """(The file that is to be broken, a case in which it is whole). expect: what follows where nobody can read it."""
    def place(kind, file, good, command, argv, files=(), names=(), expect="error", **env):
        good = good if isinstance(good, bytes) else (shared / good).read_bytes()
        files = {"in/x.png": photo()} | dict(files) | {file: good}
        return file, Case(kind, file, command, argv, files, expect, (Path(file).name, *names, "--crop", "fp32"), env)

    def option(kind, file, good, command, options, *rest):
        return place(kind, f"in/{file}", good, command, [*ARGV[command], *options.split()], (), *rest)

    for suffix in FORMATS:
        frames = {"save_all": True, "append_images": [Image.new("RGB", (24, 20))]} if suffix in "gif webp tif" else {}
        yield place("pictures", f"in/x.{suffix}", photo(suffix=suffix, **frames), "eval.py",
                    [f"@in/x.{suffix}", *EVAL[1:]])
    ram, tags = ("photos.tagger", ["--tagger", "ram", "@in/x.png"]), b'image,tags\nx.png,"tree, sky"\n'
    yield place("pictures", "in/x.png", photo(), *ram, SANASR_WEIGHTS="@shared/ram")
    yield place("weights", "in/ram.pth", "ram/ram.pth", *ram, SANASR_WEIGHTS="@in")
    yield place("weights", "in/ram_fp16.safetensors", "ram/ram_fp16.safetensors", *ram, SANASR_WEIGHTS="@in")
    yield option("references", "hr/x.png", photo(96, 80), "eval.py", "--metrics psnr --hr @in/hr", ["in/hr"])
    yield option("adapters", "a.safetensors", "adapter.safetensors", "eval.py", "--adapter @in/a.safetensors")
    yield option("texts", "i.txt", b"a tree", "eval.py", "--instruction @in/i.txt", ["the instruction"], "either")
    yield option("tables", "t.csv", tags, "eval.py", "--tagger @in/t.csv")
    yield option("tables", "t.csv", tags, "train.py", "--tags @in/t.csv")
    for script in ("train.py", "prune.py"):
        pairs, argv = photos("hq", 112, 104, 2) | photos("lq", 28, 26, 2), ["--data", "@in/hq", "--lq", "@in/lq"]
        yield place("photos", "in/lq/0.png", photo(28, 26), script, [*ARGV[script], *argv], pairs, ["lq"])
        yield place("photos", "out/data.json", "run/data.json", script, ARGV[script], expect="either")
    for script, run, file, expect, argv in (
            ("train.py", "run", "state.pt", "error", "--name @run --resume --steps 9 --workers 0".split()),
            ("train.py", "run", "log.csv", "either", "--name @run --resume --steps 9 --workers 0".split()),
            ("prune.py", "pruned", "calibration.pt", "error", [*PRUNE, *"--steps 60 --out @run --resume".split()])):
        files = {"run": partial(shutil.copytree, shared / run)}
        yield place("states", f"run/{file}", f"{run}/{file}", script, argv, files, (), expect)
    for path in sorted(p for p in (shared / "model").rglob("*") if p.suffix in (".json", ".safetensors")):
        kind = {"tokenizer.json": "tokenizer", "config.json": "config"}.get(path.name, "weights")
        yield place(kind, f"in/{path.relative_to(shared)}", path, "SanaSR", ["@in/model"],
                    {"in/model": partial(shutil.copytree, shared / "model")}, [path.parent.name, "in/model"])


# Makers of bad files: (whole file, rng) -> (name, bytes or function of the path, what has to follow)

class Mark:
    """A pickle that leaves a folder behind when it is read."""
    def __reduce__(self):
        return os.mkdir, ("mark",)


def damaged(good, rng):
    """What can lie in the place of any file."""
    for name, data in (("empty", b""), ("noise", rng.randbytes(999)), ("zeros", bytes(4096)), ("text", b"no picture"),
                       ("zip", b"PK\3\4" + bytes(60)), ("pickle", pickle.dumps(Mark())), ("a folder", Path.mkdir),
                       ("missing", lambda p: None), ("link to itself", lambda p: p.symlink_to(p.name)),
                       ("unreadable", lambda p: [p.write_bytes(good), p.chmod(0)])):
        yield name, data, "error"
    for n in (8, len(good) // 2, 3 * len(good) // 4, len(good) - 1):
        yield f"cut after {n} bytes", good[:n], "either"
    for i in range(4):
        bad = bytearray(good)
        for _ in range(1 + i):
            bad[rng.randrange(len(bad) if i % 2 else min(64, len(bad)))] ^= 1 << rng.randrange(8)
        yield f"flipped bits {i}", bytes(bad), "either"


def json_changes(value):
    """(name, changed copy): a part of a JSON value of another type, null, huge, zero, empty, removed."""
    new = [None, {str: 7, list: {"a": 1}, dict: [1]}.get(type(value), "7")]
    if isinstance(value, str | list):
        new += value * 100_000, value[:0], value[:2]
    elif isinstance(value, int | float) and not isinstance(value, bool):
        new += 10**9 if isinstance(value, int) else 1e300, -abs(value) - 1, 0, value + 0.5
    yield from ((f"→ {str(changed)[:20]}", changed) for changed in new)
    for key in [*value][:99 if len(value) < 99 else 1] if isinstance(value, dict) else ():
        yield f"{key} removed", {k: v for k, v in value.items() if k != key}
        yield from ((f"{key} {name}", value | {key: changed}) for name, changed in json_changes(value[key]))
    if isinstance(value, list) and value and (len(value) > 6 or isinstance(value[0], dict)):
        yield from ((f"first {name}", [changed, *value[1:]]) for name, changed in json_changes(value[0]))


def json_files(good, rng):
    for data in (b"{", b"[]", b"{}", b"3", b"null", b'"x"', b"\xef\xbb\xbf{}", b'{"a": "\xff"}', b"[" * 200_000,
                 b'{"num_layers": Infinity}', b'{"num_layers": ' + b"9" * 6000 + b"}", b'[["a"]]', b"[[1, 2, 3, 4]]"):
        yield f"{data[:20]}", data, "error"
    yield from ((name, json.dumps(changed).encode(), "either") for name, changed in json_changes(json.loads(good)))


def tensor_files(good, rng):
    """Broken safetensors: the header, and the last tensor's name, place, type and shape."""
    n = int.from_bytes(good[:8], "little")
    header, body = json.loads(good[8:8 + n]), good[8 + n:]
    key = max((k for k in header if k != "__metadata__"), key=lambda k: header[k]["data_offsets"][1])
    entry = header.pop(key)
    start, end = entry["data_offsets"]

    def packed(entries, body=body):
        text = json.dumps(header | entries).encode()
        return len(text).to_bytes(8, "little") + text + body
    yield "NaN", packed({key: entry}, body[:start] + b"\0\0\xc0\x7f" * ((end - start) // 4)), "either"
    files = {"only the header": good[:8 + n], "no JSON": good[:8] + b"x" * n + body, "more bytes": good + bytes(64),
             "no UTF-8": good[:8] + b"\xff" * n + body, "a list": (2).to_bytes(8, "little") + b"[]",
             "deep header": (200_000).to_bytes(8, "little") + b"[" * 200_000, "missing key": packed({}, body[:start]),
             "another key": packed({"x." + key: entry}), "key of a megabyte": packed({"x" * 10**6: entry})}
    for length in (0, -1, 99999999, 2**62):
        files[f"header length {length}"] = length.to_bytes(8, "little", signed=True) + good[8:]
    entries = [changed for _, changed in json_changes(entry) if changed != entry] + [entry | new for new in (
        *({"dtype": name} for name in "I32 U32 F16 F64 BOOL F8_E4M3".split()), {"shape": [1, *entry["shape"], 1]},
        *({"data_offsets": [start + i, end + i]} for i in (-4, 10**9)))]
    files |= {f"entry {str(changed)[:99]}": packed({key: changed}) for changed in entries}
    yield from ((name, data, "error") for name, data in files.items())


def tables(good, rng):
    for expect, rows in {
        "result": [b"\xef\xbb\xbf" + good, b"image,tags\n", b'image,tags\n"x"".png","a""b"\n',
                   b"image,tags\n../bait.png,tree\n/etc/passwd,=1\n", b"image,tags\n" + b"y,a\n" * 99999],
        "error": [good.decode().encode("utf-16"), b"a,b\n1,2\n", b"image\nx\n", good.replace(b",", b";")],
        "either": [b"image,tags\nx.png\n\n,\n", b"tags,image\ntree\n", b"image,tags\nx.png,a,b,c\n", good + good[:-9],
                   b'image,tags\n"x.png,tree\n', good.replace(b"\n", b"\r"), good + b"\0,\0\n", good + b"a" * 300_000,
                   b"step,loss\n1,x\n"]}.items():
        yield from ((f"{data[:40]}", data, "either" if b"step" in good else expect) for data in rows)


def states(good, rng):
    keys = ("settings", "masters", "ema", "optimizer", "scaler", "sums", "model")
    for value in ([], 3, {}, {"step": 1} | {key: {} for key in keys}, {"step": 1, "evil": Mark()}, {"model": [1]}):
        f = BytesIO()
        torch.save(value, f)
        yield f"holds {str(value)[:30]}", f.getvalue(), "error"


def pictures(rng):
    """Odd pictures: (kind, file, bytes or function of the path, what has to follow). More: tests/test_eval.py."""
    good, bmp, gif = (photo(suffix=suffix) for suffix in ("png", "bmp", "gif"))
    text = b"k\0\0" + zlib.compress(bytes(10**8), 1)
    for file, data in {"huge.png": png(60_000, 60_000), "wide.png": png(2**31 - 1, 1), "x.jp2": b"",
                       "text.png": png(8, 8, b"zTXt", text), "icc.png": png(8, 8, b"iCCP", text),
                       "zeros.png": png(12_000, 12_000, b"IDAT", zlib.compress(bytes(12_000 * 36_001), 1)),
                       "x.bmp": bmp[:18] + struct.pack("<ii", 60_000, 60_000) + bmp[26:],
                       "x.gif": gif[:6] + struct.pack("<HH", 65535, 65535) + gif[10:],
                       "x.ppm": b"P6 60000 60000 255\n" + bytes(99), "x.pgm": b"P5 1 4000000000 255\n"}.items():
        yield "decompression bombs", file, data, "error"
    yield from (("wrong suffix", "x.png", photo(suffix=suffix), "result") for suffix in FORMATS)
    for data in (rng.randbytes(600), b"x", bytes(4000), bytes(300_000)):
        for suffix in ("png", "jpg", "webp"):
            yield "ICC", f"x.{suffix}", photo(suffix=suffix, icc_profile=data), "result"
    for file in ("new\nline", "two words", "tab\tstop", "ünï çødé", "照片 图", "صورة", "😀", "-dash", "--help", "%s%d",
                 "quote'\"", "$HOME", "star*", "back\\slash", "many.dots.", "a" * 200):
        yield "names", f"{file}.PNG", b"x", "error"
        yield "names", f"{file}.png", good, "result"
    yield "names", "a" * 251 + ".png", good, "error"  # too long for a temporary file
    for make in (lambda p: p.symlink_to("gone"), os.mkfifo, lambda p: p.symlink_to("/dev/zero")):
        yield "no files", "x.png", make, "error"
    yield "no files", "x.png/y.png", lambda p: [p.parent.rmdir(), p.parent.write_bytes(good)], "error"
    yield "no files", "x.png", lambda p: [p.with_name("y").write_bytes(good), p.symlink_to("y")], "result"


def values(shared):
    """Cases of odd options, folders of photos and models, and hostile models."""
    x, model = {"in/x.png": photo()}, {"in/model": partial(shutil.copytree, shared / "model")}

    def case(kind, name, more, files=(), expect="error", names=("",), command="eval.py"):
        return Case(kind, name, command, [*ARGV[command], *more], x | dict(files), expect, names)

    for prompt in ("tree " * 10**5, "\1\2\x7f", "a\udcff", "😀" * 99, "<bos><eos><pad><unk>", " \t\n", "▁▁"):
        yield case("texts", f"prompt {prompt[:9]!r}", ["--prompt", prompt], expect="either")
    yield case("adapters", "of another model", ["--adapter", ROOT / "weights/embedded/adapter.safetensors"])
    good, broken = photos("hr", 112, 104), {
        "in/hr/a.png": b"", "in/hr/c.jpg": photo(suffix="jpg")[:99], "in/hr/d.png": png(60_000, 60_000),
        "in/hr/folder.png": Path.mkdir, "in/hr/link.png": lambda p: p.symlink_to(p.name)}
    for name, files, expect in (
            ("broken ones among good ones", good | broken, "result"), ("only broken ones", broken, "error"),
            ("a file", {"in/hr": b"x"}, "error"), ("no folder", {}, "error"),
            ("too small", photos("hr", 40, 40), "error"), ("one alone", photos("hr", 112, 104, 1), "either"),
            ("pairs", good | photos("lq", 28, 26), "result"), ("no LR", good | {"in/lq": Path.mkdir}, "error"),
            ("LR that is no quarter", good | photos("lq", 30, 26), "error")):
        lq = ["--lq", "@in/lq"] * any("lq" in file for file in files)
        for script in ("train.py", "prune.py"):
            yield case("photos", name, ["--data", "@in/hr", *lq], files, expect, ("--data", "in/hr", "lq"), script)
    for name in ("nothing-600m", "@in/x.png", "@in/empty", "@in/..", "sana-600m-512", "", "a\0b"):
        for script in ("eval.py", "train.py"):
            yield case("model folders", f"{name!r}", ["--model", name], {"in/empty": Path.mkdir}, command=script)
    for part in ("vae", "transformer", "text_encoder"):
        for change in (shutil.rmtree, lambda p: [shutil.rmtree(p), p.touch()], lambda p: [
                f.rename(f"{f}".replace(".s", "-00001-of-00002.s")) for f in p.glob("*.safetensors")]):
            files = model | {f"in/model/{part}": change}
            yield Case("model folders", part, "SanaSR", ["@in/model"], files, names=(part,))
    index = {f"in/{path.relative_to(shared)}.index.json": b'{"weight_map": {"x": "../../../../../../../../etc/passwd"}}'
             for path in (shared / "model").rglob("*.safetensors")}
    modules = {f"{folder}/{name}.py": b"import os; os.mkdir('mark')" for folder in ("in", "in/model", "in/model/vae")
               for name in ("__init__", "torch", "sanasr", "numpy", "conftest")}
    hostile = {file: {f"in/model/{file}": pickle.dumps(Mark())} for file in (
        "adapter.safetensors", "vae/model.safetensors", "pytorch_model.bin", "transformer/pytorch_model.bin")}
    for name, files in (hostile | {"indices of /etc/passwd": index, "modules": modules}).items():
        expect = "error" if name.endswith("safetensors") else "result"
        yield case("hostile files", name, ["--model", "@in/model"], model | files, expect)


def cases(rng, shared):
    makers = {".json": json_files, ".safetensors": tensor_files, ".csv": tables, ".pt": states, ".pth": states}
    for file, case in places(shared):
        for make in filter(None, (damaged, makers.get(Path(file).suffix))):
            for name, content, expect in make(case.files[file], rng):
                new = replace(case, name=f"{file}: {name}", files=case.files | {file: content},
                              expect=case.expect if expect == "error" else expect)
                if case.command == "SanaSR" and rng.random() < 0.15:  # some go through a command
                    script = rng.choice([*ARGV])
                    new = replace(new, command=script, argv=[*ARGV[script], "--model", "@in/model"])
                yield new
    for kind, file, data, expect in pictures(rng):
        shown = " ".join(file.split())
        yield Case(kind, f"{file[:20]!r}", "eval.py", [f"@in/{file}", *EVAL[1:]], {f"in/{file}": data}, expect,
                   (file, shown, shown[:60], "File name too long"), memory=6 << 30 if file == "zeros.png" else 1 << 30)
    yield from values(shared)


# --- Running a command in a process of its own ---


def start(name, argv, folder, shared, env=(), memory=None):
    """The process number of a fork that runs the command in folder/in, stderr to folder/log.err; memory: watched."""
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


def watch(allowed, noted, memory, opener=safe_open):
    """From here on the address space is limited, and what a command may not do is written to the file `noted`."""
    allowed += [sys.prefix, sys.base_prefix, "/usr", "/lib", "/proc", "/sys", "/dev", "/etc"]
    allowed = [f"{path}/" for a in allowed for path in (a, os.path.realpath(a))]
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + memory
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    noted = os.open(noted, os.O_CREAT | os.O_WRONLY)

    def hook(event, args):
        if event == "open" and isinstance(args[0], str | bytes | os.PathLike):
            path = os.path.abspath(os.fsdecode(args[0]))
            if not f"{path}/".startswith(tuple(allowed)):
                os.write(noted, f"opened {path}\n".encode())
        elif event in ("socket.connect", "pickle.find_class", "os.system", "subprocess.Popen", "os.exec"):
            os.write(noted, f"{event} {str(args)[:80]}\n".encode())
    for module in [m for m in sys.modules.values() if getattr(m, "safe_open", None) is opener]:  # it calls no hook
        module.safe_open = lambda path, *args, **more: (hook("open", (path,)), opener(path, *args, **more))[1]
    sys.addaudithook(hook)


def wait(pid, seconds=None):
    """The exit code, minus a signal's number; None where it runs for so many seconds. By default it is killed then."""
    end, found = time.monotonic() + (seconds or SECONDS), 0
    while not found and time.monotonic() < end:
        time.sleep(0.005)
        found, code = os.waitpid(pid, os.WNOHANG)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL if found or not seconds else 0)  # and what it started
    return os.waitstatus_to_exitcode(code) if found else None if seconds else os.waitpid(pid, 0) and None


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


def contents(folder):
    """({file: what has to be equal after a resumed run}, [which files are not whole]); hidden files are temporary."""
    def content(path, data):
        if path.suffix == ".csv":
            names, *rows, end = (line.split(",") for line in data.decode().replace("\r", "").split("\n"))
            timed = {"images_per_s", "samples_per_s", "tflops", "memory_gb", "hours", "seconds"}  # they differ
            return end == [""], [{k: v for k, v in zip(names, row, strict=True) if k not in timed} for row in rows]
        if path.suffix == ".pt":  # what counts in it shows in the weights
            return list(torch.load(path, weights_only=True))
        read = {".png": lambda p: Image.open(p).load(), ".safetensors": load_file, ".json": lambda p: json.loads(data)}
        return data, path.suffix in read and bool(read[path.suffix](path))
    found, wrong = {}, []
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name[0] != "."):
        try:
            found[str(path.relative_to(folder))] = content(path, path.read_bytes())
        except Exception as error:
            wrong.append(f"{path.name} is not whole: {error}")
    return found, wrong


def fingerprint(*folders):
    """{path: its permissions and content} of everything below the folders."""
    return {path: (path.lstat().st_mode, path.is_file() and not path.is_symlink() and
                   path.read_bytes()) for folder in folders for path in folder.rglob("*")}


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
    wrong += broken * ("out/data.json" not in case.files or code == 0) + contents(folder / "run")[1] * (code == 0)
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
                     and (name in self.reference or not {"checkpoints", "samples"} & {*Path(name).parts})]
        return wrong


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
            os.killpg(pid, number) if rng.random() < 0.5 else os.kill(pid, number)
            code = wait(pid)
            wrong = ["does not end"] * (code is None) + run.judged(0, "either", complete=False)
        else:
            wrong = run.judged(code, "result")
        if chain == 10 or code == 0 or not moments or wrong:
            for path in run.out.rglob("*"):  # as if the clock had been set back
                os.utime(path, (time.time() + 86400,) * 2)
            wrong = wrong or run.judged(wait(run.start()), "result")
            run.clear()
            chain = 0
        yield "signals", label, wrong


def bad_machine(run, args):
    """Rows (kind, label, what is wrong): disks that are full or read-only, and two processes at once."""
    for label, spoil, expect in (
            ("read-only output", lambda out, cache: out.chmod(0o555), "error"),
            ("a file in place of the output", lambda out, cache: [out.rmdir(), out.touch()], "error"),
            ("cache that cannot be written", lambda out, cache: cache.mkdir(0o555), "result"),
            ("a file in place of the cache", lambda out, cache: cache.touch(), "result")):
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
            break  # it takes privileges
        try:
            wrong = run.judged(wait(run.start()), "either")  # a result where it fits
            subprocess.run(["mount", "-o", "remount,size=500m", run.out], check=True)
            yield "machine: full disk", size, wrong or run.judged(wait(run.start()), "result")
        finally:
            subprocess.run(["umount", "-l", run.out], check=True)
    run.clear()
    ends = [wait(pid) == 0 for pid in [run.start(), run.start()]]
    wrong = run.judged(int(not all(ends)), "either", complete=True)
    yield "machine: two at once", "", wrong + ["both fail"] * (not any(ends))


def make_shared(shared):
    """The tiny model, photos, weights of a tiny tagger, an adapter, and runs to resume, below `shared`."""
    sys.path.insert(0, str(ROOT / "tests"))
    import tiny
    tiny.CONFIGS["transformer"][1]["num_layers"] = 3  # so that there is a block to prune
    tiny.tiny_model(shared / "model")
    autoencoder.VAL = 4
    for i in range(6):
        write_bytes(shared / "photos" / f"{i}.png", photo(272, 264, i))
        write_bytes(shared / "lr" / f"{i}.png", photo(24, 20, i))
    tagger.Config = partial(tagger.Config, 96, 8, (2, 2, 2, 2), (1, 2, 4, 8), 3, embed=8, hidden=8)
    torch.manual_seed(0)
    ram = {k: torch.randn(v.shape) / 8 for k, v in tagger.RAM().state_dict().items()}
    save_tensors(ram, shared / "ram" / "ram_fp16.safetensors")
    torch.save({"model": ram}, shared / "ram" / "ram.pth")
    tiny.tiny_adapter(shared / "adapter.safetensors", shared / "model", 2, metadata={"timestep": "900"})
    for name, folder in (("train.py", "run"), ("prune.py", "pruned")):
        run = Run(name, shared / name, shared)
        if run.wrong:
            raise UserError(f"{name} does not run at all: {run.wrong[0]}")
        shutil.move(run.out, shared / folder)
    shutil.rmtree(shared / "pruned" / "transformer")


@command
def main(argv=None):
    parser = runs.parser(__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/faults"), metavar="DIR")
    add("--seed", type=int, default=0)
    add("--sample", type=int, default=1, metavar="N",
        help="one input in N of each kind, 50 / N signals to each command; above 50 on one command")
    add("--only", default="", metavar="TEXT", help="of signals, machine, inputs: KIND: those that contain this text")
    args = parser.parse_args(argv)
    runs.check_ranges(args)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the cases' address space is limited, and runs are compared bit for bit
    torch.set_num_threads(1)
    began, work, rows, seen = time.monotonic(), (args.out / "work").resolve(), [], Counter()
    shutil.rmtree(work, ignore_errors=True)
    make_shared(shared := work / "shared")

    def note(kind, name, label, wrong):
        rows.append({"kind": kind, "command": name, "name": label, "wrong": wrong})
        print(f"{name}, {kind}, {label}: {'; '.join(wrong)}\n" * bool(wrong), end="", flush=True)
    for part, tries, sample in (("signals", killed, ["train.py"]), ("machine", bad_machine, ["eval.py"])):
        for name in (RUNS if args.sample <= 50 else sample) if args.only in part else ():
            for kind, label, wrong in tries(Run(name, work / f"{part} {name}", shared), args):
                note(kind, name, label, wrong)
    for n, case in enumerate(cases(random.Random(args.seed), shared)):
        seen[case.kind] += 1
        if args.only in f"inputs: {case.kind}" and seen[case.kind] % args.sample == 1 % args.sample:
            note(case.kind, case.command, case.name, check(case, work / f"{n:04d}", shared))
            shutil.rmtree(work / f"{n:04d}")
    if not rows:
        raise runs.UserError(f"--only {args.only}: nothing was tried")
    about = (f"Seed {args.seed}, sample {args.sample}, revision {revision(ROOT)}, {time.strftime('%Y-%m-%d')}, "
             f"{time.monotonic() - began:.0f} s, torch {torch.__version__}.")
    lines = [about, "", "| kind | tried | failures |", "| --- | ---: | ---: |"]
    failed, kinds = [row for row in rows if row["wrong"]], sorted({row["kind"] for row in rows})
    lines += [f"| {kind or 'all'} | {sum(kind in (None, row['kind']) for row in rows)} | "
              f"{sum(kind in (None, row['kind']) for row in failed)} |" for kind in (*kinds, None)]
    (args.out / "faults.md").write_text("\n".join(lines) + "\n")
    (args.out / "faults.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    print("\n".join(lines))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
