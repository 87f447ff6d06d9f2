"""Winograd's convolution against PyTorch's in float64."""
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from conftest import relative
from seeded import seeded_input

import fast
from fast import winograd

SHAPES = [(1, 64, 1, 1), (1, 64, 6, 7), (3, 64, 8, 16), (2, 64, 40, 24), (1, 64, 4, 1100)]


def convolved(x, weight, bias=None):
    """By the module."""
    convolution = torch.nn.Conv2d(*weight.shape[1::-1], 3, padding=1, bias=bias is not None)
    convolution.weight.data = weight
    if bias is not None:
        convolution.bias.data = bias
    return fast.Winograd(convolution)(x)


@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_module(shape):
    convolution = torch.nn.Conv2d(64, 72, 3, padding=1)
    x = seeded_input("x", shape).contiguous(memory_format=torch.channels_last)
    exact = deepcopy(convolution).double()(x.double())
    assert relative(fast.Winograd(convolution)(x), exact) < 1e-5
    half = convolution.bfloat16()
    exact = deepcopy(half).double()(x.bfloat16().double())
    assert relative(fast.Winograd(half)(x.bfloat16()), exact) < 4 * 2 ** -9  # the result's own rounding: 2 ** -9


@pytest.mark.parametrize("tiles", [3, 256])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_function(shape, bias, tiles, monkeypatch):
    monkeypatch.setattr(winograd, "TILES", tiles)  # 3: many strips
    x, before = seeded_input("x", shape), seeded_input("x", shape)  # not channels-last
    weight, b = seeded_input("w", (24, 64, 3, 3)), seeded_input("b", (24,)) if bias else None
    exact = F.conv2d(x.double(), weight.double(), b.double() if bias else None, padding=1)
    assert relative(convolved(x, weight, b), exact) < 1e-5 and torch.equal(x, before)


def test_transforms_are_exact_in_float64():
    """Winograd's identity: for integers nothing is lost."""
    for size in (2, 4):
        d, g = torch.arange(size + 2).double() ** 2 - 3, torch.tensor([1.0, -2, 4]).double()
        v = torch.empty(size + 2, 1).double()
        winograd.spread(list(d[:, None]), list(v))
        y = torch.empty(size, 1).double()
        winograd.gather(list((winograd.G[size] @ g)[:, None] * v), list(y))
        assert torch.allclose(y[:, 0], torch.stack([(d[i:i + 3] * g).sum() for i in range(size)]), atol=1e-12)


@torch.inference_mode()
def test_large_values_and_zeros():
    weight = seeded_input("w", (8, 16, 3, 3))
    x = torch.zeros(1, 16, 16, 16)
    assert convolved(x, weight).abs().max() == 0
    x[0, 3, 5, 7] = 1e30
    y = convolved(x, weight)
    assert y.isfinite().all() and relative(y, F.conv2d(x.double(), weight.double(), padding=1)) < 1e-5


def test_where_it_does_not_apply():
    assert "no multiple of 4" in winograd.obstacle(torch.empty(1, 8, 16, 18), 4)
    assert "fewer than 16 tiles" in winograd.obstacle(torch.empty(1, 8, 8, 16), 4)
    assert "on meta" in winograd.obstacle(torch.empty(1, 8, 64, 64, device="meta"), 4)
    assert winograd.obstacle(torch.empty(1, 8, 16, 16), 4) is None
