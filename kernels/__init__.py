"""Kernels of SANA's two linear-time operators and of DC-AE's blocks, each Triton beside a plain PyTorch reference.

    linear_attention   non-causal ReLU linear attention                                   (paper Eq. 3)
    mix_ffn            1x1 expand, SiLU, depthwise 3x3, gate, 1x1 project                 (SANA's GLUMBConv)
    depthwise_gate     the middle of mix_ffn, for when the two 1x1 carry adapters
    add_rms_norm_      x += RMSNorm(y) in place, for inference                            (the end of DC-AE's ResBlock)
    bias_silu_         h = SiLU(h + bias) in place, for inference                         (after its first convolution)
    join_up_block      crop, channel-to-space, bias and shortcut, for inference           (the end of DC-AE's UpBlock)
    add_layer_norm_    x += gate * y in place, LayerNorm and modulation, for inference    (between SANA's branches)
    depthwise          a depthwise 3x3 or 5x5 convolution, for inference                  (in DC-AE's attention)
    set_backend        auto | torch | triton, as does the environment variable SANASR_KERNELS

`python -m kernels.bench` checks and measures them.
"""

from kernels.dcae import bias_silu_, join_up_block
from kernels.depthwise import depthwise, depthwise_gate, mix_ffn
from kernels.dispatch import set_backend
from kernels.linear_attention import linear_attention
from kernels.norms import add_layer_norm_, add_rms_norm_

__all__ = ["add_layer_norm_", "add_rms_norm_", "bias_silu_", "depthwise", "depthwise_gate", "join_up_block",
           "linear_attention", "mix_ffn", "set_backend"]
