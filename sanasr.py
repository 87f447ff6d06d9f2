"""SANA-SR: one-step real-world image super-resolution, the whole method in one file.

Read it top to bottom, in the order of the data. One 128×128 photo on its way to 512×512 (SANA-0.6B, B = 1):

    photo 128×128 ── bicubic ×4 ──►  x_L   1×3×512×512  in [-1, 1]
    x_L   ── DC-AE encoder · s ────►  z_L   1×32×16×16   32× smaller per side, s = 0.41407       (Eq. 1)
    tags ⊕ suffix ── Gemma-2 ──────►  c, m  1×T×2304 and 1×T, T ≤ 300                            (Eq. 2)
    z_L, τ = 900, c, m ── LinearDiT ► f     1×32×16×16   28 blocks over N = 256 tokens of 1152, + LoRA
    ẑ = z_L − σ_τ · f ─────────────►  ẑ     1×32×16×16   ONE update, nothing iterates            (Eq. 4)
    ẑ / s ── DC-AE decoder ────────►  x̂     1×3×512×512

Sections: configs · operators · DC-AE · Gemma-2 and its tokenizer · LinearDiT · LoRA · prompts · loading · SanaSR.

Shapes use one alphabet: B batch, C channels, H W picture or latent height and width, N = H·W tokens, T text tokens,
n heads of d channels. Module attributes carry the key names of the official checkpoints, so they load with
`strict=True` and no renaming. Paper: "Efficient One-Step Diffusion Restoration Model with Compact Token
Compression and Linear Attention" (arXiv 2605.23451); DC-AE: arXiv 2410.10733; SANA: arXiv 2410.10629.
"""
from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F

import kernels

# ---------------------------------------------------------------------------------------------------------------------
# Configs: the official config.json files, taken at their word
# ---------------------------------------------------------------------------------------------------------------------


def read_config(name, config, defaults, neutral=None, ignored=()):
    """`config` completed by `defaults`; every other key must be known.

    neutral: key -> the one value this code computes with; a list of that value is the same said for every stage.
    ignored: keys that do not touch the computation, like all that start with "_".
    Raises ValueError naming the key that this code does not honour.
    """
    neutral = neutral or {}
    for key, value in config.items():
        if key in defaults or key in ignored or key.startswith("_"):
            continue
        if key not in neutral:
            raise ValueError(f"{name} config: unknown key {key!r} (value {value!r})")
        if any(v != neutral[key] for v in (value if isinstance(value, (list, tuple)) else [value])):
            raise ValueError(f"{name} config: {key} = {value!r} is not supported, only {neutral[key]!r}")
    return defaults | {key: value for key, value in config.items() if key in defaults}


DCAE_DEFAULTS = dict(
    in_channels=3, latent_channels=32, attention_head_dim=32, scaling_factor=1.0,
    encoder_block_types="ResBlock", decoder_block_types="ResBlock",
    encoder_block_out_channels=(128, 256, 512, 512, 1024, 1024), encoder_layers_per_block=(2, 2, 2, 3, 3, 3),
    decoder_block_out_channels=(128, 256, 512, 512, 1024, 1024), decoder_layers_per_block=(3, 3, 3, 3, 3, 3),
    encoder_qkv_multiscales=((), (), (), (5,), (5,), (5,)), decoder_qkv_multiscales=((), (), (), (5,), (5,), (5,)),
    upsample_block_type="pixel_shuffle", downsample_block_type="pixel_unshuffle",
    encoder_out_shortcut=True, decoder_in_shortcut=True,
)
DCAE_NEUTRAL = dict(decoder_norm_types="rms_norm", decoder_act_fns="silu", decoder_conv_act_fn="relu")

# ---------------------------------------------------------------------------------------------------------------------
# Operators shared by the networks
# ---------------------------------------------------------------------------------------------------------------------


def to_tokens(x):
    """B,C,H,W -> B,H·W,C: a free view when x lies in memory channels-last, as everything here does."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def to_picture(x, height, width):
    """B,H·W,C -> B,C,H,W, again without a copy."""
    return x.unflatten(1, (height, width)).permute(0, 3, 1, 2)


class Linear(nn.Linear):
    """nn.Linear that can carry a low-rank adapter: y = W x + b + (α/r) B A x (Eq. 13); see `inject_lora`."""

    adapter_scale = 0.0  # α/r; 0 without an adapter or while it is switched off

    def forward(self, x):
        y = F.linear(x, self.weight.flatten(1), self.bias)
        if self.adapter_scale:
            y = y + self.adapter_scale * self.lora_B(self.lora_A(x))
        return y


class Conv1x1(Linear):
    """A 1×1 convolution, applied to tokens (B,N,C). Only the weight's official shape, (out, in, 1, 1), is a picture's."""

    def __init__(self, in_channels, out_channels, bias=True):
        super().__init__(in_channels, out_channels, bias=bias)
        self.weight = nn.Parameter(self.weight[:, :, None, None])


class RMSNorm(nn.Module):
    """x / rms(x) · weight (+ bias) over the last axis, computed in float32."""

    def __init__(self, channels, eps=1e-5, bias=False):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def forward(self, x):
        y = F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)  # the sum of squares is taken in float32
        return y if self.bias is None else y + self.bias


class GLUMBConv(nn.Module):
    """Mix-FFN: 1×1 expand, SiLU, depthwise 3×3, value · SiLU(gate), 1×1 project, on tokens B,N,C (SANA §2.3)."""

    def __init__(self, channels, hidden):
        super().__init__()
        self.conv_inverted = Conv1x1(channels, 2 * hidden)
        self.conv_depth = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.conv_point = Conv1x1(hidden, channels, bias=False)

    def forward(self, x, height, width):
        inverted, depth, point = self.conv_inverted, self.conv_depth, self.conv_point
        if inverted.adapter_scale or point.adapter_scale:  # an adapter sits between the two products: no fusion
            h = kernels.depthwise_gate(inverted(x), height, width, depth.weight, depth.bias)
            return point(h)
        return kernels.mix_ffn(x, height, width, inverted.weight, inverted.bias, depth.weight, depth.bias, point.weight)


# ---------------------------------------------------------------------------------------------------------------------
# DC-AE: the 32× deep compression autoencoder
# ---------------------------------------------------------------------------------------------------------------------


class ResBlock(nn.Module):
    """x + RMSNorm(conv(SiLU(conv x))): the high-resolution stages."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = RMSNorm(channels, bias=True)

    def forward(self, x):  # B,C,H,W
        h = self.conv2(F.silu(self.conv1(x)))
        return x + self.norm(h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class QKVAggregation(nn.Module):
    """One coarser scale of q, k, v: a depthwise convolution, then a 1×1 within every head's q, k and v."""

    def __init__(self, channels, head_dim, kernel_size):
        super().__init__()
        self.proj_in = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels, bias=False)
        self.proj_out = nn.Conv2d(channels, channels, 1, groups=channels // head_dim, bias=False)

    def forward(self, qkv):
        return self.proj_out(self.proj_in(qkv))


class MultiscaleLinearAttention(nn.Module):
    """x + RMSNorm(W [LA(qkv), LA(aggregated qkv)]): ReLU linear attention over all H·W positions (EfficientViT).

    Trap: q, k and v are concatenated *before* the heads are cut, and a head is 3·d consecutive channels of that, split
    into its q, k, v. So the weight called `to_q` does not hold only queries.
    """

    def __init__(self, channels, head_dim, kernel_sizes):
        super().__init__()
        self.head_dim = head_dim
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(channels, channels, bias=False)
        self.to_v = nn.Linear(channels, channels, bias=False)
        self.to_qkv_multiscale = nn.ModuleList(QKVAggregation(3 * channels, head_dim, k) for k in kernel_sizes)
        self.to_out = nn.Linear(channels * (1 + len(kernel_sizes)), channels, bias=False)
        self.norm_out = RMSNorm(channels, bias=True)

    def forward(self, x):  # B,C,H,W
        height, width = x.shape[2:]
        tokens = to_tokens(x)  # B,N,C
        qkv = torch.cat([self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)], dim=2)  # B,N,3C
        scales = [qkv] + [to_tokens(m(to_picture(qkv, height, width))) for m in self.to_qkv_multiscale]
        qkv = torch.cat(scales, dim=2).unflatten(2, (-1, 3 * self.head_dim))  # B,N,n,3d
        h = kernels.linear_attention(*qkv.chunk(3, dim=3), eps=1e-15).flatten(2)  # B,N,n·d
        return x + to_picture(self.norm_out(self.to_out(h)), height, width)


class GatedConv(GLUMBConv):
    """The EfficientViT block's feed-forward: the Mix-FFN of ratio 4, normalised before its own residual."""

    def __init__(self, channels):
        super().__init__(channels, 4 * channels)
        self.norm = RMSNorm(channels, bias=True)

    def forward(self, x):  # B,C,H,W
        return x + to_picture(self.norm(super().forward(to_tokens(x), *x.shape[2:])), *x.shape[2:])


class EfficientViTBlock(nn.Module):
    """Global mixing by linear attention, then local mixing: the low-resolution stages."""

    def __init__(self, channels, head_dim, kernel_sizes):
        super().__init__()
        self.attn = MultiscaleLinearAttention(channels, head_dim, kernel_sizes)
        self.conv_out = GatedConv(channels)

    def forward(self, x):
        return self.conv_out(self.attn(x))


class DownBlock(nn.Module):
    """Half the size: a strided convolution (or convolution + space-to-channel), plus the space-to-channel shortcut
    whose 4·C_in channels are averaged in adjacent groups down to C_out (DC-AE §3.2)."""

    def __init__(self, in_channels, out_channels, strided, shortcut=True):
        super().__init__()
        self.out_channels, self.strided, self.shortcut = out_channels, strided, shortcut
        self.conv = nn.Conv2d(in_channels, out_channels if strided else out_channels // 4, 3, 2 if strided else 1, 1)

    def forward(self, x):  # B,C,H,W -> B,C',H/2,W/2
        h = self.conv(x) if self.strided else F.pixel_unshuffle(self.conv(x), 2)
        return h + F.pixel_unshuffle(x, 2).unflatten(1, (self.out_channels, -1)).mean(2) if self.shortcut else h


class UpBlock(nn.Module):
    """Twice the size: nearest-neighbour + convolution (or convolution + channel-to-space), plus the channel-to-space
    shortcut of the input with every channel repeated."""

    def __init__(self, in_channels, out_channels, nearest, shortcut=True):
        super().__init__()
        self.nearest, self.repeats = nearest, 4 * out_channels // in_channels if shortcut else 0
        self.conv = nn.Conv2d(in_channels, out_channels if nearest else 4 * out_channels, 3, padding=1)

    def forward(self, x):  # B,C,H,W -> B,C',2H,2W
        h = self.conv(F.interpolate(x, scale_factor=2)) if self.nearest else F.pixel_shuffle(self.conv(x), 2)
        return h + F.pixel_shuffle(x.repeat_interleave(self.repeats, 1), 2) if self.repeats else h


def dcae_stage(config, side, i):
    """The blocks of stage i of the encoder or decoder as `config` describes them."""
    channels, kind = config[f"{side}_block_out_channels"][i], config[f"{side}_block_types"]
    kind = kind if isinstance(kind, str) else kind[i]
    depth, scales = config[f"{side}_layers_per_block"][i], config[f"{side}_qkv_multiscales"][i]
    if kind == "ResBlock":
        return [ResBlock(channels) for _ in range(depth)]
    return [EfficientViTBlock(channels, config["attention_head_dim"], scales) for _ in range(depth)]


class Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        widths, depths = config["encoder_block_out_channels"], config["encoder_layers_per_block"]
        strided, self.latent_channels = config["downsample_block_type"] == "Conv", config["latent_channels"]
        # a first stage of depth 0: nothing happens at full resolution, the picture goes straight to the second width
        self.conv_in = (nn.Conv2d(config["in_channels"], widths[0], 3, padding=1) if depths[0]
                        else DownBlock(config["in_channels"], widths[1], strided, shortcut=False))
        self.down_blocks = nn.ModuleList()
        for i, depth in enumerate(depths):
            down = [DownBlock(widths[i], widths[i + 1], strided)] if depth and i + 1 < len(widths) else []
            self.down_blocks.append(nn.Sequential(*dcae_stage(config, "encoder", i), *down))
        self.conv_out = nn.Conv2d(widths[-1], self.latent_channels, 3, padding=1)
        self.out_shortcut = config["encoder_out_shortcut"]

    def forward(self, x):  # B,3,H,W -> B,C,H/32,W/32
        x = self.conv_in(x)
        for stage in self.down_blocks:
            x = stage(x)
        z = self.conv_out(x)
        return z + x.unflatten(1, (self.latent_channels, -1)).mean(2) if self.out_shortcut else z


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        widths, depths = config["decoder_block_out_channels"], config["decoder_layers_per_block"]
        nearest, out_channels = config["upsample_block_type"] == "interpolate", config["in_channels"]
        self.conv_in = nn.Conv2d(config["latent_channels"], widths[-1], 3, padding=1)
        self.repeats = widths[-1] // config["latent_channels"] if config["decoder_in_shortcut"] else 0
        self.up_blocks = nn.ModuleList()  # listed from high resolution to low, run from low to high
        for i, depth in enumerate(depths):
            up = [UpBlock(widths[i + 1], widths[i], nearest)] if depth and i + 1 < len(widths) else []
            self.up_blocks.append(nn.Sequential(*up, *dcae_stage(config, "decoder", i)))
        last = widths[0] if depths[0] else widths[1]
        self.norm_out = RMSNorm(last, bias=True)
        self.conv_out = (nn.Conv2d(last, out_channels, 3, padding=1) if depths[0]
                         else UpBlock(last, out_channels, nearest, shortcut=False))

    def forward(self, z):  # B,C,h,w -> B,3,32h,32w
        x = self.conv_in(z)
        if self.repeats:
            x = x + z.repeat_interleave(self.repeats, 1)
        for stage in reversed(self.up_blocks):
            x = stage(x)
        x = self.norm_out(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.conv_out(F.relu(x))


class DCAE(nn.Module):
    """The deep compression autoencoder (diffusers' AutoencoderDC): 32× smaller per side with six stages.

    Raises ValueError where a picture's sides are no multiples of that factor.
    """

    def __init__(self, config: dict):
        super().__init__()
        self.config = config = read_config("DCAE", config, DCAE_DEFAULTS, DCAE_NEUTRAL)
        self.factor = 2 ** (len(config["encoder_block_out_channels"]) - 1)
        self.encoder, self.decoder = Encoder(config), Decoder(config)

    def encode(self, x):
        """Picture B,3,H,W in [-1, 1] -> latents B,C,H/32,W/32, not yet multiplied by `scaling_factor`."""
        if x.shape[2] % self.factor or x.shape[3] % self.factor:
            raise ValueError(f"DCAE.encode: sides must be multiples of {self.factor}, got {tuple(x.shape)}")
        return self.encoder(x.contiguous(memory_format=torch.channels_last))

    def decode(self, z):
        """Latents B,C,h,w (divided by `scaling_factor`) -> picture B,3,32h,32w, not clamped."""
        return self.decoder(z.contiguous(memory_format=torch.channels_last))
