"""eval.py: every kind of picture in, four times its size out, nothing lost or overwritten, errors in one line."""
import io
import os
import shutil
import struct
import sys
import weakref
import zlib
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import tiny
import torch
from conftest import ROOT, external, python
from PIL import ExifTags, Image, ImageCms, ImageOps
from tqdm import tqdm

import eval as evaluate
import fast
import sanasr
import weights
from photos import pictures, tagger
from photos.restorer import NotFinite
from weights.files import save_module


class Nearest:
    """Stands for the model: every pixel four times each way, so that what eval.py does around it shows exactly.

    It raises `error`, if set, for a white picture.
    """
    stages = {"encode": 1.0, "decode": 2.0}
    error, metadata = None, {}

    def prompts(self, prompts, instruction):
        self.encoded = prompts

    def restore(self, image, prompt, scale, progress, **options):
        assert image.mode == "RGB"
        if self.error and image.getpixel((0, 0)) == (255, 255, 255):
            raise self.error
        self.seen = {"prompt": prompt, **options}
        return image.resize((scale * image.width, scale * image.height), Image.Resampling.NEAREST)


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """run(*arguments) -> exit code, stdout, stderr of eval.py in an empty folder, on a CPU unless told otherwise.

    The model is `run.model`, or where that is None what the arguments name; `run.loaded`: how it was asked for.
    """
    def load_model(name, device, dtype, *how):
        call.loaded = how
        return call.model or fast.load_model(name, device, dtype, *how)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "load_model", load_model)

    def call(*arguments):
        try:
            code = evaluate.main(["--device", "cpu", *map(str, arguments)])
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else print(stop.code, file=sys.stderr) or 1
        return code, *capsys.readouterr()
    call.model = Nearest()
    return call


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def png_16(x):
    """A 16-bit RGB or RGBA PNG, which Pillow reads but does not write. x: H,W,3|4 of uint16."""
    h, w, channels = x.shape
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in x)
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 16, {3: 2, 4: 6}[channels], 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b""))


# --- reading ---

GREY, GREY_ALPHA, COLOURS, COLOURS_ALPHA = noise(5, 7), noise(5, 7, 2), noise(5, 7, 3), noise(5, 7, 4)
LEVEL = np.where(np.arange(35).reshape(5, 7), GREY, 3)  # 3 in a corner, and nowhere else
RGB, BLACK = Image.fromarray(COLOURS), Image.new("RGB", (7, 5))
FOUR = Image.fromarray(np.arange(35, dtype=np.uint8).reshape(5, 7) % 4).convert("P")
FOUR.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
PICTURES = {  # file name: (picture or the file's bytes, mode of the result, the pixels where they are exact)
    **{f"rgb.{suffix}": (RGB, "RGB", COLOURS) for suffix in ("png", "bmp", "tiff", "ppm", "tga")},
    **{f"rgb.{suffix}": (RGB, "RGB", None) for suffix in ("jpg", "webp", "JPEG")},
    "rgba.png": (Image.fromarray(COLOURS_ALPHA), "RGBA", COLOURS_ALPHA),
    "grey.png": (Image.fromarray(GREY), "L", GREY),
    "grey_alpha.png": (Image.fromarray(GREY_ALPHA), "LA", GREY_ALPHA),
    "bits.png": (Image.fromarray(GREY > 99), "L", 255 * (GREY > 99)),
    "palette.gif": (RGB.quantize(16), "RGB", RGB.quantize(16).convert("RGB")),
    "clear.gif": (FOUR, "RGBA", np.dstack([FOUR.convert("RGB"), 255 * (np.asarray(FOUR) != 2)])),
    "cmyk.jpg": (RGB.convert("CMYK"), "RGB", None),
    "cmyk.tiff": (RGB.convert("CMYK"), "RGB", COLOURS),
    "ycbcr.tiff": (RGB.convert("YCbCr"), "RGB", RGB.convert("YCbCr").convert("RGB")),
    "lab.tiff": (ImageCms.profileToProfile(RGB, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"),
                                           outputMode="LAB"), "RGB", None),
    "16bit.png": (Image.fromarray(GREY.astype(np.uint16) * 257), "L", GREY),  # scaled, not clipped
    "16bit.tiff": (Image.fromarray(GREY.astype(np.uint16) * 257), "L", GREY),
    "16bit_level.png": (Image.fromarray(LEVEL.astype(np.uint16) * 257), "LA", np.dstack([LEVEL, 255 * (LEVEL != 3)])),
    "16bit_rgb.png": (png_16(COLOURS.astype(np.uint16) * 257), "RGB", COLOURS),
    "16bit_rgba.png": (png_16(COLOURS_ALPHA.astype(np.uint16) * 257), "RGBA", COLOURS_ALPHA),
    "float.tiff": (Image.fromarray(GREY.astype(np.float32) / 255), "L", GREY),
    "float_16bit.tiff": (Image.fromarray(GREY * np.float32(257)), "L", GREY),
    "float_above_1.tiff": (Image.fromarray((GREY + np.float32(20)) / 255), "L", (GREY + 20.0).clip(max=255)),
    "first_frame.webp": (BLACK, "RGB", BLACK),
}
SAVED = {"clear.gif": {"transparency": 2}, "16bit_level.png": {"transparency": 3 * 257},
         "first_frame.webp": {"save_all": True, "append_images": [RGB], "lossless": True}}


@pytest.mark.parametrize("name", PICTURES)
def test_every_kind_of_picture(run, name):
    image, mode, exact = PICTURES[name]
    Path(name).write_bytes(image) if isinstance(image, bytes) else image.save(name, **SAVED.get(name, {}))
    code, out, err = run(name, "--compare")
    assert (code, err) == (0, "")
    assert f"{name}  7×5 → 28×20  ms: encode 1  decode 2  total" in out
    result, yardstick = (Image.open(f"results/{Path(name).stem}_x4{end}.png") for end in ("", "_bicubic"))
    assert result.size == yardstick.size == (28, 20) and result.mode == yardstick.mode == mode
    picture = pictures.read(name)
    assert np.array_equal(np.asarray(result.convert("RGB"))[::4, ::4], picture.rgb)
    assert np.array_equal(yardstick.convert("RGB"), pictures.bicubic(picture.rgb))
    if "A" in mode:
        for got in (result, yardstick):
            assert np.array_equal(got.getchannel("A"), pictures.bicubic(picture.alpha))
    if exact is not None:
        read = np.dstack([np.asarray(picture.rgb)[..., :len(mode.removesuffix("A"))], *filter(None, [picture.alpha])])
        assert np.array_equal(read.squeeze(), exact)


@pytest.mark.parametrize("orientation", range(10))  # 0 and 9 mean nothing
def test_exif_orientation_is_applied(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    RGB.save(tmp_path / "a.png", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(tmp_path / "a.png"))
    assert np.array_equal(pictures.read(tmp_path / "a.png").rgb, expected)


def test_colour_profile_is_kept_where_it_still_holds(run):
    RGB.save("p.png", icc_profile=SRGB)
    RGB.convert("CMYK").save("cmyk.jpg", icc_profile=SRGB)
    assert run("p.png", "cmyk.jpg")[0] == 0
    assert Image.open("results/p_x4.png").info.get("icc_profile") == SRGB
    assert "icc_profile" not in Image.open("results/cmyk_x4.png").info
    Image.new("LAB", (7, 5)).save("lab.tiff", icc_profile=SRGB)
    assert pictures.read("lab.tiff").icc is None


def exif_bytes(*entries, following=0):
    """An EXIF block. entries: (tag, type, count, 4 bytes of value); following: offset of the next directory."""
    return (b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries))
            + b"".join(struct.pack("<HHI4s", *entry) for entry in entries) + struct.pack("<I", following))


def photo_with_exif(path, **options):
    """A JPEG (or another format) as a camera writes it: rotated, with a place and an exposure."""
    exif = Image.Exif()
    exif.update({0x0112: 6, 0x010F: "Maker", 0x8298: "Somebody", 0x0100: 7, 0x0101: 5})
    exif.get_ifd(ExifTags.IFD.Exif).update({0x829A: 0.5, 0xA002: 7, 0xA003: 5, 0xA005: 90})
    exif.get_ifd(ExifTags.IFD.GPSInfo).update({1: "N", 2: (48.0, 8.0, 0.0)})
    RGB.save(path, exif=exif.tobytes(), **options)


@pytest.mark.parametrize("source", ["photo.jpg", "photo.png", "photo.tiff", "photo.webp"])
@pytest.mark.parametrize("target", ["out.png", "out.jpg", "out.webp", "out.tiff"])
def test_exif_is_kept_upright(run, source, target):
    photo_with_exif(source)
    assert run(source, "--out", target, "--compare")[0] == 0
    for path in (target, target.replace("out", "out_bicubic")):
        with Image.open(path) as result:
            assert result.size == (20, 28), "turned upright"
            exif = result.getexif()
            assert (exif[0x010F], exif[0x8298]) == ("Maker", "Somebody")
            assert exif.get(0x0112, 1) == 1 and exif.get(0x0100, 20) == 20 and exif.get(0x0101, 28) == 28
            assert exif.get_ifd(ExifTags.IFD.Exif)[0x829A] == 0.5
            assert not {0xA002, 0xA003, 0xA005} & set(exif.get_ifd(ExifTags.IFD.Exif))
            assert exif.get_ifd(ExifTags.IFD.GPSInfo)[1] == "N"


def test_a_thumbnail_is_dropped(run):
    thumbnail = struct.pack("<HHHIIHHIII", 2, 0x0201, 4, 1, 56, 0x0202, 4, 1, 4, 0) + b"tiny"  # at 26, its data at 56
    RGB.save("photo.jpg", exif=exif_bytes((0x010F, 2, 4, b"abc"), following=26) + thumbnail)
    assert Image.open("photo.jpg").getexif().get_ifd(ExifTags.IFD.IFD1)[0x0202] == 4
    assert run("photo.jpg", "--out", "out.jpg")[0] == 0
    exif = Image.open("out.jpg").getexif()
    assert not exif.get_ifd(ExifTags.IFD.IFD1) and exif[0x010F] == "abc"
    assert b"tiny" not in Path("out.jpg").read_bytes()


def test_exif_that_is_unwanted_damaged_or_too_long_for_a_jpeg_is_left_out(run):
    photo_with_exif("photo.jpg", icc_profile=SRGB)
    assert run("photo.jpg", "--out", "out.jpg", "--no-metadata")[0] == 0
    result = Image.open("out.jpg")
    assert result.size == (20, 28) and not result.getexif() and "icc_profile" not in result.info
    RGB.save("a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f and no directory")
    RGB.save("b.jpg", exif=exif_bytes((0x0112, 3, 1, b"\6"), (0x0128, 7, 1, b"\2")))  # a unit of type UNDEFINED
    with pytest.raises(struct.error):
        ImageOps.exif_transpose(Image.open("b.jpg"))
    assert run("a.jpg", "b.jpg")[0] == 0 and Path("results/a_x4.png").exists()
    assert Image.open("results/b_x4.png").size == (20, 28)
    exif = Image.Exif()
    exif[0x010E] = "x" * 70000
    RGB.save("a.png", exif=exif)
    assert run("a.png", "--out", "b.jpg")[0] == 0 and not Image.open("b.jpg").getexif()
    assert run("a.png", "--out", "b.png")[0] == 0 and len(Image.open("b.png").getexif()[0x010E]) == 70000


@pytest.mark.parametrize("size, scale", [((7, 5), 1), ((7, 5), 2), ((7, 5), 4), ((1, 1), 4), ((1, 9), 4), ((9, 1), 4)])
def test_scale(run, size, scale):
    image = RGB.resize(size)
    image.putalpha(128)
    image.save("a.png")
    code, out, _ = run("a.png", "--scale", scale, "--compare", "--color-fix", "wavelet")
    (width, height), large = size, tuple(scale * n for n in size)
    assert code == 0 and f"{width}×{height} → {large[0]}×{large[1]}" in out
    for name in (f"results/a_x{scale}.png", f"results/a_x{scale}_bicubic.png"):
        assert Image.open(name).size == large and Image.open(name).mode == "RGBA"
    assert run("a.png", "--scale", 3)[0] != 0


# --- colour correction ---

def test_adain_takes_over_mean_and_deviation():
    x, reference = (torch.from_numpy(noise(3, 40, 50, seed=s)).float() / 255 for s in (0, 1))
    fixed = pictures.adain(x * 0.3 + 0.1, reference)
    assert torch.allclose(fixed.mean((1, 2)), reference.mean((1, 2)), atol=1e-4)
    assert torch.allclose(fixed.std((1, 2)), reference.std((1, 2)), atol=1e-3)


def test_low_frequencies_are_those_of_the_dilated_kernel():
    x = torch.from_numpy(noise(3, 21, 17)).float() / 255
    expected = x[None]
    kernel = torch.tensor([[1., 2, 1], [2, 4, 2], [1, 2, 1]]).repeat(3, 1, 1, 1) / 16
    for step in (1, 2, 4, 8, 16):
        padded = torch.nn.functional.pad(expected, (step,) * 4, mode="replicate")
        expected = torch.nn.functional.conv2d(padded, kernel, dilation=step, groups=3)
    assert torch.allclose(pictures.low_frequencies(x), expected[0], atol=1e-6)


def test_wavelet_moves_the_colour_and_keeps_the_detail():
    reference = Image.fromarray(noise(64, 64, 3))
    tinted = Image.fromarray((np.asarray(reference) * 0.5 + 100).astype(np.uint8))
    fixed = np.asarray(pictures.fix_colours(tinted, reference, "wavelet"), float)
    detail = np.asarray(tinted, float)
    assert abs(fixed.mean((0, 1)) - np.asarray(reference).mean((0, 1))).max() < 1.5
    assert np.corrcoef((fixed - fixed.mean()).ravel(), (detail - detail.mean()).ravel())[0, 1] > 0.98
    assert pictures.fix_colours(tinted, reference, "none") is tinted


# --- writing and planning ---

def test_out_is_a_file_or_a_folder(run):
    RGB.save("a.png")
    assert run("a.png", "--out", "b.jpg")[0] == 0 and Image.open("b.jpg").convert("L").size == (28, 20)
    assert run("a.png", "--out", "there")[0] == 0 and os.path.exists("there/a_x4.png")
    assert run("a.png", "--out", "v1.0/")[0] == 0 and os.path.exists("v1.0/a_x4.png")
    assert run("a.png", "--out", "v1.0")[0] == 0                     # a folder by now
    assert run("a.png", "--out", "deep/er/b.png", "--compare")[0] == 0 and os.path.exists("deep/er/b_bicubic.png")


def test_inputs_of_one_stem_get_results_of_their_own(run):
    os.mkdir("other")
    for i, name in enumerate(["a.png", "a.bmp", "other/A.png"]):
        Image.new("RGB", (2, 2), (i, i, i)).save(name)
    assert run("a.png", "a.bmp", "other", "a.png")[0] == 0           # named twice: done once
    results = sorted(Path("results").iterdir())
    assert {Image.open(p).getpixel((0, 0))[0] for p in results} == {0, 1, 2}
    assert len(results) == 3 and len({p.name.lower() for p in results}) == 3


@pytest.mark.parametrize("arguments, message", [
    ("b.png b_bicubic.png --out here", None), ("", "name pictures or folders to restore"),
    ("a.png --out a.png", "would overwrite a.png"), ("a.png --out ./link.png", "would overwrite link.png"),
    ("a.png hard.png --out .", "would overwrite a_x4.png"), ("empty", "empty: no pictures in this folder"),
    ("a.png --hr hr --out hr", "the result of a.png would overwrite hr/a_x4.png"),
    ("a.png b.png --out c.png", "is one file but there are 2 inputs"),
    ("a.png --out c.ico", ".ico cannot hold a result"), ("a.png --device cuda", "--device cuda"),
    ("rgba.png --out a.jpg", "a.jpg cannot be written (cannot write mode RGBA as JPEG)"),
    ("a.png --out a_file", "a_file is a file, not a folder"), ("a.png --tile -1", "--tile must be at least 0, not -1"),
    ("a.png --timestep 1001", "--timestep must be above 0 and at most 1000"),
    ("a.png --timestep 0", "--timestep must be above 0"), ("a.png --steps 0", "--steps must be at least 1, not 0"),
    ("a.png --cfg nan", "--cfg must be at least 0, not nan"), ("a.png --seed -1", "--seed must be at least 0"),
    ("a.png --instruction nothing.txt", "--instruction nothing.txt: No such file"),
    ("a.png --prompt-from hr --tagger ram", "--prompt-from hr needs"), ("--sr sr --hr few", "no partner for 1.png"),
    ("a.png --hr nowhere", "nowhere: no such folder"), ("--sr nowhere --hr sr", "nowhere: no such folder"),
    ("a.png --metrics psnr", "psnr: these need the references, --hr DIR"),
    ("--sr sr --hr empty", "empty: no pictures in this folder"),
    ("a.png --hr hr --csv hr/a_x4.png", "--csv would overwrite hr/a_x4.png: choose another --csv"),
    ("--sr sr --report sr/0.png", "--report would overwrite sr/0.png"),
    ("--sr sr --scale 2 --no-metadata", "--sr restores nothing: leave out --scale --no-metadata"),
    ("--sr sr --hr large", "sr/0.png is 7×5 but its reference large/0.png is 28×20"),
    ("--sr sr --hr sr --protocol patch", "too small for --protocol patch"),
    ("--sr sr --metrics beauty", "unknown metric beauty"),
    ("--sr compared", "compared: only enlargements of --compare there")])
def test_mistakes_are_told_before_anything_is_written(run, arguments, message):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for folder in ("empty", "hr", "sr", "few", "large", "compared"):
        os.mkdir(folder)
    for name in ("a.png", "b.png", "b_bicubic.png", "hr/a_x4.png", "sr/0.png", "sr/1.png", "few/0.png",
                 "compared/0_x4_bicubic.png"):
        RGB.save(name)
    for name in ("large/0.png", "large/1.png"):
        RGB.resize((28, 20)).save(name)
    RGB.convert("RGBA").save("rgba.png")
    Path("a_file").write_text("")
    os.symlink("a.png", "link.png")
    os.link("a.png", "a_x4.png")
    os.link("b.png", "hard.png")
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    code, out, err = run(*arguments.split())
    if message:
        assert code == 1 and message in err and err.startswith("error: ") and err.count("\n") == 1
        assert {path for path in Path().rglob("*") if path.is_file()} == set(before)
    else:
        assert code == 0
    assert all(path.read_bytes() == content for path, content in before.items())


def test_broken_pictures_in_a_folder_are_reported_and_other_files_are_none(run):
    os.makedirs("in/folder.png")
    RGB.save("in/good.PNG")
    RGB.save("in/zzz.jpg")
    Path("in/notes.txt").write_text("no picture")
    Path("in/._a.jpg").write_bytes(b"what macOS leaves")
    png, jpeg, bomb = io.BytesIO(), io.BytesIO(), png_16(np.zeros((1, 1, 3)))
    Image.fromarray(noise(64, 64, 3)).save(png, "PNG")
    Image.fromarray(noise(64, 64, 3)).save(jpeg, "JPEG")
    damaged = bytearray(png.getvalue())
    damaged[200] ^= 255
    broken = {"empty.png": b"", "text.png": b"this is no picture at all", "cut.png": png.getvalue()[:500],
              "cut.jpg": jpeg.getvalue()[:700], "damaged.png": damaged, "header.gif": b"GIF89a",
              "bomb.png": bomb[:16] + struct.pack(">II", 100000, 100000) + bomb[24:]}
    for name, content in broken.items():
        (Path("in") / name).write_bytes(content)
    code, out, err = run("in", "missing.png")
    assert code == 1 and f"2 restored, {len(broken) + 1} skipped" in out
    assert sorted(os.listdir("results")) == ["good_x4.png", "zzz_x4.png"]
    *lines, missing = err.strip().splitlines()                        # one line each, no traceback
    assert missing == "error: missing.png: no such file or folder" and len(lines) == len(broken)
    for name, line in zip(sorted(broken), lines, strict=True):
        assert line.startswith(f"error: in/{name}: not a picture that can be read (")
    code, out, err = run("in/empty.png")  # alone
    assert (code, out) == (1, "") and err.count("\n") == 1


@pytest.mark.parametrize("error, said", [
    (NotFinite("the result has values that are no finite numbers; try --dtype fp32"), "no finite numbers; try --dtype"),
    (torch.OutOfMemoryError("CUDA out of memory"), "7×5 needs more memory than there is; cut it, or take"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "7×5 needs more memory than there is"),
    (ValueError("text_encoder/config.json: no such key"), None)])
def test_a_picture_that_cannot_be_restored_is_skipped(run, error, said):
    """Its error names it and the way out; nothing is written for it. Another ValueError concerns every picture."""
    run.model.error = error
    for name, colour in (("a", "white"), ("b", "black"), ("c", "white")):
        Image.new("RGB", (7, 5), colour).save(f"{name}.png")
    code, out, err = run("a.png", "b.png", "c.png", "--compare", "--dtype", "fp16")
    assert code == 1
    if not said:
        assert err == f"error: {error}\n" and not Path("results").exists()
        return
    assert "1 restored, 2 skipped" in out and sorted(os.listdir("results")) == ["b_x4.png", "b_x4_bicubic.png"]
    assert [line.split(": ")[:2] for line in err.splitlines()] == [["error", "a.png"], ["error", "c.png"]]
    assert all(said in line for line in err.splitlines())


def test_options_reach_the_model(run):
    RGB.save("a.png")
    Path("how.txt").write_text("Enhance: \n")
    assert run("a.png", "--prompt", "a wall", "--suffix", "main", "--timestep", "999", "--tile", "512", "--instruction",
               "how.txt", "--fast", "off", "--adapter", "none")[0] == 0
    assert run.loaded == ("none", "off", False)
    assert run.model.seen == {"prompt": "a wall", "suffix": "main", "timestep": 999.0, "tile": 512,
                              "instruction": "Enhance: "}
    assert run("a.png")[0] == 0 and run.loaded == (None, "auto", False)
    assert run.model.seen == {"prompt": "", "suffix": None, "timestep": None, "tile": None, "instruction": None}


def test_an_adapters_suffix_is_used_unless_told_otherwise(run, tiny_model, monkeypatch):
    """What train.py --suffix none wrote is evaluated without suffix, what prune.py merged as well."""
    run.model = None
    RGB.save("a.png")
    tiny.tiny_adapter("a.safetensors", tiny_model, metadata={"suffix": "none"})
    pruned = Path(shutil.copytree(tiny_model, "pruned"))
    save_module(sanasr.LinearDiT.from_pretrained(tiny_model / "transformer"), pruned / "transformer",
                metadata={"suffix": "none"})
    seen = []
    monkeypatch.setattr(sanasr, "tokenize_prompt", lambda tokenizer, prompt, *rest, really=sanasr.tokenize_prompt: (
        seen.append(prompt), really(tokenizer, prompt, *rest))[1])
    for i, options in enumerate((["--model", tiny_model, "--adapter", "a.safetensors"], ["--model", pruned])):
        words = f"tree {i}"  # not in the cache yet
        argv = ["a.png", "--prompt", words, *options]
        assert run(*argv)[0] == 0 and seen[-1] == words
        assert run(*argv, "--suffix", "main")[0] == 0 and seen[-1] == f"{words}, {sanasr.SUFFIXES['main']}"
    assert run("a.png", "--model", tiny_model, "--prompt", "x")[0] == 0
    assert seen[-1] == f"x, {sanasr.SUFFIXES['appendix']}"


def test_one_picture_of_many_tiles_shows_a_bar_for_each_stage(run, tiny_model, monkeypatch):
    run.model, bars = None, []
    Image.fromarray(noise(40, 30, 3)).save("a.png")
    monkeypatch.setattr(evaluate, "tqdm", lambda *items, **options: bars.append(options) or tqdm(
        *items, **options | {"disable": False, "file": sys.stderr}))
    monkeypatch.setattr(evaluate.tqdm, "write", print, raising=False)
    for tile, stages in ((64, ["encode", "dit", "decode"]), (0, [])):  # of a picture of 120×160; one tile, no bar
        bars.clear()
        code, _, err = run("a.png", "--model", tiny_model, "--tile", tile)
        assert code == 0 and Image.open("results/a_x4.png").size == (120, 160)
        tiles = [bar for bar in bars if bar.get("unit") == "tile"]
        assert [bar["desc"] for bar in tiles] == stages
        assert all(bar["total"] == tiles[0]["total"] > 4 and f"/{bar['total']} [" in err for bar in tiles)


# --- tags ---

class Tags:
    """Stands for the tagger: calls a picture by its size and its first pixel."""
    def tags(self, image):
        return ["a wall", f"{image.width} by {image.height}", f"red {image.getpixel((0, 0))[0]}"]


def test_all_is_tagged_and_the_tagger_gone_before_the_model_is_loaded(run, monkeypatch):
    order = []
    def load_tagger(*_):
        found = Tags()
        weakref.finalize(found, order.append, "the tagger is gone")
        return found
    monkeypatch.setattr(evaluate, "load_model", lambda *_: order.append("the model is loaded") or run.model)
    monkeypatch.setattr(tagger.Tagger, "from_pretrained", load_tagger)
    Image.new("RGB", (7, 5), (9, 0, 0)).save("a.png")
    Path("b.png").write_text("no picture")
    code, out, err = run("b.png", "a.png", "--tagger", "ram", "--prompt", "at noon")
    assert order == ["the tagger is gone", "the model is loaded"]
    assert run.model.seen["prompt"] == "at noon, a wall, 28 by 20, red 9"
    assert code == 1 and "1 restored, 1 skipped" in out
    assert err.splitlines()[-1].startswith("error: b.png: not a picture that can be read (")


def test_tags_from_a_file(run):
    RGB.save("a.png")
    Path("tags.csv").write_text('image,tags\nelsewhere/a.png,"a wall, blurry picture, red"\n')
    assert run("a.png", "--tagger", "tags.csv")[::2] == (0, "")
    assert run.model.seen["prompt"] == "a wall, red", "words of degradation are left out, as in training"
    assert run.model.encoded == [sanasr.build_prompt("a wall, red")], "before the first picture, all prompts at once"
    RGB.save("b.png")
    assert run("a.png", "b.png", "--tagger", "tags.csv")[2] == "note: tags.csv has no tags for 1 of 2 pictures\n"


def test_a_tagger_without_weights_or_with_broken_ones(run, monkeypatch, tmp_path):
    RGB.save("a.png")
    (tmp_path / tagger.LEAN).write_bytes(b"cut")
    monkeypatch.setenv("SANASR_WEIGHTS", str(tmp_path))
    code, _, err = run("a.png", "--tagger", "ram")
    assert code == 1 and err.startswith("error: ") and tagger.LEAN in err and err.count("\n") == 1
    assert not Path("results").exists()
    unavailable = Mock(side_effect=weights.Unavailable("ram is not on this machine"))
    monkeypatch.setattr(tagger.Tagger, "from_pretrained", unavailable)
    code, _, err = run("a.png", "--tagger", "dape")
    assert code == 0 and err.count("\n") == 1 and "suffix alone: ram is not on this machine" in err


def test_prompts_from_the_references_are_marked(run, monkeypatch):
    monkeypatch.setattr(tagger.Tagger, "from_pretrained", lambda *_: Tags())
    os.mkdir("hr")
    RGB.save("a.png")
    Image.new("RGB", (28, 20), (77, 0, 0)).save("hr/a.png")
    scored = ["a.png", "--hr", "hr", "--metrics", "psnr", "--csv", "s.csv", "--report", "s.html", "--tagger", "ram"]
    code, out, _ = run(*scored)
    assert code == 0 and "red 77" not in run.model.seen["prompt"]
    assert not any("from the references" in t for t in (out, Path("s.csv").read_text(), Path("s.html").read_text()))
    code, out, _ = run(*scored, "--prompt-from", "hr")
    assert code == 0 and "28 by 20, red 77" in run.model.seen["prompt"]
    assert out.endswith("prompts from the references\n")
    assert "embedded, prompts from the references: 1 pictures" in Path("s.html").read_text()
    head, *rows = Path("s.csv").read_text().splitlines()
    assert head == "image,psnr,note" and [r.split(",")[2] for r in rows] == ["prompts from the references"] * 2
    Path("hr/a.png").write_bytes(b"")
    code, _, err = run(*scored, "--prompt-from", "hr")
    assert code == 1 and "error: hr/a.png: not a picture that can be read" in err


# --- the command itself, on a small model of the real classes ---

def test_the_command_restores_and_repeats_itself(tiny_model, tmp_path):
    Image.fromarray(noise(9, 13, 3)).save(tmp_path / "lr.png")
    for options, out in ((["--compare"], "results/lr_x4.png"), (["--seed", 7, "--out", "again.png"], "again.png")):
        done = python(ROOT / "eval.py", "lr.png", "--model", tiny_model, *options, cwd=tmp_path, OMP_NUM_THREADS=1,
                      SANASR_CACHE=tmp_path / "cache")
        assert (done.returncode, done.stderr) == (0, "")
        assert "lr.png  13×9 → 52×36  ms: text" in done.stdout and f"→ {out}" in done.stdout
    first, again = (np.asarray(Image.open(tmp_path / name)) for name in ("results/lr_x4.png", "again.png"))
    assert first.shape == (36, 52, 3) and np.array_equal(first, again)


def test_torchrun_splits_the_files_and_all_ranks_tell_of_a_failure(tiny_model, tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(4):
        Image.fromarray(noise(8, 8, 3, seed=i)).save(tmp_path / f"in/{i}.png")
    (tmp_path / "in/0.png").write_bytes(b"broken: its rank is done first, and must wait for the other")
    done = python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, ROOT / "eval.py", "in",
                  "--model", tiny_model, cwd=tmp_path, OMP_NUM_THREADS=1)
    assert done.returncode == 1
    assert sorted(os.listdir(tmp_path / "results")) == ["1_x4.png", "2_x4.png", "3_x4.png"], done.stderr
    assert "1 restored, 1 skipped (rank 0)" in done.stdout and "2 restored, 0 skipped (rank 1)" in done.stdout


@pytest.mark.parametrize("file, content, message", [
    ("vae/config.json", None, "config.json"), ("vae/config.json", "{", "vae/config.json"),
    ("transformer/diffusion_pytorch_model.safetensors", "cut", "diffusion_pytorch_model.safetensors"),
    ("transformer/diffusion_pytorch_model.safetensors", None, "transformer"),
    ("tokenizer/tokenizer.json", "{}", "tokenizer.json"), ("text_encoder/model.safetensors", None, "text_encoder"),
    ("adapter.safetensors", "no", "adapter.safetensors")])
def test_a_broken_model_is_one_line_that_names_the_file(run, tiny_model, monkeypatch, file, content, message):
    run.model = None
    path = shutil.copytree(tiny_model, "model") / Path(file)
    path.unlink() if content is None else path.write_text(content)
    monkeypatch.setenv("SANASR_CACHE", "cache")
    RGB.save("a.png")
    code, _, err = run("a.png", "--model", "model")
    assert code == 1 and err.startswith("error: ") and message in err and err.count("\n") == 1
    assert not Path("results").exists()


def test_awkward_real_pictures(run):
    folder = external("SANASR_DATA", "inputs")
    code, out, err = run(folder)
    assert (code, err) == (0, "")
    for path in folder.iterdir():
        with Image.open(path) as source, Image.open(f"results/{path.stem}_x4.png") as result:
            assert result.size == (4 * source.width, 4 * source.height)
            assert ("A" in result.mode) == source.has_transparency_data
            assert (result.mode in ("L", "LA")) == (source.mode in ("L", "LA", "1", "I;16"))
