"""The training objective, which train.py and prune.py share: Algorithm 1's losses and the frozen networks around them.

    values = losses(f, f0, vae, batch, tau, lpips)      {"mse": …, "lpips": …, "align": …, "cons": …}
    f, f0 = in_float32(dit), prior(dit)                 the adapted and the frozen network
    vae = Latents(model.vae, model.scaling_factor)      pictures <-> scaled latents
    conditions = Conditions(model)                      prompts -> text states and masks
"""
from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from tqdm import tqdm

import weights
from metrics import LPIPS
from photos.pictures import one_line, reason
from runs import UserError
from sanasr import adapters_off, conditioning, one_step, sigma

LAMBDA = {"mse": 1.0, "lpips": 2.0, "align": 1.0, "cons": 1.0}
PROTOCOLS = {"hq": (900, (70, 650)), "lq": (999, (20, 980))}  # τ, and the range of t, both ends included

# --- Losses ---


def mse(x, target):
    """‖x̂ − x_H‖² per value, on pictures in [-1, 1] that are not clamped."""
    return F.mse_loss(x, target)


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


def consistency_loss(f, q):
    """Adapter consistency (Eq. 6): mean squared difference of the adapted and the frozen network's answers."""
    return F.mse_loss(f, q)


def noised(z, t, noise):
    """z̃ = (1−σ_t)·z + σ_t·ε for z, noise: B,C,h,w and t: B."""
    s = sigma(t).view(-1, 1, 1, 1)
    return (1 - s) * z + s * noise


def losses(f, f0, vae, batch, tau, lpips=None, terms=LAMBDA):
    """The terms of Algorithm 1 for one batch, each a scalar, as {name: value} of those named in `terms`.

    f, f0:  (z, t, c, m) -> prediction, the adapted and the frozen network, float32 outside (see `in_float32`)
    vae:    a `Latents`
    batch:  x_L, x_H: B,3,H,W in [-1, 1]; c: B,T,Dt and m: B,T; t: B; noise: B,C,H/32,W/32
    Gradients flow through ẑ into every term, through f0 as well; f0's weights do not move and z_H's side is a target.
    """
    x_h, c, m, t = batch["x_H"], batch["c"], batch["m"], batch["t"]
    with torch.no_grad():
        z_l, z_h = vae.encode(batch["x_L"]), vae.encode(x_h)
    z = one_step(f, z_l, torch.full_like(t, tau), c, m)
    x = vae.decode(z)
    values = {"mse": mse(x, x_h)}
    if "lpips" in terms:
        values["lpips"] = lpips(x, x_h).mean()
    if "align" in terms or "cons" in terms:
        z_noised = noised(z, t, batch["noise"])
        q = f0(z_noised, t, c, m)
    if "align" in terms:
        with torch.no_grad():
            q_h = f0(noised(z_h, t, batch["noise"]), t, c, m)
        values["align"] = align_loss(q, q_h)
    if "cons" in terms:
        values["cons"] = consistency_loss(f(z_noised, t, c, m), q)
    return values


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


def load_lpips(net):
    """(LPIPS, its network): VGG16 as in the paper, or AlexNet, which is bundled, where that is unavailable."""
    if net == "vgg":
        try:
            return LPIPS.from_pretrained("vgg"), "vgg"
        except weights.Unavailable as error:
            print(f"note: the LPIPS loss uses AlexNet: {reason(error)}", file=sys.stderr)
    return LPIPS.from_pretrained("alex"), "alex"


def in_autocast(lpips, device, dtype):
    """lpips with its convolutions in dtype: VGG16's are most of a step's work and take half the time in bfloat16."""
    def f(x, y):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return lpips(x, y)
    return f


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

    def prepare(self, prompts, chunk=64):
        """Encode what the disk does not have yet; the text encoder is loaded once a chunk, and only if needed.

        Raises UserError in one line for a broken text encoder or tokenizer.
        """
        for i in tqdm(range(0, len(prompts), chunk), "encoding prompts", leave=False, disable=len(prompts) <= chunk):
            try:
                self.model.encode_prompt(prompts[i:i + chunk])
            except (OSError, ValueError) as error:
                raise UserError(f"{one_line(error)}")

    def __call__(self, prompts, length=None):
        """-> c: B,T,Dt and m: B,T, padded on the right to `length` or the longest, the padding masked."""
        c, m = (torch.nn.utils.rnn.pad_sequence(x, batch_first=True)
                for x in zip(*map(self.one, prompts), strict=True))
        extra = (length or c.shape[1]) - c.shape[1]
        return put(F.pad(c, (0, 0, 0, extra)), self.model.device), put(F.pad(m, (0, extra)), self.model.device)


# --- Settings that depend on the model ---


def fill_defaults(args, model, metadata=None):
    """Fill in crop, timestep, suffix, tags and lpips of train.py's or prune.py's arguments where they are None.

    metadata: of the adapter whose training goes on in other hands, as in prune.py: its words go before the defaults.
    Raises UserError for a crop that does not fit the model.
    """
    from photos.degrade import MIN_SIZE
    embedded = args.model == "embedded"
    args.crop = args.crop or model.dit.config["sample_size"] * model.vae.factor
    if args.crop % model.vae.factor or args.crop < MIN_SIZE:
        raise UserError(f"--crop {args.crop}: it must be a multiple of {model.vae.factor} and at least {MIN_SIZE}")
    how = conditioning(metadata or {}, args.suffix, args.timestep, default_timestep=PROTOCOLS[args.protocol][0])
    args.suffix, args.timestep = how["suffix"], how["timestep"]
    args.tags = args.tags or ("none" if embedded else "ram")
    args.lpips = args.lpips or ("alex" if embedded else "vgg")
