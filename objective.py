"""The training objective, which train.py and prune.py share: Algorithm 1's losses and the frozen networks around them.

    values = losses(f, f0, vae, batch, tau, lpips)      {"loss": …, "mse": …, "lpips": …, "align": …, "cons": …}
    f, f0 = in_float32(dit), prior(dit)                 the adapted and the frozen network
    vae = Latents(model.vae, model.scaling_factor)      pictures <-> scaled latents
    conditions = Conditions(model)                      prompts -> text states and masks
"""
from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from tqdm import tqdm

import weights
from metrics import LPIPS
from photos.degrade import MIN_SIZE
from photos.pictures import reason
from runs import UserError, from_first, ranks
from sanasr import adapters_off, conditioning, one_step, sigma

PROTOCOLS = {"hq": (900, (70, 650)), "lq": (999, (20, 980))}  # τ, and the range of t, both ends included

# --- Losses ---


def align_loss(q, q_target, eps=1e-6):
    """Frozen-prior alignment (Eq. 5): the divergence of two Gaussians per sample and channel, B,C,h,w -> scalar.

        1/(2BC) Σ [ log((s_H+ε)/(s_ẑ+ε)) + (s_ẑ + (μ_ẑ−μ_H)²)/(s_H+ε) − 1 ]

    μ and s: spatial mean and population variance of the prior's answers to ẑ (q) and to z_H (q_target), both noised
    by the same t and ε.
    """
    var, mean = torch.var_mean(q, (2, 3), correction=0)                        # B,C
    var_t, mean_t = torch.var_mean(q_target, (2, 3), correction=0)
    ratio = (var + (mean - mean_t).square()) / (var_t + eps)
    return 0.5 * (torch.log((var_t + eps) / (var + eps)) + ratio - 1).mean()


def noised(z, t, noise):
    """z̃ = (1−σ_t)·z + σ_t·ε for z, noise: B,C,h,w and t: B."""
    s = sigma(t).view(-1, 1, 1, 1)
    return (1 - s) * z + s * noise


class Update:
    """What Algorithm 1 computes of one batch, each quantity when a term first asks for it.

    f, f0:  (z, t, c, m) -> prediction, the adapted and the frozen network, float32 outside (see `in_float32`)
    vae:    a `Latents`; lpips: (x, x_H, batch) -> B, see `load_lpips`
    batch:  x_L, x_H: B,3,H,W in [-1, 1]; c: B,T,Dt and m: B,T; t: B; noise: B,C,H/32,W/32; shift: B,2
    target: whether x_H is encoded in one pass with x_L, for z_H and q_h
    Gradients flow through ẑ into every term, through f0 as well; f0's weights do not move and z_H's side is a target.
    So f0 takes z_H's side apart: in one batch with ẑ's the backward pass would go through both. At batch 4 of 512
    pixels, of official size, that would be 3 % more operations and 2.8 GB more of activations (counted).
    """

    def __init__(self, f, f0, vae, batch, tau, lpips=None, target=True):
        self.f, self.f0, self.vae, self.batch, self.tau, self.lpips = f, f0, vae, batch, tau, lpips
        self.x_h, self.t, self.prompt, self.target = batch["x_H"], batch["t"], (batch["c"], batch["m"]), target

    @cached_property
    @torch.no_grad()
    def encoded(self):  # z_L, z_H
        pictures = [self.batch["x_L"], self.x_h][:1 + self.target]
        return self.vae.encode(torch.cat(pictures)).split(len(self.t))

    @cached_property
    def z(self):  # ẑ
        z_l, *_ = self.encoded
        return one_step(self.f, z_l, torch.full_like(self.t, self.tau), *self.prompt)

    @cached_property
    def x(self):  # x̂, not clamped
        return self.vae.decode(self.z)

    @cached_property
    def z_noised(self):
        return noised(self.z, self.t, self.batch["noise"])

    @cached_property
    def q(self):
        return self.f0(self.z_noised, self.t, *self.prompt)

    @cached_property
    @torch.no_grad()
    def q_h(self):
        _, z_h = self.encoded
        return self.f0(noised(z_h, self.t, self.batch["noise"]), self.t, *self.prompt)


def cells(error, period):
    """An error B,3,H,W without its mean, in whole cells: B,3,H/period,period,W/period,period."""
    error = error[:, :, :error.shape[2] // period * period, :error.shape[3] // period * period]
    return (error - error.mean((2, 3), keepdim=True)).unflatten(3, (-1, period)).unflatten(2, (-1, period))


def repeated(error, period):
    """The mean square of what of an error, B,3,H,W, repeats every `period` pixels in both directions, a scalar."""
    return cells(error, period).mean((2, 4)).square().mean()


def latent_error(z, z_l, z_h):
    """The mean over samples of ‖ẑ − z_H‖² / (d + mean d), d = ‖z_L − z_H‖², a scalar; z, z_l, z_h: B,C,h,w.

    The mean square alone is noisy photos' affair: their d is several times that of clean ones.
    """
    error, d = ((v - z_h).square().mean((1, 2, 3)) for v in (z, z_l))
    return (error / (d + d.mean()).clamp(min=1e-6)).mean()


@dataclass(frozen=True)
class Term:
    """One term of the loss: the paper's λ, 0 for a term that it does not have, and Update -> scalar."""
    weight: float
    function: Callable


# A new term is one line here, its test and one line in docs/usage.md; `--no-NAME` follows.
TERMS = {
    "mse": Term(1.0, lambda u: F.mse_loss(u.x, u.x_h)),
    "lpips": Term(2.0, lambda u: u.lpips(u.x, u.x_h, u.batch).mean()),
    "align": Term(1.0, lambda u: align_loss(u.q, u.q_h)),                                               # Eq. 5
    "cons": Term(1.0, lambda u: F.mse_loss(u.f(u.z_noised, u.t, *u.prompt), u.q)),                      # Eq. 6
    "lattice": Term(0.0, lambda u: repeated(u.x - u.x_h, 8) + repeated(u.x - u.x_h, 32)),
    "latent": Term(0.0, lambda u: latent_error(u.z, *u.encoded)),  # alone it needs no decoder: train.py --latent
}
PAPER = {name: term.weight for name, term in TERMS.items() if term.weight}
REC_AND_ALIGN = {name: PAPER[name] for name in ("mse", "lpips", "align")}  # of the calibration (Eq. 21)


def losses(f, f0, vae, batch, tau, lpips=None, weights=PAPER):
    """{"loss": Σ λ·term, name: term, …} of Algorithm 1 for one batch, each a scalar. weights: {name of a term: λ}.

    The other arguments are those of `Update`.
    """
    update = Update(f, f0, vae, batch, tau, lpips, bool({"align", "latent"} & {*weights}))
    values = {name: TERMS[name].function(update) for name in weights}
    return {"loss": sum(weights[name] * value for name, value in values.items())} | values


def omega(t):
    """ω(t) = 1 − log(t+1)/log(T+1), T = 1000 (Eq. 22): 1 at t = 0, 0 at t = 1000."""
    return 1 - math.log(t + 1) / math.log(1001)


def calibration_loss(update):
    """L_cal of pruning, ω(t)·(L_rec + L_align), for the `Update` of one sample, a scalar (Eq. 21)."""
    return omega(update.t.item()) * sum(w * TERMS[name].function(update) for name, w in REC_AND_ALIGN.items())


def lattice(error, period=32):
    """The share of an error's variance that repeats every `period` pixels in both directions, 0 to 1.

    error: x̂ − x_H, B,3,H,W, at least four periods a side. Of white noise the share is 1 / (number of periods).
    """
    return (repeated(error, period) / cells(error, period).square().mean().clamp(min=1e-12)).item()


def judged(x, x_l, x_h, lpips):
    """What validation says of one x̂: (x̂ in 8 bits, PSNR over R, G and B in dB, LPIPS, a row x_L | x̂ | x_H in [0, 1]).

    x, x_l, x_h: 1,3,H,W in [-1, 1], and so is the first that is returned; x need not be clamped. lpips: a metric.
    """
    x = ((x.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
    psnr = 10 * math.log10(4 / max((x - x_h).square().mean().item(), 1e-10))
    return x, psnr, lpips(x, x_h).item(), torch.cat([x_l, x, x_h], 3)[0].cpu() / 2 + 0.5


# --- The frozen networks, as the losses see them ---


def in_float32(dit):
    """dit as a function with float32 latents outside, whatever dtype its weights have."""
    dtype = next(dit.parameters()).dtype
    return lambda z, t, c, m: dit(z.to(dtype), t, c.to(dtype), m).float()


def prior(dit):
    """f0: the same network with its adapters off."""
    f = in_float32(dit)

    def f0(*args):
        with adapters_off(dit):
            return f(*args)
    return f0


class Latents:
    """The DC-AE between pictures and scaled latents, float32 outside."""

    def __init__(self, vae, scale):
        self.vae, self.scale, self.dtype = vae, scale, next(vae.parameters()).dtype

    def encode(self, x):
        return self.vae.encode(x.to(self.dtype)).float() * self.scale

    def decode(self, z):
        return self.vae.decode((z / self.scale).to(self.dtype)).float()


def load_lpips(net, device, dtype):
    """((x, x_H, batch) -> B, the network's name): LPIPS by VGG16, or by AlexNet where VGG16's weights are unavailable.

    Unshifted, AlexNet's LPIPS draws a dot in each 32-pixel cell (docs/training.md, T7): it sees both pictures without
    their first rows and columns, batch["shift"], 0 to 31 of them. The first rank decides for all.
    """
    lpips = None
    try:
        lpips = LPIPS.from_pretrained(net) if ranks()[0] == 0 else None
    except weights.Unavailable as error:
        print(f"note: the LPIPS loss uses AlexNet: {reason(error)}", file=sys.stderr)
        net = "alex"
    net = from_first(lambda: net)
    lpips = (lpips or LPIPS.from_pretrained(net)).to(device)

    def judge(x, x_h, batch):
        top, left = batch["shift"][0].tolist() if net == "alex" else (0, 0)
        with torch.autocast(device.type, dtype, dtype != torch.float32):  # bfloat16 takes half the time
            return lpips(x[:, :, top:, left:], x_h[:, :, top:, left:])
    return judge, net


def put(x, device):
    """x, from host memory, on the device. A copy to a GPU does not wait for what runs there."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


class Conditions:
    """Prompts -> text states, from the disk where `SanaSR.encode_prompt` keeps them; KEPT bytes stay in host memory."""

    KEPT = 10**9

    def __init__(self, model):
        self.model, self.kept, self.size = model, {}, 0

    def one(self, prompt):
        """c: T,Dt and m: T in host memory."""
        if prompt not in self.kept:
            c, m = self.model.prompts(prompt)
            c, m = c[0].to(self.model.dtype, copy=True), m[0].clone()  # no longer inference-mode tensors
            self.kept[prompt] = c, m
            self.size += c.nbytes
            while self.size > self.KEPT and len(self.kept) > 1:
                self.size -= self.kept.pop(next(iter(self.kept)))[0].nbytes  # the oldest
        return self.kept[prompt]

    def longest(self, prompts):
        """The most tokens of any of the prompts."""
        return max(len(self.one(prompt)[1]) for prompt in prompts)

    def prepare(self, prompts, chunk=512):
        """Encode what the disk does not have yet; the text encoder is loaded once a chunk, and only if needed."""
        for i in tqdm(range(0, len(prompts), chunk), "encoding prompts", leave=False, disable=len(prompts) <= chunk):
            self.model.encode_prompt(prompts[i:i + chunk])

    def __call__(self, prompts, length=None):
        """-> c: B,T,Dt and m: B,T, padded on the right to `length` or the longest, the padding masked."""
        c, m = (torch.nn.utils.rnn.pad_sequence(x, batch_first=True)
                for x in zip(*map(self.one, prompts), strict=True))
        extra = (length or c.shape[1]) - c.shape[1]
        return put(F.pad(c, (0, 0, 0, extra)), self.model.device), put(F.pad(m, (0, extra)), self.model.device)


# --- Settings that depend on the model ---


def fill_crop(args, model):
    """Fill in crop, pixels, where it is None. Raises UserError where it does not fit the model."""
    args.crop = args.crop or model.dit.config["sample_size"] * model.vae.factor
    if args.crop % model.vae.factor or args.crop < MIN_SIZE:
        raise UserError(f"--crop {args.crop}: it must be a multiple of {model.vae.factor} and at least {MIN_SIZE}")


def fill_defaults(args, model, metadata=None):
    """Fill in crop, timestep, suffix, tags and lpips of train.py's or prune.py's arguments where they are None.

    metadata: of the adapter that is trained further or pruned; its words go before the defaults. tags and lpips: what
    the model's provenance.json names, else those of the paper. Raises UserError for a crop that does not fit the model.
    Returns {name: λ}: the paper's, with those that provenance.json names in their place.
    """
    fill_crop(args, model)
    tau, metadata = PROTOCOLS[args.protocol][0], metadata or {}
    other = metadata.get("protocol", args.protocol) != args.protocol  # the adapter's τ is that of its protocol
    how = conditioning(metadata, args.suffix, tau if other and args.timestep is None else args.timestep,
                       default_timestep=tau)
    args.suffix, args.timestep = how["suffix"], how["timestep"]
    about = model.folder / "provenance.json"
    own = json.loads(about.read_text()).get("training", {}) if about.is_file() else {}
    args.tags, args.lpips = args.tags or own.get("tags", "ram"), args.lpips or own.get("lpips", "vgg")
    return PAPER | own.get("losses", {})
