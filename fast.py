"""The same numbers sooner: exact rewrites of a loaded model, for inference.

    model = fast.optimise(SanaSR.from_pretrained("sana-600m-512"))      # in place, and returned

`sanasr.py` stays the readable path; what stands here replaces its modules by others that compute the same function of
the same weights (float32: within 1e-4, see tests/test_fast.py) with fewer multiplications or fewer bytes, from public
PyTorch operators alone. `python bench.py --rewrites` measures those of the autoencoder one by one:

    UpBlock      nearest ×2, then 3×3 = four 2×2 convolutions on the small picture, 2.25 times fewer multiplications;
                 the channel-to-space shortcut is one more tap of theirs
    DownBlock    the space-to-channel shortcut is a tap of the strided convolution
    ResBlock     SiLU in place; RMSNorm, gain, bias and residual strip by strip, so that they pass memory once
    attention    q, k and v in one product; the scales' heads joined after the attention, a third of the bytes
    LinearDiT    text keys and values and the timestep's modulation kept from call to call; AdaLN as one layer_norm

Trap: the modules work in place on their own intermediates. No gradients, no adapters: merge them first.
"""
from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F

import kernels
import sanasr
from sanasr import to_picture, to_tokens

STRIP = 64 * 1024  # values that a strip of the normalisation holds: 256 KB in float32, within a core's L2 cache


def merged(*linears):
    """One nn.Linear that computes several of the same input, outputs joined."""
    first = linears[0]
    with torch.device("meta"):
        joined = nn.Linear(first.in_features, sum(m.out_features for m in linears), bias=first.bias is not None)
    joined.weight = frozen(torch.cat([m.weight for m in linears]))
    if first.bias is not None:
        joined.bias = frozen(torch.cat([m.bias for m in linears]))
    return joined


def frozen(x):
    return nn.Parameter(x, requires_grad=False)


# ---------------------------------------------------------------------------------------------------------------------
# DC-AE
# ---------------------------------------------------------------------------------------------------------------------


def add_norm_(x, h, norm):
    """x + norm(h) (or norm(h) where x is None), written over h. x, h: B,N,C; norm: RMSNorm with a bias.

    On a GPU a strip is the whole; on a CPU everything between reading h and writing it stays in cache.
    """
    weight, bias = norm.weight.float(), norm.bias.float()
    rows = max(1, STRIP // h.shape[2]) if h.device.type == "cpu" else h.shape[0] * h.shape[1]
    h = h.contiguous()
    residuals = [None] if x is None else x.flatten(0, 1).split(rows)
    for i, part in enumerate(h.flatten(0, 1).split(rows)):  # n,C
        y = part.float()  # part itself in float32
        mean = torch.linalg.vector_norm(y, dim=1, keepdim=True).square_().div_(y.shape[1])
        y.mul_(mean.add_(norm.eps).rsqrt_())
        if x is None:
            y.mul_(weight)
        else:
            torch.addcmul(residuals[i].float(), y, weight, out=y)
        y.add_(bias)
        if y.dtype != part.dtype:
            part.copy_(y)
    return h


class Norm(nn.Module):
    """RMSNorm with a bias, strip by strip, over its input."""

    def __init__(self, plain):
        super().__init__()
        self.weight, self.bias, self.eps = plain.weight, plain.bias, plain.eps

    def forward(self, x):  # B,H,W,C
        tokens = x.flatten(1, 2)
        return add_norm_(None, tokens, self).view(x.shape)


class ResBlock(nn.Module):
    """x + RMSNorm(conv(SiLU(conv x)))."""

    def __init__(self, plain):
        super().__init__()
        self.conv1, self.conv2, self.norm = plain.conv1, plain.conv2, plain.norm

    def forward(self, x):  # B,C,H,W
        h = self.conv2(F.silu(self.conv1(x), inplace=True))
        return to_picture(add_norm_(to_tokens(x), to_tokens(h), self.norm), *x.shape[2:])


class QKVAggregation(nn.Module):
    """The depthwise convolution, then the 1×1 within every head's q, k and v as one batched matrix product."""

    def __init__(self, plain):
        super().__init__()
        self.proj_in, groups = plain.proj_in, plain.proj_out.groups
        self.weight = frozen(plain.proj_out.weight.flatten(1).unflatten(0, (groups, -1)).transpose(1, 2).contiguous())

    def forward(self, qkv):  # B,3C,H,W
        x = to_tokens(self.proj_in(qkv)).unflatten(2, (len(self.weight), -1))  # B,N,groups,d
        y = torch.matmul(x.transpose(1, 2), self.weight).transpose(1, 2).flatten(2)  # B,N,3C
        return to_picture(y, *qkv.shape[2:])


class MultiscaleLinearAttention(nn.Module):
    """One QKV product; the scales attend apart and only their results are joined."""

    def __init__(self, plain):
        super().__init__()
        self.head_dim, self.scales, self.norm = plain.head_dim, plain.to_qkv_multiscale, plain.norm_out
        self.to_qkv, self.to_out = merged(plain.to_q, plain.to_k, plain.to_v), plain.to_out

    def forward(self, x):  # B,C,H,W
        height, width = x.shape[2:]
        tokens = to_tokens(x)  # B,N,C
        qkv = self.to_qkv(tokens)  # B,N,3C
        scales = [qkv] + [to_tokens(m(to_picture(qkv, height, width))) for m in self.scales]
        h = torch.cat([self.attend(y) for y in scales], dim=2) if self.scales else self.attend(qkv)
        return to_picture(add_norm_(tokens, self.to_out(h), self.norm), height, width)

    def attend(self, qkv):  # B,N,3C -> B,N,C
        q, k, v = qkv.unflatten(2, (-1, 3 * self.head_dim)).chunk(3, dim=3)  # B,N,n,d
        return kernels.linear_attention(q, k, v, eps=1e-15).flatten(2)


class GatedConv(sanasr.GLUMBConv):
    """The Mix-FFN with its norm and residual strip by strip."""

    def __init__(self, plain):
        nn.Module.__init__(self)
        self.conv_inverted, self.conv_depth, self.conv_point = plain.conv_inverted, plain.conv_depth, plain.conv_point
        self.norm = plain.norm

    def forward(self, x):  # B,C,H,W
        tokens = to_tokens(x)
        return to_picture(add_norm_(tokens, super().forward(tokens, *x.shape[2:]), self.norm), *x.shape[2:])


def down_block(plain):
    """The strided convolution of a DownBlock that holds its shortcut, too.

    Channel o of the shortcut is the mean of `group` adjacent channels 4c + 2dy + dx of the space-to-channel picture,
    and that is pixel (2i + dy, 2j + dx) of channel c: tap (1 + dy, 1 + dx) of the convolution.
    """
    conv = plain.conv
    if not plain.strided or not plain.shortcut:
        return plain
    weight = conv.weight.float().clone()  # C',C,3,3
    group = 4 * weight.shape[1] // plain.out_channels
    for channel in range(4 * weight.shape[1]):
        c, dy, dx = channel // 4, channel // 2 % 2, channel % 2
        weight[channel // group, c, 1 + dy, 1 + dx] += 1 / group
    conv.weight = frozen(weight.to(conv.weight.dtype).contiguous(memory_format=torch.channels_last))
    return conv


class UpBlock(nn.Module):
    """Nearest ×2 and 3×3 as one 2×2 convolution to the four phases (dy, dx) of the result, with the shortcut in it.

    Pixel 2i + dy of the large picture sees rows i − 1, i, i of the small one (dy = 0) or i, i, i + 1 (dy = 1): two taps
    whose weights are sums of the three.
    """

    TAPS = torch.tensor([[[1., 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])  # dy, tap of two, tap of three

    def __init__(self, plain):
        super().__init__()
        w, taps = plain.conv.weight.float(), self.TAPS.to(plain.conv.weight.device)
        w = torch.einsum("ypk,xql,ockl->yxocpq", taps, taps, w)  # 2,2,C',C,2,2
        for channel in range(w.shape[3] * plain.repeats):  # of the repeated input: 4·o + 2·dy + dx
            o, dy, dx = channel // 4, channel // 2 % 2, channel % 2
            w[dy, dx, o, channel // plain.repeats, 1 - dy, 1 - dx] += 1
        w = w.flatten(0, 2).to(plain.conv.weight.dtype)  # 4C',C,2,2
        self.weight = frozen(w.contiguous(memory_format=torch.channels_last))
        self.bias = frozen(plain.conv.bias.repeat(4))

    def forward(self, x):  # B,C,H,W -> B,C',2H,2W
        batch, _, height, width = x.shape
        h = F.conv2d(x, self.weight, self.bias, padding=1).unflatten(1, (2, 2, -1))  # B,2,2,C',H+1,W+1
        y = torch.empty(batch, h.shape[3], 2 * height, 2 * width, dtype=x.dtype, device=x.device,
                        memory_format=torch.channels_last)
        for dy in range(2):
            for dx in range(2):
                y[:, :, dy::2, dx::2] = h[:, dy, dx, :, dy:dy + height, dx:dx + width]
        return y


REWRITES = {
    "up": (sanasr.UpBlock, lambda plain: UpBlock(plain) if plain.nearest else plain),
    "down": (sanasr.DownBlock, down_block),
    "res": (sanasr.ResBlock, ResBlock),
    "aggregation": (sanasr.QKVAggregation, QKVAggregation),
    "attention": (sanasr.MultiscaleLinearAttention, MultiscaleLinearAttention),
    "gated": (sanasr.GatedConv, GatedConv),
    "norm": (sanasr.RMSNorm, lambda plain: plain if plain.bias is None else Norm(plain)),
}


def optimise_vae(vae, rewrites=tuple(REWRITES)):
    """Rewrite a sanasr.DCAE in place, and return it. rewrites: names in REWRITES, by default all."""
    rules = [REWRITES[name] for name in rewrites]
    for convolution in (m for m in vae.modules() if isinstance(m, nn.Conv2d)):
        convolution.weight = frozen(convolution.weight.contiguous(memory_format=torch.channels_last))

    def walk(module):
        for name, child in module.named_children():
            for kind, make in rules:
                if type(child) is kind and not (kind is sanasr.RMSNorm and not isinstance(module, sanasr.Decoder)):
                    child = make(child)  # the norms inside of blocks are the blocks' matter
                    setattr(module, name, child)
            walk(child)

    walk(vae)
    return vae.requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# LinearDiT
# ---------------------------------------------------------------------------------------------------------------------


class FastDiT(nn.Module):
    """sanasr.LinearDiT, called in the same way; what depends on the prompt or the timestep alone is kept.

    Kept for the last (t, c, mask), compared by value: per block the keys and values of the text, B,n,T,d each, and the
    six modulation vectors, B,1,D.
    """

    def __init__(self, plain):
        super().__init__()
        if sanasr.lora_modules(plain):
            raise ValueError("fast.optimise: the adapters are not merged; call sanasr.merge_lora first")
        self.plain, self.config, self.kept = plain, plain.config, None
        for block in plain.transformer_blocks:
            a = block.attn1
            a.to_qkv = merged(a.to_q, a.to_k, a.to_v)
            del a.to_q, a.to_k, a.to_v

    def prepare(self, t, c, mask):
        """Everything that does not depend on the picture: (text bias, per block (k, v, modulation), the last one)."""
        if self.kept is not None and all(a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
                                         for a, b in zip(self.kept[0], (t, c, mask), strict=True)):
            return self.kept[1]
        plain, blocks = self.plain, []
        modulation, e = plain.time_embed(t)
        text = plain.caption_norm(plain.caption_projection(c))  # B,T,D
        for block in plain.transformer_blocks:
            k, v = (y.unflatten(2, (block.attn2.heads, -1)).transpose(1, 2)  # B,n,T,d
                    for y in (block.attn2.to_k(text), block.attn2.to_v(text)))
            shift1, scale1, gate1, shift2, scale2, gate2 = (block.scale_shift_table + modulation).chunk(6, dim=1)
            blocks.append((k, v, 1 + scale1, shift1, gate1, 1 + scale2, shift2, gate2))
        shift, scale = (plain.scale_shift_table + e[:, None]).chunk(2, dim=1)
        bias = ((1 - mask.to(c.dtype)) * -10000)[:, None, None]  # B,1,1,T
        self.kept = [x.clone() for x in (t, c, mask)], (bias, blocks, (1 + scale, shift))
        return self.kept[1]

    def forward(self, z, t, c, mask):
        """z: B,C,h,w; t: B; c: B,T,Dt; mask: B,T -> B,C,h,w, as sanasr.LinearDiT.forward."""
        plain, (height, width) = self.plain, z.shape[2:]
        bias, blocks, (gain, shift) = self.prepare(t, c, mask)
        x = plain.patch_embed["proj"](to_tokens(z))  # B,N,D
        for block, (k, v, gain1, shift1, gate1, gain2, shift2, gate2) in zip(plain.transformer_blocks, blocks,
                                                                            strict=True):
            a = block.attn1
            q1, k1, v1 = a.to_qkv(modulated(x, gain1, shift1, block.eps)).unflatten(2, (3, a.heads, -1)).unbind(2)
            y = a.to_out[0](kernels.linear_attention(q1, k1, v1, eps=1e-15).flatten(2))
            x = torch.addcmul(x, gate1, y.clip_(-65504, 65504) if y.dtype == torch.float16 else y)
            a = block.attn2
            q = a.to_q(x).unflatten(2, (a.heads, -1)).transpose(1, 2)  # B,n,N,d
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
            x = x.add_(a.to_out[0](y))
            x = torch.addcmul(x, gate2, block.ff(modulated(x, gain2, shift2, block.eps), height, width))
        return to_picture(plain.proj_out(modulated(x, gain, shift, 1e-6)), height, width)


def modulated(x, gain, shift, eps):
    """layer_norm(x) · gain + shift. x: B,N,D; gain, shift: B,1,D. For one picture that is layer_norm's own affine."""
    if len(gain) == 1:
        return F.layer_norm(x, x.shape[2:], gain.flatten(), shift.flatten(), eps)
    return torch.addcmul(shift, F.layer_norm(x, x.shape[2:], eps=eps), gain)


def optimise_dit(dit):
    """A FastDiT of a sanasr.LinearDiT, which is used up. Raises ValueError where it carries unmerged adapters."""
    return FastDiT(dit).requires_grad_(False)


def optimise(model):
    """Rewrite a sanasr.SanaSR in place, and return it. Raises ValueError where its adapter is not merged."""
    model.dit = optimise_dit(model.dit)
    model.vae = optimise_vae(model.vae)
    return model
