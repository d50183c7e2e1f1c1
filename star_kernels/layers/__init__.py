"""Layers on the operators: each (B, L, D) to (B, L, D), with a cache for inference.

Every layer is a drop-in ``nn.Module``: no norm in front and no residual connection inside; sizes, initial
weights and state-dict names, those of its family, are in its docstring::

    layer = GatedShortConv(768)
    y = layer(x)                                        # training
    cache = layer.allocate_cache(batch=2, max_length=4096)
    y = layer(prompt, cache); y = layer(token, cache)   # prefill, decode
    T = layer.materialize(x)                            # the operator as a matrix, for small inputs
    layer = GatedShortConv.from_module(lfm2_short_conv) # weights of transformers' modules
"""

from star_kernels.layers.attention import Attention as Attention
from star_kernels.layers.attention import DiffAttention as DiffAttention
from star_kernels.layers.base import LivLayer as LivLayer
from star_kernels.layers.cells import GRUScan as GRUScan
from star_kernels.layers.cells import LSTMScan as LSTMScan
from star_kernels.layers.convolution import DiffGatedLongConv as DiffGatedLongConv
from star_kernels.layers.convolution import DiffGatedShortConv as DiffGatedShortConv
from star_kernels.layers.convolution import GatedLongConv as GatedLongConv
from star_kernels.layers.convolution import GatedShortConv as GatedShortConv
from star_kernels.layers.delta_rule import GatedDeltaNet as GatedDeltaNet
from star_kernels.layers.linear_attention import GatedLinearAttention as GatedLinearAttention
from star_kernels.layers.linear_attention import Mamba2 as Mamba2
from star_kernels.layers.memoryless import SwiGLU as SwiGLU
from star_kernels.layers.norm import RMSNorm as RMSNorm
from star_kernels.layers.recurrence import DiffSelectiveSSM as DiffSelectiveSSM
from star_kernels.layers.recurrence import SelectiveSSM as SelectiveSSM
from star_kernels.layers.rotary import Rotary as Rotary
