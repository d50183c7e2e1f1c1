"""Layers on the operators: each (B, L, D) to (B, L, D), with a cache for inference.

Every layer is a drop-in ``nn.Module``: no norm and no residual connection inside, sizes and initial weights
in its docstring::

    layer = GatedShortConv(768)
    y = layer(x)                                        # training
    cache = layer.allocate_cache(batch=2, max_length=4096)
    y = layer(prompt, cache); y = layer(token, cache)   # prefill, decode
    T = layer.materialize(x)                            # the operator as a matrix, for small inputs
"""

from star_kernels.layers.attention import Attention as Attention
from star_kernels.layers.attention import DiffAttention as DiffAttention
from star_kernels.layers.base import LivLayer as LivLayer
from star_kernels.layers.convolution import DiffGatedLongConv as DiffGatedLongConv
from star_kernels.layers.convolution import DiffGatedShortConv as DiffGatedShortConv
from star_kernels.layers.convolution import GatedLongConv as GatedLongConv
from star_kernels.layers.convolution import GatedShortConv as GatedShortConv
from star_kernels.layers.memoryless import SwiGLU as SwiGLU
from star_kernels.layers.norm import RMSNorm as RMSNorm
from star_kernels.layers.recurrence import DiffSelectiveSSM as DiffSelectiveSSM
from star_kernels.layers.recurrence import SelectiveSSM as SelectiveSSM
