"""Pairs of four kinds, made ahead of time for training a restorer end to end, as PNG files that any restorer can read.

    OUT/{hr,lr}/NNNNNN_KIND.png      x_H of SIDE pixels, and its LR picture of a quarter of that

    strong       the second-order pipeline of photos/degrade.py: noise, blur, two compressions
    mild         one blur, one resize, a fine JPEG (`degrade` with mild=1)
    compressed   reduced without aliasing, a third of them blurred before, then one JPEG: pictures from the web
    soft         x_H itself enlarged first, as a camera's picture at its full size is; blurred, reduced, half compressed
"""
import signal
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from photos.degrade import SCALE, blur, degrade, gaussian_kernel, jpeg, to_image, to_tensor
from photos.pictures import read, write
from runs import UserError

SIDE = 256
KINDS = {"strong": 0.35, "mild": 0.15, "compressed": 0.25, "soft": 0.25}  # shares of the training pairs
HALVED = 0.35              # of photos of twice the size: taken at half of it
WEB, FINE = (20, 60), (60, 95)  # JPEG qualities of compressed pictures; three in five are WEB's
FILTERS = (Image.BICUBIC, Image.LANCZOS, Image.BOX, Image.BILINEAR)
PAIRS_VERSION = 2          # part of what a run depends on: raise it when a pair changes


def make_pair(image, kind, rng):
    """(x_H, LR picture) of a random crop of `image`, both PIL images; image: RGB, at least SIDE a side."""
    if rng.random() < HALVED and min(image.size) >= 2 * SIDE:
        image = image.reduce(2)
    side = round(SIDE / rng.uniform(1, 2)) if kind == "soft" and rng.random() < 0.7 else SIDE
    left, top = (int(rng.integers(size - side + 1)) for size in image.size)
    hr = image.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.BICUBIC)
    if rng.random() < 0.5:
        hr = hr.transpose(Image.FLIP_LEFT_RIGHT)
    x = to_tensor(hr)
    if kind in ("strong", "mild"):
        return hr, to_image(degrade(x, rng, mild=float(kind == "mild")))
    if kind == "compressed":
        if rng.random() < 0.3:
            x = softer(x, rng.uniform(0.5, 2))
        small = to_image(x).resize((SIDE // SCALE, SIDE // SCALE), FILTERS[rng.integers(len(FILTERS))])
        quality = rng.integers(*(WEB if rng.random() < 0.6 else FINE), endpoint=True)
        return hr, to_image(jpeg(to_tensor(small), quality))
    low = F.avg_pool2d(softer(x, rng.uniform(0.5, 4)), SCALE)
    return hr, to_image(jpeg(low, rng.integers(30, 96)) if rng.random() < 0.5 else low)


def softer(x, sigma):
    return blur(x, gaussian_kernel(21, sigma, sigma, 0.0))


def write_pair(folder, paths, shares, kinds, seed, n):
    """Pair n of `write_pairs`; a function of (seed, n) and the photos."""
    rng = np.random.default_rng((seed, n))
    kind = rng.choice(list(kinds), p=list(kinds.values()))
    name = f"{n:06d}_{kind}.png"
    if not (folder / "lr" / name).exists():
        hr, lr = make_pair(read(paths[rng.choice(len(paths), p=shares)]).rgb, kind, rng)
        write(hr, folder / "hr" / name)
        write(lr, folder / "lr" / name)  # last: without it the pair is made again
    return name


def start_worker():
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def write_pairs(folder, photos, count, seed, workers, kinds=KINDS):
    """Make the pairs 0…count-1 that `folder` lacks. Photos are drawn in proportion to their area, at most 12 × SIDE².

    photos: [photos.pairs.Photo], of at least SIDE pixels a side. Returns the names of the pairs. Raises UserError where
    the system ends a worker.
    """
    areas = np.array([min(12, p.width * p.height / SIDE ** 2) for p in photos])
    job = partial(write_pair, Path(folder), [p.path for p in photos], areas / areas.sum(), kinds, seed)
    try:
        with ProcessPoolExecutor(max(workers, 1), initializer=start_worker) as pool:
            made = pool.map(job, range(count), chunksize=32)
            return list(tqdm(made, "pairs", count, disable=count < 100, leave=False))
    except BrokenProcessPool:
        raise UserError("a process that makes pairs was killed, for want of memory perhaps; rerun with fewer --workers")
