"""What surrounds the networks of a restorer, whatever they are: pictures to and from tensors, tiles, the clock.

    y = tiled(f, x, tile, overlap)      f(x) by overlapping tiles
    class SanaSR(Restorer)              sanasr.py; LinearSR in linearsr/
"""
import functools
import itertools
import math
import time

import numpy as np
import torch

from photos.pictures import to_image


class NotFinite(ValueError):
    """A result with values that are no finite numbers. It concerns this picture; others may come out well."""


class Restorer:
    """What SanaSR and LinearSR share: text states, tiles, the clock, and pictures from and to tensors.

    scaling_factor: s; stages: milliseconds by stage of the last `restore`; folder: holds the text encoder;
    metadata: what the model's files say of it, see `conditioning`.
    """

    TILE, OVERLAP = 44, 2  # latent positions: tiles of 1408 pixels that share 64; so 3 × 3 of them cover 4096²

    def __init__(self, vae, dit, prompts, metadata=None):
        """vae: DCAE, on the device; dit: a LinearDiT; prompts: (texts, instruction) -> (c, m), as `PromptEncoder`."""
        self.vae, self.prompts, self.metadata = vae, prompts, metadata or {}
        self.device, self.vae_dtype = next(vae.parameters()).device, next(vae.parameters()).dtype
        self.dtype, self.scaling_factor = next(dit.parameters()).dtype, vae.config["scaling_factor"]
        self.folder, self.stages = None, {}
        if vae.config["latent_channels"] != dit.config["in_channels"]:
            raise ValueError(f"the autoencoder makes {vae.config['latent_channels']} latent channels, "
                             f"the transformer wants {dit.config['in_channels']}")

    def encode_prompt(self, prompts: str | list, instruction: str = "") -> tuple[torch.Tensor, torch.Tensor]:
        """One prompt or several -> (c: B,T,Dt text states, m: B,T of 0/1) on the model's device: `PromptEncoder`."""
        c, m = self.prompts(prompts, instruction)
        return c.to(self.device, self.dtype), m.to(self.device)

    def tiling(self, tile=None, progress=None):
        """`tiled` for tiles of `tile` pixels, with the `progress` of `restore`: (stage, f, x, down=1, up=1) -> f(x)."""
        tile = self.TILE if tile is None else max(1, tile // self.vae.factor) if tile else math.inf
        overlap = min(self.OVERLAP, tile // 4) if tile < math.inf else 0
        return lambda stage, f, x, **sides: tiled(f, x, tile, overlap, **sides,
                                                  progress=progress and functools.partial(progress, stage))

    def to_tensor(self, image, dtype, multiple):
        """8-bit RGB picture or array H,W,3 -> 1,3,H,W in [-1, 1], its sides replicated to multiples of `multiple`."""
        x = np.array(image)
        sides = (0, -x.shape[0] % multiple), (0, -x.shape[1] % multiple), (0, 0)
        x = np.pad(x, sides, "edge")  # here: CUDA's padding takes no more than 2³¹ values
        x = torch.from_numpy(x).to(self.device).permute(2, 0, 1)[None].float()
        return x.div_(127.5).sub_(1).to(dtype)  # in float32: bfloat16 would lose grey levels

    def decode(self, z, width, height, by_tiles):
        """Scaled latents 1,C,h,w -> PIL image, the upper left width × height of the decoded ones. Raises NotFinite."""
        z = (z / self.scaling_factor).to(self.vae_dtype)
        x = by_tiles("decode", self.vae.decode, z, up=self.vae.factor)[0, :, :height, :width].float()  # 3,H,W
        if not x.isfinite().all():
            raise NotFinite("the result has values that are no finite numbers; try --dtype fp32")
        return to_image(x.add_(1).div_(2))


# --- Tiles ---


def spans(length, tile, overlap):
    """Cover 0…length by equal pieces of at most `tile` that overlap by at least `overlap`: [(start, end), …]."""
    if length <= tile:
        return [(0, length)]
    count = math.ceil((length - overlap) / (tile - overlap))
    size = math.ceil((length + (count - 1) * overlap) / count)
    return [(start, start + size) for start in ((length - size) * i // (count - 1) for i in range(count))]


def blend_weights(pieces, up):
    """For each piece a weight for each position × `up`: linear ramps in the overlaps, 1 elsewhere; they sum to 1."""
    weights = [torch.ones((end - start) * up) for start, end in pieces]
    for i, (a, b) in enumerate(itertools.pairwise(pieces)):
        n = (a[1] - b[0]) * up
        ramp = (torch.arange(n) + 0.5) / n
        weights[i][len(weights[i]) - n:], weights[i + 1][:n] = 1 - ramp, ramp
    return weights


def tiled(f, x, tile, overlap, down=1, up=1, progress=None):
    """f(x) by overlapping tiles, blended: besides input and output, memory does not grow with the picture.

    x: B,C,h·down,w·down -> B,C',h·up,w·up, as f maps each tile. tile and overlap count positions of the h×w grid. f
    sees one tile at a time, so where it mixes globally (attention) the result differs from f(x).
    progress(done, total) is called before the first tile and after each.
    """
    rows, cols = spans(x.shape[2] // down, tile, overlap), spans(x.shape[3] // down, tile, overlap)
    done, total, progress = 0, len(rows) * len(cols), progress or (lambda done, total: None)
    progress(0, total)
    if total == 1:
        y = f(x)
        progress(1, 1)
        return y
    y = None
    for (top, bottom), wy in zip(rows, blend_weights(rows, up), strict=True):
        for (left, right), wx in zip(cols, blend_weights(cols, up), strict=True):
            part = f(x[:, :, top * down:bottom * down, left * down:right * down])
            if y is None:
                size = *part.shape[:2], x.shape[2] // down * up, x.shape[3] // down * up
                y = torch.zeros(size, device=x.device)  # float32: the ramps need more than bfloat16's 8 bits
            y[:, :, top * up:bottom * up, left * up:right * up] += part * (wy.to(x.device)[:, None] * wx.to(x.device))
            done += 1
            progress(done, total)
    return y


# --- Time ---


class Stopwatch:
    """Wall-clock milliseconds by stage, waiting for the device at every lap."""

    def __init__(self, device):
        self.device, self.laps, self.last = device, {}, time.perf_counter()

    def lap(self, name):
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        now = time.perf_counter()
        self.laps[name], self.last = 1000 * (now - self.last), now
