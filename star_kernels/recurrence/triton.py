"""The recurrences in Triton."""

from star_kernels.recurrence import triton_linear_attention as triton_linear_attention
