"""Non-causal ReLU linear attention, forward and backward.

    O = relu(Q) (relu(K)^T V) / (relu(Q) (relu(K)^T 1) + eps)        for each head       (paper Eq. 3 and 14)

    q, k, v, out   B, N, heads, d    any strides
    state          S, B, heads, d + 1, d, float32: rows 0..d-1 are relu(K)^T V, row d is relu(K)^T 1

Eager PyTorch writes relu(Q), relu(K), float32 copies of all three, numerator and denominator. Here a first kernel
reads K and V once and leaves one partial state for each of S spans of tokens, and a second reads Q once and writes O
once. The backward has the same two halves: Q and dO give dQ and the partial gradients of the state; K and V then give
dK and dV. Where there are more than a few spans, a sum of the partial states comes between: two or three launches each.
For few tokens the forward is one launch, in which each program makes the whole state of its head.

Counts for each token and head, in elements: forward 4d, backward 7d, the least that is possible. Operations: 4d^2 and
10d^2 + O(d), at d = 32 in bf16 16 and 23 FLOP a byte, far below the ~200 where a GPU stops being bound by its memory.

Splitting over tokens, not only over B and heads, fills a large GPU from one image: 36 heads would be 36 programs. The
partial states are added in a fixed order, so a card repeats its results bit for bit: no atomics, and no autotuning,
which could pick another order of summation each time. torch.sum of many states splits them by device: cards may differ.

fp32, fp16, bf16, d = 16, 32 or 64; other sizes and float64 run the reference. Sums, state and division are float32.
Check and measure: python -m kernels.bench --op linear_attention
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from kernels.dispatch import INTERPRET, autocast_is_on, check, check_same, jit, plain_obstacle, tl, triton, use_triton

# --- reference: the specification -------------------------------------------------------------------------------------


def linear_attention_reference(q, k, v, eps=1e-15):
    """linear_attention in PyTorch, with sums and division in float32 (float64 for float64)."""
    if autocast_is_on(q):  # it would take the products to half precision
        with torch.autocast(q.device.type, enabled=False):
            return linear_attention_reference(q, k, v, eps)
    dtype = torch.promote_types(q.dtype, torch.float32)
    q_, k_, v_ = (t.transpose(1, 2) for t in (q, k, v))  # B heads N d
    q_, k_, v_ = F.relu(q_).to(dtype), F.relu(k_).to(dtype), v_.to(dtype)
    kv = k_.transpose(-1, -2) @ v_  # B heads d d
    z = k_.sum(dim=-2).unsqueeze(-1)  # B heads d 1
    out = q_ @ torch.cat([kv, z], dim=-1)  # B heads N d+1: numerator and denominator in one product
    return (out[..., :-1] / (out[..., -1:] + eps)).transpose(1, 2).to(q.dtype)


# --- configuration ----------------------------------------------------------------------------------------------------

SIZES = (16, 32, 64)
# (tokens in a tile, warps) by head size and bytes of a value: the largest tiles with which no kernel spills registers
# on sm_80, 89 or 90 (but a few of _backward_query at d = 64 in half precision, on sm_80 and 89 with some Tritons).
# _backward_query holds twice what the others do: it takes half a tile and two stages of loads.
CONFIG = {(16, 2): (64, 4), (32, 2): (64, 4), (64, 2): (32, 4), (16, 4): (32, 4), (32, 4): (64, 8), (64, 4): (32, 8)}
PROGRAMS = 384  # aimed at: one wave of three on each SM of a large GPU. A constant: the spans do not depend on the card
SHORT = 512  # up to so many tokens, or for one span, one launch does the forward. Each span then reads all of K and V:
#              at 512 tokens of 36 heads in half precision 2.4 MB, which stay in the L2 cache, up to eight times
MAX_STATES = 4  # more partial states than this are added once, by torch, rather than by each program that reads them


def spans(B, N, heads, block):
    """(tokens, S): the tokens of a span, a multiple of block, and the number of spans in N."""
    tiles = triton.cdiv(N, block)
    wanted = min(tiles, max(1, PROGRAMS // (B * heads)))
    tokens = triton.cdiv(tiles, wanted) * block
    return tokens, triton.cdiv(N, tokens)


# --- kernels ----------------------------------------------------------------------------------------------------------
# Program (s, h, b) owns the tokens [s * tokens, (s + 1) * tokens) of head h in picture b. PRECISION is that of products
# with a float32 operand: "ieee" for float32 inputs; "tf32" for half ones, held exactly by it (the state to 11 bits).


@jit
def _relu(x):
    """Keeps NaN as torch does; tl.maximum(x, 0) would not. Compares in float32: Triton's interpreter holds bf16 as
    unsigned integers, and that of 3.9 compares these, so that no bf16 value would be negative."""
    return tl.where(x.to(tl.float32) <= 0, 0.0, x).to(x.dtype)


@jit
def _load(x, n, end, stride_n, stride_d, D: tl.constexpr):
    """Tokens n of one head: tile, D; zero from `end` on."""
    d = tl.arange(0, D)
    return tl.load(x + n.to(tl.int64)[:, None] * stride_n + d[None, :] * stride_d, mask=n[:, None] < end, other=0.0)


@jit
def _store(x, n, end, stride_n, value, D: tl.constexpr):
    d = tl.arange(0, D)
    tl.store(x + n.to(tl.int64)[:, None] * stride_n + d[None, :], value.to(x.dtype.element_ty), mask=n[:, None] < end)


@jit
def _state_offset(s, b, h, B, heads, D: tl.constexpr):
    return ((s * B + b).to(tl.int64) * heads + h) * ((D + 1) * D)


@jit
def _load_state(state, S, b, h, B, heads, D: tl.constexpr):
    """The sum of S partial states: kv D, D and z D."""
    d = tl.arange(0, D)
    kv = tl.zeros([D, D], tl.float32)
    z = tl.zeros([D], tl.float32)
    for s in range(S):
        part = state + _state_offset(s, b, h, B, heads, D)
        kv += tl.load(part + d[:, None] * D + d[None, :])
        z += tl.load(part + D * D + d)
    return kv, z


@jit
def _store_state(state, s, b, h, B, heads, kv, z, D: tl.constexpr):
    d = tl.arange(0, D)
    part = state + _state_offset(s, b, h, B, heads, D)
    tl.store(part + d[:, None] * D + d[None, :], kv)
    tl.store(part + D * D + d, z)


@jit
def _sum_state(k, v, start, end, k_n, k_d, v_n, v_d, D: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr,
               PRECISION: tl.constexpr):
    """relu(K)^T V: D, D and relu(K)^T 1: D of the tokens start .. end - 1 of one head."""
    kv = tl.zeros([D, D], tl.float32)
    z = tl.zeros([BLOCK, D], tl.float32)  # summed over tokens once, after the loop
    for first in range(start, end, BLOCK):
        n = first + tl.arange(0, BLOCK)
        k_tile = _relu(_load(k, n, end, k_n, k_d, D))  # BLOCK D
        v_tile = _load(v, n, end, v_n, v_d, D)  # BLOCK D
        kv = tl.dot(tl.trans(k_tile.to(DOT)), v_tile.to(DOT), kv, input_precision=PRECISION)  # D D
        z += k_tile.to(tl.float32)
    return kv, tl.sum(z, axis=0)


@jit
def _write_out(q, out, kv, z, start, end, heads, eps, q_n, q_d, D: tl.constexpr, BLOCK: tl.constexpr,
               PRECISION: tl.constexpr):
    """out = relu(Q) kv / (relu(Q) z + eps) for the tokens start .. end - 1 of one head."""
    for first in range(start, end, BLOCK):
        n = first + tl.arange(0, BLOCK)
        q_tile = _relu(_load(q, n, end, q_n, q_d, D)).to(tl.float32)  # BLOCK D
        numerator = tl.dot(q_tile, kv, input_precision=PRECISION)  # BLOCK D
        denominator = tl.sum(q_tile * z[None, :], axis=1) + eps  # BLOCK
        _store(out, n, end, heads * D, numerator / denominator[:, None], D)


@jit
def _forward_state(k, v, state,
                   N, tokens, B, heads,
                   k_b, k_n, k_h, k_d, v_b, v_n, v_h, v_d,
                   D: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """state[s] = (relu(K)^T V, relu(K)^T 1) over the program's tokens."""
    s, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    k += b.to(tl.int64) * k_b + h.to(tl.int64) * k_h
    v += b.to(tl.int64) * v_b + h.to(tl.int64) * v_h
    end = tl.minimum((s + 1) * tokens, N)
    kv, z = _sum_state(k, v, s * tokens, end, k_n, k_d, v_n, v_d, D, BLOCK, DOT, PRECISION)
    _store_state(state, s, b, h, B, heads, kv, z, D)


@jit
def _forward_out(q, state, out,
                 N, tokens, S, B, heads, eps,
                 q_b, q_n, q_h, q_d,
                 D: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """out = relu(Q) kv / (relu(Q) z + eps) for the program's tokens."""
    s, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    q += b.to(tl.int64) * q_b + h.to(tl.int64) * q_h
    out += (b.to(tl.int64) * N * heads + h) * D
    kv, z = _load_state(state, S, b, h, B, heads, D)
    _write_out(q, out, kv, z, s * tokens, tl.minimum((s + 1) * tokens, N), heads, eps, q_n, q_d, D, BLOCK, PRECISION)


@jit
def _forward_short(q, k, v, state, out,
                   N, tokens, B, heads, eps,
                   q_b, q_n, q_h, q_d, k_b, k_n, k_h, k_d, v_b, v_n, v_h, v_d,
                   D: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Both for few tokens: each program sums the state of all of them itself, and span 0 stores it."""
    s, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    q += b.to(tl.int64) * q_b + h.to(tl.int64) * q_h
    k += b.to(tl.int64) * k_b + h.to(tl.int64) * k_h
    v += b.to(tl.int64) * v_b + h.to(tl.int64) * v_h
    out += (b.to(tl.int64) * N * heads + h) * D
    kv, z = _sum_state(k, v, 0, N, k_n, k_d, v_n, v_d, D, BLOCK, DOT, PRECISION)
    if s == 0:
        _store_state(state, 0, b, h, B, heads, kv, z, D)
    _write_out(q, out, kv, z, s * tokens, tl.minimum((s + 1) * tokens, N), heads, eps, q_n, q_d, D, BLOCK, PRECISION)


@jit
def _backward_query(q, g, state, dq, dstate,
                    N, tokens, S, B, heads, eps,
                    q_b, q_n, q_h, q_d, g_b, g_n, g_h, g_d,
                    D: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """dQ for the program's tokens, and dstate[s] = (relu(Q)^T dNum, relu(Q)^T dDen) over them, where g = dO,
    dNum = g / den and dDen = -(dNum . num) / den."""
    s, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    q += b.to(tl.int64) * q_b + h.to(tl.int64) * q_h
    g += b.to(tl.int64) * g_b + h.to(tl.int64) * g_h
    dq += (b.to(tl.int64) * N * heads + h) * D
    kv, z = _load_state(state, S, b, h, B, heads, D)
    dkv = tl.zeros([D, D], tl.float32)
    dz = tl.zeros([BLOCK, D], tl.float32)
    end = tl.minimum((s + 1) * tokens, N)
    for start in range(s * tokens, end, BLOCK):
        n = start + tl.arange(0, BLOCK)
        q_tile = _relu(_load(q, n, end, q_n, q_d, D)).to(tl.float32)  # BLOCK D
        numerator = tl.dot(q_tile, kv, input_precision=PRECISION)  # BLOCK D
        denominator = tl.sum(q_tile * z[None, :], axis=1) + eps  # BLOCK
        denominator = tl.where(n < end, denominator, 1.0)  # beyond the end 0 / eps would be NaN where eps is 0
        dnum = _load(g, n, end, g_n, g_d, D).to(tl.float32) / denominator[:, None]  # BLOCK D
        dden = -tl.sum(dnum * numerator, axis=1) / denominator  # BLOCK
        dq_tile = tl.dot(dnum, tl.trans(kv), input_precision=PRECISION) + dden[:, None] * z[None, :]
        _store(dq, n, end, heads * D, tl.where(q_tile == 0, 0.0, dq_tile), D)
        dkv = tl.dot(tl.trans(q_tile), dnum, dkv, input_precision=PRECISION)  # D D
        dz += q_tile * dden[:, None]
    _store_state(dstate, s, b, h, B, heads, dkv, tl.sum(dz, axis=0), D)


@jit
def _backward_key_value(k, v, dstate, dk, dv,
                        N, tokens, S, B, heads,
                        k_b, k_n, k_h, k_d, v_b, v_n, v_h, v_d,
                        D: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """dK = (V dkv^T + dz) where K > 0 and dV = relu(K) dkv for the program's tokens."""
    s, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    k += b.to(tl.int64) * k_b + h.to(tl.int64) * k_h
    v += b.to(tl.int64) * v_b + h.to(tl.int64) * v_h
    dk += (b.to(tl.int64) * N * heads + h) * D
    dv += (b.to(tl.int64) * N * heads + h) * D
    dkv, dz = _load_state(dstate, S, b, h, B, heads, D)
    end = tl.minimum((s + 1) * tokens, N)
    for start in range(s * tokens, end, BLOCK):
        n = start + tl.arange(0, BLOCK)
        k_tile = _relu(_load(k, n, end, k_n, k_d, D)).to(tl.float32)  # BLOCK D
        v_tile = _load(v, n, end, v_n, v_d, D).to(tl.float32)  # BLOCK D
        dk_tile = tl.dot(v_tile, tl.trans(dkv), input_precision=PRECISION) + dz[None, :]
        _store(dk, n, end, heads * D, tl.where(k_tile == 0, 0.0, dk_tile), D)
        _store(dv, n, end, heads * D, tl.dot(k_tile, dkv, input_precision=PRECISION), D)


# --- launchers --------------------------------------------------------------------------------------------------------


def _plan(q):
    """(tokens of a span, spans, the compile-time arguments that all four kernels share)"""
    B, N, heads, d = q.shape
    block, warps = CONFIG[d, q.element_size()]
    precision = "ieee" if q.dtype == torch.float32 else "tf32"
    return *spans(B, N, heads, block), dict(D=d, BLOCK=block, PRECISION=precision, num_warps=warps)


def _half_tile(constants):
    return {**constants, "BLOCK": constants["BLOCK"] // 2, "num_stages": 2}


def _few(state):
    return state.sum(0, keepdim=True) if state.shape[0] > MAX_STATES else state


class _LinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, eps):
        B, N, heads, d = q.shape
        tokens, S, constants = _plan(q)
        grid = (S, heads, B)
        short, half = S == 1 or N <= SHORT, {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
        dot = tl.float32 if INTERPRET else half.get(q.dtype, tl.float32)  # the interpreter multiplies bf16 wrongly
        state = torch.empty(1 if short else S, B, heads, d + 1, d, dtype=torch.float32, device=q.device)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if short:
            _forward_short[grid](q, k, v, state, out, N, tokens, B, heads, eps, *q.stride(), *k.stride(), *v.stride(),
                                 DOT=dot, **constants)
        else:
            _forward_state[grid](k, v, state, N, tokens, B, heads, *k.stride(), *v.stride(), DOT=dot, **constants)
            state = _few(state)
            _forward_out[grid](q, state, out, N, tokens, state.shape[0], B, heads, eps, *q.stride(), **constants)
        ctx.save_for_backward(q, k, v, state)
        ctx.eps = eps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        q, k, v, state = ctx.saved_tensors
        B, N, heads, d = q.shape
        tokens, S, constants = _plan(q)
        grid = (S, heads, B)
        dstate = torch.empty(S, B, heads, d + 1, d, dtype=torch.float32, device=q.device)
        dq, dk, dv = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
        _backward_query[grid](q, g, state, dq, dstate, N, tokens, state.shape[0], B, heads, ctx.eps, *q.stride(),
                              *g.stride(), **_half_tile(constants))
        dstate = _few(dstate)
        _backward_key_value[grid](k, v, dstate, dk, dv, N, tokens, dstate.shape[0], B, heads, *k.stride(), *v.stride(),
                                  **constants)
        return dq, dk, dv, None


# --- the public name --------------------------------------------------------------------------------------------------


def linear_attention(q, k, v, eps=1e-15, backend=None):
    """relu(q) (relu(k)^T v) / (relu(q) (relu(k)^T 1) + eps) for each head (paper Eq. 3).

    q, k, v: B, N, heads, d, of any strides and one floating dtype; the ReLU of q and k is done here.
    Returns B, N, heads, d, contiguous, in that dtype; 0 where a token's denominator is 0. eps: added to it.
    backend: None (SANASR_KERNELS), "auto", "torch" or "triton"; see kernels.dispatch.use_triton.
    Differentiable once. Raises ValueError for wrong ranks, shapes, dtypes or devices.
    """
    check(q.ndim == 4, lambda: f"q must be B, N, heads, d, got shape {tuple(q.shape)}")
    for name, t in (("k", k), ("v", v)):
        check(t.shape == q.shape, lambda: f"{name} has shape {tuple(t.shape)}, q {tuple(q.shape)}: they must agree")  # noqa: B023
    check_same(q, k=k, v=v)
    k, v = k.to(q.dtype), v.to(q.dtype)  # they differ under autocast alone
    obstacle = plain_obstacle(q, contiguous=False)
    if q.shape[-1] not in SIZES:
        obstacle = f"q has head size {q.shape[-1]}, the kernels have {', '.join(map(str, SIZES))}"
    if use_triton(q, backend, obstacle):
        with torch.cuda.device(q.get_device()):  # Triton launches on the current device
            return _LinearAttention.apply(q, k, v, eps)
    return linear_attention_reference(q, k, v, eps)
