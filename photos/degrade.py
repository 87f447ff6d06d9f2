"""Synthetic low-quality photos: the second-order Real-ESRGAN degradation (Wang et al. 2021), 4x smaller, seeded.

    python -m photos.degrade photo.png --out lr.png [--seed N] [--sheet]     # --sheet also draws every stage

    x_H  -> blur, resize, noise, JPEG                                 # first order
         -> blur (p 0.8), resize, noise                               # second order, sizes relative to 1/4
         -> {resize to 1/4 + sinc (p 0.8), JPEG} in random order, clamp, round to 8 bits -> LR

Everything drawn for a sample comes from one `numpy` generator, so a pair depends on its seed alone (`train.py` seeds by
(seed, epoch, index)), never on the worker or the rank that makes it.

Made for loader workers on a CPU. On one Zen 5 core a 128x128 crop takes 4 ms, 256x256 10 ms, 512x512 41 ms, the way
back to x_L included. Parts at 256x256: a 21x21 blur by FFT 1.3 ms (grouped convolution 11 ms), a JPEG round trip by
Pillow 0.9 ms (a blockwise DCT in torch 2.6 ms). So JPEG is Pillow's, chroma 4:2:0.
"""
import argparse
import io
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from photos.pictures import contact_sheet, read_rgb, to_image, to_tensor, write
from runs import command

SCALE = 4
DEGRADE_VERSION = 1  # raise it when the same seed gives another LR picture: kept pairs are then made anew
MIN_SIZE = 80  # below it, the smallest first-order result would be smaller than the blur's reflected border


@dataclass(frozen=True)
class Order:
    """One round of degradation: probabilities and ranges. Ranges are uniform, ends included where they are integers."""
    blur: float                   # probability of a blur
    sigma: tuple                  # of the blur, pixels
    up_down_keep: tuple           # probabilities of the resize
    factor: tuple                 # (smallest, largest): down is U(smallest, 1), up is U(1, largest)
    gauss: tuple                  # standard deviation of Gaussian noise, grey levels of 255
    poisson: tuple                # scale of Poisson noise


FIRST = Order(1.0, (0.2, 3.0), (0.2, 0.7, 0.1), (0.15, 1.5), (1, 30), (0.05, 3.0))
SECOND = Order(0.8, (0.2, 1.5), (0.3, 0.4, 0.3), (0.3, 1.2), (1, 25), (0.05, 2.5))

KERNELS = {"iso": 0.45, "aniso": 0.25, "generalised iso": 0.12, "generalised aniso": 0.03,
           "plateau iso": 0.12, "plateau aniso": 0.03}
SINC, FINAL_SINC = 0.1, 0.8       # probability of a sinc instead of the above; of one at the end
BETA_G, BETA_P = (0.5, 4.0), (1.0, 2.0)
GAUSSIAN, GREY = 0.5, 0.4         # probability of Gaussian rather than Poisson noise; of the same noise in all channels
QUALITY = (30, 95)                # JPEG
MILD_SIGMA, MILD_QUALITY = (0.5, 4.0), (75, 99)
MODES = ("area", "bilinear", "bicubic")


# Kernels

def gaussian_kernel(size, sigma_x, sigma_y, angle, beta=1.0, plateau=False):
    """A blur kernel, size x size, float64, sum 1: with d the squared Mahalanobis distance from the centre,
    exp(-d^beta / 2) (generalised Gaussian; beta 1 is the Gaussian) or 1 / (1 + d^beta) (plateau)."""
    axis = torch.arange(size, dtype=torch.float64) - size // 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    u = math.cos(angle) * x + math.sin(angle) * y
    v = math.cos(angle) * y - math.sin(angle) * x
    d = ((u / sigma_x).square() + (v / sigma_y).square()).pow(beta)
    k = 1 / (1 + d) if plateau else torch.exp(-d / 2)
    return k / k.sum()


def sinc_kernel(size, cutoff):
    """The ideal circular low-pass of `cutoff` radians a pixel, size x size, float64, sum 1: the source of ringing."""
    axis = torch.arange(size, dtype=torch.float64) - size // 2
    r = torch.hypot(axis[:, None], axis)
    r[size // 2, size // 2] = 1                                            # 0/0 at the centre: its limit is set below
    k = cutoff * torch.special.bessel_j1(cutoff * r) / (2 * math.pi * r)
    k[size // 2, size // 2] = cutoff ** 2 / (4 * math.pi)
    return k / k.sum()


def random_kernel(rng, sigma):
    """Draw (description, kernel) of an order's blur."""
    size = int(2 * rng.integers(3, 11) + 1)                                # odd, 7..21
    if rng.random() < SINC:
        return f"sinc {size}", sinc_kernel(size, rng.uniform(math.pi / (3 if size < 13 else 5), math.pi))
    kind = rng.choice(list(KERNELS), p=list(KERNELS.values()))
    sigma_x = sigma_y = rng.uniform(*sigma)
    angle, beta = 0.0, 1.0
    if "aniso" in kind:
        sigma_y, angle = rng.uniform(*sigma), rng.uniform(-math.pi, math.pi)
    if "generalised" in kind or "plateau" in kind:  # below and above 1 with equal chance, as in Real-ESRGAN
        low, high = BETA_G if "generalised" in kind else BETA_P
        beta = rng.uniform(low, 1) if rng.random() < 0.5 else rng.uniform(1, high)
    return f"{kind} {size}", gaussian_kernel(size, sigma_x, sigma_y, angle, beta, "plateau" in kind)


# Stages, each of (C, H, W) float32

def blur(x, kernel):
    """Convolves every channel with one odd-sized kernel, the border reflected; by FFT, at one cost for all sizes."""
    p, (h, w) = kernel.shape[0] // 2, x.shape[-2:]
    x = F.pad(x[None], (p, p, p, p), mode="reflect")[0]
    size = [-(-n // 20) * 20 for n in x.shape[-2:]]     # FFTs like small factors; what wraps around stays in the border
    spectrum = torch.fft.rfft2(x, s=size) * torch.fft.rfft2(kernel.to(x.dtype), s=size)
    return torch.fft.irfft2(spectrum, s=size)[:, 2 * p:2 * p + h, 2 * p:2 * p + w]


def resize(x, height, width, mode):
    """Resizes without antialiasing (except `area`), which is how Real-ESRGAN gets its aliasing."""
    return F.interpolate(x[None], size=(height, width), mode=mode)[0]


def gaussian_noise(x, rng, sigma, grey):
    """Adds noise of standard deviation sigma/255, one for all channels if grey; clamps to [0, 1]."""
    noise = torch.from_numpy(rng.standard_normal((1 if grey else 3, *x.shape[1:]), dtype=np.float32))
    return (x + noise * (sigma / 255)).clamp(0, 1)


def poisson_noise(x, rng, scale, grey):
    """Adds `scale` times the shot noise of x seen with as many photons as it has grey levels (next power of two)."""
    light = (x.clamp(0, 1) * 255).round()
    if grey:
        light = (light / 255 * light.new_tensor([0.2989, 0.587, 0.114])[:, None, None]).sum(0, keepdim=True)
        light = (light * 255).round()
    photons = 2 ** math.ceil(math.log2(np.count_nonzero(np.bincount(light.int().numpy().ravel()))))
    light = light / 255
    counts = torch.from_numpy(rng.poisson((light * photons).numpy()).astype(np.float32))
    return (x + (counts / photons - light) * scale).clamp(0, 1)


def jpeg(x, quality):
    """One JPEG round trip (Pillow, 4:2:0) of an image in [0, 1]; values beyond are clamped."""
    buffer = io.BytesIO()
    to_image(x).save(buffer, "JPEG", quality=int(quality))
    return to_tensor(Image.open(buffer))


# The pipeline

def degrade(hr: torch.Tensor, rng, trace: list | None = None, mild: float = 0.0) -> torch.Tensor:
    """Degrades one photo.

    hr: (3, H, W) float32 in [0, 1], H and W multiples of 4 and at least 80. rng: a numpy Generator, or what seeds one:
    an int, or a tuple such as (seed, epoch, index). trace: a list that receives (what was done, image) of each stage.
    mild: the share of photos that get only one blur, one resize and a fine JPEG (not in Real-ESRGAN).
    Returns (3, H/4, W/4) float32 in [0, 1] of 8-bit values, a function of hr and rng alone.
    """
    height, width = hr.shape[-2:]
    if hr.ndim != 3 or hr.shape[0] != 3 or height % SCALE or width % SCALE or min(height, width) < MIN_SIZE:
        raise ValueError(f"degrade needs 3 x H x W with H and W multiples of {SCALE} and at least {MIN_SIZE}, "
                         f"got {tuple(hr.shape)}")
    if not isinstance(rng, np.random.Generator):
        rng = np.random.default_rng(rng)
    low = height // SCALE, width // SCALE
    x = hr

    if mild and rng.random() < mild:
        x = resize(blur(x, random_kernel(rng, MILD_SIGMA)[1]), *low, rng.choice(MODES))
        return jpeg(x, rng.integers(*MILD_QUALITY, endpoint=True))

    def noted(what, x):
        if trace is not None:
            trace.append((what, x))
        return x

    def compress(x):
        quality = rng.integers(*QUALITY, endpoint=True)
        return noted(f"jpeg {quality}", jpeg(x, quality))

    def shrink(x):
        mode = rng.choice(MODES)
        x = noted(f"resize final {mode}", resize(x, *low, mode))
        if rng.random() < FINAL_SINC:
            size = int(2 * rng.integers(3, 11) + 1)
            x = noted(f"final sinc {size}", blur(x, sinc_kernel(size, rng.uniform(math.pi / 3, math.pi))))
        return x

    for order, (h, w) in ((FIRST, (height, width)), (SECOND, low)):
        if rng.random() < order.blur:
            name, kernel = random_kernel(rng, order.sigma)
            x = noted(f"blur {name}", blur(x, kernel))
        way = rng.choice(["up", "down", "keep"], p=order.up_down_keep)
        factor = {"up": rng.uniform(1, order.factor[1]), "down": rng.uniform(order.factor[0], 1), "keep": 1.0}[way]
        mode = rng.choice(MODES)
        x = noted(f"resize {way} {mode} {factor:.2f}", resize(x, int(h * factor), int(w * factor), mode))
        gaussian, grey = rng.random() < GAUSSIAN, rng.random() < GREY
        strength = rng.uniform(*(order.gauss if gaussian else order.poisson))
        x = noted(f"noise {'gaussian' if gaussian else 'poisson'} {'grey' if grey else 'colour'} {strength:.2f}",
                  (gaussian_noise if gaussian else poisson_noise)(x, rng, strength, grey))
        if order is FIRST:
            x = compress(x)
    for stage in (shrink, compress) if rng.random() < 0.5 else (compress, shrink):
        x = stage(x)
    return (x.clamp(0, 1) * 255).round() / 255


def enlarge(lr, size=None):
    """The network's input x_L of an LR picture: Pillow's BICUBIC on 8-bit RGB, 4x larger or to `size` (width, height).

    lr: PIL image or (3, h, w) in [0, 1]. Returns (3, 4h, 4w) float32 in [-1, 1].
    """
    lr = lr.convert("RGB") if isinstance(lr, Image.Image) else to_image(lr)
    return to_tensor(lr.resize(size or (lr.width * SCALE, lr.height * SCALE), Image.BICUBIC)) * 2 - 1


def sharpen(x):
    """Unsharp mask of Real-ESRGAN's x_H (an option there too): x + residual / 2 where that exceeds 10/255."""
    kernel = gaussian_kernel(51, 8.0, 8.0, 0.0)                            # sigma by OpenCV's rule for a kernel of 51
    residual = x - blur(x, kernel)
    mask = blur((residual.abs() * 255 > 10).to(x.dtype), kernel)
    return mask * (x + residual / 2).clamp(0, 1) + (1 - mask) * x


def sheet(stages):
    """One picture of (caption, image) stages, all 320 pixels high, their pixels shown as they are."""
    tiles = [(f"{caption}  {width}x{height}", to_image(x).resize((round(width * 320 / height), 320), Image.NEAREST))
             for caption, x in stages for height, width in [x.shape[1:]]]
    return contact_sheet([tiles[i:i + 4] for i in range(0, len(tiles), 4)], letters=10)


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description="Degrade a photo as the training does.")
    parser.add_argument("image", help="the high-quality photo")
    parser.add_argument("--out", type=Path, default="lr.png", help="the LR picture, a quarter of its size")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sheet", action="store_true", help="also write OUT.sheet.png, which shows every stage")
    args = parser.parse_args(argv)
    if args.out.resolve() == Path(args.image).resolve():
        raise ValueError(f"--out {args.out} is the photo itself")
    hr = to_tensor(read_rgb(args.image))
    hr = hr[:, :hr.shape[1] // SCALE * SCALE, :hr.shape[2] // SCALE * SCALE]
    stages = [("photo", hr)]
    lr = degrade(hr, args.seed, stages)
    write(to_image(lr), args.out)
    print(f"{args.out}: {lr.shape[2]}x{lr.shape[1]}, seed {args.seed}: " + ", ".join(s for s, _ in stages[1:]))
    if args.sheet:
        write(sheet([*stages, ("LR", lr)]), args.out.with_suffix(".sheet.png"))
        print(args.out.with_suffix(".sheet.png"))


if __name__ == "__main__":
    main()
