"""Two elementwise passes of DC-AE behind its convolutions, each one launch, on channels-last pixels. For inference.

    bias_silu_         h = SiLU(h + bias)                                                       h: ..., C, in place
    join_up_block      out[2i + dy, 2j + dx] = y[i + dy, j + dx, parity 2 dy + dx] + bias + shortcut of x[i, j]
                       y: B, H + 1, W + 1, 4, C'    x: B, H, W, C    out: B, 2H, 2W, C'

bias_silu_: eager PyTorch adds the bias in a pass of its own, 4 C values a pixel; the kernel moves 2 C, the least.

join_up_block ends a block of nearest ×2 and 3×3 convolution. A pixel of parity (dy, dx) sees 2×2 pixels of x, so that
block is one 2×2 convolution to 4 C' channels, `fold`, with 16 products for each pixel of x instead of 36. The kernel
crops y to each parity, interleaves the parities, and adds the bias and the shortcut: channel 4c' + 2dy + dx of x with
each channel repeated r = 4 C' / C times. It reads y and x once and writes out, the least. PyTorch's pixel_shuffle and
repeat_interleave have no channels-last kernel on CUDA and add copies.

Training runs the plain path: SiLU's backward needs h + bias, which an operation in place loses, and join_up_block's
gradients would be two more kernels.

fp32, fp16, bf16, contiguous; all else runs the reference. Arithmetic is float32.
Check and measure: python -m kernels.bench --op bias_silu_
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.dispatch import check, check_same, jit, launch, no_gradient, plain_obstacle, tl, triton, use_triton

# --- reference: the specification -------------------------------------------------------------------------------------


def bias_silu_reference_(h, bias):
    """bias_silu_ in PyTorch, in h's dtype."""
    return F.silu(h.add_(bias.to(h.dtype)), inplace=True)


def join_up_block_reference(y, x, bias, repeats):
    """join_up_block in PyTorch, in y's dtype."""
    (B, H, W), out = x.shape[:3], y.shape[-1]
    parities = [y[:, dy:dy + H, dx:dx + W, 2 * dy + dx] for dy in (0, 1) for dx in (0, 1)]
    joined = torch.stack(parities, dim=3).add_(bias)  # B H W 4 C'
    if repeats:
        joined += x.repeat_interleave(repeats, 3).unflatten(3, (out, 4)).transpose(3, 4)
    return joined.view(B, H, W, 2, 2, out).transpose(2, 3).reshape(B, 2 * H, 2 * W, out)


def fold(weight):
    """The 3×3 weight C', C, 3, 3 of a convolution after nearest ×2 as 4 C', C, 2, 2: parity 2 dy + dx, then C'."""
    taps = weight.new_tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], dtype=torch.float32)  # dy 2 3
    return torch.einsum("dpk,eql,ockl->deocpq", taps, taps, weight.float()).flatten(0, 2).to(weight.dtype)


# --- configuration ----------------------------------------------------------------------------------------------------

PIXELS, BLOCK_C = 16, 128  # a program's tile; with 4 warps two 16-byte loads a thread in half precision
WARPS = 4


# --- kernels ----------------------------------------------------------------------------------------------------------


@jit
def _bias_silu(h, bias, n, channels, PIXELS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Program (i, j) owns PIXELS pixels (of n) and a tile of their channels."""
    p = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    at = p.to(tl.int64)[:, None] * channels + c[None, :]
    mask = (p < n)[:, None] & (c < channels)[None, :]
    v = tl.load(h + at, mask=mask, other=0.0).to(tl.float32)  # PIXELS BLOCK_C
    v += tl.load(bias + c, mask=c < channels, other=0.0).to(tl.float32)[None, :]
    tl.store(h + at, (v * tl.sigmoid(v)).to(h.dtype.element_ty), mask=mask)


@jit
def _join_up_block(y, x, bias, out,
                   n, height, width, channels, hidden,
                   REPEATS: tl.constexpr, PIXELS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Program (i, j) owns PIXELS pixels of out (of n) and a tile of its channels. x: hidden channels."""
    p = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    column, row, b = p % (2 * width), p // (2 * width) % (2 * height), p // (2 * width) // (2 * height)
    dy, dx, i, j = row % 2, column % 2, row // 2, column // 2
    mask = (p < n)[:, None] & (c < channels)[None, :]
    pixel = ((b * (height + 1) + i + dy) * (width + 1) + j + dx).to(tl.int64) * 4 + 2 * dy + dx
    v = tl.load(y + pixel[:, None] * channels + c[None, :], mask=mask, other=0.0).to(tl.float32)  # PIXELS BLOCK_C
    v += tl.load(bias + c, mask=c < channels, other=0.0).to(tl.float32)[None, :]
    if REPEATS:
        first = ((b * height + i) * width + j).to(tl.int64) * hidden + (2 * dy + dx) // REPEATS
        v += tl.load(x + first[:, None] + c[None, :] * (4 // REPEATS), mask=mask, other=0.0).to(tl.float32)
    tl.store(out + p.to(tl.int64)[:, None] * channels + c[None, :], v.to(out.dtype.element_ty), mask=mask)


# --- the public names -------------------------------------------------------------------------------------------------


def _launch(kernel, n, channels, *args, **constants):
    """Over n pixels of so many channels."""
    launch(kernel, (triton.cdiv(n, PIXELS), triton.cdiv(channels, BLOCK_C)), *args, PIXELS=PIXELS, BLOCK_C=BLOCK_C,
           num_warps=WARPS, **constants)


def bias_silu_(h, bias, backend=None):
    """h = SiLU(h + bias) over the last axis. Writes h: ..., C, and returns it. bias: C.

    backend: None (SANASR_KERNELS), "auto", "torch" or "triton"; see kernels.dispatch.use_triton.
    Raises ValueError for shapes, dtypes or devices that disagree, and where gradients would be needed.
    """
    check(h.ndim > 0 and bias.shape == h.shape[-1:], lambda: f"bias is {tuple(bias.shape)}, h {tuple(h.shape)}")
    check_same(h, bias=bias)
    no_gradient("bias_silu_", h, bias)
    if not use_triton(h, backend, plain_obstacle(h, bias)):
        return bias_silu_reference_(h, bias)
    n, C = h.numel() // len(bias), len(bias)
    _launch(_bias_silu, n, C, h, bias, n, C)
    return h


def join_up_block(y, x, bias, repeats, backend=None):
    """out[2i + dy, 2j + dx] = y[i + dy, j + dx, 2 dy + dx] + bias + shortcut; see the top of this file.

    y: B, H + 1, W + 1, 4, C', the convolution of x, padded by 1, with `fold(weight)`; x: B, H, W, C; bias: C';
    repeats: 4 C' / C, or 0 for no shortcut -> B, 2H, 2W, C'.
    backend: None (SANASR_KERNELS), "auto", "torch" or "triton"; see kernels.dispatch.use_triton.
    Raises ValueError for shapes, dtypes or devices that disagree, and where gradients would be needed.
    """
    (B, H, W, C), channels = x.shape, len(bias)
    check(y.shape == (B, H + 1, W + 1, 4, channels), lambda: f"y is {tuple(y.shape)}, x {tuple(x.shape)}, bias C'")
    check(repeats in (0, 1, 2, 4) and repeats * C in (0, 4 * channels),
          lambda: f"repeats = {repeats} does not make {C} channels 4 · {channels}")
    check_same(y, x=x, bias=bias)
    no_gradient("join_up_block", y, x, bias)
    if not use_triton(y, backend, plain_obstacle(y, x, bias)):
        return join_up_block_reference(y, x, bias, repeats)
    out, n = y.new_empty(B, 2 * H, 2 * W, channels), 4 * B * H * W
    _launch(_join_up_block, n, channels, y, x, bias, out, n, H, W, channels, C, REPEATS=repeats)
    return out
