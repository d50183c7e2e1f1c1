"""Fused linear input-varying operators with inference caches, for CPUs and GPUs.

Every operator has a plain PyTorch definition (``backend="reference"``) against which its fast forms are
tested; ``backend=None`` takes the fastest that covers the call.
"""

from star_kernels.attention import attention as attention
from star_kernels.attention import attention_decode as attention_decode
from star_kernels.attention import diff_attention as diff_attention
from star_kernels.convolution import gated_long_conv as gated_long_conv
from star_kernels.convolution import gated_long_conv_step as gated_long_conv_step
from star_kernels.convolution import gated_short_conv as gated_short_conv
from star_kernels.convolution import gated_short_conv_step as gated_short_conv_step
from star_kernels.convolution import long_conv as long_conv
from star_kernels.convolution import long_conv_step as long_conv_step
from star_kernels.convolution import short_conv as short_conv
from star_kernels.convolution import short_conv_step as short_conv_step
from star_kernels.dispatch import load_compiled
from star_kernels.loss import linear_cross_entropy as linear_cross_entropy
from star_kernels.memoryless import glu as glu
from star_kernels.norm import rms_norm as rms_norm
from star_kernels.norm import rope as rope
from star_kernels.recurrence import gated_delta_rule as gated_delta_rule
from star_kernels.recurrence import gated_delta_rule_step as gated_delta_rule_step
from star_kernels.recurrence import gated_linear_attention as gated_linear_attention
from star_kernels.recurrence import gated_linear_attention_step as gated_linear_attention_step
from star_kernels.recurrence import gru_scan as gru_scan
from star_kernels.recurrence import gru_scan_step as gru_scan_step
from star_kernels.recurrence import linear_scan as linear_scan
from star_kernels.recurrence import linear_scan_step as linear_scan_step
from star_kernels.recurrence import lstm_scan as lstm_scan
from star_kernels.recurrence import lstm_scan_step as lstm_scan_step
from star_kernels.recurrence import selective_scan as selective_scan
from star_kernels.recurrence import selective_scan_step as selective_scan_step

COMPILED = load_compiled()
"""Whether this installation has the compiled CPU operators."""

__version__ = "0.1.0"
