"""The operators' calls at sizes that fill a data-centre GPU: batch x length x width = 8 x 4096 x 2048.

For these the Triton kernels are tuned (`star bench --tune`), compiled and measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from star.bench.cases import CASES, Case

__all__ = ["GPU_SIZES", "gpu_cases"]

GPU_SIZES: Mapping[str, tuple[Mapping[str, int], ...]] = {
    "short_conv": ({"B": 8, "L": 4096, "D": 2048, "K": 4},),
    "gated_short_conv": ({"B": 8, "L": 4096, "D": 2048, "K": 3},),
    "long_conv": ({"B": 8, "L": 4096, "D": 2048},),
    "gated_long_conv": (
        {"B": 8, "L": 2048, "D": 2048},
        {"B": 8, "L": 4096, "D": 2048},
        {"B": 8, "L": 8192, "D": 2048},
    ),
    "linear_scan": ({"B": 8, "L": 4096, "D": 2048},),
    "selective_scan": ({"B": 8, "L": 4096, "D": 2048, "N": 16},),
    "gated_linear_attention": (
        {"B": 8, "L": 4096, "H": 16, "Dk": 128, "Dv": 128},
        {"B": 8, "L": 4096, "H": 32, "Dk": 64, "Dv": 64},
    ),
    "gated_delta_rule": (
        {"B": 8, "L": 4096, "H": 16, "Dk": 128, "Dv": 128},
        {"B": 8, "L": 4096, "H": 32, "Dk": 64, "Dv": 64},
    ),
    "gru_scan": ({"B": 8, "L": 4096, "D": 2048},),
    "lstm_scan": ({"B": 8, "L": 4096, "D": 2048},),
    "attention": (
        {"B": 8, "L": 4096, "H": 32, "Dh": 64},
        {"B": 8, "L": 4096, "H": 16, "Dh": 128},
    ),
    "diff_attention": (
        {"B": 8, "L": 4096, "H": 16, "Dh": 64},
        {"B": 8, "L": 4096, "H": 8, "Dh": 128},
    ),
    "rms_norm": ({"B": 8, "L": 4096, "D": 2048},),
    "rope": ({"B": 8, "L": 4096, "H": 32, "Dh": 64},),
    "glu": ({"B": 8, "L": 4096, "D": 2048},),
    "linear_cross_entropy": ({"N": 8192, "D": 2048, "V": 128256},),
}


def gpu_cases(operators: Sequence[str] | None = None) -> Iterator[Case]:
    """The timed calls, in the README's order of operators; all of them, or those of the operators named."""
    for operator, case in CASES.items():
        if operators is None or operator in operators:
            for sizes in GPU_SIZES.get(operator, ()):
                yield replace(case, sizes=dict(sizes))
