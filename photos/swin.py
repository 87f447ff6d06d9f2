"""The transformer block of RAM's image encoder, MANIQA and MUSIQ, and Swin's attention (Liu et al. 2021).

Module attributes carry the official key names.
"""
from functools import cache

import torch
import torch.nn as nn
import torch.nn.functional as F


@cache
def relative_index(window, device):
    """N, N → row of the bias table, N = window². (Δy + w − 1)(2w − 1) + Δx + w − 1 with Δ = query − key."""
    yx = torch.cartesian_prod(*[torch.arange(window, device=device)] * 2)  # N, 2
    delta = yx[:, None] - yx[None] + window - 1                             # N, N, 2
    return delta[..., 0] * (2 * window - 1) + delta[..., 1]


@cache
def shift_mask(side, window, device):
    """nW, 1, N, N: −100 between tokens that only the cyclic shift brought into one window, else 0.

    After the shift, the second half of the last window of a row holds tokens of the picture's other edge.
    """
    part = torch.zeros(side, dtype=torch.long, device=device)
    part[side - window:] = 1
    part[side - window // 2:] = 2
    region = part[:, None] * 3 + part                                                     # side, side
    n = side // window
    region = region.view(n, window, n, window).transpose(1, 2).reshape(n * n, 1, -1)      # nW, 1, N
    return -100.0 * (region[..., None] != region[..., None, :]).float()


class WindowAttention(nn.Module):
    """Softmax attention inside windows of square maps B, H, W, C, with a bias for every relative position and head."""

    def __init__(self, width, heads, window, shift):
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        (B, H, W, C), w, heads = x.shape, self.window, self.heads
        n = H // w                                                                 # windows along one side, H = W
        bias = self.relative_position_bias_table.t()[:, relative_index(w, x.device)]    # heads, N, N
        bias = bias[None].expand(n * n, -1, -1, -1)                                # nW, heads, N, N
        if self.shift:
            x = x.roll((-self.shift, -self.shift), (1, 2))
            bias = bias + shift_mask(H, w, x.device).to(x.dtype)
        qkv = self.qkv(x).view(B, n, w, n, w, 3, heads, C // heads)
        # one copy brings windows and heads to the front: 3, B, nW·heads, N, d
        q, k, v = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(3, B, n * n * heads, w * w, C // heads)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.flatten(0, 1)[None])
        x = x.view(B, n, n, heads, w, w, C // heads).permute(0, 1, 4, 2, 5, 3, 6).reshape(B, H, W, C)
        x = self.proj(x)
        return x.roll((self.shift, self.shift), (1, 2)) if self.shift else x


class Block(nn.Module):
    """Pre-norm attention and MLP, the GELU by erf (tanh is off by 1e-3). name: of `attention` in the checkpoint."""

    def __init__(self, width, hidden, attention, name="attn", eps=1e-5):
        super().__init__()
        self.name = name
        self.norm1 = nn.LayerNorm(width, eps)
        self.add_module(name, attention)
        self.norm2 = nn.LayerNorm(width, eps)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})

    def forward(self, x):
        x = x + self.get_submodule(self.name)(self.norm1(x))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))
