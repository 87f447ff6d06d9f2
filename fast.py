"""The same numbers sooner: exact rewrites of a loaded model, for inference.

    model = fast.optimise(SanaSR.from_pretrained("sana-600m-512"))      # in place, and returned

`sanasr.py` stays the readable path; what stands here replaces its modules by others that compute the same function of
the same weights (float32: within 1e-4; bfloat16: to its rounding; see tests/test_fast.py) with fewer multiplications
or fewer bytes, from public PyTorch operators and `kernels`. What each gives: `python bench.py --rewrites`.

    winograd     3×3 = a quarter of the multiplications, in bfloat16 four ninths (on a CPU, where channels are many)
    up           nearest ×2, then 3×3 = nine products per small pixel, of differences, instead of 36; where it is 3×3
                 and channel-to-space, the shortcut is a tap of the 3×3
    down         the space-to-channel shortcut is a tap of the strided convolution
    norm         RMSNorm, gain, bias and residual strip by strip (on a GPU one kernel): memory once; SiLU in place
    dit          text keys and values and the timestep's modulation kept from call to call; AdaLN as one layer_norm

With graphs=True, on CUDA only, each of encoder, transformer and decoder is one CUDA graph besides. "Within 1e-4" there
wants torch.backends.cudnn.allow_tf32 = False.

The blocks of the low resolutions stay as they are: one QKV product, the 1×1 within heads as batched matrix products,
and hidden channels a few at a time so that they stay in cache gave 1 % of the whole together.

Trap: the modules work in place on their own intermediates. No gradients, no adapters: merge them first.
"""
from __future__ import annotations

import ctypes
import math
import sys
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

import kernels
import sanasr
from kernels.rms_norm import add_rms_norm_reference_, rms_norm_
from sanasr import to_picture, to_tokens

STRIP = 64 * 1024  # values that a strip of elementwise work holds: 256 KB in float32, within a core's L2 cache
TILES = 256  # 4×4 tiles in a strip of Winograd's convolution: rows enough for matrix products, few enough for the L3
FEW = 16  # fewer tiles than this are convolved directly
TOKENS = 2048  # tokens in a strip of an up block: rows enough that the one more it needs counts little


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


def rows_of(x):
    """B,C,H,W -> B·H·W,C, a view: RuntimeError where x is not channels-last, since a copy could not be written to."""
    return x.permute(0, 2, 3, 1).view(-1, x.shape[1])


def strips(y):
    """Cuts y (B,C,H,W) into rows that stay in cache: yields (slice of the B·H·W rows, those rows)."""
    y = rows_of(y.contiguous(memory_format=torch.channels_last))
    count = max(1, STRIP // y.shape[1]) if y.device.type == "cpu" else len(y)
    for start in range(0, len(y), count):
        at = slice(start, min(start + count, len(y)))
        yield at, y[at]


def add_norm_(x, parts, norm):
    """x + norm(y) written over x (B,C,H,W), y as `strips` gives it: whole to a GPU's one kernel."""
    x_rows, add = rows_of(x), kernels.add_rms_norm_ if x.is_cuda else add_rms_norm_reference_
    for at, y in parts:
        add(x_rows[at], y, norm.weight, norm.bias, norm.eps)
    return x


class Norm(nn.Module):
    """RMSNorm with a bias, strip by strip, over its input. For a CPU: on a GPU the plain one is a kernel."""

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
    """A 3×3 convolution by Winograd's F(m×m, 3×3), with fewer multiplications (arXiv 1509.09308).

    Tiles of (m+2)×(m+2) values that overlap by two give m×m results each: Y = Aᵀ[(G g Gᵀ) ⊙ (Bᵀ d B)]A. Summed over
    channels, ⊙ is (m+2)² products of matrices, tiles × C by C × C'. B and A hold small integers: `spread` and `gather`
    apply them. In float32 m = 4, a quarter of the multiplications. It would magnify a rounding to bfloat16 tenfold, so
    there m = 2, four ninths of them and four times a rounding's error: a network of nothing else is up to 1.5 times as
    far from float32 as the plain path is.
    For few tiles, where reading the weights ((m+2)²/9 of their memory) costs more than they save, and for sides that
    are no multiples of m it stays the convolution it was.
    """

    G = {2: torch.tensor([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]]).double() / 2,
         4: torch.tensor([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]).double() / 24}

    def __init__(self, plain):
        super().__init__()
        w = plain.weight.float().permute(2, 3, 1, 0)  # 3,3,C,C'
        self.size = 4 if plain.weight.dtype == torch.float32 else 2  # m
        both = torch.kron(self.G[self.size], self.G[self.size]).float()  # (m+2)²,9
        self.weight = frozen((both @ w.flatten(2).flatten(0, 1)).unflatten(1, w.shape[2:]).to(plain.weight.dtype))
        self.direct, self.bias = plain, plain.bias

    @staticmethod
    def spread(d, v):
        """v = Bᵀ d for m + 2 arrays each; v is also where intermediate results lie."""
        add, sub = torch.add, torch.sub
        if len(d) == 4:
            (d0, d1, d2, d3), (v0, v1, v2, v3) = d, v
            sub(d0, d2, out=v0)
            add(d1, d2, out=v1)
            sub(d2, d1, out=v2)
            sub(d1, d3, out=v3)
            return
        (d0, d1, d2, d3, d4, d5), (v0, v1, v2, v3, v4, v5) = d, v
        add(d4, d2, alpha=-4, out=v1)
        add(d3, d1, alpha=-4, out=v2)
        v1 += v2  # d4 − 4·d2 + (d3 − 4·d1)
        add(v1, v2, alpha=-2, out=v2)  # d4 − 4·d2 − (d3 − 4·d1)
        sub(d4, d2, out=v3)
        sub(d3, d1, out=v4)
        sub(d0, d2, out=v0)
        add(v3, v0, alpha=4, out=v0)  # 4·d0 − 5·d2 + d4
        sub(d5, d3, out=v5)
        v5.sub_(v4, alpha=4)  # 4·d1 − 5·d3 + d5
        v3.add_(v4, alpha=2)  # d4 − d2 + 2·(d3 − d1)
        add(v3, v4, alpha=-4, out=v4)  # d4 − d2 − 2·(d3 − d1)

    @staticmethod
    def gather(m, y):
        """y = Aᵀ m, m + 2 arrays to m; what it is given is overwritten."""
        add, sub = torch.add, torch.sub
        if len(m) == 4:
            (m0, m1, m2, m3), (y0, y1) = m, y
            sub(m1, m2, out=y1)
            y1 -= m3
            m1 += m2
            add(m0, m1, out=y0)
            return
        (m0, m1, m2, m3, m4, m5), (y0, y1, y2, y3) = m, y
        m1 += m2
        add(m1, m2, alpha=-2, out=m2)  # m1 − m2
        m3 += m4
        add(m3, m4, alpha=-2, out=m4)  # m3 − m4
        m0 += m1
        m5 += m2
        add(m0, m3, out=y0)
        add(m2, m4, alpha=2, out=y1)
        add(m1, m3, alpha=4, out=y2)
        add(m5, m4, alpha=8, out=y3)

    def strips(self, x):
        """Yields the results like the function `strips`; they hold until the next strip is asked for."""
        (batch, channels, height, width), out, size = x.shape, self.weight.shape[2], self.size
        down, across, side = height // size, width // size, size + 2
        if height % size or width % size or batch * down * across < FEW:
            yield from strips(self.direct(x))
            return
        x, tiles = x.permute(0, 2, 3, 1), TILES * 4 // size
        pictures = min(batch, max(1, tiles // (down * across)))
        most = min(down, max(1, tiles // across))  # rows of tiles in a strip
        sizes = [(size * most + 2) * side * channels, most * side**2 * channels, most * side**2 * out,
                 most * size * side * out, most * size**2 * out]
        memory = [torch.empty(pictures * across * n, dtype=x.dtype) for n in sizes]
        # column m·k + p − 1 of the picture is d[…, p, k, :]: from here to the last step all runs are long
        padded = torch.zeros(pictures, size * most + 2, size, across + 1, channels, dtype=x.dtype)
        for b in range(0, batch, pictures):
            n = min(pictures, batch - b)
            for r in range(0, down, most):
                rows = min(most, down - r)
                shapes = ((n, size * rows + 2, side, across, channels), (side, side, n, rows, across, channels),
                          (side, side, n, rows, across, out), (size, side, n, rows, across, out),
                          (n, rows, size, across, size, out))
                t, v, m, z, y = (a[:math.prod(shape)].view(shape) for a, shape in zip(memory, shapes, strict=True))
                d = padded[:n, :size * rows + 2]
                first, last = max(size * r - 1, 0), min(size * (r + rows) + 1, height)
                if first > size * r - 1:
                    d[:, 0] = 0
                if last < size * (r + rows) + 1:
                    d[:, -1] = 0
                inside = d[:, first - (size * r - 1):last - (size * r - 1)]
                inside[:, :, 0, 1:] = x[b:b + n, first:last, size - 1::size]
                for p in range(1, size):
                    inside[:, :, p, :-1] = x[b:b + n, first:last, p - 1::size]
                self.spread([d[:, :, j % size, j // size:j // size + across] for j in range(side)], t.unbind(2))
                self.spread([t[:, j:j + size * (rows - 1) + 1:size].permute(2, 0, 1, 3, 4) for j in range(side)], v)
                torch.bmm(v.flatten(2, 4).flatten(0, 1), self.weight, out=m.flatten(2, 4).flatten(0, 1))
                if self.bias is not None:
                    m[1, 1] += self.bias  # Aᵀ has nothing but ones in this column: the bias of all m² results
                self.gather(m, z)
                self.gather(z.unbind(1), y.permute(4, 2, 0, 1, 3, 5))
                y = y.flatten(0, 4)
                start = (b * height + size * r) * width
                yield slice(start, start + len(y)), y

    def forward(self, x, finish=lambda part: part):  # B,C,H,W
        """finish: what is done to every strip of the result (n,C') while it lies in cache."""
        y = torch.empty(len(x), self.weight.shape[2], *x.shape[2:], dtype=x.dtype, memory_format=torch.channels_last)
        rows = rows_of(y)
        for at, part in self.strips(x):
            rows[at] = finish(part)
        return y


class ResBlock(nn.Module):
    """x + RMSNorm(conv(SiLU(conv x))), over x."""

    def __init__(self, plain):
        super().__init__()
        self.conv1, self.conv2, self.norm = plain.conv1, plain.conv2, plain.norm

    def forward(self, x):  # B,C,H,W
        x, silu = x.contiguous(memory_format=torch.channels_last), partial(F.silu, inplace=True)
        h = self.conv1(x, silu) if isinstance(self.conv1, Winograd) else silu(self.conv1(x))
        parts = self.conv2.strips(h) if isinstance(self.conv2, Winograd) else strips(self.conv2(h))
        return add_norm_(x, parts, self.norm)


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
    channel = torch.arange(4 * weight.shape[1], device=weight.device)
    weight[channel // group, channel // 4, 1 + channel // 2 % 2, 1 + channel % 2] += 1 / group
    conv.weight = frozen(weight.to(conv.weight.dtype).contiguous(memory_format=torch.channels_last))
    return conv


class UpBlock(nn.Module):
    """Nearest ×2 and 3×3 as nine products per small pixel for its four large ones (of 36), and the shortcut.

    In one direction, with taps w0, w1, w2 and S = w0 + w1 + w2, and the differences D[i] = x[i] − x[i−1]:
        y[2i]   = w0·x[i−1] + (w1 + w2)·x[i] = S·x[i] − w0·D[i]
        y[2i+1] = (w0 + w1)·x[i] + w2·x[i+1] = S·x[i] + w2·D[i+1]
    In two, x, its differences in either direction and those in both take C × C', C × 2C', C × 2C' and C × 4C'.
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
        count = max(1, TOKENS // width) if x.device.type == "cpu" else height
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


def differences(x):
    """H,W,C -> H,W + 1,C: every column less the one before it, with zeros around the picture."""
    return F.pad(x, (0, 0, 0, 1)) - F.pad(x, (0, 0, 1, 0))


def winograd(plain):
    """A Winograd of a 3×3 convolution where that is faster: on a CPU, with channels enough to pay for the tiles.

    In bfloat16, where the products are the smaller part of it, only for the wider ones.
    """
    weight = plain.weight
    fits = (plain.kernel_size, plain.stride, plain.padding, plain.groups) == ((3, 3), (1, 1), (1, 1), 1)
    enough = {torch.float32: 64, torch.bfloat16: 128}.get(weight.dtype, math.inf)
    return Winograd(plain) if fits and weight.device.type == "cpu" and min(weight.shape[:2]) >= enough else plain


def norm(plain):
    return Norm(plain) if plain.weight.device.type == "cpu" else plain


def up_block(plain):
    """An UpBlock, or where the plain one is 3×3 + channel-to-space, that with the shortcut as one more middle tap."""
    if plain.nearest:
        return UpBlock(plain) if plain.repeats in (0, 1, 2, 4) else plain
    conv = plain.conv
    if plain.repeats:
        weight = conv.weight.float().clone()  # 4C',C,3,3
        channel = torch.arange(len(weight), device=weight.device)
        weight[channel, channel // plain.repeats, 1, 1] += 1
        conv.weight = frozen(weight.to(conv.weight.dtype).contiguous(memory_format=torch.channels_last))
    return nn.Sequential(conv, nn.PixelShuffle(2))


REWRITES = {  # name -> the rules (class, its replacement) that make it up
    "winograd": [(nn.Conv2d, winograd)],
    "up": [(sanasr.UpBlock, up_block)],
    "down": [(sanasr.DownBlock, down_block)],
    "norm": [(sanasr.ResBlock, ResBlock), (sanasr.RMSNorm, norm)],
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
                    child = make(child)  # the norms inside of blocks are the blocks' matter
                    setattr(module, name, child)
            if not isinstance(child, Winograd):  # that holds the convolution it replaces
                walk(child)

    walk(vae)
    if graphs:
        vae.encode, vae.decode = Graphed(vae.encode), Graphed(vae.decode)
    return vae.requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# LinearDiT
# ---------------------------------------------------------------------------------------------------------------------


class FastDiT(nn.Module):
    """sanasr.LinearDiT, called in the same way; what depends on the prompt or the timestep alone is kept.

    Kept for the last (t, c, mask), compared by value: per block the keys and values of the text, B,n,T,d each, and the
    six modulation vectors, B,1,D.
    """

    def __init__(self, plain, graphs=False):
        super().__init__()
        if sanasr.lora_modules(plain):
            raise ValueError("fast.optimise: the adapters are not merged; call sanasr.merge_lora first")
        self.plain, self.config, self.kept = plain, plain.config, None
        self.graph = Graphed(self.prediction) if graphs else None
        for block in plain.transformer_blocks:
            a = block.attn1
            a.to_qkv = merged(a.to_q, a.to_k, a.to_v)
            del a.to_q, a.to_k, a.to_v

    def prepare(self, t, c, mask):
        """Keep what does not depend on the picture: (text bias, per block (k, v, modulation), the last one)."""
        if self.kept is not None and all(a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
                                         for a, b in zip(self.kept[0], (t, c, mask), strict=True)):
            return
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
        if self.graph:
            self.graph.forget()  # it reads the tensors kept before

    def forward(self, z, t, c, mask, condition=None):
        """z: B,C,h,w; t: B; c: B,T,Dt; mask: B,T; condition: B,D,h,w -> B,C,h,w, as sanasr.LinearDiT.forward."""
        self.prepare(t, c, mask)
        if condition is not None:
            return self.prediction(z, condition)
        return (self.graph or self.prediction)(z)

    def prediction(self, z, condition=None):
        plain, (height, width) = self.plain, z.shape[2:]
        bias, blocks, (gain, shift) = self.kept[1]
        x = plain.patch_embed["proj"](to_tokens(z))  # B,N,D
        if condition is not None:
            x = x + to_tokens(condition)
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


def optimise_dit(dit, graphs=False):
    """A FastDiT of a sanasr.LinearDiT, which is used up. Raises ValueError where it carries unmerged adapters.

    graphs: CUDA graphs, see `Graphed`; a new prompt takes a new one, some three calls' time.
    """
    return FastDiT(dit, graphs).requires_grad_(False)


class Graphed:
    """f(x) as one CUDA graph: all of its kernels by a single launch. Captured for the first x and for every new shape.

    Trap: f must not wait for the GPU; what it reads besides x must stay where it was at the capture, or `forget`.
    """

    def __init__(self, f):
        self.f = f
        self.forget()

    def forget(self):
        """Give the graph and its memory back; the next call captures anew."""
        self.graph = self.x = self.y = None

    def __call__(self, x):
        if self.graph is None or x.shape != self.x.shape:
            self.forget()
            self.capture(x)
        self.x.copy_(x)
        self.graph.replay()
        return self.y.clone()  # the next replay writes over y

    def capture(self, x):
        x, graph = x.clone(), torch.cuda.CUDAGraph()
        with torch.cuda.device(x.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # what operators do at their first calls only is no part of the graph
                for _ in range(2):
                    self.f(x)
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(graph):
                y = self.f(x)
        self.graph, self.x, self.y = graph, x, y


def keep_memory():
    """Let glibc keep what tensors leave for the next ones; by default large ones are new pages, zeroed by the kernel.

    For the whole process, which then gives nothing back before it ends. Where there is no glibc nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX: no tensor has a mapping of its own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the end of the heap is not given back


def optimise(model, graphs=False):
    """Rewrite a SanaSR or LinearSR in place, and return it. Raises ValueError where its adapter is not merged.

    graphs: CUDA graphs, one each for encoder, transformer and decoder, for the last size of picture and prompt seen.
    LinearSR's transformers have none: what they keep changes with every step.
    """
    if hasattr(model, "experts"):
        model.experts = [optimise_dit(expert) for expert in model.experts]
    else:
        model.dit = optimise_dit(model.dit, graphs)
    model.vae = optimise_vae(model.vae, graphs=graphs)
    return model
