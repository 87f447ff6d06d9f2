"""Winograd's convolution against PyTorch's in float64."""
from copy import deepcopy

import pytest
import torch
from conftest import relative
from seeded import seeded_input, seeded_module

import fast
from fast import winograd


def check(convolution, x, tolerance):
    """The convolution's rewrite against itself in float64; the input is left alone. Returns the result."""
    exact, before = deepcopy(convolution).double()(x.double()), x.clone()
    y = fast.Winograd(convolution)(x)
    assert relative(y, exact) < tolerance and torch.equal(x, before)
    return y


@pytest.mark.parametrize("tiles", [3, 256])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 64, 1, 1), (1, 64, 6, 7), (3, 64, 8, 16), (2, 64, 40, 24), (1, 64, 4, 1100)])
@torch.inference_mode()
def test_sizes_layouts_and_dtypes(shape, bias, tiles, monkeypatch):
    monkeypatch.setattr(winograd, "TILES", tiles)  # 3: many strips
    convolution, x = seeded_module(torch.nn.Conv2d(64, 72, 3, padding=1, bias=bias)), seeded_input("x", shape)
    check(convolution, x, 1e-5)
    x = x.contiguous(memory_format=torch.channels_last)
    check(convolution, x, 1e-5)
    check(convolution.bfloat16(), x.bfloat16(), 4 * 2 ** -9)  # the result's own rounding: 2 ** -9


@torch.inference_mode()
def test_large_values_and_zeros():
    convolution, x = seeded_module(torch.nn.Conv2d(16, 8, 3, padding=1, bias=False)), torch.zeros(1, 16, 16, 16)
    assert fast.Winograd(convolution)(x).abs().max() == 0
    x[0, 3, 5, 7] = 1e30
    assert check(convolution, x, 1e-5).isfinite().all()


def test_where_it_does_not_apply():
    assert "no multiple of 4" in winograd.obstacle(torch.empty(1, 8, 16, 18), 4)
    assert "fewer than 16 tiles" in winograd.obstacle(torch.empty(1, 8, 8, 16), 4)
    assert "on meta" in winograd.obstacle(torch.empty(1, 8, 64, 64, device="meta"), 4)
    assert winograd.obstacle(torch.empty(1, 8, 16, 16), 4) is None
