"""Between two branches of SANA's transformer: residual, LayerNorm and AdaLN modulation in one pass. For inference.

    x += gate * y                                                            x, y: ..., C, x in place
    out = (x - mean(x)) / sqrt(var(x) + eps) * gain + shift                  gate, gain, shift: C

Eager PyTorch moves 5 C values a token in two launches: 3 C for the sum, 2 C for the norm. The kernel, one launch, reads
x and y and writes x and out: 4 C, the least that is possible. The norm is taken of the sum before it is rounded.

fp32, fp16, bf16, contiguous, C up to 4096; all else runs the reference. Arithmetic is float32.
Training runs the plain path: it does not write over x, which the cross-attention's gradients need.
Check and measure: python -m kernels.bench --op add_layer_norm_
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.dispatch import check_rows, jit, no_gradient, plain_obstacle, tl, triton, use_triton
from kernels.rms_norm import MAX_C, WARPS, tile

# --- reference: the specification -------------------------------------------------------------------------------------


def add_layer_norm_reference_(x, y, gate, gain, shift, eps):
    """add_layer_norm_ in PyTorch. The sum is rounded to x's dtype, the norm is float32 inside (float64 for float64)."""
    x = x.add_(y) if gate is None else x.addcmul_(y, gate.to(x.dtype))
    return F.layer_norm(x, x.shape[-1:], gain.to(x.dtype), shift.to(x.dtype), eps)


# --- kernel -----------------------------------------------------------------------------------------------------------
# Program i owns the rows [i * ROWS, (i + 1) * ROWS), whole.


@jit
def _add_layer_norm(
    x, y, gate, gain, shift, out, n, channels, eps, GATED: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK_C)
    at = row.to(tl.int64)[:, None] * channels + c[None, :]
    inside = (row < n)[:, None] & (c < channels)[None, :]
    v = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)  # ROWS BLOCK_C
    if GATED:
        v *= tl.load(gate + c, mask=c < channels, other=0.0).to(tl.float32)[None, :]
    v += tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(x + at, v.to(x.dtype.element_ty), mask=inside)
    mean = tl.sum(v, axis=1) / channels  # ROWS
    v = tl.where((c < channels)[None, :], v - mean[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(v * v, axis=1) / channels + eps)  # ROWS
    gains = tl.load(gain + c, mask=c < channels, other=0.0).to(tl.float32)
    shifts = tl.load(shift + c, mask=c < channels, other=0.0).to(tl.float32)
    v = v * scale[:, None] * gains[None, :] + shifts[None, :]
    tl.store(out + at, v.to(out.dtype.element_ty), mask=inside)


# --- the public name --------------------------------------------------------------------------------------------------


def add_layer_norm_(x, y, gate, gain, shift, eps, backend=None):
    """x += gate * y, written to x; returns the LayerNorm of that over the last axis, times gain, plus shift: ..., C.

    x, y: ..., C of one floating dtype; gate (None for 1), gain, shift: C, of any.
    backend: None (SANASR_KERNELS), "auto", "torch" or "triton"; see kernels.dispatch.use_triton.
    Raises ValueError for shapes, dtypes or devices that disagree, and where gradients would be needed.
    """
    vectors = {"gain": gain, "shift": shift} | ({} if gate is None else {"gate": gate})
    check_rows(x, y, **vectors)
    no_gradient("add_layer_norm_", x, y, *vectors.values())
    C = x.shape[-1]
    many = f"x has {C} channels, the kernel up to {MAX_C}" if C > MAX_C else None
    obstacle = many or plain_obstacle(x, y, *vectors.values())
    if use_triton(x, backend, obstacle):
        out, n, (rows, channels) = torch.empty_like(x), x.numel() // C, tile(C)
        with torch.cuda.device(x.get_device()):  # Triton launches on the current device
            _add_layer_norm[(triton.cdiv(n, rows),)](
                x, y, x if gate is None else gate, gain, shift, out, n, C, eps,
                GATED=gate is not None, ROWS=rows, BLOCK_C=channels, num_warps=WARPS,
            )  # fmt: skip
        return out
    return add_layer_norm_reference_(x, y, gate, gain, shift, eps)
