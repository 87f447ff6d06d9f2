"""The Triton kernels against float64: outputs and every gradient. On a GPU they run as they are, on a CPU under
Triton's interpreter, which tests/test_kernels.py starts (by hand: TRITON_INTERPRET=1 pytest THIS_FILE).

Errors are relative to the norm of the float64 result. With a GPU, memory errors once by hand:
compute-sanitizer python -m pytest tests/test_kernels_triton.py
"""

import sys
from functools import partial

import pytest
import torch

import kernels
from kernels.dcae import bias_silu_reference_, join_up_block_reference
from kernels.depthwise import depthwise_gate_reference, depthwise_reference
from kernels.dispatch import INTERPRET, device_obstacle
from kernels.linear_attention import CONFIG, MAX_STATES, linear_attention_reference, spans
from kernels.norms import MAX_C, add_layer_norm_reference_, add_rms_norm_reference_, tile

DEVICE = "cpu" if INTERPRET or not torch.cuda.is_available() else "cuda"
OBSTACLE = device_obstacle(DEVICE, 0)
pytestmark = pytest.mark.skipif(OBSTACLE is not None, reason=f"Triton cannot run: {OBSTACLE}")
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs an NVIDIA GPU; the interpreter would take hours")

# A rounding of the result is 2^-25, 2^-12 and 2^-9. bf16 has more room since the interpreter cuts instead of rounding.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 1e-2}
DTYPES = list(TOLERANCE)


def assert_close(got, expected, dtype, floor=0.0):
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.dtype == dtype and a.shape == b.shape
        error, scale = (a.double() - b).norm().item(), max(b.norm().item(), floor)
        assert error <= TOLERANCE[dtype] * scale, f"{f'd{i - 1}' if i else 'out'}: error {error:.2e} at {scale:.2e}"


def grads(function, inputs, g):
    """The result, and with `g` the gradient of every input."""
    if g is None:
        return [function(*inputs)]
    inputs = [t.detach().requires_grad_() for t in inputs]  # the same memory: strides are kept
    out = function(*inputs)
    return out.detach(), *torch.autograd.grad(out, inputs, g)


def double(*tensors):
    return [t.double() for t in tensors]


def drawn(seed, *shapes, dtype=torch.float32):
    r = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=r).to(DEVICE, dtype) for shape in shapes]


def check(function, reference, inputs, g=None, floor=0.0):
    """`function` by Triton against `reference` in float64. Returns what Triton gave."""
    got = grads(partial(function, backend="triton"), inputs, g)
    expected = grads(reference, double(*inputs), None if g is None else g.double())
    assert_close(got, expected, inputs[0].dtype, floor)
    return got


def attention_inputs(B, N, heads, d, dtype, layout="qkv", scale=1.0):
    """q, k, v and dO. Layouts: "qkv", slices of one product; "channels", channels before tokens, as a convolution
    leaves them; "plain", contiguous."""
    x = torch.randn(B, N, 4, heads, d, generator=torch.Generator().manual_seed(N)).mul(scale).to(DEVICE, dtype)
    if layout == "channels":
        x = x.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)
    return [t.contiguous() if layout == "plain" else t for t in x.unbind(2)]


def check_attention(q, k, v, g, eps=1e-15):
    # Where the true gradient is zero (a single token: out = v), what remains is rounding at the scale of dO.
    return check(partial(kernels.linear_attention, eps=eps), partial(linear_attention_reference, eps=eps), (q, k, v), g,
                 floor=g.double().norm().item())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d, short", [(16, 512), (32, 512), (64, 512), (32, 0)])
def test_attention_head_sizes_and_dtypes(d, short, dtype, monkeypatch):
    monkeypatch.setattr(sys.modules["kernels.linear_attention"], "SHORT", short)  # 0: in two launches
    check_attention(*attention_inputs(2, 70, 2, d, dtype))


@pytest.mark.parametrize("N", [1, 63, 64, 1025])
@pytest.mark.parametrize("layout", ["plain", "channels"])
def test_attention_lengths_and_layouts(N, layout):
    check_attention(*attention_inputs(1, N, 1, 32, torch.float32, layout))


def test_attention_adds_spans_in_the_launcher():
    assert spans(1, 1025, 1, CONFIG[32, 4][0])[1] > MAX_STATES  # so that N = 1025 above takes that path,
    assert 1 < spans(2, 70, 2, CONFIG[32, 4][0])[1] <= MAX_STATES  # and N = 70 the other
    for N in (1, 64, 1025, 1 << 22):
        for block in (32, 64):
            tokens, S = spans(1, N, 36, block)
            assert tokens % block == 0 and (S - 1) * tokens < N <= S * tokens


@pytest.mark.parametrize("which", ["q", "k"])
def test_attention_zero_denominator(which):
    q, k, v, g = attention_inputs(1, 40, 2, 16, torch.float32)
    if which == "q":
        q = q.clone()
        q[:, 7] = -q[:, 7].abs()
    else:
        k = -k.abs()
    out = check_attention(q, k, v, g)[0]
    assert (out[:, 7] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_attention_large_values(dtype):
    q, k, v, g = attention_inputs(1, 130, 1, 32, dtype, scale=1e4)
    g = (g / 1e4).to(dtype)
    out = check_attention(q, k, v, g)[0]
    assert out.isfinite().all() and out.abs().max() > 100


@pytest.mark.parametrize("which", [0, 1, 2])
def test_attention_carries_nan(which):
    inputs = [t.clone() for t in attention_inputs(1, 40, 2, 16, torch.float32)]
    inputs[which][0, 5, 1, 3] = float("nan")
    q, k, v, _ = inputs
    out = kernels.linear_attention(q, k, v, backend="triton")
    expected = linear_attention_reference(q.double(), k.double(), v.double())
    assert expected.isnan().any() and not expected[:, :, 0].isnan().any()
    assert torch.equal(out.isnan(), expected.isnan())


def test_attention_eps_and_an_expanded_gradient():
    q, k, v, g = attention_inputs(1, 40, 1, 16, torch.float32)
    check_attention(q, k, v, g, eps=10.0)
    check_attention(q.abs() + 0.1, k.abs() + 0.1, v, g, eps=0.0)  # 40 tokens end within a tile, where q and g are 0
    check_attention(q, k, v, torch.ones((), device=DEVICE).expand(q.shape))  # what out.sum() sends back


def test_other_head_sizes_and_float64_run_the_reference():
    q = torch.randn(1, 8, 2, 24, device=DEVICE)
    assert torch.equal(kernels.linear_attention(q, q, q), linear_attention_reference(q, q, q))
    with pytest.raises(ValueError, match="q has head size 24, the kernels have 16, 32, 64"):
        kernels.linear_attention(q, q, q, backend="triton")
    q = q[..., :16].double()
    assert torch.equal(kernels.linear_attention(q, q, q), linear_attention_reference(q, q, q))
    q = q[:, :0].float()
    assert kernels.linear_attention(q, q, q).shape == (1, 0, 2, 16)


def gate_inputs(B, height, width, hidden, dtype):
    """u, weight, bias and the gradient of the result."""
    N = height * width
    return drawn(N, (B, N, 2 * hidden), (2 * hidden, 1, 3, 3), (2 * hidden,), (B, N, hidden), dtype=dtype)


def check_gate(u, weight, bias, g, height, width):
    return check(lambda u, *t, **how: kernels.depthwise_gate(u, height, width, *t, **how),
                 lambda u, *t: depthwise_gate_reference(u, height, width, *t), (u, weight, bias), g)


@pytest.mark.parametrize("B, height, width, hidden, dtype", [
    *((1, 3, 5, 3, dtype) for dtype in DTYPES),
    *((*size, torch.float32) for size in ((1, 1, 1, 1), (1, 9, 7, 5), (2, 3, 2, 130)))])
def test_gate_sizes_and_dtypes(B, height, width, hidden, dtype):
    check_gate(*gate_inputs(B, height, width, hidden, dtype), height, width)


def test_gate_non_contiguous_and_with_frozen_weights():
    u, weight, bias, g = gate_inputs(1, 4, 3, 2, torch.float32)
    check(lambda u, **how: kernels.depthwise_gate(u, 4, 3, weight, bias, **how),
          lambda u: depthwise_gate_reference(u, 4, 3, *double(weight, bias)), [u], g)
    u = u.transpose(1, 2).contiguous().transpose(1, 2)
    weight = weight.to(memory_format=torch.channels_last)
    check_gate(u, weight, bias, torch.ones((), device=DEVICE).expand(g.shape), 4, 3)


def test_gate_large_values_and_nan():
    u, weight, bias, _ = gate_inputs(1, 4, 4, 2, torch.bfloat16)
    u = u * 1e4
    check_gate(u, weight, bias, None, 4, 4)
    u[0, 5, 1] = float("nan")
    out = kernels.depthwise_gate(u, 4, 4, weight, bias, backend="triton").isnan()
    assert torch.equal(out, depthwise_gate_reference(u, 4, 4, weight, bias).isnan()) and out.sum() == 9


def test_mix_ffn_every_gradient():
    def ffn(x, *weights, backend="torch"):
        return kernels.mix_ffn(x, 3, 2, *weights, backend=backend)
    *inputs, g = drawn(0, (2, 6, 3), (8, 3, 1, 1), (8,), (8, 1, 3, 3), (8,), (3, 4, 1, 1), (3,), (2, 6, 3))
    check(ffn, ffn, inputs, g)


IN_PLACE = {  # (x, y, vectors, eps) -> the result, and the number of vectors
    "add_rms_norm_": (kernels.add_rms_norm_, add_rms_norm_reference_, 2),
    "add_layer_norm_": (kernels.add_layer_norm_, add_layer_norm_reference_, 3),
    "add_layer_norm_, no gate": (lambda x, y, *t, **how: kernels.add_layer_norm_(x, y, None, *t, **how),
                                 lambda x, y, *t: add_layer_norm_reference_(x, y, None, *t), 2),
    "bias_silu_": (lambda x, y, b, eps, **how: kernels.bias_silu_(x, b, **how),
                   lambda x, y, b, eps: bias_silu_reference_(x, b), 1)}


def check_in_place(name, shape, dtype, scale=1.0, eps=1e-5):
    """x lies between other rows, which must stay as they are. The first of two or three vectors is float32."""
    function, reference, count = IN_PLACE[name]
    around, y = drawn(shape[-1], (3, *shape), shape, dtype=dtype)
    vectors = [*drawn(1, shape[-1:], shape[-1:]), *drawn(2, shape[-1:], dtype=dtype)][-count:]
    y, x, before = y * scale, around[1], around.clone()
    double_x, y_before = before[1].double(), y.clone()
    out = function(x, y, *vectors, eps, backend="triton")
    expected = reference(double_x, *double(y, *vectors), eps)
    assert (out.data_ptr() == x.data_ptr()) == (expected is double_x)
    assert torch.equal(y, y_before) and torch.equal(around[::2], before[::2])
    assert_close([out, x], [expected, double_x], dtype)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, C", [(1, 128), (37, 128), (19, 96), (300, 5), (5, 512), (2, 1152), (3, 1)])
@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_norm_sizes_and_dtypes(name, n, C, dtype):
    if C > 1 or "layer" not in name:  # of a single channel the LayerNorm is 0
        check_in_place(name, (n, C), dtype)


@pytest.mark.parametrize("name", list(IN_PLACE)[:2])
def test_norm_rows_and_values(name):
    assert tile(128) == (16, 128) and 37 % 16 and tile(96) == (16, 128) and tile(MAX_C) == (1, MAX_C)
    check_in_place(name, (2, 3, 7, 33), torch.float32)
    check_in_place(name, (2, MAX_C), torch.float32)
    check_in_place(name, (9, 64), torch.float32, scale=1e-3, eps=1e-2)
    assert check_in_place(name, (9, 64), torch.float32, scale=0.0).isfinite().all()
    assert check_in_place(name, (9, 64), torch.float16, scale=5e3).isfinite().all()  # the squares exceed float16


@pytest.mark.parametrize("name", list(IN_PLACE)[:2])
def test_norm_carries_nan_in_its_row_only(name):
    function, _, count = IN_PLACE[name]
    x, y, w = torch.zeros(40, 96, device=DEVICE), torch.ones(40, 96, device=DEVICE), torch.ones(96, device=DEVICE)
    y[17, 3] = float("nan")
    out = function(x, y, *[w] * count, 1e-5, backend="triton").isnan()
    assert out[17].all() and out.sum() == 96


@pytest.mark.parametrize("name", list(IN_PLACE)[:2])
def test_norm_elsewhere_runs_the_reference(name):
    function, _, count = IN_PLACE[name]
    w = [torch.ones(8, device=DEVICE)] * count
    x = torch.zeros(8, 4, device=DEVICE).t()  # 4, 8 with strided channels: in place all the same
    function(x, torch.ones(4, 8, device=DEVICE), *w, 1.0)
    assert (x > 0).all()
    with pytest.raises(ValueError, match="is not contiguous"):
        function(x, x, *w, 0.0, backend="triton")
    x, wide = torch.zeros(1, MAX_C + 1, device=DEVICE), [torch.ones(MAX_C + 1, device=DEVICE)] * count
    function(x, torch.ones_like(x), *wide, 0.0)
    assert (x > 0).all() and function(x[:0], x[:0], *wide, 1.0).shape == (0, MAX_C + 1)
    assert function(x[:0, :8].double(), x[:0, :8].double(), *w, 1.0).shape == (0, 8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B, height, width, C, K", [
    (1, 1, 1, 1, 5), (2, 6, 7, 130, 5), (1, 9, 5, 3, 5), (1, 6, 5, 4, 3)])
def test_depthwise(B, height, width, C, K, dtype):
    wide, weight = drawn(C, (B, height * width, C + 5), (C, 1, K, K), dtype=dtype)
    out, = check(lambda u, weight, **how: kernels.depthwise(u, height, width, weight, **how),
                 lambda u, weight: depthwise_reference(u, height, width, weight), (wide[..., 2:2 + C], weight))
    assert out.is_contiguous()


def test_depthwise_elsewhere_runs_the_reference():
    u, weight = torch.ones(1, 4, 8, device=DEVICE), torch.ones(8, 1, 7, 7, device=DEVICE)
    assert (kernels.depthwise(u, 2, 2, weight) == 4).all()
    with pytest.raises(ValueError, match="7 x 7"):
        kernels.depthwise(u, 2, 2, weight, backend="triton")
    strided = u.transpose(1, 2).contiguous().transpose(1, 2)
    assert (kernels.depthwise(strided, 2, 2, weight[..., :3, :3]) == 4).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B, H, W, C, out, repeats", [
    (1, 1, 1, 3, 5, 0), (2, 3, 4, 36, 9, 1), (1, 5, 2, 32, 16, 2), (1, 2, 3, 130, 130, 4)])
def test_join_up_block(B, H, W, C, out, repeats, dtype):
    inputs = drawn(C, (B, H + 1, W + 1, 4, out), (B, H, W, C), (out,), dtype=dtype)
    check(lambda *t, **how: kernels.join_up_block(*t, repeats, **how),
          lambda *t: join_up_block_reference(*t, repeats), inputs)


# --- on a GPU only ----------------------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_our_sizes(dtype):
    for N in (256, 4096, 65536, 1 << 20):
        check_attention(*attention_inputs(1, N, 4, 32, dtype))
    for B, height, width, hidden in ((1, 25, 41, 2880), (2, 16, 16, 2880), (1, 64, 64, 2048)):
        check_gate(*gate_inputs(B, height, width, hidden, dtype), height, width)
    for name, n, C in (("add_rms_norm_", 512 * 512, 128), ("add_rms_norm_", 128 * 128, 512),
                       ("add_rms_norm_", 256 * 256, 256), ("bias_silu_", 256 * 256, 256),
                       ("add_layer_norm_", 16384, 1152)):
        check_in_place(name, (n, C), dtype)


@needs_gpu
def test_gpu_offsets_beyond_int32():
    q = torch.zeros(1, (1 << 31) // 32 + 64, 1, 32, device=DEVICE, dtype=torch.bfloat16)
    q[:, -1] = 1
    assert (kernels.linear_attention(q, q, q, backend="triton")[:, -1] == 1).all()
    y, w = torch.ones((1 << 31) // 128 + 64, 128, device=DEVICE, dtype=torch.bfloat16), torch.ones(128, device=DEVICE)
    assert (kernels.add_rms_norm_(torch.zeros_like(y), y, w, w, 0.0, backend="triton") == 2).all()


@needs_gpu
def test_gpu_same_bits_each_time():
    q, k, v, g = attention_inputs(1, 5000, 8, 32, torch.bfloat16)
    u, weight, bias, gu = gate_inputs(1, 33, 47, 500, torch.bfloat16)

    def run():
        a = grads(lambda *t: kernels.linear_attention(*t, backend="triton"), (q, k, v), g)
        b = grads(lambda *t: kernels.depthwise_gate(t[0], 33, 47, *t[1:], backend="triton"), (u, weight, bias), gu)
        return *a, *b

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@needs_gpu
def test_gpu_under_compile():
    q, k, v, g = attention_inputs(1, 250, 4, 32, torch.bfloat16)  # 4 states: no sum by torch, whose order may change
    compiled = torch.compile(lambda *t: kernels.linear_attention(*t, backend="triton"), fullgraph=True)
    for a, b in zip(grads(compiled, (q, k, v), g), check_attention(q, k, v, g), strict=True):
        assert torch.equal(a, b)
