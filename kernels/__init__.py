"""Kernels of SANA's two linear-time operators, each a Triton version beside its plain PyTorch reference.

    linear_attention   non-causal ReLU linear attention                                   (paper Eq. 3)
    mix_ffn            1x1 expand, SiLU, depthwise 3x3, gate, 1x1 project                 (SANA's GLUMBConv)
    depthwise_gate     the middle of mix_ffn, for when the two 1x1 carry adapters
    set_backend        auto | torch | triton, as does the environment variable SANASR_KERNELS

`python -m kernels.bench` checks and measures them.
"""

from kernels.dispatch import set_backend
from kernels.linear_attention import linear_attention
from kernels.mix_ffn import depthwise_gate, mix_ffn

__all__ = ["depthwise_gate", "linear_attention", "mix_ffn", "set_backend"]
