"""Pictures: reading, enlarging, tensors, colour correction, writing; and the atomic write that all files go through.

    picture = read("photo.jpg")             8-bit RGB, upright, with its alpha, colour profile and EXIF beside it
    x_l = bicubic(picture.rgb, 4)           what the networks restore
    result = picture.finish(result, 4)      alpha and grey are put back
    write(result, path, picture.icc, picture.exif)
"""
import contextlib
import glob
import os
import secrets
import time
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageDraw, ImageFont

# --- Errors in one line ---


def one_line(error):
    """An exception in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def reason(error, path=""):
    """An exception in one line, without the file name `path`, which the message around it already has."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return one_line(error).replace(f" {str(path)!r}", "").replace(f" '{os.path.realpath(path)}'", "")


# --- The atomic write ---


@contextlib.contextmanager
def atomically(path):
    """A context that yields a temporary path beside `path`, which takes its name when the block ends without error.

    The file is flushed to the disk before it is renamed, and the folder after: a crash leaves either the old file or
    the new one. The temporary name is unique. Its file is removed when the block fails. What a killed process left is
    removed by a later write of the same target, after an hour. Missing folders are made. Raises OSError.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    short = path.name[:40]  # a name has at most 255 bytes, a character up to four
    for old in path.parent.glob(f".{glob.escape(short)}.*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > 3600:
                old.unlink()
    temporary = path.with_name(f".{short}.{secrets.token_hex(8)}.tmp")
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
        if os.name == "posix":  # elsewhere a folder cannot be opened
            _flush(path.parent)
    except OSError as error:
        if error.filename == str(temporary):
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _flush(path):
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError:  # some network file systems cannot flush a folder
        if not os.path.isdir(path):
            raise
    finally:
        os.close(handle)


def write_bytes(path, content):
    """Write `content`, bytes or a str in UTF-8, to `path`, see `atomically`."""
    with atomically(path) as temporary:  # names of files can hold bytes that are no UTF-8
        temporary.write_bytes(content.encode(errors="backslashreplace") if isinstance(content, str) else content)


# --- Pictures in ---

NO_PICTURES = {"BUFR", "GRIB", "HDF5", "MPEG"}  # Pillow knows these formats by name but decodes none of them


def picture_suffixes(table):
    """The lower-case suffixes of the formats in `table`: Image.OPEN for reading, Image.SAVE for writing."""
    return {s for s, f in Image.registered_extensions().items() if f in table and f not in NO_PICTURES}


def find_inputs(paths):
    """The files that `paths` name, each name once, folders sorted by name. Raises ValueError for an empty folder."""
    files, known = {}, picture_suffixes(Image.OPEN)
    for path in map(Path, paths):
        inside = [path] if not path.is_dir() else sorted(
            p for p in path.iterdir() if p.suffix.lower() in known and not p.name.startswith(".") and p.is_file())
        if not inside:
            raise ValueError(f"{path}: no pictures in this folder")
        for p in inside:
            files.setdefault(os.path.abspath(p), p)
    return list(files.values())


@dataclass
class Picture:
    """A decoded input: what the networks see, and what must be put back afterwards."""
    rgb: Image.Image           # 8 bits, upright
    alpha: Image.Image | None  # mode L, the same size
    grey: bool
    icc: bytes | None          # the colour profile that `rgb` is still in
    exif: bytes = b""          # without orientation, thumbnail and what describes the file rather than the photo

    def finish(self, image, scale=4):
        """`image`, an RGB result of `scale` times the size, with this picture's alpha, and grey if this is grey."""
        image = image.convert(("L" if self.grey else "RGB") + ("A" if self.alpha else ""))
        if self.alpha:
            image.putalpha(bicubic(self.alpha, scale))
        return image


def to_8_bit(image):
    """Modes of more than 8 bits, which Pillow's own conversion would clip: I;16… and I (0…65535), F (0…1, where nothing
    reaches 2, 0…255, where nothing reaches 512, or 0…65535)."""
    x = np.asarray(image, np.float64)
    if not np.isfinite(x).all():
        raise ValueError("it has pixels that are not finite numbers")
    scale = 65535 if image.mode.startswith("I") or x.max() >= 512 else 1 if x.max() < 2 else 255
    if x.max() > 65535:
        raise ValueError("it has pixel values of more than 16 bits")
    return Image.fromarray((x / scale * 255).clip(0, 255).round().astype(np.uint8))


# EXIF tags that describe how the file stores its pixels: strips and tiles, sizes, compression, colour tables, profiles
FILE_TAGS = {254, 255, *range(256, 270), *range(273, 282), 284, *range(288, 294), 301, 317, *range(318, 326), 330, 332,
             *range(336, 344), 347, *range(512, 522), *range(529, 533), 700, 33723, 34377, 34675}
SIZE_TAGS = (40962, 40963, 40965)  # of the Exif part: width, height, and where another part lies in the file


def kept_exif(image):
    """The EXIF of an opened image, as bytes for `write`; b"" where nothing is left or readable.

    The orientation, the thumbnail and the tags that describe the file rather than the photo are dropped.
    """
    try:
        exif = image.getexif()
        kept = Image.Exif()
        kept.endian = exif.endian
        kept.update({tag: value for tag, value in exif.items() if tag not in FILE_TAGS})
        for part in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo):
            kept.pop(part, None)
            if values := {k: v for k, v in exif.get_ifd(part).items() if k not in SIZE_TAGS}:
                kept.get_ifd(part).update(values)
        return kept.tobytes() if kept or kept._ifds else b""
    except Exception:  # EXIF is often malformed; the picture is what counts
        return b""


_T = Image.Transpose
TURNS = {2: _T.FLIP_LEFT_RIGHT, 3: _T.ROTATE_180, 4: _T.FLIP_TOP_BOTTOM, 5: _T.TRANSPOSE, 6: _T.ROTATE_270,
         7: _T.TRANSVERSE, 8: _T.ROTATE_90}


def upright(image):
    """A copy, turned as the EXIF says. ImageOps.exif_transpose also writes the EXIF anew, and fails where it is odd."""
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # as in kept_exif
        turn = None
    return image.copy() if turn is None else image.transpose(turn)


def read(path) -> Picture:
    """Decode `path`, a file name or a file object. Raises whatever Pillow does: OSError, ValueError, SyntaxError…"""
    with Image.open(path) as image:
        exif = kept_exif(image) if image.format == "TIFF" else None  # before load(), which closes the file
        image.load()
        exif = kept_exif(image) if exif is None else exif  # it also loads a PNG, but hides that the file is broken
        image = upright(image)
    if 0 in image.size:
        raise ValueError("it has no pixels")
    icc = image.info.get("icc_profile")
    if image.mode == "F" or image.mode.startswith("I"):
        clear, values = image.info.get("transparency"), np.asarray(image)
        image = to_8_bit(image)
        if isinstance(clear, int):  # the grey level that is transparent
            image.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    elif image.mode == "LAB":  # Pillow converts it by profile only
        from PIL import ImageCms
        image = ImageCms.profileToProfile(image, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"),
                                          outputMode="RGB")
        icc = None
    grey = image.mode in ("1", "L", "LA", "La")
    if image.mode not in ("L", "LA", "P", "PA", "RGB", "RGBA"):
        icc = None  # CMYK, YCbCr, …: the profile does not describe the RGB made of it
    alpha = None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    return Picture(image.convert("RGB"), alpha, grey, icc, exif)


def read_picture(path):
    """`read`, but every error is a ValueError that names the file."""
    try:
        return read(path)
    except Exception as error:  # on broken files the decoders raise anything
        raise ValueError(f"{path}: not a picture that can be read ({reason(error, path)})") from error


def read_rgb(path):
    """The picture `path` in RGB. Raises ValueError that names it."""
    return read_picture(path).rgb


def bicubic(image: Image.Image, scale: int = 4) -> Image.Image:
    """`image` enlarged `scale` times by Pillow's BICUBIC: the x_L that the networks restore."""
    return image.resize((scale * image.width, scale * image.height), Image.Resampling.BICUBIC)


# --- Pictures and tensors ---


def to_tensor(image):
    """PIL image -> (3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous().float() / 255


def to_image(x):
    """(3, H, W) in [0, 1], clamped and rounded to 8 bits -> PIL image."""
    return Image.fromarray((x.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())


# --- Colour correction: the result takes over the colours of the enlarged input, as in StableSR (arXiv 2305.07015) ---


def adain(result, reference):
    """Give each channel of `result` the mean and the deviation of `reference`. Both float32, 3,H,W."""
    def moments(x):
        deviation, mean = torch.std_mean(x.double().flatten(1), 1, correction=0)
        return mean[:, None, None].float(), (deviation[:, None, None].square() + 1e-5).sqrt().float()
    (mean, deviation), (mean_ref, deviation_ref) = moments(result), moments(reference)
    return (result - mean) / deviation * deviation_ref + mean_ref


def low_frequencies(x):
    """The channels x: 3,H,W smoothed by (1 2 1)/4 in both directions at steps 1, 2, 4, 8, 16."""
    for step in (1, 2, 4, 8, 16):
        for dim in (1, 2):
            n = x.shape[dim]
            around = x.index_select(dim, torch.arange(-step, n + step).clamp(0, n - 1))  # edges replicated
            x = around.narrow(dim, 0, n) / 4 + around.narrow(dim, step, n) / 2 + around.narrow(dim, 2 * step, n) / 4
    return x


def wavelet(result, reference):
    """The high frequencies of `result` on the low ones of `reference`. Both float32, 3,H,W."""
    return result - low_frequencies(result) + low_frequencies(reference)


COLOUR_FIXES = {"none": None, "adain": adain, "wavelet": wavelet}


def fix_colours(result, reference, how):
    """`result` with the colours of `reference`, 8-bit RGB pictures of one size; how: a key of COLOUR_FIXES."""
    fix = COLOUR_FIXES[how]
    return to_image(fix(to_tensor(result), to_tensor(reference))) if fix else result


def restored(model, picture, prompt="", color_fix="none", scale=4, **options):
    """What `model` makes of a `Picture`: a picture of `scale` times the size and of the same mode.

    model: anything with restore(image, prompt, scale=…, **options) -> RGB picture.
    """
    result = model.restore(picture.rgb, prompt, scale=scale, **options)
    return picture.finish(fix_colours(result, bicubic(picture.rgb, scale), color_fix), scale)


# --- Pictures out ---


def write(image: Image.Image, path: Path, icc: bytes | None = None, exif: bytes = b"") -> None:
    """Write `image` in the format of the suffix of `path` (PNG for an unknown one), see `atomically`.

    icc: a colour profile; exif: as `Picture.exif`. A JPEG cannot hold more than 64 kB of EXIF: it then gets none.
    """
    kind = Image.registered_extensions().get(path.suffix.lower(), "PNG")
    options = {"quality": 95} if kind in ("JPEG", "WEBP") else {}
    if exif and not (kind == "JPEG" and len(exif) > 65533):
        options["exif"] = exif
    with atomically(path) as temporary, open(temporary, "wb") as f:
        image.save(f, kind, icc_profile=icc, **options)


def png(image):
    """`image` as the bytes of a PNG file."""
    f = BytesIO()
    image.save(f, "PNG")
    return f.getvalue()


def central(image, side):
    """The central part of `image`, at most side × side."""
    width, height = min(image.width, side), min(image.height, side)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def contact_sheet(rows, letters=20):
    """One white picture of RGB pictures. rows: [[(caption, picture), …], …], each caption above its picture.

    letters: the captions' height in pixels.
    """
    gap = 8  # pixels between two pictures
    wide = max(picture.width for row in rows for _, picture in row) + gap
    heads = [letters + gap if any(caption for caption, _ in row) else 0 for row in rows]
    heights = [head + max(picture.height for _, picture in row) for head, row in zip(heads, rows, strict=True)]
    sheet = Image.new("RGB", (max(map(len, rows)) * wide - gap, sum(heights) + gap * (len(rows) - 1)), "white")
    draw, font, y = ImageDraw.Draw(sheet), ImageFont.load_default(letters), 0
    for row, head, height in zip(rows, heads, heights, strict=True):
        for i, (caption, picture) in enumerate(row):
            draw.text((i * wide + (wide - gap) // 2, y + head // 2), caption, "black", font, anchor="mm")
            sheet.paste(picture, (i * wide + (wide - gap - picture.width) // 2, y + head))
        y += height + gap
    return sheet
