"""The broken and odd inputs of lab.faults: pictures, model folders, tables, texts, states, hostile files.

Each function yields `Case`s. shared: a folder with model/, photos/, adapter.safetensors, run/ and pruned/ (to resume).
In the arguments that a case's setup returns, "@in/x" and "@out" stand for paths in the case's own folder.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import pickle
import shutil
import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from photos import tagger

ROOT = Path(__file__).resolve().parent.parent
TRAIN = ["--crop", "96", "--batch", "1", "--val", "1", "--tags", "none", "--lpips", "alex", "--rank", "2"]


@dataclasses.dataclass
class Case:
    """One input. setup(folder) writes it and returns the arguments; command: a key of COMMANDS.

    expect: "result" (exit code 0), "error", or "either" where the decoder decides.
    names: texts of which the line of error has to contain one. outputs: how many files the folder out/ has to hold.
    memory: MB that it may need beyond the loaded modules.
    """

    kind: str
    name: str
    command: str
    setup: object
    expect: str
    names: tuple = ()
    outputs: int | None = None
    memory: int = 600
    env: dict = dataclasses.field(default_factory=dict)
    prepare: object = None  # called in the process before the command


def without_privileges():
    """From here on permissions hold, also for root."""
    if os.geteuid() == 0:
        ctypes.CDLL(None, use_errno=True).capset(struct.pack("Ii", 0x20080522, 0), bytes(24))


# --- Pictures ---


def photo(width=24, height=20, seed=0):
    """A smooth random picture."""
    rgb = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(rgb).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, kind, **options):
    f = BytesIO()
    image.save(f, kind, **options)
    return f.getvalue()


FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP", "tif": "TIFF", "gif": "GIF", "bmp": "BMP", "ppm": "PPM"}


def exif(orientation, type_=3):
    """EXIF with one orientation tag of a TIFF type, as the bytes of an APP1 segment."""
    value = struct.pack("<HHIHH", 0x0112, type_, 1, orientation, 0)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + value + struct.pack("<I", 0)


def png_chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_header(width, height, *chunks):
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + b"".join(chunks)
        + png_chunk(b"IEND", b"")
    )


def pictures(rng):
    """(kind, name, file name, bytes or function of a path, expected, size of the result or None)."""
    good = {suffix: encoded(photo(), kind) for suffix, kind in FORMATS.items()}
    for suffix, data in good.items():
        places = [1, 4, 8, 20, len(data) // 4, len(data) // 2, 3 * len(data) // 4, len(data) - 1]
        for n in places:
            yield "pictures cut short", f"{suffix} after {n} bytes", f"x.{suffix}", data[:n], "either"
        for i in range(8):
            bad = bytearray(data)
            for _ in range(1 + i % 3):
                bad[rng.randrange(len(bad) if i % 2 else min(64, len(bad)))] ^= 1 << rng.randrange(8)
            yield "pictures with flipped bytes", f"{suffix} {i}", f"x.{suffix}", bytes(bad), "either"
        yield "wrong suffix", f"{suffix} called .png", "x.png", data, "result"
    for name, data in (
        ("text", b"no picture"), ("zip", b"PK\3\4" + bytes(60)), ("elf", b"\x7fELF" + bytes(60)),
        ("zeros", bytes(4096)), ("noise", rng.randbytes(4096)), ("html", b"<html><img></html>"),
    ):
        yield "wrong suffix", f"{name} called .png", "x.png", data, "error"
    for suffix in (*FORMATS, "ico", "tga", "jp2"):
        yield "empty files", f"x.{suffix}", f"x.{suffix}", b"", "error"

    side = 60_000
    text = zlib.compress(bytes(200_000_000))
    bombs = {
        "png.png": png_header(side, side), "small png.png": png_header(2**31 - 1, 1),
        "itxt.png": png_header(8, 8, png_chunk(b"zTXt", b"k\0\0" + text)),
        "iccp.png": png_header(8, 8, png_chunk(b"iCCP", b"k\0\0" + text)),
        "bmp.bmp": good["bmp"][:18] + struct.pack("<ii", side, side) + good["bmp"][26:],
        "gif.gif": good["gif"][:6] + struct.pack("<HH", 65535, 65535) + good["gif"][10:],
        "ppm.ppm": b"P6 %d %d 255\n" % (side, side) + bytes(99), "pgm.pgm": b"P5 1 4000000000 255\n" + bytes(99),
        "zeros.png": png_header(12_000, 12_000, png_chunk(b"IDAT", zlib.compress(bytes(12_000 * 36_001)))),
    }
    for name, data in bombs.items():
        yield "decompression bombs", name, name.replace(" ", "_"), data, "error"
    for width, height in ((1, 1), (1, 40), (40, 1), (2, 3), (300, 1), (1, 300), (33, 31)):
        yield "odd sizes", f"{width}×{height}", "x.png", encoded(photo(width, height), "PNG"), "result"

    frames = [photo(seed=i) for i in range(4)]
    for suffix, kind in (("gif", "GIF"), ("webp", "WEBP"), ("png", "PNG"), ("tif", "TIFF")):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        yield "several frames", suffix, f"x.{suffix}", data, "result"
        yield "several frames", f"{suffix}, cut in the last", f"x.{suffix}", data[:-9], "either"

    grey, floats = np.asarray(photo().convert("L")), np.asarray(photo().convert("L"), np.float32) / 255
    modes = {
        "cmyk.jpg": photo().convert("CMYK"), "cmyk.tif": photo().convert("CMYK"),
        "ycbcr.tif": photo().convert("YCbCr"), "lab.tif": photo().convert("LAB"), "grey.png": photo().convert("L"),
        "bits.png": photo().convert("1"), "16 bits.png": Image.fromarray(grey.astype(np.uint16) * 257),
        "16 bits.tif": Image.fromarray(grey.astype(np.uint16) * 257),
        "32 bits.tif": Image.fromarray(grey.astype(np.int32) * 257), "floats.tif": Image.fromarray(floats),
        "la.png": photo().convert("LA"), "rgba.png": photo().convert("RGBA"), "rgba.webp": photo().convert("RGBA"),
        "palette.png": photo().convert("P"), "palette.gif": photo().convert("P"),
    }
    for name, image in modes.items():
        yield (
            "modes", name, name.replace(" ", "_"),
            encoded(image, FORMATS[name[-3:].replace("ebp", "webp")] if name[-3:] != "ebp" else "WEBP"), "result",
        )
    for name, data in (
        ("palette with transparency.png", encoded(photo().convert("P"), "PNG", transparency=3)),
        ("palette with alpha.png", encoded(photo().convert("P"), "PNG", transparency=bytes(range(256)))),
        ("rgb with transparency.png", encoded(photo(), "PNG", transparency=(1, 2, 3))),
    ):
        yield "modes", name, "x.png", data, "result"
    for name, value in (("NaN", np.nan), ("infinity", np.inf), ("1e30", 1e30)):
        bad = floats.copy()
        bad[3, 4] = value
        yield "floats", name, "x.tif", encoded(Image.fromarray(bad), "TIFF"), "error"
    for name, image in (("all zero", floats * 0), ("negative", floats - 0.5)):
        yield "floats", name, "x.tif", encoded(Image.fromarray(image), "TIFF"), "result"

    for i in range(1, 9):
        yield "EXIF", f"orientation {i}", "x.jpg", encoded(photo(), "JPEG", exif=exif(i)), "result"
    whole_ = exif(6)
    for name, data in (
        ("orientation 0", exif(0)), ("orientation 9", exif(9)), ("orientation 65535", exif(65535)),
        ("orientation as text", exif(6, 2)), ("orientation as a fraction", exif(6, 5)), ("unknown type", exif(6, 99)),
        ("noise", b"Exif\0\0" + rng.randbytes(200)), ("empty", b"Exif\0\0"),
        ("loop", whole_[:-4] + struct.pack("<I", 8)), *((f"cut after {n}", whole_[:n]) for n in (8, 12, 15, 20, 26)),
    ):
        yield "EXIF", name, "x.jpg", encoded(photo(), "JPEG", exif=data), "result"
    for name, data in (
        ("noise", rng.randbytes(600)), ("one byte", b"x"), ("zeros", bytes(4000)), ("huge", bytes(300_000)),
    ):
        for suffix in ("png", "jpg", "webp"):
            yield (
                "ICC", f"{name}, {suffix}", f"x.{suffix}", encoded(photo(), FORMATS[suffix], icc_profile=data),
                "result",
            )
    for name in (
        "two words.png", "new\nline.png", "tab\tstop.png", "ünï çødé.png", "照片 图.png", "صورة.png", "😀.png",
        "-dash.png", "--help.png", "percent%s%d.png",
        "quote'\".png",
        "dollar$HOME.png",
        "star*.png",
        "back\\slash.png",
        "many.dots..png",
        "UPPER.PNG",
        "a" * 200 + ".png",
        "a" * 251 + ".png",
    ):
        yield (
            "names", name[:20].replace("\n", "\\n") + f" ({len(name)})", name, encoded(photo(), "PNG"),
            ("result" if len(name) < 240 else "error"),
        )
        if len(name) < 240:
            yield "names", f"{name[:20]!r}, broken", name, b"x", "error"

    png = encoded(photo(), "PNG")
    links = {
        "link to itself": lambda p: p.symlink_to(p.name), "link to nothing": lambda p: p.symlink_to("gone.png"),
        "folder": lambda p: p.mkdir(), "pipe": os.mkfifo, "device": lambda p: p.symlink_to("/dev/zero"),
        "file in a file": lambda p: None,
    }
    for name, make in links.items():
        yield "no files", name, "x.png/y.png" if name == "file in a file" else "x.png", make, "error"
    yield (
        "no files", "link to a picture", "x.png", lambda p: [(p.parent / "y").write_bytes(png), p.symlink_to("y")],
        ("result"),
    )

    def unreadable(p):
        p.write_bytes(png)
        p.chmod(0)

    yield "unreadable files", "picture", "x.png", unreadable, "error"


def picture_cases(rng, shared):
    model = ["--model", shared / "model"]
    for kind, name, file, data, expect in pictures(rng):

        def setup(folder, file=file, data=data):
            if callable(data):
                data(folder / file)
            else:
                (folder / file).write_bytes(data)
            return [f"@in/{file}", "--out", "@out/", *model]

        shown = " ".join(file.split())
        yield Case(
            kind, name, "eval.py", setup, expect, (file, shown, shown[:60], "File name too long"),
            prepare=without_privileges if kind == "unreadable files" else None,
            memory=4200 if name == "zeros.png" else 600,  # a whole picture of 144 megapixels
        )
    broken = [
        ("a.png", b""), ("b.png", b"no"), ("c.jpg", encoded(photo(), "JPEG")[:99]),
        ("d.png", png_header(60000, 60000)),
        ("e.tif", encoded(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF")),
    ]

    def mixed(folder, good=2, size=(24, 20)):
        for name, data in broken:
            (folder / name).write_bytes(data)
        (folder / "link.png").symlink_to("link.png")
        (folder / "folder.png").mkdir()
        for i in range(good):
            photo(*size, seed=i).save(folder / f"good{i}.png")

    photos = {"steps": ["--steps", "1", "--workers", "0", "--model", shared / "model", *TRAIN]}

    def data_of(good, size, *more):
        def setup(folder):
            mixed(folder, good, size)
            return ["--data", "@in", *more]

        return setup

    train_, prune_ = (
        ["--name", "@out", *photos["steps"]],
        [
            "--out", "@out", "--model", shared / "model", "--steps", "1", "--workers", "0", "--crop", "96", "--tags",
            "none", "--lpips", "alex", "--val", "1", "--keep", "2",
        ],
    )
    for command, argv in (("train.py", train_), ("prune.py", prune_)):
        yield Case(
            "photos to train on", "broken ones among good ones", command, data_of(3, (112, 104), *argv), "result"
        )
        yield Case("photos to train on", "only broken ones", command, data_of(0, (1, 1), *argv), "error", ("--data",))
        yield Case("photos to train on", "too small", command, data_of(3, (40, 40), *argv), "error", ("--data",))
        yield Case("photos to train on", "one alone", command, data_of(1, (112, 104), *argv), "either", ("--data",))
        yield Case(
            "photos to train on", "no folder", command, lambda f, a=argv: ["--data", "@in/gone", *a], "error", ("gone",)
        )
        yield Case(
            "photos to train on", "a file", command,
            lambda f, a=argv: [(f / "x").write_text("x") and "--data", "@in/x", *a], "error", ("in/x",),
        )
        for name, data in (
            ("not JSON", "{"),
            ("another shape", '{"a": 1}'),
            ("rows too short", '[["a"]]'),
            ("empty", ""),
            ("null", "null"),
            ("numbers for texts", "[[1, 2, 3, 4, 5, 6]]"),
        ):

            def index(folder, data=data, argv=argv):
                mixed(folder, 3, (112, 104))
                (folder.parent / "out").mkdir()
                (folder.parent / "out" / "data.json").write_text(data)
                return ["--data", "@in", *argv]

            yield Case("index of the photos", name, command, index, "either", ("data.json",))
        for name, size in (("not a quarter", (30, 26)), ("no pair", None), ("broken", b"x"), ("right", (28, 26))):

            def lq(folder, size=size, argv=argv):
                mixed(folder, 3, (112, 104))
                (folder / "lq").mkdir()
                for i in range(3 if size else 0):
                    if isinstance(size, bytes):
                        (folder / "lq" / f"good{i}.png").write_bytes(size)
                    else:
                        photo(*size, seed=i).save(folder / "lq" / f"good{i}.png")
                return ["--data", "@in", "--lq", "@in/lq", *argv]

            yield Case("real LR pictures", name, command, lq, "result" if name == "right" else "error", ("lq",))
    for name, data in (
        ("truncated", encoded(photo(), "PNG")[:80]), ("empty", b""), ("text", b"x"), ("folder", None),
        ("missing", ...), ("pickle", pickle.dumps({})),
    ):

        def tag(folder, data=data):
            if data is None:
                (folder / "x.png").mkdir()
            elif data is not ...:
                (folder / "x.png").write_bytes(data)
            ram = folder.parent / "weights"
            ram.mkdir()
            tiny_ram(ram / "ram.pth")
            return ["--tagger", "ram", "@in/x.png"]

        yield Case(
            "pictures for the tagger", name, "photos.tagger", tag, "error", ("x.png",),
            env={"SANASR_WEIGHTS": "@weights"}, prepare=tiny_tagger,
        )


TINY_RAM = tagger.Config(size=96, width=8, depths=(2, 2, 2, 2), heads=(1, 2, 4, 8), window=3, embed=8, hidden=8)


def tiny_tagger():
    """RAM in this process is a tiny one."""
    plain = tagger.Tagger.from_pretrained.__func__
    tagger.Tagger.from_pretrained = classmethod(lambda cls, *a, **k: plain(cls, *a, **k | {"config": TINY_RAM}))


def tiny_ram(path):
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in tagger.RAM(TINY_RAM).state_dict().items()}
    torch.manual_seed(0)
    torch.save({"model": {k: torch.randn(v) / 8 for k, v in shapes.items()}}, path)


# --- Model folders ---


def changed(data, how, rng):
    """The bytes of a safetensors file, broken in one way."""
    n = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + n]), data[8 + n :]
    keys = [k for k in header if k != "__metadata__"]
    key = max(keys, key=lambda k: header[k]["data_offsets"][1] - header[k]["data_offsets"][0])
    entry = header[key]
    if how.startswith("header length"):
        return int(how.split()[-1]).to_bytes(8, "little", signed=True) + data[8:]
    raw = {
        "empty": b"", "7 bytes": data[:7], "only the header": data[: 8 + n], "cut in the header": data[: 8 + n // 2],
        "cut in the data": data[:-5], "more bytes": data + bytes(64), "noise": rng.randbytes(999),
        "zeros": bytes(999), "zip": b"PK\3\4" + bytes(99), "header is no JSON": data[:8] + b"x" * n + body,
        "header is a list": (2).to_bytes(8, "little") + b"[]",
        "deep header": (200_000).to_bytes(8, "little") + b"[" * 200_000,
        "header is not UTF-8": data[:8] + b"\xff" * n + body,
    }
    if how in raw:
        return raw[how]
    start_, end = entry["data_offsets"]
    if how == "overlapping offsets":
        other = next(k for k in keys if k != key)
        header[other]["data_offsets"] = [
            start_,
            start_ + header[other]["data_offsets"][1] - header[other]["data_offsets"][0],
        ]
    elif how.startswith("offsets"):
        entry["data_offsets"] = {
            "beyond the end": [start_ + 10**9, end + 10**9], "reversed": [end, start_],
            "negative": [-8, end - start_ - 8], "huge": [0, 2**63], "texts": ["0", "4"], "one": [start_],
        }[how.removeprefix("offsets ")]
    elif how.startswith("dtype"):
        entry["dtype"] = how.split()[1]
    elif how.startswith("shape"):
        entry["shape"] = {
            "reversed": [*entry["shape"], 1], "huge": [2**62, 4], "negative": [-1, -1], "text": ["a"], "empty": [],
        }[how.removeprefix("shape ")]
    elif how == "missing key":
        body = body[:start_] + body[end:]
        del header[key]
        for other in header.values():
            if isinstance(other, dict) and other.get("data_offsets", [0])[0] > start_:
                other["data_offsets"] = [x - (end - start_) for x in other["data_offsets"]]
    elif how == "another key":
        header["x." + key] = header.pop(key)
    elif how == "NaN":
        body = body[:start_] + b"\0\0\xc0\x7f" * ((end - start_) // 4) + body[end:]
    elif how == "key of a megabyte":
        header["x" * 10**6] = header.pop(key)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


TENSORS = [
    "empty",
    "7 bytes",
    "only the header",
    "cut in the header",
    "cut in the data",
    "more bytes",
    "noise",
    "zeros",
    "zip",
    "header is no JSON",
    "header is a list",
    "deep header",
    "header is not UTF-8",
    "header length 0",
    "header length -1",
    "header length 99999999",
    "header length 4611686018427387904",
    "header length 3",
    "overlapping offsets",
    *(f"offsets {w}" for w in ("beyond the end", "reversed", "negative", "huge", "texts", "one")),
    *(f"dtype {d}" for d in ("I32", "U32", "F16", "F64", "BOOL", "F8_E4M3", "X9")),
    *(f"shape {s}" for s in ("reversed", "huge", "negative", "text", "empty")),
    "missing key",
    "another key",
    "key of a megabyte",
    "NaN",
]


def retyped(value):
    return {str: 7, int: "seven", float: "half", bool: "yes", type(None): "none", list: {"a": 1}, dict: [1]}[
        type(value)
    ]


def enlarged(value):
    if isinstance(value, bool) or value is None:
        return 10**9
    if isinstance(value, int):
        return 10**9
    if isinstance(value, float):
        return 1e300
    return value * 100_000 if isinstance(value, str | list) else {**value, **{str(i): i for i in range(100_000)}}


def json_changes(config):
    """(name, changed copy) of a JSON object: every key removed, retyped, null, negative, huge."""
    for key in config:
        yield f"{key} removed", {k: v for k, v in config.items() if k != key}
        for name, change in (("retyped", retyped), ("huge", enlarged)):
            yield f"{key} {name}", config | {key: change(config[key])}
        yield f"{key} null", config | {key: None}
        if isinstance(config[key], int | float) and not isinstance(config[key], bool):
            yield f"{key} negative", config | {key: -abs(config[key]) - 1}
            yield f"{key} zero", config | {key: 0}
        if isinstance(config[key], list):
            yield f"{key} empty", config | {key: []}


TEXTS = {
    "empty": b"",
    "not JSON": b"{",
    "a list": b"[]",
    "a number": b"3",
    "null": b"null",
    "a text": b'"x"',
    "byte order mark": b"\xef\xbb\xbf{}",
    "not UTF-8": b'{"a": "\xff"}',
    "deep": b"[" * 200_000,
    "infinity": b'{"num_layers": Infinity}',
    "long number": b'{"num_layers": ' + b"9" * 6000 + b"}",
    "zeros": bytes(99),
}


def model_cases(rng, shared):
    """Through the API, and a few through each command."""

    def copy_of(change):
        def setup(folder):
            shutil.copytree(shared / "model", folder / "model")
            change(folder / "model")
            return ["@in/model"]

        return setup

    def through(command, setup):
        """The same case as arguments of a command."""

        def arguments(folder):
            model = setup(folder)[0]
            photo().save(folder / "x.png")
            return {
                "eval.py": ["@in/x.png", "--out", "@out/", "--model", model],
                "train.py": [
                    "--data", shared / "photos", "--name", "@out", "--model", model, "--steps", "1", "--workers", "0",
                    *TRAIN,
                ],
                "prune.py": [
                    "--data", shared / "photos", "--out", "@out", "--model", model, "--steps", "1", "--workers", "0",
                    "--crop", "96", "--tags", "none", "--lpips", "alex", "--keep", "2",
                ],
            }[command]

        return arguments

    parts = {
        part: next((shared / "model" / part).glob("*.safetensors")).name
        for part in ("vae", "transformer", "text_encoder")
    }
    for part, name in parts.items():
        for how in TENSORS:

            def change(model, part=part, name=name, how=how):
                path = model / part / name
                path.write_bytes(changed(path.read_bytes(), how, rng))

            setup = copy_of(change)
            expect = "either" if how in ("NaN", "header length 3") else "error"
            yield Case("weights", f"{part}: {how}", "SanaSR", setup, expect, (part,))
            if rng.random() < 0.25:
                command = rng.choice(["eval.py", "train.py", "prune.py"])
                yield Case("weights", f"{part}: {how}", command, through(command, setup), "either", (part,))
        config = json.loads((shared / "model" / part / "config.json").read_text())
        for how, value in json_changes(config):

            def change(model, part=part, value=value):
                (model / part / "config.json").write_text(json.dumps(value))

            setup = copy_of(change)
            yield Case("config", f"{part}: {how}", "SanaSR", setup, "either", (part, "in/model"))
            if rng.random() < 0.1:
                command = rng.choice(["eval.py", "train.py", "prune.py"])
                yield Case(
                    "config", f"{part}: {how}", command, through(command, setup), "either", (part, "in/model", "--crop")
                )
        for how, text in TEXTS.items():

            def change(model, part=part, text=text):
                (model / part / "config.json").write_bytes(text)

            yield Case("config", f"{part}: {how}", "SanaSR", copy_of(change), "error", (part,))
        for how, change in {
            "no folder": lambda p: shutil.rmtree(p), "no config.json": lambda p: (p / "config.json").unlink(),
            "no weights": lambda p: [f.unlink() for f in p.glob("*.safetensors")],
            "folder for config.json": lambda p: [(p / "config.json").unlink(), (p / "config.json").mkdir()],
            "folder for the weights": lambda p: [[f.unlink(), f.mkdir()] for f in [*p.glob("*.safetensors")]],
            "link to itself": lambda p: [(p / "config.json").unlink(), (p / "config.json").symlink_to("config.json")],
            "a file": lambda p: [shutil.rmtree(p), p.write_text("x")],
            "shard missing": lambda p: [
                f.rename(f.with_name(f.name.replace(".s", "-00001-of-00002.s"))) for f in [*p.glob("*.safetensors")]
            ],
        }.items():
            yield Case(
                "model folders", f"{part}: {how}", "SanaSR", copy_of(lambda m, p=part, c=change: c(m / p)), "error",
                (part,),
            )

    bpe = json.loads((shared / "model" / "tokenizer" / "tokenizer.json").read_text())
    changes = [
        *json_changes(bpe),
        *((f"model.{how}", bpe | {"model": value}) for how, value in json_changes(bpe["model"])),
    ]
    vocab, added = bpe["model"]["vocab"], bpe["added_tokens"]
    first = next(iter(vocab))
    for how, model in (
        ("vocab of texts", {"vocab": {k: str(v) for k, v in vocab.items()}}),
        ("negative id", {"vocab": vocab | {"a": -5}}), ("id beyond the embedding", {"vocab": vocab | {"a": 10**6}}),
        ("fraction for an id", {"vocab": vocab | {"a": 1.5}}), ("merge of three", {"merges": ["a b c"]}),
        ("merge of unknown", {"merges": ["zz yy"]}), ("merge is a number", {"merges": [3]}),
        ("no unknown token", {"vocab": {k: v for k, v in vocab.items() if k != "<unk>"}}),
        ("equal ids", {"vocab": dict.fromkeys(vocab, 0)}), ("one entry", {"vocab": {first: 0}}),
    ):
        changes.append((how, bpe | {"model": bpe["model"] | model}))
    for how, tokens in (
        ("without content", [{"id": 1}]), ("without id", [{"content": "<bos>"}]), ("texts", ["<bos>"]),
        ("empty content", [*added, {"id": 3, "content": ""}]), ("without <bos>", added[:2]),
        ("id is a text", [{**t, "id": "x"} for t in added]),
    ):
        changes.append((f"added tokens {how}", bpe | {"added_tokens": tokens}))
    for how, value in changes:

        def change(model, value=value):
            (model / "tokenizer" / "tokenizer.json").write_text(json.dumps(value))

        yield Case("tokenizer", how, "SanaSR", copy_of(change), "either", ("tokenizer", "text_encoder"))
    for how, text in TEXTS.items():

        def change(model, text=text):
            (model / "tokenizer" / "tokenizer.json").write_bytes(text)

        yield Case("tokenizer", how, "SanaSR", copy_of(change), "error", ("tokenizer",))

    for how in TENSORS:  # an adapter

        def change(folder, how=how):
            data = changed((shared / "adapter.safetensors").read_bytes(), how, rng)
            (folder / "a.safetensors").write_bytes(data)
            photo().save(folder / "x.png")
            return ["@in/x.png", "--out", "@out/", "--model", shared / "model", "--adapter", "@in/a.safetensors"]

        yield Case(
            "adapters", how, "eval.py", change,
            "either" if how in ("NaN", "header length 3", "shape reversed") else "error", ("a.safetensors",),
        )
    for how, value in (
        ("rank", "x"), ("alpha", "x"), ("alpha", "0"), ("alpha", "-1"), ("alpha", "nan"), ("alpha", "1e400"),
        ("timestep", "x"), ("timestep", "0"), ("timestep", "-3"), ("timestep", "99999"), ("suffix", "x" * 10**5),
        ("suffix", "\n\0"), ("instruction", "y" * 10**5), ("protocol", "x"),
    ):

        def metadata(folder, key=how, value=value):
            from safetensors.torch import load_file, save_file

            save_file(load_file(shared / "adapter.safetensors"), folder / "a.safetensors", {"rank": "2", key: value})
            photo().save(folder / "x.png")
            return ["@in/x.png", "--out", "@out/", "--model", shared / "model", "--adapter", "@in/a.safetensors"]

        yield Case(
            "adapters", f"{how} = {value[:9]!r}", "eval.py", metadata, "either", ("a.safetensors", "instruction")
        )
    for how, argv in (("missing", ["@in/gone"]), ("a folder", ["@in"]), ("of another model", ["@in/b"])):

        def setup(folder, argv=argv):
            shutil.copyfile(ROOT / "weights/embedded/adapter.safetensors", folder / "b")
            photo().save(folder / "x.png")
            return ["@in/x.png", "--out", "@out/", "--model", shared / "model", "--adapter", *argv]

        yield Case("adapters", how, "eval.py", setup, "error", ("in",))
    for name, model in (
        ("no such name", "nothing-600m"), ("a file", "@in/x.png"), ("empty folder", "@in/e"),
        ("official", "sana-600m-512"), ("parent", "@in/.."), ("empty name", ""), ("null byte", "a\0b"),
    ):

        def setup(folder, model=model):
            photo().save(folder / "x.png")
            (folder / "e").mkdir()
            return ["@in/x.png", "--out", "@out/", "--model", model]

        yield Case("model folders", name, "eval.py", setup, "error")
        yield Case(
            "model folders", name, "train.py",
            lambda f, m=model: [
                (f / "e").mkdir() or "--data", shared / "photos", "--name", "@out", "--model", m, "--steps", "1",
                "--workers", "0", *TRAIN,
            ],
            "error",
        )


# --- Tables, texts, states ---


def table_cases(rng, shared):
    tables = {
        "right": b'image,tags\nx.png,"tree, sky"\n', "byte order mark": b"\xef\xbb\xbfimage,tags\nx.png,tree\n",
        "UTF-16": "image,tags\nx.png,tree\n".encode("utf-16"), "no columns": b"a,b\n1,2\n", "no tags": b"image\nx\n",
        "empty": b"", "only a header": b"image,tags\n", "short row": b"image,tags\nx.png\n\n,\n",
        "empty name": b"tags,image\ntree\n", "long row": b"image,tags\nx.png,a,b,c,d\n",
        "open quote": b'image,tags\n"x.png,tree\n',
        "quotes": b'image,tags\n"x"".png","a""b"\n',
        "null bytes": b"image,tags\nx.png,\0\0\n",
        "huge field": b"image,tags\nx.png," + b"a" * 300_000 + b"\n",
        "many rows": b"image,tags\n" + b"y.png,tree\n" * 100_000,
        "noise": rng.randbytes(5000),
        "semicolons": b"image;tags\nx.png;tree\n",
        "carriage returns": b"image,tags\rx.png,tree\r",
        "path outside": b"image,tags\n../../bait.png,tree\n/etc/passwd,tree\n",
        "twice": b"image,tags\nx.png,a\nx.png,b\n",
        "header twice": b"image,tags,tags\nx.png,a,b\n",
        "formula": b"image,tags\nx.png,=1+1\n",
    }
    bad = {"UTF-16", "no columns", "no tags", "empty", "noise", "semicolons"}
    for how, data in tables.items():

        def tags(folder, data=data):
            (folder / "t.csv").write_bytes(data)
            photo().save(folder / "x.png")
            return ["@in/x.png", "--out", "@out/", "--model", shared / "model", "--tagger", "@in/t.csv"]

        expect = (
            "error"
            if how in bad
            else "result"
            if how in ("right", "byte order mark", "only a header", "quotes", "path outside", "many rows", "formula")
            else "either"
        )
        yield Case("tables", how, "eval.py", tags, expect, ("t.csv",))

        def train_tags(folder, data=data):
            (folder / "t.csv").write_bytes(data)
            return [
                "--data", shared / "photos", "--name", "@out", "--model", shared / "model", "--steps", "1",
                "--workers", "0", *TRAIN, "--tags", "@in/t.csv",
            ]

        yield Case("tables", how, "train.py", train_tags, expect, ("t.csv",))
    for how, make in (
        ("missing", lambda p: None), ("a folder", lambda p: p.mkdir()),
        ("not UTF-8", lambda p: p.write_bytes(b"\xff\xfe")), ("huge", lambda p: p.write_text("tree " * 10**5)),
        ("empty", lambda p: p.write_text("")),
    ):

        def instruction(folder, make=make):
            make(folder / "i.txt")
            photo().save(folder / "x.png")
            return ["@in/x.png", "--out", "@out/", "--model", shared / "model", "--instruction", "@in/i.txt"]

        yield Case(
            "texts", how, "eval.py", instruction, "result" if how == "empty" else "error", ("i.txt", "the instruction")
        )
    for how, text in (
        ("long", "tree " * 10**5), ("not printable", "\1\2\x7f"), ("surrogate", "a\udcff"), ("emoji", "😀" * 99),
        ("special tokens", "<bos><eos><pad><unk>"), ("spaces", " \t\n"), ("separator", "▁▁"),
    ):

        def prompt(folder, text=text):
            photo().save(folder / "x.png")
            return ["@in/x.png", "--out", "@out/", "--model", shared / "model", "--prompt", text]

        yield Case("texts", f"prompt: {how}", "eval.py", prompt, "either")

    scored = ["--metrics", "psnr"]
    for how, argv, expect in (
        ("no reference", ["--hr", "@in/none"], "error"), ("other sizes", ["--hr", "@in/small"], "error"),
        ("broken reference", ["--hr", "@in/broken"], "error"), ("no folder", ["--hr", "@in/x"], "error"),
        ("right", ["--hr", "@in/hr"], "result"), ("table is a folder", ["--hr", "@in/hr", "--csv", "@in"], "error"),
        ("no such metric", ["--hr", "@in/hr", "--metrics", "x"], "error"),
        ("metric without weights", ["--hr", "@in/hr", "--metrics", "musiq"], "error"),
    ):

        def references(folder, argv=argv):
            for name, size in (
                ("lr", (24, 20)), ("hr", (96, 80)), ("small", (50, 50)), ("none", (96, 80)), ("broken", None),
            ):
                (folder / name).mkdir()
                target = folder / name / ("y.png" if name == "none" else "x.png")
                photo(*size).save(target) if size else target.write_bytes(b"x")
            return ["@in/lr", "--out", "@out/", "--model", shared / "model", *scored, *argv]

        yield Case(
            "references", how, "eval.py", references, expect,
            outputs=1
            if how in ("right", "other sizes", "broken reference", "table is a folder", "metric without weights")
            else 0,
        )

    class Mark:
        """A pickle that leaves a folder behind when it is read."""

        def __init__(self, path):
            self.path = path

        def __reduce__(self):
            return os.mkdir, (str(self.path),)

    def states(good, mark):
        """(name, bytes or None) of broken states."""
        yield from (
            ("empty", b""), ("cut", good[: len(good) // 2]), ("cut at the end", good[:-9]),
            ("noise", rng.randbytes(999)), ("pickle", pickle.dumps(Mark(mark))),
            ("pickle of protocol 2", pickle.dumps(Mark(mark), protocol=2)),
        )
        f = BytesIO()
        torch.save({"step": 1, "evil": Mark(mark)}, f)
        yield "pickle in an archive", f.getvalue()
        for name, value in (
            ("a list", []), ("a number", 3), ("no keys", {}),
            (
                "keys without content",
                {
                    "step": 1, "settings": {}, "masters": [], "ema": [], "optimizer": {}, "scaler": {}, "sums": {},
                    "model": {},
                },
            ),
        ):
            f = BytesIO()
            torch.save(value, f)
            yield name, f.getvalue()

    runs = {
        "train.py": ("run", "state.pt", lambda o: ["--name", o, "--resume", "--steps", "4"]),
        "prune.py": ("pruned", "calibration.pt", lambda o: prune_argv(shared, o) + ["--resume"]),
    }
    for command, (run, file, argv) in runs.items():
        good = (shared / run / file).read_bytes()
        for how, data in states(good, "mark"):

            def state(folder, run=run, file=file, data=data, argv=argv):
                shutil.copytree(shared / run, folder.parent / "run")
                (folder.parent / "run" / file).write_bytes(data)
                return argv("@run")

            yield Case("states", f"{file}: {how}", command, state, "error", (file,))
        for name in ("log.csv", "data.json") if command == "train.py" else ("data.json",):
            for how, data in (("empty", b""), ("noise", rng.randbytes(99)), ("cut", None), ("missing", ...)):

                def log(folder, run=run, name=name, data=data, argv=argv):
                    shutil.copytree(shared / run, folder.parent / "run")
                    path = folder.parent / "run" / name
                    if data is ...:
                        path.unlink()
                    else:
                        path.write_bytes(path.read_bytes()[:-20] if data is None else data)
                    return argv("@run")

                yield Case("states", f"{name}: {how}", command, log, "either", (name,))
    good = BytesIO()
    torch.save({"model": {}}, good)
    for how, data in states(good.getvalue(), "mark"):

        def ram(folder, data=data):
            (folder / "ram.pth").write_bytes(data)
            photo().save(folder / "x.png")
            return ["--tagger", "ram", "@in/x.png"]

        yield Case("weights of the tagger", how, "photos.tagger", ram, "error", ("ram.pth",),
                   env={"SANASR_WEIGHTS": "@in"})
        yield Case(
            "weights of the tagger", f"{how}, lean", "photos.tagger",
            lambda f, d=data: [
                (f / "ram_fp16.safetensors").write_bytes(d) and "--tagger" or "--tagger", "ram", str(photo_at(f)),
            ],
            "error",
            ("ram_fp16.safetensors",),
            env={"SANASR_WEIGHTS": "@in"},
        )

        def picture(folder, data=data):
            (folder / "x.png").write_bytes(data)
            return ["@in/x.png", "--out", "@out/", "--model", shared / "model"]

        yield Case("hostile files", f"picture: {how}", "eval.py", picture, "error", ("x.png",))
    for file in ("adapter.safetensors", "pytorch_model.bin", "transformer/pytorch_model.bin", "vae/model.safetensors"):

        def hostile(folder, file=file):
            shutil.copytree(shared / "model", folder / "model")
            (folder / "model" / file).write_bytes(pickle.dumps(Mark("mark")))
            photo().save(folder / "x.png")
            return ["@in/x.png", "--out", "@out/", "--model", "@in/model"]

        yield Case("hostile files", f"pickle as {file}", "eval.py", hostile, "result" if "bin" in file else "error")

    def index(folder):
        shutil.copytree(shared / "model", folder / "model")
        for part, name in (
            ("transformer", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"), ("text_encoder", "model"),
        ):
            keys = list(json.loads((folder / "model" / part / "config.json").read_text()))
            (folder / "model" / part / f"{name}.safetensors.index.json").write_text(
                json.dumps({"weight_map": {k: "../../../../../../etc/passwd" for k in keys}})
            )
        photo().save(folder / "x.png")
        return ["@in/x.png", "--out", "@out/", "--model", "@in/model"]

    yield Case("hostile files", "an index that names /etc/passwd", "eval.py", index, "result")

    def modules(folder):
        index(folder)
        for path in ("", "transformer", "vae", "text_encoder", "tokenizer"):
            for name in ("__init__", "torch", "sanasr", "modeling_sana", "numpy", "conftest"):
                (folder / "model" / path / f"{name}.py").write_text("import os; os.mkdir('mark')")
        return ["@in/x.png", "--out", "@out/", "--model", "@in/model"]

    yield Case(
        "hostile files", "a model folder full of modules", "eval.py", modules, "result",
        prepare=lambda: os.chdir("in/model"),
    )
    for key in ("auto_map", "custom_pipelines", "trust_remote_code", "_target_", "_class_name"):

        def code(folder, key=key):
            index(folder)
            path = folder / "model/transformer/config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {key: "os.system"}))
            return ["@in/x.png", "--out", "@out/", "--model", "@in/model"]

        yield Case(
            "hostile files", f"{key} in config.json", "eval.py", code, "result" if key[0] == "_" else "error",
            ("config.json",),
        )


def photo_at(folder):
    photo().save(folder / "x.png")
    return folder / "x.png"


def prune_argv(shared, out, *more):
    return [
        "--data", shared / "photos", "--out", out, "--model", shared / "model", "--steps", "6", "--workers", "0",
        "--crop", "96", "--tags", "none", "--lpips", "alex", "--val", "1", "--keep", "2", *more,
    ]
