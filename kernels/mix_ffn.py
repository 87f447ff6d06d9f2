"""SANA's Mix-FFN (GLUMBConv) on channels-last tokens."""

import torch.nn.functional as F


def depthwise_gate_reference(u, height, width, depth_weight, depth_bias):
    """The specification of depthwise_gate, in PyTorch."""
    B, N, two_hidden = u.shape
    e = F.silu(u).view(B, height, width, two_hidden).permute(0, 3, 1, 2)  # B 2H h w, channels-last in memory
    p = F.conv2d(e, depth_weight, depth_bias, padding=1, groups=two_hidden)
    a, g = p.permute(0, 2, 3, 1).reshape(B, N, two_hidden).chunk(2, dim=-1)
    return a * F.silu(g)  # B N H


def depthwise_gate(u, height, width, depth_weight, depth_bias, backend=None):
    """SiLU, depthwise 3x3 (zero padding) + bias, split into halves a and g, a * SiLU(g).

    u: B, N, 2H, the output of the expanding 1x1 BEFORE its SiLU, N = height * width, row-major  ->  B, N, H.
    depth_weight: 2H, 1, 3, 3; depth_bias: 2H.
    """
    return depthwise_gate_reference(u, height, width, depth_weight, depth_bias)


def mix_ffn(x, height, width, inverted_weight, inverted_bias, depth_weight, depth_bias, point_weight, point_bias=None,
            backend=None):
    """1x1 expand -> SiLU -> depthwise 3x3 -> a * SiLU(g) -> 1x1 project, the feed-forward of a SANA block.

    x: B, N, C tokens, N = height * width, row-major  ->  B, N, C. Weights in the official convolution shapes:
    inverted 2H, C, 1, 1; depth 2H, 1, 3, 3; point C, H, 1, 1.
    """
    u = F.linear(x, inverted_weight.flatten(1), inverted_bias)  # B N 2H
    h = depthwise_gate(u, height, width, depth_weight, depth_bias, backend)  # B N H
    return F.linear(h, point_weight.flatten(1), point_bias)  # B N C
