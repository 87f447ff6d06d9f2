"""A residual sum and the norm around it, each one launch. For inference.

    add_rms_norm_     x += y / sqrt(mean(y^2) + eps) * weight + bias                     the end of DC-AE's ResBlock
    add_layer_norm_   x += gate * y                                                      between two branches of SANA's
                      out = (x - mean(x)) / sqrt(var(x) + eps) * gain + shift            transformer: AdaLN modulation

    x, y, out: ..., C, norms over the last axis, x in place        weight, bias, gate, gain, shift: C

add_rms_norm_: eager PyTorch moves 7 C values a token: 2 C for the norm, 2 C for the bias, 3 C for the sum. The kernel
reads x and y and writes x: 3 C, the least that is possible. A backward pass of its own would move 3 C (y and the
gradient in, dy out) where autograd's moves 4 C, the fourth for the bias's gradient, and none where that is frozen.

add_layer_norm_: eager PyTorch moves 5 C in two launches: 3 C for the sum, 2 C for the norm. The kernel reads x and y
and writes x and out: 4 C, the least that is possible. The norm is taken of the sum before it is rounded.

At about one operation a byte the memory is the limit of both. Training runs the plain path: it does not write over x,
which gradients need. fp32, fp16, bf16, contiguous, C up to 4096; all else runs the reference. Arithmetic is float32.
Check and measure: python -m kernels.bench --op add_rms_norm_
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.dispatch import check, check_same, jit, launch, no_gradient, plain_obstacle, tl, triton, use_triton

# --- reference: the specification -------------------------------------------------------------------------------------


def rms_norm_(y, weight, bias, eps):
    """y / rms(y) * weight + bias over the last axis of y (..., C in float32 or float64), in place."""
    mean = torch.linalg.vector_norm(y, dim=-1, keepdim=True).square_().div_(y.shape[-1])
    y.mul_(mean.add_(eps).rsqrt_())
    return torch.addcmul(bias.to(y.dtype), y, weight.to(y.dtype), out=y)


def add_rms_norm_reference_(x, y, weight, bias, eps):
    """add_rms_norm_ in PyTorch, in float32 (float64 for float64). Where y has that dtype already, it is overwritten."""
    return x.add_(rms_norm_(y.to(torch.promote_types(y.dtype, torch.float32)), weight, bias, eps))


def add_layer_norm_reference_(x, y, gate, gain, shift, eps):
    """add_layer_norm_ in PyTorch. The sum is rounded to x's dtype, the norm is float32 inside (float64 for float64)."""
    x = x.add_(y) if gate is None else x.addcmul_(y, gate.to(x.dtype))
    return F.layer_norm(x, x.shape[-1:], gain.to(x.dtype), shift.to(x.dtype), eps)


# --- configuration ----------------------------------------------------------------------------------------------------

MAX_C = 4096  # a row has to fit the registers of one program: 32 values of y and of x in each thread
VALUES = 2048  # of a tile, 16 rows at C = 128: with 4 warps two 16-byte loads of y and of x a thread in half precision
WARPS = 4


def tile(C):
    """(rows, channels) of a program's tile: whole rows, channels padded to a power of two."""
    channels = triton.next_power_of_2(C)
    return max(1, VALUES // channels), channels


# --- kernels ----------------------------------------------------------------------------------------------------------
# Program i owns the rows [i * ROWS, (i + 1) * ROWS), whole.


@jit
def _place(n, channels, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """The program's channels c, the offsets of its values, and a mask of those inside."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK_C)
    return c, row.to(tl.int64)[:, None] * channels + c[None, :], (row < n)[:, None] & (c < channels)[None, :]


@jit
def _vector(pointer, c, channels):
    return tl.load(pointer + c, mask=c < channels, other=0.0).to(tl.float32)[None, :]


@jit
def _add_rms_norm(x, y, weight, bias, n, channels, eps, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    c, at, inside = _place(n, channels, ROWS, BLOCK_C)
    v = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)  # ROWS BLOCK_C
    old = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)  # ROWS BLOCK_C
    scale = tl.rsqrt(tl.sum(v * v, axis=1) / channels + eps)  # ROWS
    new = old + (v * scale[:, None] * _vector(weight, c, channels) + _vector(bias, c, channels))
    tl.store(x + at, new.to(x.dtype.element_ty), mask=inside)


@jit
def _add_layer_norm(x, y, gate, gain, shift, out, n, channels, eps, GATED: tl.constexpr, ROWS: tl.constexpr,
                    BLOCK_C: tl.constexpr):
    c, at, inside = _place(n, channels, ROWS, BLOCK_C)
    v = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)  # ROWS BLOCK_C
    if GATED:
        v *= _vector(gate, c, channels)
    v += tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(x + at, v.to(x.dtype.element_ty), mask=inside)
    mean = tl.sum(v, axis=1) / channels  # ROWS
    v = tl.where((c < channels)[None, :], v - mean[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(v * v, axis=1) / channels + eps)  # ROWS
    v = v * scale[:, None] * _vector(gain, c, channels) + _vector(shift, c, channels)
    tl.store(out + at, v.to(out.dtype.element_ty), mask=inside)


# --- the public names -------------------------------------------------------------------------------------------------


def _checked(name, x, y, **vectors):
    """Why the kernel cannot take these tensors, in words, or None. Raises ValueError unless x and y are ..., C of one
    floating dtype, and the vectors C of any, on one device, and where gradients would be needed."""
    check(x.ndim > 0 and x.shape[-1] > 0, lambda: f"x must be ..., C, got shape {tuple(x.shape)}")
    check(y.shape == x.shape, lambda: f"y has shape {tuple(y.shape)}, x {tuple(x.shape)}: they must agree")
    check_same(x, y=y)
    C = x.shape[-1]
    for key, t in vectors.items():
        check(t.shape == (C,), lambda: f"{key} must be {(C,)}, got {tuple(t.shape)}")  # noqa: B023
        check(t.is_floating_point(), lambda: f"{key} must have a floating dtype, got {t.dtype}")  # noqa: B023
        check(t.device == x.device, lambda: f"{key} is on {t.device}, the first argument on {x.device}")  # noqa: B023
    no_gradient(name, x, y, *vectors.values())
    many = f"x has {C} channels, the kernel up to {MAX_C}" if C > MAX_C else None
    return many or plain_obstacle(x, y, *vectors.values())


def _launch(kernel, x, *pointers, eps, **constants):
    C = x.shape[-1]
    n, (rows, channels) = x.numel() // C, tile(C)
    launch(kernel, (triton.cdiv(n, rows),), x, *pointers, n, C, eps, ROWS=rows, BLOCK_C=channels, num_warps=WARPS,
           **constants)


def add_rms_norm_(x, y, weight, bias, eps, backend=None):
    """x += y / sqrt(mean(y^2) + eps) * weight + bias over the last axis. Writes x, and returns it.

    x, y: ..., C of one floating dtype; weight, bias: C, of any. y may be used as scratch space: its values are lost.
    backend: None (SANASR_KERNELS), "auto", "torch" or "triton"; see kernels.dispatch.use_triton.
    Raises ValueError for shapes, dtypes or devices that disagree, and where gradients would be needed.
    """
    if not use_triton(x, backend, _checked("add_rms_norm_", x, y, weight=weight, bias=bias)):
        return add_rms_norm_reference_(x, y, weight, bias, eps)
    _launch(_add_rms_norm, x, y, weight, bias, eps=eps)
    return x


def add_layer_norm_(x, y, gate, gain, shift, eps, backend=None):
    """x += gate * y, written to x; returns the LayerNorm of that over the last axis, times gain, plus shift: ..., C.

    x, y: ..., C of one floating dtype; gate (None for 1), gain, shift: C, of any.
    backend: None (SANASR_KERNELS), "auto", "torch" or "triton"; see kernels.dispatch.use_triton.
    Raises ValueError for shapes, dtypes or devices that disagree, and where gradients would be needed.
    """
    vectors = {"gain": gain, "shift": shift} | ({} if gate is None else {"gate": gate})
    if not use_triton(x, backend, _checked("add_layer_norm_", x, y, **vectors)):
        return add_layer_norm_reference_(x, y, gate, gain, shift, eps)
    out = torch.empty_like(x)
    _launch(_add_layer_norm, x, y, x if gate is None else gate, gain, shift, out, eps=eps, GATED=gate is not None)
    return out
