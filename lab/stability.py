"""Is the autoencoder's latent more stable under degradation than the picture (the paper's §3.1)?

    python -m lab.stability pictures/                  the bundled model's autoencoder, a table

For a photo x and its degraded x', ‖x' − x‖ / ‖x‖ with pixels in [-1, 1], beside ‖E(x') − E(x)‖ / ‖E(x)‖. A ratio below
1 says that the latents change less than the pixels.
"""
import math
from statistics import fmean

import numpy as np
import torch
from tqdm import tqdm

import runs
from fast import load_model
from photos.degrade import blur, enlarge, gaussian_kernel, gaussian_noise, jpeg, resize, to_tensor
from photos.pictures import find_inputs, read_rgb
from runs import add_device_options, command, pick_device, pick_dtype

SIDE = 512  # larger photos are cropped to their centre
STRENGTHS = {
    "blur": (1, 2, 4),           # σ in pixels
    "noise": (5, 15, 30),        # σ in grey levels of 255
    "JPEG": (90, 60, 30),        # quality
    "down-sampling": (2, 4, 8),  # factor: by area, and back by Pillow's BICUBIC
}


def degraded(x, kind, strength, rng):
    """x: 3,H,W in [0, 1] of 8-bit values -> the same with one degradation of STRENGTHS, again of 8-bit values."""
    if kind == "blur":
        x = blur(x, gaussian_kernel(2 * math.ceil(3 * strength) + 1, strength, strength, 0.0))
    elif kind == "noise":
        x = gaussian_noise(x, rng, strength, grey=False)
    elif kind == "JPEG":
        x = jpeg(x, strength)
    else:
        height, width = x.shape[1:]
        x = enlarge(resize(x, height // strength, width // strength, "area"), (width, height)) / 2 + 0.5
    return (x.clamp(0, 1) * 255).round() / 255


def relative(a, b):
    """‖a − b‖ / ‖b‖, in float32."""
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


@torch.inference_mode()
def stability(vae, photos, seed=0):
    """vae: DCAE; photos: PIL images, or what yields them -> {(kind, strength): (pixels, latents)}, means over photos.

    The noise of the photo with number i is drawn from (seed, i), so a call can be repeated. A photo's central part, of
    at most 512 pixels and a multiple of the autoencoder's 32 a side, is used; raises ValueError for a smaller one.
    """
    p = next(vae.parameters())

    def encode(x):
        return vae.encode((x * 2 - 1)[None].to(p.device, p.dtype))
    changes = {(kind, strength): [] for kind, strengths in STRENGTHS.items() for strength in strengths}
    for i, photo in enumerate(photos):
        width, height = (min(n, SIDE) // vae.factor * vae.factor for n in photo.size)
        if not width or not height:
            raise ValueError(f"photos need at least {vae.factor} pixels a side, one is {photo.width}×{photo.height}")
        left, top = (photo.width - width) // 2, (photo.height - height) // 2
        x = to_tensor(photo.crop((left, top, left + width, top + height)))
        z = encode(x)
        for (kind, strength), values in changes.items():
            y = degraded(x, kind, strength, np.random.default_rng((seed, i)))
            values.append((relative(y * 2 - 1, x * 2 - 1), relative(encode(y), z)))
    return {key: tuple(map(fmean, zip(*values, strict=True))) for key, values in changes.items()}


@command
def main(argv=None):
    parser = runs.parser(__doc__)
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="photos and folders of photos")
    add("--model", default="embedded", metavar="NAME|FOLDER", help="see `python -m weights`")
    add("--seed", type=int, default=0, metavar="N", help="of the noise")
    add_device_options(add)
    args = parser.parse_args(argv)
    device, inputs = pick_device(args.device), find_inputs(args.inputs)
    model = load_model(args.model, device, pick_dtype(args.dtype, device), fast="auto")
    changes = stability(model.vae, map(read_rgb, tqdm(inputs, unit="img", disable=None)), args.seed)
    print(f"{args.model}, {len(inputs)} photos, mean of ‖y' − y‖ / ‖y‖")
    print(f"{'':18}{'pixels':>10}{'latents':>10}{'ratio':>10}")
    for (kind, strength), (pixels, latents) in changes.items():
        print(f"{f'{kind} {strength}':18}{pixels:10.4f}{latents:10.4f}{latents / pixels if pixels else math.nan:10.2f}")


if __name__ == "__main__":
    main()
