"""Fused linear input-varying operators with inference caches, for CPUs and GPUs.

Every operator has a plain PyTorch definition (``backend="reference"``) against which its fast forms are
tested; ``backend=None`` takes the fastest that covers the call.
"""

from star_kernels import dispatch as dispatch

COMPILED = dispatch.load_compiled()
"""Whether this installation has the compiled CPU operators."""

from star_kernels.convolution import (  # noqa: E402 - the compiled operators must be there before the families
    gated_long_conv as gated_long_conv,
)
from star_kernels.convolution import gated_short_conv as gated_short_conv  # noqa: E402
from star_kernels.convolution import long_conv as long_conv  # noqa: E402
from star_kernels.convolution import short_conv as short_conv  # noqa: E402

__version__ = "0.1.0"
