"""The end of DC-AE's ResBlock: x += RMSNorm(y), with gain and bias, in one pass. For inference: no gradients.

    x += y / sqrt(mean(y^2) + eps) * weight + bias        over the last axis, in place
    x, y   ..., C        weight, bias   C

Eager PyTorch moves 7 C values a token: 2 C for the norm, 2 C for the bias, 3 C for the sum. The kernel, one launch,
reads x and y and writes x: 3 C, the least that is possible. At about one operation a byte the memory is its limit.

Training runs the plain path. A backward pass of its own would move 3 C (y and the gradient in, dy out) where autograd's
moves 4 C, the fourth for the bias's gradient, and none where that is frozen; the residual costs neither anything.

fp32, fp16, bf16, contiguous, C up to 4096; all else runs the reference. Arithmetic is float32.
Check and measure: python -m kernels.bench --op add_rms_norm_
"""

from __future__ import annotations

import torch

from kernels.dispatch import check_rows, jit, no_gradient, plain_obstacle, tl, triton, use_triton

# --- reference: the specification -------------------------------------------------------------------------------------


def rms_norm_(y, weight, bias, eps):
    """y / rms(y) * weight + bias over the last axis of y (..., C in float32 or float64), in place."""
    mean = torch.linalg.vector_norm(y, dim=-1, keepdim=True).square_().div_(y.shape[-1])
    y.mul_(mean.add_(eps).rsqrt_())
    return torch.addcmul(bias.to(y.dtype), y, weight.to(y.dtype), out=y)


def add_rms_norm_reference_(x, y, weight, bias, eps):
    """add_rms_norm_ in PyTorch, in float32 (float64 for float64). Where y has that dtype already, it is overwritten."""
    return x.add_(rms_norm_(y.to(torch.promote_types(y.dtype, torch.float32)), weight, bias, eps))


# --- configuration ----------------------------------------------------------------------------------------------------

MAX_C = 4096  # a row has to fit the registers of one program: 32 values of y and of x in each thread
VALUES = 2048  # of a tile, 16 rows at C = 128: with 4 warps two 16-byte loads of y and of x a thread in half precision
WARPS = 4


def tile(C):
    """(rows, channels) of a program's tile: whole rows, channels padded to a power of two."""
    channels = triton.next_power_of_2(C)
    return max(1, VALUES // channels), channels


# --- kernel -----------------------------------------------------------------------------------------------------------
# Program i owns the rows [i * ROWS, (i + 1) * ROWS), whole.


@jit
def _add_rms_norm(x, y, weight, bias, n, channels, eps, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK_C)
    at = row.to(tl.int64)[:, None] * channels + c[None, :]
    inside = (row < n)[:, None] & (c < channels)[None, :]
    v = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)  # ROWS BLOCK_C
    old = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)  # ROWS BLOCK_C
    gain = tl.load(weight + c, mask=c < channels, other=0.0).to(tl.float32)
    shift = tl.load(bias + c, mask=c < channels, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(v * v, axis=1) / channels + eps)  # ROWS
    new = old + (v * scale[:, None] * gain[None, :] + shift[None, :])
    tl.store(x + at, new.to(x.dtype.element_ty), mask=inside)


# --- the public name --------------------------------------------------------------------------------------------------


def add_rms_norm_(x, y, weight, bias, eps, backend=None):
    """x += y / sqrt(mean(y^2) + eps) * weight + bias over the last axis. Writes x, and returns it.

    x, y: ..., C of one floating dtype; weight, bias: C, of any. y may be used as scratch space: its values are lost.
    backend: None (SANASR_KERNELS), "auto", "torch" or "triton"; see kernels.dispatch.use_triton.
    Raises ValueError for shapes, dtypes or devices that disagree, and where gradients would be needed.
    """
    check_rows(x, y, weight=weight, bias=bias)
    no_gradient("add_rms_norm_", x, y, weight, bias)
    C = x.shape[-1]
    obstacle = f"x has {C} channels, the kernel up to {MAX_C}" if C > MAX_C else plain_obstacle(x, y, weight, bias)
    if use_triton(x, backend, obstacle):
        n, (rows, channels) = x.numel() // C, tile(C)
        with torch.cuda.device(x.get_device()):  # Triton launches on the current device
            _add_rms_norm[(triton.cdiv(n, rows),)](
                x, y, weight, bias, n, C, eps, ROWS=rows, BLOCK_C=channels, num_warps=WARPS
            )
        return x
    return add_rms_norm_reference_(x, y, weight, bias, eps)
