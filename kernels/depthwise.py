"""Depthwise convolutions of channels-last tokens: the middle of SANA's Mix-FFN (GLUMBConv), and a plain one.

    mix_ffn     U = X W1^T + b1                     B, N, 2H    the 1x1 expand       cuBLAS, bias in its epilogue
                E = SiLU(U)                         B, N, 2H
                A, G = depthwise3x3(E) + b          B, N, H each, zero padding, over the picture of height * width = N
                Y = A SiLU(G)                       B, N, H     E, A, G and Y are one kernel, two in the backward
                out = Y W2^T (+ b2)                 B, N, C     the 1x1 project      cuBLAS
    depthwise   out = depthwiseKxK(u)               B, N, C     K = 3 or 5, for inference

Eager PyTorch moves 4 H values a token for E, 4 H for the convolution, 2 H for SiLU(G) and 3 H for Y, 13 H in all. The
kernel reads U and writes Y: 3 H. In training it keeps U alone, where autograd keeps U, E, A, G and SiLU(G).

Every program slides down a strip of COLS columns and keeps in registers, for the row above and the current one, what
the rows read so far add to the convolution. So a value of U is read from cache, and its SiLU taken, once for each strip
that touches it: (COLS + 2) / COLS * (rows + 2) / rows times, 1.6 for tall strips, instead of nine times.

Special functions (exponential, reciprocal; 16 a cycle on an SM) are 8.4 H a token. By these counts they, and not the
memory, are an H200's limit in half precision, at about 60 % of its copy rate; an RTX 4090, with a quarter of the memory
rate, is bound by that. A matrix product with SiLU in its epilogue would save at most an eighth of its own time on an
H200, nothing on an RTX 4090, and lose more where it runs at under 88 % of cuBLAS.

depthwise, K = 5, is the first half of EfficientViT's aggregation of q, k and v: cuDNN has no fast kernel for it in
channels-last. It moves 2 C values a token, the least. u may be a slice of wider tokens, so that a product can leave it
where the attention reads it. Training runs the plain path, cuDNN, which has both gradients.

fp32, fp16, bf16; all else runs the reference. Arithmetic is float32, a card adds gradients of weights in one order.
Check and measure: python -m kernels.bench --op mix_ffn
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from kernels.dispatch import check, check_same, jit, launch, no_gradient, plain_obstacle, tl, triton, use_triton

# --- reference: the specification -------------------------------------------------------------------------------------


def depthwise_gate_reference(u, height, width, depth_weight, depth_bias, inplace=False):
    """depthwise_gate in PyTorch. inplace: u may be overwritten, which halves the time on a CPU."""
    e = F.silu(u, inplace=inplace)  # B N 2H
    e = e.unflatten(1, (height, width)).permute(0, 3, 1, 2)  # B 2H h w, and channels-last in memory
    p = F.conv2d(e, depth_weight, depth_bias, padding=1, groups=depth_weight.shape[0])
    a, g = p.permute(0, 2, 3, 1).flatten(1, 2).chunk(2, dim=-1)  # B N H each
    return F.silu(g, inplace=True).mul_(a) if not p.requires_grad else a * F.silu(g)


def depthwise_reference(u, height, width, weight):
    """depthwise in PyTorch."""
    picture = u.unflatten(1, (height, width)).permute(0, 3, 1, 2)  # B C h w, and channels-last in memory
    out = F.conv2d(picture, weight, padding=weight.shape[3] // 2, groups=len(weight))
    return out.permute(0, 2, 3, 1).flatten(1, 2)


# --- configuration ----------------------------------------------------------------------------------------------------

BLOCK_C = 128  # channels in a tile; two to a thread, so a warp reads 128 bytes of half precision at once
WARPS = 2
COLS = 4  # columns of a strip
MIN_ROWS, MAX_ROWS = 4, 32  # rows of a strip: few where the picture is small, to have programs for all SMs
PROGRAMS = 1024  # aimed at: eight on each SM of a large GPU. A constant: the strips do not depend on the card


def strips(B, height, width, channels):
    """(rows of a strip, strips across, strips down, channel tiles)"""
    across, tiles = triton.cdiv(width, COLS), triton.cdiv(channels, BLOCK_C)
    rows = MAX_ROWS
    while rows > MIN_ROWS and B * across * tiles * triton.cdiv(height, rows) < PROGRAMS:
        rows //= 2
    return rows, across, triton.cdiv(height, rows), tiles


# --- kernels ----------------------------------------------------------------------------------------------------------
# Program (i, b) owns one channel tile of one strip of picture b; the tiles of a strip follow each other, so programs
# that run together read whole tokens. Tuples of tiles are a strip's columns, or the filter's taps in reading order.


@jit
def _place(rows, across, height, tiles, BLOCK_C: tl.constexpr, COLS: tl.constexpr):
    """The program's channels c, first row y0, last row (exclusive) y1 and first column x0."""
    i = tl.program_id(0)
    strip = i // tiles
    c = (i % tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    y0 = (strip // across) * rows
    return c, y0, tl.minimum(y0 + rows, height), (strip % across) * COLS


@jit
def _where(c, channels, condition):
    """c < channels if the scalar condition holds, else nowhere. `block & scalar` does not do: Triton's interpreter
    makes integers of it, and that of 3.9 refuses to store under such a mask."""
    return c < tl.where(condition, channels, 0)


@jit
def _load_row(x, y, x0, height, width, stride, c, channels, COUNT: tl.constexpr):
    """Columns x0 .. x0 + COUNT - 1 of row y in float32, zero outside the picture."""
    row = ()
    for j in tl.static_range(COUNT):
        inside = (y >= 0) & (y < height) & (x0 + j >= 0) & (x0 + j < width) & (c < channels)
        at = (y * width + x0 + j).to(tl.int64) * stride + c
        row = row + (tl.load(x + at, mask=inside, other=0.0).to(tl.float32),)
    return row


@jit
def _load_taps(weight, c, channels, COUNT: tl.constexpr, FLIP: tl.constexpr):
    taps = ()
    for k in tl.static_range(COUNT):
        at = c * COUNT + (COUNT - 1 - k if FLIP else k)
        taps = taps + (tl.load(weight + at, mask=c < channels, other=0.0).to(tl.float32),)
    return taps


@jit
def _silu(x):
    return x * tl.sigmoid(x)


@jit
def _silu_row(row):
    out = ()
    for j in tl.static_range(len(row)):
        out = out + (_silu(row[j]),)
    return out


@jit
def _silu_slope(x):
    s = tl.sigmoid(x)
    return s * (1 + x * (1 - s))


@jit
def _zeros(COUNT: tl.constexpr, BLOCK_C: tl.constexpr):
    row = ()
    for _ in tl.static_range(COUNT):
        row = row + (tl.zeros([BLOCK_C], tl.float32),)
    return row


@jit
def _slide(above, here, row, taps, COLS: tl.constexpr):
    """Add input row y to the 3x3 convolution: above and here hold what rows < y gave to output rows y - 1 and y.
    Returns the finished output row y - 1, and above and here for row y + 1."""
    done = ()
    next_above = ()
    next_here = ()
    for j in tl.static_range(COLS):
        done = done + (above[j] + taps[6] * row[j] + taps[7] * row[j + 1] + taps[8] * row[j + 2],)
        next_above = next_above + (here[j] + taps[3] * row[j] + taps[4] * row[j + 1] + taps[5] * row[j + 2],)
        next_here = next_here + (taps[0] * row[j] + taps[1] * row[j + 1] + taps[2] * row[j + 2],)
    return done, next_above, next_here


@jit
def _gate(u, weight, bias, dy, out,
          height, width, hidden, rows, across, tiles,
          BACKWARD: tl.constexpr, BLOCK_C: tl.constexpr, COLS: tl.constexpr):
    """Forward: out = Y: B, N, H. Backward: out = (dA, dG): B, N, 2H, with A and G computed again."""
    c, y0, y1, x0 = _place(rows, across, height, tiles, BLOCK_C, COLS)
    b = tl.program_id(1).to(tl.int64) * height * width
    u += b * 2 * hidden
    dy += b * hidden
    out += b * hidden * (2 if BACKWARD else 1)
    mask = c < hidden
    a_taps = _load_taps(weight, c, hidden, 9, False)
    g_taps = _load_taps(weight + hidden * 9, c, hidden, 9, False)
    a_bias = tl.load(bias + c, mask=mask, other=0.0).to(tl.float32)
    g_bias = tl.load(bias + hidden + c, mask=mask, other=0.0).to(tl.float32)
    a_above = _zeros(COLS, BLOCK_C)
    a_here = _zeros(COLS, BLOCK_C)
    g_above = _zeros(COLS, BLOCK_C)
    g_here = _zeros(COLS, BLOCK_C)
    for y in range(y0 - 1, y1 + 1):
        a_row = _silu_row(_load_row(u, y, x0 - 1, height, width, 2 * hidden, c, hidden, COLS + 2))
        g_row = _silu_row(_load_row(u + hidden, y, x0 - 1, height, width, 2 * hidden, c, hidden, COLS + 2))
        a_done, a_above, a_here = _slide(a_above, a_here, a_row, a_taps, COLS)
        g_done, g_above, g_here = _slide(g_above, g_here, g_row, g_taps, COLS)
        for j in tl.static_range(COLS):
            inside = _where(c, hidden, (y > y0) & (x0 + j < width))
            n = ((y - 1) * width + x0 + j).to(tl.int64)
            a = a_done[j] + a_bias
            g = g_done[j] + g_bias
            if BACKWARD:
                d = tl.load(dy + n * hidden + c, mask=inside, other=0.0).to(tl.float32)
                at = out + n * 2 * hidden + c
                tl.store(at, (d * _silu(g)).to(out.dtype.element_ty), mask=inside)
                tl.store(at + hidden, (d * a * _silu_slope(g)).to(out.dtype.element_ty), mask=inside)
            else:
                tl.store(out + n * hidden + c, (a * _silu(g)).to(out.dtype.element_ty), mask=inside)


@jit
def _backward_input(u, weight, dp, du, dweight,
                    height, width, channels, rows, across, tiles,
                    NEED_WEIGHT: tl.constexpr, BLOCK_C: tl.constexpr, COLS: tl.constexpr):
    """From dp = (dA, dG), B, N, 2H: du = SiLU'(u) * (dp convolved with the flipped filter), and into
    dweight[strip, 0..8] the strip's sums for the taps, into dweight[strip, 9] those for the bias."""
    c, y0, y1, x0 = _place(rows, across, height, tiles, BLOCK_C, COLS)
    b = tl.program_id(1).to(tl.int64) * height * width * channels
    u += b
    dp += b
    du += b
    mask = c < channels
    taps = _load_taps(weight, c, channels, 9, True)
    above = _zeros(COLS, BLOCK_C)
    here = _zeros(COLS, BLOCK_C)
    # Rows y - 1 and y of E and of SiLU'(U), inside the strip only: each pixel counts in the strip that owns it.
    e_above = _zeros(COLS, BLOCK_C)
    e_here = _zeros(COLS, BLOCK_C)
    s_above = _zeros(COLS, BLOCK_C)
    s_here = _zeros(COLS, BLOCK_C)
    sums = _zeros(10, BLOCK_C)
    for y in range(y0 - 1, y1 + 1):
        row = _load_row(dp, y, x0 - 1, height, width, channels, c, channels, COLS + 2)
        done, above, here = _slide(above, here, row, taps, COLS)
        for j in tl.static_range(COLS):
            inside = _where(c, channels, (y > y0) & (x0 + j < width))
            n = ((y - 1) * width + x0 + j).to(tl.int64)
            tl.store(du + n * channels + c, (done[j] * s_above[j]).to(du.dtype.element_ty), mask=inside)
        u_below = _load_row(u, y + 1, x0, y1, width, channels, c, channels, COLS)
        e_below = _silu_row(u_below)
        s_below = ()
        for j in tl.static_range(COLS):
            s_below = s_below + (_silu_slope(u_below[j]),)
        if NEED_WEIGHT:
            new = ()
            for k in tl.static_range(9):
                total = sums[k]
                for j in tl.static_range(COLS):
                    e = (e_above[j], e_here[j], e_below[j])[k // 3]  # pixel y - 1 + k // 3, which saw dp's row y
                    total += e * row[j + 2 - k % 3]
                new = new + (total,)
            total = sums[9]
            for j in tl.static_range(COLS):
                total += tl.where((y >= y0) & (y < y1), row[j + 1], 0.0)
            sums = new + (total,)
        e_above = e_here
        e_here = e_below
        s_above = s_here
        s_here = s_below
    if NEED_WEIGHT:
        strip = tl.program_id(1).to(tl.int64) * (tl.num_programs(0) // tiles) + tl.program_id(0) // tiles
        for k in tl.static_range(10):
            tl.store(dweight + (strip * 10 + k) * channels + c, sums[k], mask=mask)


@jit
def _slide_square(pending, row, taps, K: tl.constexpr, COLS: tl.constexpr):
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
def _depthwise(u, weight, out,
               height, width, channels, rows, across, tiles,
               u_b, u_n,
               K: tl.constexpr, BLOCK_C: tl.constexpr, COLS: tl.constexpr):
    """Program (i, b) owns one channel tile of one strip of picture b."""
    c, y0, y1, x0 = _place(rows, across, height, tiles, BLOCK_C, COLS)
    b = tl.program_id(1).to(tl.int64)
    u += b * u_b
    out += b * height * width * channels
    taps = _load_taps(weight, c, channels, K * K, False)
    pending = _zeros((K - 1) * COLS, BLOCK_C)
    for y in range(y0 - K // 2, y1 + K // 2):
        row = _load_row(u, y, x0 - K // 2, height, width, u_n, c, channels, COLS + K - 1)
        done, pending = _slide_square(pending, row, taps, K, COLS)
        for j in tl.static_range(COLS):
            inside = _where(c, channels, (y >= y0 + K // 2) & (x0 + j < width))
            n = ((y - K // 2) * width + x0 + j).to(tl.int64)
            tl.store(out + n * channels + c, done[j].to(out.dtype.element_ty), mask=inside)


# --- launchers --------------------------------------------------------------------------------------------------------


def _launch(kernel, tensors, height, width, channels, *strides, **constants):
    """Over the strips and channel tiles of a batch of pictures."""
    B = len(tensors[0])
    rows, across, down, tiles = strips(B, height, width, channels)
    launch(kernel, (tiles * across * down, B), *tensors, height, width, channels, rows, across, tiles, *strides,
           BLOCK_C=BLOCK_C, COLS=COLS, num_warps=WARPS, **constants)


def _run_gate(u, weight, bias, dy, out, height, width):
    tensors = u, weight, bias, u if dy is None else dy, out
    _launch(_gate, tensors, height, width, u.shape[2] // 2, BACKWARD=dy is not None)
    return out


class _DepthwiseGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, weight, bias, height, width):
        u, weight, bias = u.contiguous(), weight.contiguous(), bias.contiguous()
        ctx.save_for_backward(u, weight, bias)
        ctx.size = height, width
        return _run_gate(u, weight, bias, None, u.new_empty(*u.shape[:2], u.shape[2] // 2), height, width)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        u, weight, bias = ctx.saved_tensors
        height, width = ctx.size
        dp = _run_gate(u, weight, bias, dy.contiguous(), torch.empty_like(u), height, width)
        B, _, channels = u.shape
        _, across, down, _ = strips(B, height, width, channels)
        du = torch.empty_like(u)
        need_weight = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        dweight = u.new_empty(B * across * down if need_weight else 0, 10, channels, dtype=torch.float32)
        _launch(_backward_input, (u, weight, dp, du, dweight), height, width, channels, NEED_WEIGHT=need_weight)
        if not need_weight:
            return du, None, None, None, None
        dweight = dweight.sum(0).to(weight.dtype)  # 10 2H
        return du, dweight[:9].t().reshape(weight.shape), dweight[9], None, None


# --- the public names -------------------------------------------------------------------------------------------------


def depthwise_gate(u, height, width, depth_weight, depth_bias, backend=None, inplace=False):
    """SiLU, depthwise 3x3 with zero padding + bias, split into halves a and g, a * SiLU(g): the middle of mix_ffn.

    u: B, N, 2H, the output of the 1x1 expand BEFORE its SiLU, tokens row by row, N = height * width  ->  B, N, H.
    depth_weight: 2H, 1, 3, 3; depth_bias: 2H. For models whose two 1x1 are more than a matrix product (LoRA).
    backend: None (SANASR_KERNELS), "auto", "torch" or "triton"; see kernels.dispatch.use_triton. inplace: u may be
    overwritten. Differentiable once in u, depth_weight and depth_bias. Raises ValueError for sizes that disagree.
    """
    check(u.ndim == 3 and u.shape[2] % 2 == 0 and u.shape[2] > 0, lambda: f"u must be B, N, 2H, got {tuple(u.shape)}")
    _, N, channels = u.shape
    check(height > 0 and width > 0, lambda: f"height and width must be positive, got {height} and {width}")
    check(height * width == N, lambda: f"height {height} * width {width} is not the {N} tokens of {tuple(u.shape)}")
    shape = (channels, 1, 3, 3)
    check(depth_weight.shape == shape, lambda: f"depth_weight must be {shape}, got {tuple(depth_weight.shape)}")
    check(depth_bias.shape == shape[:1], lambda: f"depth_bias must be {shape[:1]}, got {tuple(depth_bias.shape)}")
    check_same(u, depth_weight=depth_weight, depth_bias=depth_bias)
    depth_weight, depth_bias = depth_weight.to(u.dtype), depth_bias.to(u.dtype)  # they differ under autocast alone
    if use_triton(u, backend, plain_obstacle(u, contiguous=False)):
        return _DepthwiseGate.apply(u, depth_weight, depth_bias, height, width)
    return depthwise_gate_reference(u, height, width, depth_weight, depth_bias, inplace)


def mix_ffn(x, height, width, inverted_weight, inverted_bias, depth_weight, depth_bias, point_weight, point_bias=None,
            backend=None):
    """1x1 expand -> SiLU -> depthwise 3x3 -> a * SiLU(g) -> 1x1 project: the feed-forward of a SANA or DC-AE block.

    x: B, N, C tokens, row by row, N = height * width  ->  B, N, C. Weights in the official convolutions' shapes:
    inverted 2H, C, 1, 1 and 2H; depth 2H, 1, 3, 3 and 2H; point C, H, 1, 1 and C (LinearDiT and DC-AE have no bias
    there). backend: None (SANASR_KERNELS), "auto", "torch" or "triton"; see kernels.dispatch.use_triton.
    Differentiable once in x and every weight. Raises ValueError for sizes that disagree.
    """
    check(x.ndim == 3, lambda: f"x must be B, N, C, got shape {tuple(x.shape)}")
    w1, w2 = inverted_weight, point_weight
    for name, w in (("inverted_weight", w1), ("point_weight", w2)):
        check(w.ndim == 4 and w.shape[2:] == (1, 1), lambda: f"{name} must be out, in, 1, 1, got {tuple(w.shape)}")  # noqa: B023
    check(w1.shape[1] == x.shape[2], lambda: f"inverted_weight {tuple(w1.shape)} does not fit x {tuple(x.shape)}")
    check(w1.shape[0] == 2 * w2.shape[1],
          lambda: f"point_weight {tuple(w2.shape)} does not fit inverted_weight {tuple(w1.shape)}")
    check_same(x, inverted_weight=w1, inverted_bias=inverted_bias, point_weight=w2, point_bias=point_bias)
    u = F.linear(x, w1.flatten(1), inverted_bias)  # B N 2H
    y = depthwise_gate(u, height, width, depth_weight, depth_bias, backend, inplace=not u.requires_grad)  # B N H
    return F.linear(y, w2.flatten(1), point_bias)  # B N C


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
    _launch(_depthwise, (u, weight, out), height, width, C, u.stride(0), u.stride(1), K=K)
    return out
