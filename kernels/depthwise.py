"""Depthwise convolution of channels-last tokens with zero padding, one launch. For inference.

    out[y, x, c] = sum over (i, j) of weight[c, i, j] * u[y + i - K/2, x + j - K/2, c]          u, out: B, N, C

The first half of EfficientViT's aggregation of q, k and v (K = 5). cuDNN has no fast kernel for it in channels-last.
This one slides down strips of columns as that of kernels/mix_ffn.py does: a value of u is read from cache once for each
strip that touches it, (COLS + K - 1) / COLS * (rows + K - 1) / rows times, instead of K^2 times. u may be a slice of
wider tokens, so that a product can leave it where the attention reads it. Least moved: 2 C values a token.

fp32, fp16, bf16, K = 3 or 5; all else runs the reference. Arithmetic is float32.
Training runs the plain path, cuDNN, which has both gradients.
Check and measure: python -m kernels.bench --op depthwise
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.dispatch import check, check_same, jit, launch, no_gradient, plain_obstacle, tl, use_triton
from kernels.mix_ffn import BLOCK_C, COLS, WARPS, _load_row, _place, _where, _zeros, strips

# --- reference: the specification -------------------------------------------------------------------------------------


def depthwise_reference(u, height, width, weight):
    """depthwise in PyTorch."""
    picture = u.unflatten(1, (height, width)).permute(0, 3, 1, 2)  # B C h w, and channels-last in memory
    out = F.conv2d(picture, weight, padding=weight.shape[3] // 2, groups=len(weight))
    return out.permute(0, 2, 3, 1).flatten(1, 2)


# --- kernel -----------------------------------------------------------------------------------------------------------


@jit
def _slide(pending, row, taps, K: tl.constexpr, COLS: tl.constexpr):
    """Add input row y. pending: K - 1 rows of COLS, what rows < y gave to output rows y - K/2 .. y + K/2 - 1.
    Returns the finished output row y - K/2, and pending for row y + 1."""
    done = ()
    later = ()
    for i in tl.static_range(K):
        for j in tl.static_range(COLS):
            if i < K - 1:
                total = pending[i * COLS + j]
            else:
                total = tl.zeros_like(row[0])
            for k in tl.static_range(K):
                total += taps[(K - 1 - i) * K + k] * row[j + k]
            if i == 0:
                done = done + (total,)
            else:
                later = later + (total,)
    return done, later


@jit
def _depthwise(
    u, weight, out,
    height, width, channels, rows, across, tiles,
    u_b, u_n,
    K: tl.constexpr, BLOCK_C: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Program (i, b) owns one channel tile of one strip of picture b."""
    c, y0, y1, x0 = _place(rows, across, height, tiles, BLOCK_C, COLS)
    b = tl.program_id(1).to(tl.int64)
    u += b * u_b
    out += b * height * width * channels
    taps = ()
    for k in tl.static_range(K * K):
        taps = taps + (tl.load(weight + c * K * K + k, mask=c < channels, other=0.0).to(tl.float32),)
    pending = _zeros((K - 1) * COLS, BLOCK_C)
    for y in range(y0 - K // 2, y1 + K // 2):
        row = _load_row(u, y, x0 - K // 2, height, width, u_n, c, channels, COLS + K - 1)
        done, pending = _slide(pending, row, taps, K, COLS)
        for j in tl.static_range(COLS):
            inside = _where(c, channels, (y >= y0 + K // 2) & (x0 + j < width))
            n = ((y - K // 2) * width + x0 + j).to(tl.int64)
            tl.store(out + n * channels + c, done[j].to(out.dtype.element_ty), mask=inside)


# --- the public name --------------------------------------------------------------------------------------------------


def depthwise(u, height, width, weight, backend=None):
    """A depthwise K x K convolution with zero padding, without a bias, over pictures of height * width = N tokens.

    u: B, N, C, row by row, with C contiguous (a slice of wider tokens is fine); weight: C, 1, K, K, K odd -> B, N, C.
    backend: None (SANASR_KERNELS), "auto", "torch" or "triton"; see kernels.dispatch.use_triton.
    Raises ValueError for sizes, dtypes or devices that disagree, and where gradients would be needed.
    """
    check(u.ndim == 3 and height > 0 and width > 0 and u.shape[1] == height * width,
          lambda: f"u must be B, {height} * {width}, C, got {tuple(u.shape)}")
    B, _, C = u.shape
    K = weight.shape[-1]
    check(weight.shape == (C, 1, K, K) and K % 2 == 1, lambda: f"weight is {tuple(weight.shape)}, u {tuple(u.shape)}")
    check_same(u, weight=weight)
    no_gradient("depthwise", u, weight)
    obstacle = plain_obstacle(u, weight, contiguous=False)
    if K not in (3, 5):
        obstacle = f"weight is {K} x {K}, the kernel has 3 x 3 and 5 x 5"
    elif u.stride(2) != 1 or not weight.is_contiguous():
        obstacle = "u or weight is not contiguous"
    if not use_triton(u, backend, obstacle):
        return depthwise_reference(u, height, width, weight)
    out = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    rows, across, down, tiles = strips(B, height, width, C)
    launch(_depthwise, (tiles * across * down, B), u, weight, out, height, width, C, rows, across, tiles, u.stride(0),
           u.stride(1), K=K, BLOCK_C=BLOCK_C, COLS=COLS, num_warps=WARPS)
    return out
