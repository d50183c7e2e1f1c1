"""The recurrences in Triton."""

from star_kernels.recurrence import triton_delta_rule as triton_delta_rule
from star_kernels.recurrence import triton_linear_attention as triton_linear_attention
