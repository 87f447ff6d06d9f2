"""The broken and odd inputs of lab.faults: places for a file, makers of bad files, odd pictures, values and folders.

`cases` puts what every maker makes into every place for that type of file. shared: a folder with model/, photos/, lr/,
ram/ (a tiny tagger's weights), adapter.safetensors, run/ and pruned/ (to resume). In arguments "@in", "@out" and "@run"
are folders of the case itself, "@shared" is the shared one.
"""
from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import zlib
from dataclasses import dataclass, field, replace
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save

ROOT = Path(__file__).resolve().parent.parent
EVAL = ["@in/x.png", "--out", "@out/", "--model", "@shared/model"]
STEP = ["--data", "@shared/photos", "--model", "@shared/model", *"--crop 96 --val 1 --workers 0 --steps 1".split()]
TRAIN = [*STEP, "--name", "@out", *"--tags none --lpips alex --batch 1 --rank 2".split()]
PRUNE = [*STEP, "--out", "@out", *"--tags none --lpips alex --keep 2".split()]
ARGV = {"eval.py": EVAL, "train.py": TRAIN, "prune.py": PRUNE}
FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP", "tif": "TIFF", "gif": "GIF", "bmp": "BMP", "ppm": "PPM"}


@dataclass
class Case:
    """One input. files: {path below the case's folder: bytes, or a function of the path that makes it}.

    expect: "result" (exit code 0), "error", or "either" where the decoder decides; names: the line of error has to
    contain one of them; memory: bytes of address space that it may take beyond the loaded modules.
    """
    kind: str
    name: str
    command: str  # a key of lab.faults.COMMANDS
    argv: list
    files: dict
    expect: str = "error"
    names: tuple = ("",)
    env: dict = field(default_factory=dict)
    memory: int = 1 << 30


def photo(width=24, height=20, seed=0):
    """A smooth random picture."""
    rgb = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(rgb).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, suffix="png", **options):
    f = BytesIO()
    image.save(f, FORMATS[suffix], **options)
    return f.getvalue()


def photos(folder, width, height, count=3):
    return {f"in/{folder}/{i}.png": encoded(photo(width, height, i)) for i in range(count)}


def png(width, height, kind=b"IEND", data=b""):
    """An RGB PNG of this size with one chunk and no valid pixels."""
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (kind, data), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)


def places(shared):
    """(The file that is to be broken, a case in which it is whole). expect: what follows where nobody can read it."""
    def place(kind, file, good, command, argv, files=(), names=(), expect="error", **env):
        good = good if isinstance(good, bytes) else (shared / good).read_bytes()
        files = {"in/x.png": encoded(photo())} | dict(files) | {file: good}
        return file, Case(kind, file, command, argv, files, expect, (Path(file).name, *names, "--crop"), env)

    def option(kind, file, good, command, options, *rest):
        return place(kind, f"in/{file}", good, command, [*ARGV[command], *options.split()], (), *rest)

    for suffix in FORMATS:
        yield place("pictures", f"in/x.{suffix}", encoded(photo(), suffix), "eval.py", [f"@in/x.{suffix}", *EVAL[1:]])
    ram, tags = ("photos.tagger", ["--tagger", "ram", "@in/x.png"]), b'image,tags\nx.png,"tree, sky"\n'
    yield place("pictures", "in/x.png", encoded(photo()), *ram, SANASR_WEIGHTS="@shared/ram")
    yield place("weights", "in/ram.pth", "ram/ram.pth", *ram, SANASR_WEIGHTS="@in")
    yield place("weights", "in/ram_fp16.safetensors", "ram/ram_fp16.safetensors", *ram, SANASR_WEIGHTS="@in")
    yield option("references", "hr/x.png", encoded(photo(96, 80)), "eval.py", "--metrics psnr --hr @in/hr", ["in/hr"])
    yield option("adapters", "a.safetensors", "adapter.safetensors", "eval.py", "--adapter @in/a.safetensors")
    yield option("texts", "i.txt", b"a tree", "eval.py", "--instruction @in/i.txt", ["the instruction"], "either")
    yield option("tables", "t.csv", tags, "eval.py", "--tagger @in/t.csv")
    yield option("tables", "t.csv", tags, "train.py", "--tags @in/t.csv")
    for command in ("train.py", "prune.py"):
        pairs, argv = photos("hq", 112, 104, 2) | photos("lq", 28, 26, 2), ["--data", "@in/hq", "--lq", "@in/lq"]
        yield place("photos", "in/lq/0.png", encoded(photo(28, 26)), command, [*ARGV[command], *argv], pairs, ["lq"])
        yield place("photos", "out/data.json", "run/data.json", command, ARGV[command], expect="either")
    for command, run, file, expect, argv in (
            ("train.py", "run", "state.pt", "error", "--name @run --resume --steps 9".split()),
            ("train.py", "run", "log.csv", "either", "--name @run --resume --steps 9".split()),
            ("prune.py", "pruned", "calibration.pt", "error", [*PRUNE, *"--steps 60 --out @run --resume".split()])):
        files = {"run": partial(shutil.copytree, shared / run)}
        yield place("states", f"run/{file}", f"{run}/{file}", command, argv, files, (), expect)
    for path in sorted(p for p in (shared / "model").rglob("*") if p.suffix in (".json", ".safetensors")):
        kind = {"tokenizer.json": "tokenizer", "config.json": "config"}.get(path.name, "weights")
        yield place(kind, f"in/{path.relative_to(shared)}", path, "SanaSR", ["@in/model"],
                    {"in/model": partial(shutil.copytree, shared / "model")}, [path.parent.name, "in/model"])


# --- Makers: (whole file, rng) -> (name, bytes or function of the path, what has to follow) ---


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
    """(name, changed copy): a part of a JSON value of another type, null, huge, negative, zero, empty or removed."""
    new = [{str: 7, int: "7", float: "7", bool: "yes", type(None): "none", list: {"a": 1}, dict: [1]}[type(value)], None]
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
    entries = [changed for _, changed in json_changes(entry)] + [entry | new for new in (
        *({"dtype": name} for name in "I32 U32 F16 F64 BOOL F8_E4M3".split()), {"shape": [1, *entry["shape"], 1]},
        *({"data_offsets": [start + i, end + i]} for i in (-4, 10**9)))]
    files |= {f"entry {str(changed)[:99]}": packed({key: changed}) for changed in entries}
    yield from ((name, data, "error") for name, data in files.items())


def tables(good, rng):
    for expect, rows in {
        "result": [b"\xef\xbb\xbf" + good, b"image,tags\n", b'image,tags\n"x"".png","a""b"\n',
                   b"image,tags\n../../bait.png,tree\n/etc/passwd,=1\n", b"image,tags\n" + b"y,tree\n" * 99999],
        "error": [good.decode().encode("utf-16"), b"a,b\n1,2\n", b"image\nx\n", good.replace(b",", b";")],
        "either": [b"image,tags\nx.png\n\n,\n", b"tags,image\ntree\n", b"image,tags\nx.png,a,b,c\n", b"step,loss\n1,x\n",
                   b'image,tags\n"x.png,tree\n', b"image,tags\nx.png,\0\0\n", good.replace(b"\n", b"\r"),
                   b"image,tags\nx.png," + b"a" * 300_000, b"image,tags\nx.png,a\nx.png,b\n"]}.items():
        yield from ((f"{data[:40]}", data, "either" if b"step" in good else expect) for data in rows)


def states(good, rng):
    keys = ("settings", "masters", "ema", "optimizer", "scaler", "sums", "model")
    for value in ([], 3, {}, {"step": 1} | {key: {} for key in keys}, {"step": 1, "evil": Mark()}, {"model": [1]}):
        f = BytesIO()
        torch.save(value, f)
        yield f"holds {str(value)[:30]}", f.getvalue(), "error"


MAKERS = {".json": json_files, ".safetensors": tensor_files, ".csv": tables, ".pt": states, ".pth": states}


def pictures(rng):
    """Odd pictures: (kind, file, bytes or function of the path, what has to follow). More: tests/test_eval.py."""
    good, bmp, gif = (encoded(photo(), suffix) for suffix in ("png", "bmp", "gif"))
    text = b"k\0\0" + zlib.compress(bytes(2 * 10**8))
    for file, data in {"huge.png": png(60_000, 60_000), "wide.png": png(2**31 - 1, 1), "x.jp2": b"",
                       "text.png": png(8, 8, b"zTXt", text), "icc.png": png(8, 8, b"iCCP", text),
                       "zeros.png": png(12_000, 12_000, b"IDAT", zlib.compress(bytes(12_000 * 36_001))),
                       "x.bmp": bmp[:18] + struct.pack("<ii", 60_000, 60_000) + bmp[26:],
                       "x.gif": gif[:6] + struct.pack("<HH", 65535, 65535) + gif[10:],
                       "x.ppm": b"P6 60000 60000 255\n" + bytes(99), "x.pgm": b"P5 1 4000000000 255\n"}.items():
        yield "decompression bombs", file, data, "error"
    for suffix in FORMATS:
        yield "wrong suffix", "x.png", encoded(photo(), suffix), "result"
    for suffix in ("gif", "webp", "png", "tif"):
        data = encoded(photo(), suffix, save_all=True, append_images=[photo(seed=i) for i in range(3)])
        yield "frames cut", f"x.{suffix}", data[:-9], "either"
    for value in (np.nan, np.inf, 1e30):
        yield "floats", "x.tif", encoded(Image.fromarray(np.full((9, 9), value, np.float32)), "tif"), "error"
    tag = b"Exif\0\0II*\0" + struct.pack("<IHHHI", 8, 1, 0x0112, 3, 1)  # an orientation; its value and an end follow
    for data in (b"Exif\0\0" + rng.randbytes(200), tag + struct.pack("<HHI", 6, 0, 8), *(
            tag[:n] for n in (6, 8, 12, 15, 20, 24))):
        yield "EXIF", "x.jpg", encoded(photo(), "jpg", exif=data), "result"
    for data in (rng.randbytes(600), b"x", bytes(4000), bytes(300_000)):
        for suffix in ("png", "jpg", "webp"):
            yield "ICC", f"x.{suffix}", encoded(photo(), suffix, icc_profile=data), "result"
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
    x, model = {"in/x.png": encoded(photo())}, {"in/model": partial(shutil.copytree, shared / "model")}

    def case(kind, name, more, files=(), expect="error", names=("",), command="eval.py"):
        return Case(kind, name, command, [*ARGV[command], *more], x | dict(files), expect, names)

    for prompt in ("tree " * 10**5, "\1\2\x7f", "a\udcff", "😀" * 99, "<bos><eos><pad><unk>", " \t\n", "▁▁"):
        yield case("texts", f"prompt {prompt[:9]!r}", ["--prompt", prompt], expect="either")
    for key, options in {"rank": "x", "alpha": "x 0 -1 nan 1e400", "timestep": "x 0 -3 99999", "protocol": "x",
                         "suffix": "x" * 10**5, "instruction": "y" * 10**5}.items():
        for value in options.split():
            data = save(load_file(shared / "adapter.safetensors"), {"rank": "2", key: value})
            yield case("adapters", f"{key} = {value[:9]!r}", ["--adapter", "@in/a.safetensors"],
                       {"in/a.safetensors": data}, "either", ("a.safetensors", "instruction"))
    yield case("adapters", "of another model", ["--adapter", ROOT / "weights/embedded/adapter.safetensors"])
    for size, more, expect in ((96, [], "result"), (50, [], "error"), (96, ["--csv", "@in"], "error"),
                               (96, ["--metrics", "x"], "error"), (96, ["--metrics", "musiq"], "error")):
        yield case("references", f"{size} {more}", ["--metrics", "psnr", "--hr", "@in/hr", *more],
                   {"in/hr/x.png": encoded(photo(size, 80))}, expect)
    good, broken = photos("hr", 112, 104), {
        "in/hr/a.png": b"", "in/hr/c.jpg": encoded(photo(), "jpg")[:99], "in/hr/d.png": png(60_000, 60_000),
        "in/hr/folder.png": Path.mkdir, "in/hr/link.png": lambda p: p.symlink_to(p.name)}
    for name, files, expect in (
            ("broken ones among good ones", good | broken, "result"), ("only broken ones", broken, "error"),
            ("a file", {"in/hr": b"x"}, "error"), ("no folder", {}, "error"),
            ("too small", photos("hr", 40, 40), "error"), ("one alone", photos("hr", 112, 104, 1), "either"),
            ("pairs", good | photos("lq", 28, 26), "result"), ("no LR", good | {"in/lq": Path.mkdir}, "error"),
            ("LR that is no quarter", good | photos("lq", 30, 26), "error")):
        lq = ["--lq", "@in/lq"] * any("lq" in file for file in files)
        for command in ("train.py", "prune.py"):
            yield case("photos", name, ["--data", "@in/hr", *lq], files, expect, ("--data", "in/hr", "lq"), command)
    for name in ("nothing-600m", "@in/x.png", "@in/empty", "@in/..", "sana-600m-512", "", "a\0b"):
        for command in ("eval.py", "train.py"):
            yield case("model folders", f"{name!r}", ["--model", name], {"in/empty": Path.mkdir}, command=command)
    for part in ("vae", "transformer", "text_encoder"):
        for change in (shutil.rmtree, lambda p: [shutil.rmtree(p), p.touch()], lambda p: [
                f.rename(f"{f}".replace(".s", "-00001-of-00002.s")) for f in p.glob("*.safetensors")]):
            yield Case("model folders", part, "SanaSR", ["@in/model"], model | {f"in/model/{part}": change}, names=(part,))
    index = {f"in/{path.relative_to(shared)}.index.json": b'{"weight_map": {"x": "../../../../../../../../etc/passwd"}}'
             for path in (shared / "model").rglob("*.safetensors")}
    modules = {f"{folder}/{name}.py": b"import os; os.mkdir('mark')" for folder in ("in", "in/model", "in/model/vae")
               for name in ("__init__", "torch", "sanasr", "numpy", "conftest")}
    config, pickled = json.loads((shared / "model/transformer/config.json").read_text()), pickle.dumps(Mark())
    hostile = [("indices of /etc/passwd", index, "result"), ("modules", modules, "result")]
    hostile += [(file, {f"in/model/{file}": pickled}, expect) for file, expect in {
        "adapter.safetensors": "error", "vae/model.safetensors": "error", "pytorch_model.bin": "result",
        "transformer/pytorch_model.bin": "result"}.items()]
    hostile += [(key, {"in/model/transformer/config.json": json.dumps(config | {key: "os.system"}).encode()}, expect)
                for key, expect in {"auto_map": "error", "_class_name": "result"}.items()]
    for name, files, expect in hostile:
        yield case("hostile files", name, ["--model", "@in/model"], model | files, expect)


def cases(rng, shared):
    for file, case in places(shared):
        for make in filter(None, (damaged, MAKERS.get(Path(file).suffix))):
            for name, content, expect in make(case.files[file], rng):
                new = replace(case, name=f"{file}: {name}", files=case.files | {file: content},
                              expect=case.expect if expect == "error" else expect)
                if case.command == "SanaSR" and rng.random() < 0.15:  # some go through a command
                    command = rng.choice([*ARGV])
                    new = replace(new, command=command, argv=[*ARGV[command], "--model", "@in/model"])
                yield new
    for kind, file, data, expect in pictures(rng):
        shown = " ".join(file.split())
        yield Case(kind, f"{file[:20]!r}", "eval.py", [f"@in/{file}", *EVAL[1:]], {f"in/{file}": data}, expect,
                   (file, shown, shown[:60], "File name too long"), memory=6 << 30 if file == "zeros.png" else 1 << 30)
    yield from values(shared)
