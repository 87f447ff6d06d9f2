"""The kernels package on any machine: the references, the dispatcher, the errors; and, in a second process, the Triton
kernels under Triton's interpreter (tests/test_kernels_triton.py, which on a GPU runs as it is)."""

import importlib.util

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import python, relative
from torch.torch_version import TorchVersion as Version

import kernels
from kernels import bench
from kernels.dispatch import INTERPRET, device_obstacle


def ffn_weights(C, H, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    shapes = ((2 * H, C, 1, 1), (2 * H,), (2 * H, 1, 3, 3), (2 * H,), (C, H, 1, 1), (C,))
    return [torch.randn(s, generator=g, dtype=torch.float64).mul(0.3).to(dtype) for s in shapes]


@pytest.mark.parametrize("dtype, tolerance", [
    (torch.float64, 1e-13), (torch.float32, 1e-6), (torch.float16, 5e-4), (torch.bfloat16, 4e-3)])
def test_references_follow_their_formulas_and_round_only_at_the_end(dtype, tolerance):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 300, 3, 2, 32).to(dtype).unbind(2)
    scores = torch.einsum("bnhd,bmhd->bhnm", F.relu(q.double()), F.relu(k.double()))
    expected = torch.einsum("bhnm,bmhd->bnhd", scores / (scores.sum(-1, keepdim=True) + 1e-15), v.double())
    out = kernels.linear_attention(q, k, v, backend="torch")
    assert out.dtype == dtype and out.shape == q.shape and relative(out, expected) < tolerance
    x, y, (weight, bias) = *torch.randn(2, 3, 5, 96).to(dtype).unbind(), torch.randn(2, 96)  # weights of another dtype
    rms = y.double().square().mean(-1, keepdim=True).add(0.1).sqrt()
    expected = x.double() + y.double() / rms * weight.double() + bias.double()
    out = kernels.add_rms_norm_(x, y, weight, bias, 0.1, backend="torch")
    assert out is x and out.dtype == dtype and relative(out, expected) < tolerance


def test_mix_ffn_is_the_official_convolutions():
    torch.manual_seed(0)
    B, C, H, h, w = 2, 6, 10, 5, 7
    x = torch.randn(B, C, h, w, dtype=torch.float64)
    w1, b1, wd, bd, w2, b2 = ffn_weights(C, H, torch.float64)
    a, g = F.conv2d(F.silu(F.conv2d(x, w1, b1)), wd, bd, padding=1, groups=2 * H).chunk(2, dim=1)
    expected = F.conv2d(a * F.silu(g), w2, b2)
    tokens = x.flatten(2).transpose(1, 2)
    out = kernels.mix_ffn(tokens, h, w, w1, b1, wd, bd, w2, b2)
    assert relative(out.transpose(1, 2).unflatten(2, (h, w)), expected) < 1e-13
    u = F.linear(tokens, w1.flatten(1), b1)
    y = kernels.depthwise_gate(u, h, w, wd, bd)
    assert relative(F.linear(y, w2.flatten(1), b2), out) < 1e-13


def test_mix_ffn_gradients_and_untouched_inputs():
    x = torch.randn(1, 6, 4, dtype=torch.float64, requires_grad=True)
    weights = [w.requires_grad_() for w in ffn_weights(4, 3, torch.float64)]
    assert torch.autograd.gradcheck(lambda *a: kernels.mix_ffn(a[0], 2, 3, *a[1:]), (x, *weights))
    frozen = [t.detach().clone() for t in (x, *weights)]
    kept = [t.clone() for t in frozen]
    u = torch.randn(1, 6, 6, dtype=torch.float64)
    u_kept = u.clone()
    kernels.mix_ffn(frozen[0], 2, 3, *frozen[1:])  # without gradients it works in place, on its own tensors only
    kernels.depthwise_gate(u, 2, 3, *frozen[3:5])
    assert all(torch.equal(a, b) for a, b in zip((*frozen, u), (*kept, u_kept), strict=True))


def test_autocast_concerns_products_only():
    torch.manual_seed(0)
    (q, k, v), x, weights = torch.randn(3, 1, 300, 2, 32), torch.randn(2, 12, 8), ffn_weights(8, 16)
    with torch.autocast("cpu", torch.bfloat16):
        attention, out = kernels.linear_attention(q, k, v, backend="torch"), kernels.mix_ffn(x, 3, 4, *weights)
    assert torch.equal(kernels.linear_attention(q, k, v, backend="torch"), attention)
    assert out.dtype == torch.bfloat16 and relative(out, kernels.mix_ffn(x, 3, 4, *weights)) < 3e-2


def test_references_traced_without_a_graph_break():
    q, x, weights = torch.randn(1, 6, 2, 32), torch.randn(1, 6, 4), ffn_weights(4, 4)
    attention, ffn = (torch.compile(f, fullgraph=True, backend="eager")
                      for f in (kernels.linear_attention, kernels.mix_ffn))
    assert torch.equal(attention(q, q, q), kernels.linear_attention(q, q, q))
    assert torch.equal(ffn(x, 2, 3, *weights), kernels.mix_ffn(x, 2, 3, *weights))


Q = torch.zeros(1, 4, 2, 16)
U, WD, BD = torch.zeros(1, 6, 8), torch.zeros(8, 1, 3, 3), torch.zeros(8)
X, FFN = torch.zeros(1, 6, 4), ffn_weights(4, 4)
W = torch.zeros(4)


@pytest.mark.parametrize("call, words", [
    (lambda: kernels.linear_attention(Q[0], Q, Q), r"q must be B, N, heads, d, got shape \(4, 2, 16\)"),
    (lambda: kernels.linear_attention(Q, Q[:, :3], Q), r"k has shape \(1, 3, 2, 16\)"),
    (lambda: kernels.linear_attention(Q, Q, Q[..., :8]), r"v has shape \(1, 4, 2, 8\)"),
    (lambda: kernels.linear_attention(Q, Q, Q.half()), "v is torch.float16"),
    (lambda: kernels.linear_attention(Q, Q.to("meta"), Q), "k is on meta"),
    (lambda: kernels.linear_attention(Q.int(), Q.int(), Q.int()), "floating dtype, got torch.int32"),
    (lambda: kernels.linear_attention(Q, Q, Q, backend="cuda"), "backend must be one of auto, torch, triton"),
    (lambda: kernels.set_backend("fast"), "backend must be one of auto, torch, triton, got 'fast'"),
    (lambda: kernels.depthwise_gate(U[0], 2, 3, WD, BD), r"u must be B, N, 2H, got \(6, 8\)"),
    (lambda: kernels.depthwise_gate(U, -2, -3, WD, BD), "height and width must be positive, got -2 and -3"),
    (lambda: kernels.depthwise_gate(U, 2, 4, WD, BD), r"height 2 \* width 4 is not the 6 tokens"),
    (lambda: kernels.depthwise_gate(U, 2, 3, WD[:4], BD), r"depth_weight must be \(8, 1, 3, 3\), got \(4, "),
    (lambda: kernels.depthwise_gate(U, 2, 3, WD, BD[:4]), r"depth_bias must be \(8,\), got \(4,\)"),
    (lambda: kernels.depthwise_gate(U, 2, 3, WD.double(), BD), "depth_weight is torch.float64"),
    (lambda: kernels.mix_ffn(X[0], 2, 3, *FFN), r"x must be B, N, C, got shape \(6, 4\)"),
    (lambda: kernels.mix_ffn(X, 2, 3, FFN[0].flatten(1), *FFN[1:]), r"inverted_weight must be out, in, 1, 1"),
    (lambda: kernels.mix_ffn(X[..., :3], 2, 3, *FFN), r"inverted_weight \(8, 4, 1, 1\) does not fit x \(1, 6, 3\)"),
    (lambda: kernels.mix_ffn(X, 2, 3, *FFN[:4], FFN[4][:, :3]), r"point_weight \(4, 3, 1, 1\) does not fit"),
    (lambda: kernels.add_rms_norm_(W[0], W[0], W, W, 1e-5), r"x must be ..., C, got shape \(\)"),
    (lambda: kernels.add_rms_norm_(X, X[:, :3], W, W, 1e-5), r"y has shape \(1, 3, 4\), x \(1, 6, 4\)"),
    (lambda: kernels.add_rms_norm_(X, X.half(), W, W, 1e-5), "y is torch.float16"),
    (lambda: kernels.add_rms_norm_(X, X, W[:3], W, 1e-5), r"weight must be \(4,\), got \(3,\)"),
    (lambda: kernels.add_rms_norm_(X, X, W, W.int(), 1e-5), "bias must have a floating dtype, got torch.int32"),
    (lambda: kernels.add_rms_norm_(X, X, W.to("meta"), W, 1e-5), "weight is on meta"),
    (lambda: kernels.add_rms_norm_(X, X, W, W.clone().requires_grad_(), 1e-5), "add_rms_norm_ has no gradient"),
    (lambda: kernels.add_layer_norm_(X, X, W[:3], W, W, 1e-5), r"gate must be \(4,\), got \(3,\)"),
    (lambda: kernels.add_layer_norm_(X, X, None, W, W.clone().requires_grad_(), 0), "add_layer_norm_ has no gra"),
    (lambda: kernels.depthwise(U, 2, 4, WD), r"u must be B, 2 \* 4, C, got \(1, 6, 8\)"),
    (lambda: kernels.depthwise(U, 2, 3, WD[:4]), r"weight is \(4, 1, 3, 3\), u \(1, 6, 8\)"),
    (lambda: kernels.depthwise(U, 2, 3, WD.clone().requires_grad_()), "depthwise has no gradient"),
    (lambda: kernels.bias_silu_(X, W[:3]), r"bias is \(3,\), h \(1, 6, 4\)"),
    (lambda: kernels.bias_silu_(X, W.half()), "bias is torch.float16"),
    (lambda: kernels.bias_silu_(X.clone().requires_grad_(), W), "bias_silu_ has no gradient"),
    (lambda: kernels.join_up_block(X, X[None], W, 1), r"y is \(1, 6, 4\), x \(1, 1, 6, 4\)"),
    (lambda: kernels.join_up_block(torch.zeros(1, 2, 7, 4, 4), X[None], W, 2), "repeats = 2 does not make 4")])
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.skipif(torch.cuda.is_available() or INTERPRET, reason="about machines where Triton cannot run")
def test_asking_for_triton_where_it_cannot_run():
    assert device_obstacle("cpu") is not None
    with pytest.raises(ValueError, match='backend="triton" is not possible'):
        kernels.linear_attention(Q, Q, Q, backend="triton")


@pytest.mark.parametrize("choice, lines", [(None, 0), ("auto", 0), ("torch", 0), ("triton", 1)])
def test_the_reason_is_said_once_and_only_where_it_matters(choice, lines):
    script = "import torch, kernels; q = torch.ones(1, 4, 1, 16); [kernels.linear_attention(q, q, q) for _ in range(3)]"
    done = python("-c", script, SANASR_KERNELS=choice, TRITON_INTERPRET=None)
    assert done.returncode == 0 and done.stderr.count("kernels: PyTorch, since ") == lines, done.stderr


def test_bench_counts_and_checks(capsys, monkeypatch):
    ((moved, flop),) = bench.OPS["linear_attention"].counts(2, 4, 3, 0, 0, 2, backward=False)
    assert moved == 4 * 2 * 16 * 3 * 32 * 2 and flop == 2 * 2 * (2 * 16 * 3 * 32 * 32)
    bench.check(bench.OPS, torch.float32, "cpu", "torch")
    assert capsys.readouterr().out.count(" ok") == len(bench.OPS)
    monkeypatch.setitem(bench.TOLERANCE, torch.float32, 1e-9)
    with pytest.raises(SystemExit):
        bench.check(["linear_attention"], torch.float32, "cpu", "torch")
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_triton_kernels_under_the_interpreter():
    """Triton chooses its interpreter when it is imported, hence the second process."""
    import triton

    if Version(triton.__version__) < Version("3.7") and Version(np.__version__) >= Version("2.4"):
        pytest.skip("the interpreter of Triton 3.6 needs NumPy below 2.4")
    done = python("-m", "pytest", "-x", "-p", "no:cacheprovider", "tests/test_kernels_triton.py",
                  TRITON_INTERPRET=1, SANASR_KERNELS="auto")
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]
