"""3×3 convolution by Winograd's F(m×m, 3×3), with fewer multiplications (arXiv 1509.09308). For inference on a CPU.

    y = F.conv2d(x, g, b, padding=1)          x: B,C,H,W    g: C',C,3,3    b: C'    y: B,C',H,W

    Y = Aᵀ [ (G g Gᵀ) ⊙ (Bᵀ d B) ] A

d are tiles of (m+2)×(m+2) values of x that overlap by two; Y are the m×m results of one tile. Summed over channels, ⊙
is (m+2)² matrix products of tiles × C by C × C'. B and A hold small integers: `spread` and `gather` apply them with
additions alone.

A direct convolution takes 9·C·C' multiplications a result, this one (m+2)²/m²·C·C': for m = 4 a quarter, for m = 2 four
ninths. It reads (m+2)²/9 of the weights' memory, so for few tiles the direct convolution is faster. Tiles are worked on
in strips that stay in cache; a strip's results can be used before the next is computed.

float32 takes m = 4. Its transforms would magnify a rounding to bfloat16 tenfold, so bfloat16 takes m = 2, which
magnifies it by four. Limits: a CPU, both sides multiples of m. Check: pytest tests/test_winograd.py; measure:
python -m lab.bench --rewrites
"""

from __future__ import annotations

import math

import torch

# --- configuration ----------------------------------------------------------------------------------------------------

TILES = 256  # 4×4 tiles in a strip: rows enough for matrix products, few enough for the L3 cache
FEW = 16  # fewer tiles than this are convolved directly
G = {2: torch.tensor([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]]).double() / 2,
     4: torch.tensor([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]).double() / 24}


def size_of(dtype):
    """m for weights of this dtype."""
    return 4 if dtype == torch.float32 else 2


def obstacle(x, size):
    """Why the direct convolution is to be used for x: B,C,H,W, in words, or None."""
    batch, _, height, width = x.shape
    if x.device.type != "cpu":
        return f"the tensors are on {x.device.type}"
    if height % size or width % size:
        return f"{height}×{width} is no multiple of {size}"
    if batch * (height // size) * (width // size) < FEW:
        return f"fewer than {FEW} tiles"
    return None


# --- the transforms ---------------------------------------------------------------------------------------------------


def transform(weight):
    """G g Gᵀ of a weight C',C,3,3: (m+2)²,C,C' in the weight's dtype."""
    w, g = weight.float().permute(2, 3, 1, 0), G[size_of(weight.dtype)]  # 3,3,C,C'
    both = torch.kron(g, g).float()  # (m+2)²,9
    return (both @ w.flatten(2).flatten(0, 1)).unflatten(1, w.shape[2:]).to(weight.dtype)


def spread(d, v):
    """v = Bᵀ d in one direction, m + 2 arrays each. v also holds intermediate results."""
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


def gather(m, y):
    """y = Aᵀ m in one direction, m + 2 arrays to m. The arrays m are overwritten."""
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


# --- the convolution --------------------------------------------------------------------------------------------------


def strips(x, transformed, bias=None):
    """Yields (slice of the B·H·W rows of the result, those rows n,C'), strip by strip.

    x: B,C,H,W; transformed: (m+2)²,C,C', see `transform`. A strip is valid until the next one is asked for.
    """
    size = math.isqrt(len(transformed)) - 2  # m
    (batch, channels, height, width), out = x.shape, transformed.shape[2]
    down, across, side = height // size, width // size, size + 2
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
            spread([d[:, :, j % size, j // size:j // size + across] for j in range(side)], t.unbind(2))
            spread([t[:, j:j + size * (rows - 1) + 1:size].permute(2, 0, 1, 3, 4) for j in range(side)], v)
            torch.bmm(v.flatten(2, 4).flatten(0, 1), transformed, out=m.flatten(2, 4).flatten(0, 1))
            if bias is not None:
                m[1, 1] += bias  # Aᵀ has nothing but ones in this column: the bias of all m² results
            gather(m, z)
            gather(z.unbind(1), y.permute(4, 2, 0, 1, 3, 5))
            y = y.flatten(0, 4)
            start = (b * height + size * r) * width
            yield slice(start, start + len(y)), y
