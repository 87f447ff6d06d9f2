"""Faster inference: rewrites of a loaded model, equal up to rounding.

    model = fast.optimise(SanaSR.from_pretrained("sana-600m-512"))      # in place, and returned

`sanasr.py` is the readable path. The modules here replace its modules. They compute the same function of the same
weights with fewer multiplications or fewer bytes moved. Results differ by rounding: by less than 1e-4 in float32, in
bfloat16 by its own rounding (tests/test_fast.py). What each rewrite gains: `python -m lab.bench --rewrites`.

    winograd     3×3 convolutions with a quarter of the multiplications, in bfloat16 four ninths (on a CPU, where there
                 are many channels), see fast/winograd.py
    up           nearest ×2 and 3×3: nine products per small pixel, of differences, instead of 36 (on a GPU 16, in one
                 convolution); for 3×3 and channel-to-space, the shortcut becomes a tap of the 3×3
    down         the space-to-channel shortcut becomes a tap of the strided convolution
    norm         RMSNorm, gain, bias and residual in one pass over memory, strip by strip (on a GPU in one kernel, of
                 all blocks; bias and SiLU in another)
    dit          text keys and values and the timestep's modulation are kept between calls; residual and AdaLN are one
                 kernel; the self-attention's gate is in a weight

With graphs=True, on CUDA only, encoder, transformer and decoder are also replayed as CUDA graphs, see fast/graphs.py.

On a CPU the blocks of the low resolutions are not rewritten: three attempts there gained 1 % of the whole together.

Trap: the modules work in place on their own intermediates. There are no gradients. Adapters must be merged first.
"""
from __future__ import annotations

import ctypes
import math
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import kernels
import linearsr
import sanasr
import weights
from fast import winograd
from fast.graphs import Graphed
from kernels.dcae import fold
from kernels.norms import add_rms_norm_reference_, rms_norm_
from sanasr import to_picture, to_tokens

STRIP = 64 * 1024  # values in a strip of elementwise work: 256 KB in float32, within a core's L2 cache
TEXT = 304  # text tokens with CUDA graphs: MAX_TOKENS up to a multiple of 8, as attention on a GPU wants its bias
TOKENS = 2048  # tokens in a strip of an up block: many rows, so that the one extra row it needs costs little


def frozen(x):
    return nn.Parameter(x, requires_grad=False)


# --- DC-AE ---


def rows_of(x):
    """B,C,H,W -> B·H·W,C as a view, to be written to. Raises RuntimeError where x is not channels-last."""
    return x.permute(0, 2, 3, 1).view(-1, x.shape[1])


def strips(y):
    """Cut y (B,C,H,W) into strips that stay in cache: yields (slice of the B·H·W rows, those rows)."""
    y = rows_of(y.contiguous(memory_format=torch.channels_last))
    count = max(1, STRIP // y.shape[1]) if y.device.type == "cpu" else len(y)
    for start in range(0, len(y), count):
        at = slice(start, min(start + count, len(y)))
        yield at, y[at]


def add_norm_(x, parts, norm):
    """x + norm(y), written over x (B,C,H,W). parts: y as `strips` yields it; on a GPU one strip, for one kernel."""
    x_rows, add = rows_of(x), add_rms_norm_reference_ if x.device.type == "cpu" else kernels.add_rms_norm_
    for at, y in parts:
        add(x_rows[at], y, norm.weight, norm.bias, norm.eps)
    return x


class Norm(nn.Module):
    """RMSNorm with a bias, strip by strip, written over its input. For a CPU; on a GPU the plain one is one kernel."""

    def __init__(self, plain):
        super().__init__()
        self.weight, self.bias, self.eps = plain.weight, plain.bias, plain.eps

    def forward(self, x):  # B,H,W,C
        x = x.permute(0, 3, 1, 2)
        rows = rows_of(x)
        for at, y in strips(x):
            y = rms_norm_(y.float(), self.weight, self.bias, self.eps)
            if y.dtype != x.dtype:  # else y is a view of x
                rows[at] = y
        return x.permute(0, 2, 3, 1)


class Winograd(nn.Module):
    """A 3×3 convolution by `fast.winograd`; sizes for which the direct convolution is faster use that."""

    def __init__(self, plain):
        super().__init__()
        self.direct, self.bias = plain, plain.bias
        self.weight = frozen(winograd.transform(plain.weight))  # (m+2)²,C,C'
        self.size = winograd.size_of(plain.weight.dtype)  # m

    def strips(self, x):
        """Yields the results like the function `strips`. A strip is valid until the next one is asked for."""
        return strips(self.direct(x)) if winograd.obstacle(x, self.size) else winograd.strips(x, self.weight, self.bias)

    def forward(self, x, finish=lambda part: part):  # B,C,H,W
        """finish: is applied to every strip of the result (n,C') while it is in cache."""
        y = torch.empty(len(x), self.weight.shape[2], *x.shape[2:], dtype=x.dtype, memory_format=torch.channels_last)
        rows = rows_of(y)
        for at, part in self.strips(x):
            rows[at] = finish(part)
        return y


class ResBlock(nn.Module):
    """x + RMSNorm(conv(SiLU(conv x))), written over x."""

    def __init__(self, plain):
        super().__init__()
        self.conv1, self.conv2, self.norm = plain.conv1, plain.conv2, plain.norm

    def forward(self, x):  # B,C,H,W
        x, silu = x.contiguous(memory_format=torch.channels_last), partial(F.silu, inplace=True)
        if isinstance(self.conv1, Winograd):
            h = self.conv1(x, silu)
        elif x.device.type == "cpu":
            h = silu(self.conv1(x))
        else:  # bias and SiLU in one pass
            h = F.conv2d(x, self.conv1.weight, padding=1).contiguous(memory_format=torch.channels_last)
            kernels.bias_silu_(rows_of(h), self.conv1.bias)
        parts = self.conv2.strips(h) if isinstance(self.conv2, Winograd) else strips(self.conv2(h))
        return add_norm_(x, parts, self.norm)


class MultiscaleAttention(nn.Module):
    """sanasr.MultiscaleLinearAttention, written over x: one QKV product, norm and residual in one kernel. For a GPU.

    Of a coarser scale, the depthwise convolution is a kernel, and the grouped 1×1 a batched product. All scales are
    written where the attention reads them.
    """

    def __init__(self, plain):
        super().__init__()
        self.head_dim = plain.head_dim
        self.to_qkv = frozen(torch.cat([plain.to_q.weight, plain.to_k.weight, plain.to_v.weight]))  # 3C,C
        self.depth = nn.ParameterList(frozen(m.proj_in.weight) for m in plain.to_qkv_multiscale)  # 3C,1,k,k
        self.point = nn.ParameterList(frozen(  # 3C/d,d,d: of each group, from column to row
            m.proj_out.weight.view(-1, self.head_dim, self.head_dim).mT.contiguous()) for m in plain.to_qkv_multiscale)
        self.to_out, self.norm = plain.to_out, plain.norm_out

    def forward(self, x):  # B,C,H,W
        x = x.contiguous(memory_format=torch.channels_last)
        (batch, _, height, width), (wide, d) = x.shape, (len(self.to_qkv), self.head_dim)
        qkv = x.new_empty(batch, height * width, (1 + len(self.depth)) * wide)  # B,N,s·3C
        parts = qkv.flatten(0, 1).split(wide, dim=1)
        torch.mm(rows_of(x), self.to_qkv.t(), out=parts[0])
        for depth, point, part in zip(self.depth, self.point, parts[1:], strict=True):
            y = kernels.depthwise(qkv[..., :wide], height, width, depth).view(-1, wide // d, d)
            torch.bmm(y.transpose(0, 1), point, out=part.unflatten(1, (-1, d)).transpose(0, 1))
        h = kernels.linear_attention(*qkv.unflatten(2, (-1, 3 * d)).chunk(3, dim=3), eps=1e-15).flatten(2)  # B,N,n·d
        return add_norm_(x, [(slice(None), self.to_out(h).flatten(0, 1))], self.norm)


class GatedConv(sanasr.GLUMBConv):
    """sanasr.GatedConv, written over x: norm and residual in one kernel. For a GPU."""

    def __init__(self, plain):
        nn.Module.__init__(self)
        self.conv_inverted, self.conv_depth = plain.conv_inverted, plain.conv_depth
        self.conv_point, self.norm = plain.conv_point, plain.norm

    def forward(self, x):  # B,C,H,W
        x = x.contiguous(memory_format=torch.channels_last)
        return add_norm_(x, [(slice(None), super().forward(to_tokens(x), *x.shape[2:]).flatten(0, 1))], self.norm)


def with_taps(conv, out, channel, y, x, value):
    """The 3×3 convolution with `value` added to these entries of its weight C',C,3,3."""
    weight = conv.weight.float().clone()
    weight[out, channel, y, x] += value
    conv.weight = frozen(weight.to(conv.weight.dtype).contiguous(memory_format=torch.channels_last))
    return conv


def down_block(plain):
    """The strided convolution of a DownBlock, with the shortcut added to its weights.

    Channel o of the shortcut is the mean of `group` adjacent channels 4c + 2dy + dx of the space-to-channel picture,
    and that is pixel (2i + dy, 2j + dx) of channel c: tap (1 + dy, 1 + dx) of the convolution.
    """
    if not plain.strided or not plain.shortcut:
        return plain
    channel = torch.arange(4 * plain.conv.in_channels, device=plain.conv.weight.device)
    group = len(channel) // plain.out_channels
    return with_taps(plain.conv, channel // group, channel // 4, 1 + channel // 2 % 2, 1 + channel % 2, 1 / group)


class UpBlock(nn.Module):
    """Nearest ×2, 3×3 convolution and the shortcut, with nine products per small pixel instead of 36. For a CPU.

    In one direction, with taps w0, w1, w2 and S = w0 + w1 + w2, and the differences D[i] = x[i] − x[i−1]:
        y[2i]   = w0·x[i−1] + (w1 + w2)·x[i] = S·x[i] − w0·D[i]
        y[2i+1] = (w0 + w1)·x[i] + w2·x[i+1] = S·x[i] + w2·D[i+1]
    In two directions these are products of x (C × C'), of its differences in one direction (C × 2C' each) and of its
    differences in both (C × 4C').
    """

    TAPS = torch.tensor([[1., 1, 1], [-1, 0, 0], [0, 0, 1]])  # S, −w0, w2

    def __init__(self, plain):
        super().__init__()
        self.repeats, self.bias = plain.repeats, plain.conv.bias
        taps, weight = self.TAPS.to(plain.conv.weight.device), plain.conv.weight
        w = torch.einsum("yk,xl,ockl->yxoc", taps, taps, weight.float()).to(weight.dtype)  # 3,3,C',C
        self.plane, self.down, self.right, self.both = (frozen(part.flatten(0, -2).contiguous()) for part in (
            w[0, 0], w[1:, 0], w[0, 1:], w[1:, 1:]))

    def forward(self, x):  # B,C,H,W -> B,C',2H,2W
        (batch, _, height, width), out = x.shape, len(self.plane)
        y = torch.empty(batch, 2 * height, 2 * width, out, dtype=x.dtype, device=x.device)
        count = max(1, TOKENS // width)
        for b, picture in enumerate(x.permute(0, 2, 3, 1)):
            for r in range(0, height, count):
                self.strip(picture, r, min(count, height - r), y[b])
        return y.permute(0, 3, 1, 2)

    def strip(self, x, start, count, y):
        """The results of rows start … start + count − 1 of x (H,W,C), into y (2H,2W,C')."""
        above, below = int(start == 0), int(start + count == len(x))
        rows = F.pad(x[start - 1 + above:start + count + 1 - below], (0, 0, 0, 0, above, below))  # count + 2
        vertical = rows[1:] - rows[:-1]  # count + 1,W,C
        x = rows[1:-1]
        plane = F.linear(x, self.plane, self.bias)  # count,W,C'
        right = F.linear(differences(x), self.right).unflatten(2, (2, -1))  # count,W + 1,2,C'
        down = F.linear(vertical, self.down).unflatten(2, (2, -1))  # count + 1,W,2,C'
        both = F.linear(differences(vertical), self.both).unflatten(2, (2, 2, -1))  # count + 1,W + 1,2,2,C'
        for dy in range(2):
            column = plane + down[dy:dy + count, :, dy]
            for dx in range(2):
                part = both[dy:dy + count, dx:dx + x.shape[1], dy, dx].add_(right[:, dx:dx + x.shape[1], dx])
                if self.repeats:
                    part += x[..., (2 * dy + dx) // self.repeats::4 // self.repeats]
                torch.add(column, part, out=y[2 * start + dy:2 * (start + count):2, dx::2])


class FoldedUpBlock(nn.Module):
    """The same as one 2×2 convolution and one kernel, see kernels/dcae.py. For a GPU."""

    def __init__(self, plain):
        super().__init__()
        self.repeats, self.bias = plain.repeats, plain.conv.bias
        self.weight = frozen(fold(plain.conv.weight).contiguous(memory_format=torch.channels_last))  # 4C',C,2,2

    def forward(self, x):  # B,C,H,W -> B,C',2H,2W
        x = x.contiguous(memory_format=torch.channels_last)
        y = F.conv2d(x, self.weight, padding=1).permute(0, 2, 3, 1).contiguous().unflatten(3, (4, -1))
        return kernels.join_up_block(y, x.permute(0, 2, 3, 1), self.bias, self.repeats).permute(0, 3, 1, 2)


def differences(x):
    """H,W,C -> H,W + 1,C: every column minus the one before it, with zeros around the picture."""
    return F.pad(x, (0, 0, 0, 1)) - F.pad(x, (0, 0, 1, 0))


def fast_convolution(plain):
    """A Winograd in place of a 3×3 convolution where that is faster: on a CPU, for many channels.

    In bfloat16 the products take a smaller part of the time, so it needs more channels to pay.
    """
    weight = plain.weight
    fits = (plain.kernel_size, plain.stride, plain.padding, plain.groups) == ((3, 3), (1, 1), (1, 1), 1)
    enough = {torch.float32: 64, torch.bfloat16: 128}.get(weight.dtype, math.inf)
    return Winograd(plain) if fits and weight.device.type == "cpu" and min(weight.shape[:2]) >= enough else plain


def up_block(plain):
    """A fast UpBlock; for 3×3 + channel-to-space, that convolution with the shortcut added to its middle tap."""
    if plain.nearest:
        fast_block = UpBlock if plain.conv.weight.device.type == "cpu" else FoldedUpBlock
        return fast_block(plain) if plain.repeats in (0, 1, 2, 4) else plain
    if plain.repeats:
        channel = torch.arange(plain.conv.out_channels, device=plain.conv.weight.device)
        with_taps(plain.conv, channel, channel // plain.repeats, 1, 1, 1)
    return nn.Sequential(plain.conv, nn.PixelShuffle(2))


def where(cpu, make):
    """The rule `make` for a CPU alone, or for all other devices."""
    return lambda plain: make(plain) if (next(plain.parameters()).device.type == "cpu") == cpu else plain


REWRITES = {  # name -> the rules (class, its replacement) that make it up
    "winograd": [(nn.Conv2d, fast_convolution)],
    "up": [(sanasr.UpBlock, up_block)],
    "down": [(sanasr.DownBlock, down_block)],
    "norm": [(sanasr.ResBlock, ResBlock), (sanasr.RMSNorm, where(True, Norm)),
             (sanasr.MultiscaleLinearAttention, where(False, MultiscaleAttention)),
             (sanasr.GatedConv, where(False, GatedConv))],
}


def optimise_vae(vae, rewrites=tuple(REWRITES), graphs=False):
    """Rewrite a sanasr.DCAE in place, and return it.

    rewrites: names in REWRITES, by default all. graphs: CUDA graphs, see `Graphed`.
    """
    rules = [rule for name in rewrites for rule in REWRITES[name]]
    for convolution in (m for m in vae.modules() if isinstance(m, nn.Conv2d)):
        convolution.weight = frozen(convolution.weight.contiguous(memory_format=torch.channels_last))

    def walk(module):
        for name, child in module.named_children():
            for kind, make in rules:
                if type(child) is kind and not (kind is sanasr.RMSNorm and not isinstance(module, sanasr.Decoder)):
                    child = make(child)  # each block rewrites its own norms
                    setattr(module, name, child)
            if not isinstance(child, Winograd):  # a Winograd holds the convolution it replaces
                walk(child)

    walk(vae)
    if graphs:
        vae.encoder, vae.decoder = Graphed(vae.encoder), Graphed(vae.decoder)
    return vae.requires_grad_(False)


# --- LinearDiT ---


class FastDiT(nn.Module):
    """sanasr.LinearDiT, called in the same way, which keeps what depends on the text alone or the timestep alone.

    Kept are keys and values for the last two texts (classifier-free guidance alternates between two) and the modulation
    for the last timestep, all compared by value. `made` counts how often each was computed.
    """

    def __init__(self, plain, graphs=False):
        """plain: a sanasr.LinearDiT, which is changed and must not be used again. Raises ValueError where it carries
        unmerged adapters. graphs: CUDA graphs, see `Graphed`. They serve all prompts and timesteps: what is kept of
        those is copied to them."""
        super().__init__()
        if sanasr.lora_modules(plain):
            raise ValueError("fast.optimise: the adapters are not merged; call sanasr.merge_lora first")
        self.plain, self.config, self.texts, self.times, self.made = plain, plain.config, [], [], Counter()
        self.multiple = TEXT if graphs else 8 if plain.scale_shift_table.is_cuda else 1
        self.prediction = Graphed(partial(prediction, plain)) if graphs else None
        self.out = frozen(torch.stack([block.attn1.to_out[0].weight for block in plain.transformer_blocks]))  # L,D,D
        for block in plain.transformer_blocks:
            a = block.attn1
            a.to_qkv, linears = a.to_q, (a.to_q, a.to_k, a.to_v)  # one product for the three
            a.to_qkv.weight = frozen(torch.cat([m.weight for m in linears]))
            if a.to_qkv.bias is not None:
                a.to_qkv.bias = frozen(torch.cat([m.bias for m in linears]))
            del a.to_q, a.to_k, a.to_v, a.to_out[0].weight
        self.requires_grad_(False)

    def _apply(self, *args):  # .to(device): what is kept stays behind
        self.texts.clear()
        self.times.clear()
        return super()._apply(*args)

    def text(self, c, mask):
        """Keys and values of all L blocks (L,2,B,T',n·d) and the bias (B,1,1,T') of a text c: B,T,Dt, mask: B,T.

        T' is T up to the next multiple of `multiple`: with graphs one length for all prompts, and on a GPU one that
        attention needs no padding for. The bias hides what was added, even from a text that is masked as a whole.
        """
        self.made["text"] += 1
        plain, more = self.plain, -c.shape[1] % self.multiple
        y = F.pad(plain.caption_norm(plain.caption_projection(c)), (0, 0, 0, more))  # B,T',D
        keys_values = [part(y) for block in plain.transformer_blocks for part in (block.attn2.to_k, block.attn2.to_v)]
        bias = F.pad((1 - mask.to(c.dtype)) * -10000, (0, more), value=-math.inf)
        return torch.stack(keys_values).unflatten(0, (-1, 2)), bias[:, None, None]

    def time(self, t):
        """What the blocks and the output need of a timestep t: 1, in the order in which `prediction` takes it."""
        self.made["time"] += 1
        plain, (modulation, e) = self.plain, self.plain.time_embed(t)
        tables = torch.stack([block.scale_shift_table for block in plain.transformer_blocks]) + modulation  # L,6,D
        norms = torch.stack([tables[:, [1, 4]], tables[:, [0, 3]]], dim=2).flatten(0, 1)  # 2L,2,D
        norms = torch.cat([norms, (plain.scale_shift_table + e).flip(0)[None]])  # and of the output
        norms[:, 0] += 1
        gate1, gate2 = tables[:, 2], tables[:, 5]  # L,D
        queries, outputs = [], []
        for block, gate in zip(plain.transformer_blocks, gate1, strict=True):
            late = gate * block.attn1.to_out[0].bias
            queries.append(block.attn2.to_q(late))
            outputs.append(block.attn2.to_out[0].bias + late)
        return norms, gate2, gate1[:, :, None] * self.out, torch.stack(queries), torch.stack(outputs)

    def forward(self, z, t, c, mask, condition=None):
        """z: B,C,h,w; t: B; c: B,T,Dt; mask: B,T; condition: B,D,h,w -> B,C,h,w, as sanasr.LinearDiT.forward."""
        if len(t) > 1 and (t != t[0]).any():  # what is kept of timesteps is for one
            inputs = [x for x in (z, t, c, mask, condition) if x is not None]
            return torch.cat([self(*parts) for parts in zip(*(x.split(1) for x in inputs), strict=True)])
        kept = *recall(self.texts, 2, self.text, c, mask), *recall(self.times, 1, self.time, t[:1])
        if self.prediction:
            return self.prediction(z, condition, fixed=kept)
        return prediction(self.plain, z, condition, *kept)


def recall(kept, limit, make, *inputs):
    """make(*inputs), or what it returned for equal inputs. kept: a list of the last `limit` (inputs, result)."""
    for i, (before, result) in enumerate(kept):
        if all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(before, inputs, strict=True)):
            kept.insert(0, kept.pop(i))
            return result
    kept.insert(0, ([x.clone() for x in inputs], make(*inputs)))
    del kept[limit:]
    return kept[0][1]


def prediction(plain, z, condition, keys_values, bias, norms, gates, out, queries, outputs):
    """LinearDiT.forward of z and condition, from what FastDiT's `text` and `time` return.

    norms: 2L + 1,2,D: 1 + scale and shift of every LayerNorm in turn; gates: L,D: of the Mix-FFN. The gate of the
    self-attention is a part of its last product's weight, out: L,D,D, so that the product adds to x itself. Its bias
    comes later, with that of the cross-attention, outputs: L,D; its share of the queries is in queries: L,n·d.
    """
    height, width = z.shape[2:]
    x = plain.patch_embed["proj"](to_tokens(z))  # B,N,D
    if condition is not None:
        x += to_tokens(condition)
    eps, rows = plain.config["norm_eps"], x.view(-1, x.shape[2])  # the same memory
    h = F.layer_norm(x, x.shape[2:], *norms[0], eps)
    for i, (block, (k, v)) in enumerate(zip(plain.transformer_blocks, keys_values, strict=True)):
        a = block.attn1
        q1, k1, v1 = a.to_qkv(h).unflatten(2, (3, a.heads, -1)).unbind(2)
        rows.addmm_(kernels.linear_attention(q1, k1, v1, eps=1e-15).flatten(0, 1).flatten(1), out[i].t())
        a = block.attn2
        q = F.linear(x, a.to_q.weight, queries[i])
        q, k, v = (y.unflatten(2, (a.heads, -1)).transpose(1, 2) for y in (q, k, v))  # B,n,N,d; B,n,T,d
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
        h = kernels.add_layer_norm_(x, F.linear(y, a.to_out[0].weight, outputs[i]), None, *norms[2 * i + 1], eps)
        y, last = block.ff(h, height, width), 2 * i + 2 == len(norms) - 1
        h = kernels.add_layer_norm_(x, y, gates[i], *norms[2 * i + 2], 1e-6 if last else eps)
    return to_picture(plain.proj_out(h), height, width)


def keep_memory():
    """Let glibc reuse the memory of freed tensors. By default large tensors get new pages, which the kernel zeroes.

    This holds for the whole process, which then returns no memory before it ends. Without glibc nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX: no tensor has a mapping of its own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the end of the heap is not given back


def optimise(model: sanasr.SanaSR, graphs: bool = False) -> sanasr.SanaSR:
    """Rewrite a SanaSR or LinearSR in place, and return it. Raises ValueError where its adapter is not merged.

    graphs: CUDA graphs for encoder, transformer and decoder, see `Graphed`. Transformers that LinearSR moves to the
    device and back (offload) have none.
    """
    if hasattr(model, "experts"):
        model.experts = [FastDiT(expert, graphs and not model.offload) for expert in model.experts]
    else:
        model.dit = FastDiT(model.dit, graphs)
    model.vae = optimise_vae(model.vae, graphs=graphs)
    return model


def load_model(name, device, dtype=None, adapter=None, fast="off", offload=False):
    """SanaSR or LinearSR of a name or folder.

    adapter: of a SanaSR: a file, None for the model's own, False or "none" for the bare prior.
    fast: "on" applies these rewrites (on a GPU with CUDA graphs), "auto" where they are known to work: on a CPU or an
    NVIDIA GPU.
    offload: of a LinearSR: only the expert in use lies on the device.
    Raises OSError or ValueError that names the file, weights.Unavailable where a known model is unavailable.
    """
    device = torch.device(device)
    if is_linearsr(name, dtype):
        if adapter is not None:
            raise ValueError(f"{name} is a LinearSR model: it has experts instead of an adapter, and is no prior")
        model = linearsr.LinearSR.from_pretrained(name, device, dtype, offload)
    else:
        adapter = False if adapter == "none" else adapter
        if adapter and not Path(adapter).is_file():
            raise ValueError(f"--adapter {adapter}: no such file")
        model = sanasr.SanaSR.from_pretrained(name, device, dtype, adapter)
    if fast == "on" or (fast == "auto" and device.type in ("cpu", "cuda")):
        if device.type == "cpu":
            keep_memory()
        optimise(model, graphs=device.type == "cuda")
    return model


def is_linearsr(name, dtype=None):
    """Whether the model of this name or folder is a LinearSR rather than a SanaSR: it has a config.json of its own."""
    return (weights.folder(name, dtype) / "config.json").is_file()
