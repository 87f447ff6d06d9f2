"""Non-causal ReLU linear attention."""

import torch
import torch.nn.functional as F


def linear_attention_reference(q, k, v, eps=1e-15):
    """The specification of linear_attention, in PyTorch: sums and division in float32 (float64 for float64)."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    qh, kh, vh = (t.transpose(1, 2).to(dtype) for t in (q, k, v))  # B heads N d
    qh, kh = F.relu(qh), F.relu(kh)
    kv = kh.transpose(-1, -2) @ vh  # B heads d d
    z = kh.sum(dim=-2, keepdim=True)  # B heads 1 d
    out = qh @ kv / (qh @ z.transpose(-1, -2) + eps)
    return out.transpose(1, 2).to(q.dtype)


def linear_attention(q, k, v, eps=1e-15, backend=None):
    """relu(q)(relu(k)^T v) / (relu(q)(relu(k)^T 1) + eps) for each head (paper Eq. 3).

    q, k, v: B, N, heads, d of any strides and one floating dtype  ->  B, N, heads, d of that dtype.
    """
    return linear_attention_reference(q, k, v, eps)
