"""LinearSR: super-resolution in many steps, on the networks of SANA-SR. Read it after sanasr.py, whose parts it uses.

One 128×128 photo on its way to 512×512 (SANA-0.6B, B = 1, N = 20 steps):

    photo in [-1, 1] ── E_conv ────►  e     1×1152×16×16  three strided convolutions on the LR picture itself
    tags ⊕ suffix ── Gemma-2 ──────►  c, m  1×T×2304 and 1×T
    seed ── Gaussian noise ────────►  z_1   1×32×16×16    at t = 1
    z ← z − (t − t′) · v_k(z, t, e, c, m)                 N Euler steps from t = 1 to 0; t alone chooses the expert k
    z_0 / s ── DC-AE decoder ──────►  x̂     1×3×512×512

    t:         0 ────── 0.223 ────────────── 0.875 ── 0.939 ── 1
    expert:      0 polish     1 texture        2 refine  3 structure

Training is flow matching on latents, with no loss on pictures (linearsr/train.py): z_t = (1 − t)·z_H + t·ε, and every
expert v_k, a LinearDiT, learns ε − z_H on its own interval of t. Paper: "LinearSR" (arXiv 2510.08771).

A folder of LinearSR holds what SANA-SR does not have; autoencoder, text encoder and tokenizer are those of its base:

    config.json                {"system": "linearsr", "base": "embedded", "boundaries": [0.223, 0.875, 0.939], …}
    stem/, transformer/        the network that all experts share; without transformer/ it is the base's own prior
    experts/0.safetensors …    each expert's low-rank difference from it, in the format of SANA-SR's adapter
"""
from __future__ import annotations

import copy
import itertools
import json
import math
from bisect import bisect_left
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import sanasr
import weights
from photos.restorer import Restorer, Stopwatch
from sanasr import DCAE, Conv1x1, LinearDiT, PromptEncoder, to_picture, to_tokens
from weights.configs import read_config
from weights.dtypes import choose_dtypes
from weights.files import Pretrained

SYSTEM = "linearsr"
BOUNDARIES = (0.223, 0.875, 0.939)  # the paper's
SHIFT = 3.0  # SANA's flow shift
STRIDE = 8  # of E_conv: the LR picture is 4 times smaller than the result, the latents 32 times

# --- Time: the experts' intervals and the steps ---


def check_boundaries(boundaries):
    """The boundaries as a tuple. Raises ValueError unless they rise strictly within (0, 1)."""
    try:
        values = tuple(map(float, boundaries))
    except (TypeError, ValueError):
        raise ValueError(f"boundaries must be a list of numbers, not {boundaries!r}") from None
    if any(not a < b for a, b in itertools.pairwise((0.0, *values, 1.0))):
        raise ValueError(f"boundaries must rise within (0, 1), not {', '.join(f'{b:g}' for b in values)}")
    return values


def expert_of(t, boundaries=BOUNDARIES):
    """Index of the expert for t in [0, 1]: [0, b_0] is expert 0's, then (b_0, b_1] expert 1's, … An interval includes
    its upper end."""
    return bisect_left(boundaries, t)


def shifted(u, shift=SHIFT):
    """SANA's flow shift, t = s·u / (1 + (s − 1)·u): equal steps of u are small steps of t near the noise, t = 1."""
    return shift * u / (1 + (shift - 1) * u)


def unshifted(t, shift=SHIFT):
    """The u of t, the inverse of `shifted`."""
    return t / (shift - (shift - 1) * t)


def sample(velocity, z, steps):
    """Euler's method from noise z at t = 1 to t = 0, at `steps` equal steps of u (see `shifted`).

    velocity: (z, t) -> dz/dt, t a float. It is called at t = 1 first and never at 0. Raises ValueError for steps < 1.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    times = [shifted(1 - i / steps) for i in range(steps + 1)]
    for t, following in itertools.pairwise(times):
        z = z - (t - following) * velocity(z, t)
    return z


# --- The condition ---


class Stem(Pretrained):
    """E_conv, and the part of the patch embedding that takes its output.

    The patch embedding of concat_C(z_t, E_conv(x)) is one linear layer, W [z_t; E_conv(x)] + b = (W_z z_t + b) +
    W_e E_conv(x). LinearDiT holds W_z and b, `proj` here is W_e. It starts at zero, so that an untrained network is the
    prior to the last bit: W_z z_t is then one product of the prior's own shape, and zero is added to it.
    """

    def __init__(self, config: dict):
        """config: channels of the three convolutions, and the width D of the transformer's blocks."""
        super().__init__()
        self.config = config = read_config("Stem", config, dict(channels=(64, 128, 256), width=1152))
        channels = (3, *config["channels"])
        if len(channels) != 4:
            raise ValueError(f"Stem config: channels must be three numbers, not {config['channels']}")
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in itertools.pairwise(channels))
        self.proj = Conv1x1(channels[-1], config["width"], bias=False)
        for conv in self.convs:
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")  # keeps the variance through SiLU, nearly
        nn.init.zeros_(self.proj.weight)

    def forward(self, x):  # LR picture B,3,8h,8w in [-1, 1] -> B,D,h,w
        for conv in self.convs:
            x = F.silu(conv(x))
        return to_picture(self.proj(to_tokens(x)), *x.shape[2:])


# --- The restorer ---


def read_linearsr(folder):
    """config.json of a LinearSR folder, with `boundaries` checked. Raises ValueError or OSError naming the file."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {folder} is no LinearSR folder")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict) or config.get("system") != SYSTEM:
            raise ValueError(f'there is no "system": "{SYSTEM}" in it')
        config = read_config("LinearSR", config, dict(system=SYSTEM, base=None, boundaries=None, suffix="appendix"))
        for key in ("base", "suffix"):
            if not isinstance(config[key], str):
                raise ValueError(f"{key} must be a text")
        boundaries = BOUNDARIES if config["boundaries"] is None else config["boundaries"]
        return config | {"boundaries": check_boundaries(boundaries)}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def parts(folder, dtype=None):
    """(config, folder of its base, folder of the shared network's transformer) of a LinearSR folder. dtype: of the base
    to download. Raises ValueError that names the file, weights.Unavailable."""
    config = read_linearsr(folder)
    base = weights.folder(config["base"] if config["base"] in weights.MODELS else folder / config["base"], dtype)
    return config, base, (folder if (folder / "transformer").exists() else base) / "transformer"


def load_experts(shared, folder, boundaries):
    """The experts of a LinearSR folder: copies of the network `shared`, each with its low-rank difference merged.

    Without a folder experts/, and without boundaries, `shared` is the one expert. Raises ValueError or OSError.
    """
    files = [Path(folder) / "experts" / f"{k}.safetensors" for k in range(len(boundaries) + 1)]
    if not boundaries and not files[0].parent.exists():
        return [shared]
    if missing := [str(file) for file in files if not file.is_file()]:
        raise FileNotFoundError(f"{', '.join(missing)}: missing, config.json names {len(boundaries)} boundaries and so "
                                f"needs {len(files)} experts; export the model again")
    experts = [copy.deepcopy(shared) for _ in files]
    for expert, file in zip(experts, files, strict=True):
        sanasr.load_lora(expert, file, system=SYSTEM)
        sanasr.merge_lora(expert)
    return experts


class LinearSR(Restorer):
    """The whole restorer: the experts, the stem, and what it shares with SanaSR.

    experts: LinearDiTs, the first for the smallest t; one alone is LinearSR without a mixture of experts.
    """

    def __init__(self, experts, stem: Stem, vae: DCAE, prompts: PromptEncoder, boundaries=BOUNDARIES,
                 metadata: dict | None = None, offload: bool = False):
        """From parts. stem and vae lie on the device, and so do the experts unless `offload`: then they stay in host
        memory, and the device holds the one in use. Raises ValueError for parts that do not fit together."""
        super().__init__(vae, experts[0], prompts, metadata)
        self.experts, self.stem, self.offload, self.on_device = list(experts), stem, offload, None
        self.boundaries = check_boundaries(boundaries) if len(self.experts) > 1 else ()
        if len(self.experts) != len(self.boundaries) + 1:
            raise ValueError(f"{len(self.boundaries)} boundaries need {len(self.boundaries) + 1} experts, "
                             f"there are {len(self.experts)}")
        width = self.experts[0].config["cross_attention_dim"]
        if stem.config["width"] != width:
            raise ValueError(f"the stem is made for a transformer of width {stem.config['width']}, not of {width}")
        if vae.factor != 4 * STRIDE:
            raise ValueError(f"E_conv makes latents {4 * STRIDE} times smaller, the autoencoder {vae.factor} times")

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path, device: str | torch.device = "cpu",
                        dtype: torch.dtype | None = None, offload: bool = False) -> LinearSR:
        """Load a LinearSR folder, or a name in `weights.MODELS`. dtype: as SanaSR's.

        offload: only the expert in use lies on the device; a restoration moves each one there once.
        Raises OSError or ValueError that names the file, weights.Unavailable where a known model is unavailable.
        """
        device = torch.device(device)
        dtype, vae_dtype = choose_dtypes(device, dtype)
        folder = weights.folder(name_or_folder, dtype)
        config, base, transformer = parts(folder, dtype)
        vae = DCAE.from_pretrained(base / "vae", vae_dtype, device)
        stem = Stem.from_pretrained(folder / "stem", dtype, device)
        shared = LinearDiT.from_pretrained(transformer, dtype, "cpu" if offload else device)
        experts = load_experts(shared, folder, config["boundaries"])
        try:
            prompts = PromptEncoder(base, vae_dtype, device)
            self = cls(experts, stem, vae, prompts, config["boundaries"], config, offload)
        except ValueError as error:
            raise ValueError(f"{folder} on {base}: {error}") from None
        self.folder = base
        return self

    @torch.inference_mode(False)  # what is moved stays an ordinary parameter
    def use(self, k):
        """Expert k, on the device; with `offload` the one that was there before goes back to host memory."""
        if self.offload and k != self.on_device:
            if self.on_device is not None:
                self.experts[self.on_device].to("cpu")
            self.experts[k].to(self.device)
            self.on_device = k
        return self.experts[k]

    @torch.inference_mode()
    def restore(self, image: Image.Image, prompt: str | list = "", *, scale: int = 4, steps: int = 20, seed: int = 0,
                cfg: float = 1.0, suffix: str | None = None, tile: int | None = None, instruction: str | None = None,
                progress=None) -> Image.Image:
        """PIL image -> PIL image (RGB) of exactly `scale` times the size.

        The condition is the picture at a quarter of the result's size. So at scale 4 it is the picture itself; at scale
        1 or 2 it is made smaller first, and the detail lost by that is generated again.
        prompt, suffix, tile, instruction, progress: as SanaSR's; the stage dit counts the tiles of all steps.
        steps: evaluations of the network, at least 1 (with cfg ≠ 1 two each).
        seed: of the noise, which is drawn for the whole picture at once on the CPU: it depends on nothing but the seed
        and the latents' shape, so the result does not depend on the device or the order of the tiles.
        cfg: scale of classifier-free guidance, v_∅ + cfg·(v − v_∅) with the empty prompt's v_∅.
        """
        channels, done = self.vae.config["latent_channels"], 0  # steps

        def report(stage, tile, tiles):
            if stage != "dit":
                progress(stage, tile, tiles)
            elif tile or not done:  # of all steps
                progress(stage, done * tiles + tile, steps * tiles)

        clock, by_tiles = Stopwatch(self.device), self.tiling(tile, progress and report)
        how = sanasr.conditioning(self.metadata, suffix, None, instruction)
        c, m = self.encode_prompt(sanasr.build_prompt(prompt, how["suffix"]), how["instruction"])  # 1,T,Dt and 1,T
        terms = [(1.0, c, m)] if cfg == 1 else [(cfg, c, m), (1 - cfg, *self.encode_prompt(""))]
        clock.lap("text")
        k = 4 // math.gcd(4, scale)  # pixels of the input to one of the condition, or to `scale` of them
        x = np.pad(np.array(image.convert("RGB")), ((0, -image.height % k), (0, -image.width % k), (0, 0)), "edge")
        if scale != 4:
            small = scale * x.shape[1] // 4, scale * x.shape[0] // 4
            x = Image.fromarray(x).resize(small, Image.Resampling.BICUBIC)
        e = self.stem(self.to_tensor(x, self.dtype, STRIDE))  # 1,D,h,w
        clock.lap("stem")
        z = torch.randn((1, channels, *e.shape[2:]), generator=torch.Generator().manual_seed(seed)).to(self.device)

        def velocity(z, t):
            nonlocal done
            dit, tau = self.use(expert_of(t, self.boundaries)), torch.full((1,), 1000 * t, device=self.device)

            def f(part):  # latents and condition of one tile
                z, e = part[:, :channels], part[:, channels:]
                return sum(share * dit(z, tau, c, m, e).float() for share, c, m in terms)
            v = by_tiles("dit", f, torch.cat([z.to(self.dtype), e], 1))
            done += 1
            return v

        z = sample(velocity, z, steps)
        clock.lap("dit")
        result = self.decode(z, scale * image.width, scale * image.height, by_tiles)
        clock.lap("decode")
        self.stages = clock.laps
        return result
