"""Weights drawn from their key names, so that parity with a reference needs no checkpoint.

The tensor of key k and shape s comes from `torch.Generator().manual_seed(crc32(salt + k))`, drawn in float32:

    two or more dimensions       randn(s) / sqrt(fan_in),  fan_in = prod(s[1:])
    one dimension, "…weight"     1 + 0.1 randn(s)          (a norm's gain)
    anything else                0.02 randn(s)             (biases, scalars)
"""
import math
from zlib import crc32

import torch


def _randn(name, shape):
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(crc32(name.encode())))


def seeded(key, shape, salt="", dtype=torch.float32):
    """The weight that belongs to `key`, drawn in float32 and cast to `dtype`."""
    x = _randn(salt + key, shape)
    if x.ndim >= 2:
        x /= math.sqrt(math.prod(x.shape[1:]))
    elif key.endswith("weight"):
        x = 1 + 0.1 * x
    else:
        x *= 0.02
    return x.to(dtype)


def seeded_state_dict(manifest, salt="", dtype=torch.float32):
    """A state_dict for `manifest`, an iterable of (key, shape)."""
    return {key: seeded(key, shape, salt, dtype) for key, shape in manifest}


def seeded_input(name, shape, salt=""):
    """A unit-normal input tensor named `name`."""
    return _randn(f"{salt}input:{name}", shape)
