"""Weights drawn from their key names, so that parity with a reference needs no checkpoint.

The tensor of key k and shape s comes from `torch.Generator().manual_seed(crc32(k))`, drawn in float32:

    two or more dimensions       randn(s) / sqrt(fan_in),  fan_in = prod(s[1:])
    one dimension, "…weight"     1 + 0.1 randn(s)          (a norm's gain)
    anything else                0.02 randn(s)             (biases, scalars)
"""
import math
from zlib import crc32

import torch


def _randn(name, shape):
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(crc32(name.encode())))


def seeded(key, shape):
    """The weight that belongs to `key`."""
    x = _randn(key, shape)
    if x.ndim >= 2:
        return x / math.sqrt(math.prod(x.shape[1:]))
    return 1 + 0.1 * x if key.endswith("weight") else 0.02 * x


def seeded_state_dict(manifest, dtype=torch.float32):
    """A state_dict for `manifest`, an iterable of (key, shape)."""
    return {key: seeded(key, shape).to(dtype) for key, shape in manifest}


def seeded_module(module):
    """`module`, which may lie on the meta device, with the weights of its keys, for inference."""
    module.load_state_dict(seeded_state_dict((key, x.shape) for key, x in module.state_dict().items()), assign=True)
    return module.eval().requires_grad_(False)


def seeded_input(name, shape):
    """A unit-normal input tensor named `name`."""
    return _randn(f"input:{name}", shape)
