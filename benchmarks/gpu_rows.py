"""What `benchmarks.gpu` times, and what it must reach; the calls are those of `star.bench.gpu_cases`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from star.bench.cases import CASES, Case
from star.bench.gpu_cases import gpu_cases

__all__ = ["MEMORY_FRACTION", "ROWS", "GpuRow", "Limit", "rows_of", "tiny"]

COPY = 0.9
"""Of the bandwidth of a copy, for operators that memory limits."""

MEMORY_FRACTION = 0.5
"""Of the peak memory of Liger's linear cross entropy, forward and backward."""


@dataclass(frozen=True)
class Limit:
    """One thing that a row must reach.

    Args:
        kind: "ratio" (times as fast as the peer), "copy" (fraction of a copy's bandwidth) or "product" (at
            most so many times the time of the products of a blocked convolution at the machine's rate).
        value: of that.
        against: start of the peer's name, for a ratio; a backend of ours where no peer is named so.
    """

    kind: str
    value: float
    against: str = ""


@dataclass(frozen=True)
class GpuRow:
    """One line of the table: a call, its passes, its limits, and the backends of ours that are timed."""

    case: Case
    passes: str
    limits: tuple[Limit, ...] = ()
    backends: tuple[str, ...] = ("cuda", "triton")

    @property
    def name(self) -> str:
        sizes = " ".join(f"{name}{size}" for name, size in self.case.sizes.items())
        return (
            f"{self.case.operator} {sizes}, {'forward + backward' if self.passes == 'both' else self.passes}"
        )


def _rows(
    operator: str, passes: str, *limits: Limit, backends: tuple[str, ...] | None = None
) -> list[GpuRow]:
    made = [GpuRow(case, passes, limits) for case in gpu_cases([operator])]
    return [replace(row, backends=backends) for row in made] if backends else made


def _both(operator: str, *limits: Limit) -> list[GpuRow]:
    """Forward and backward pass, each with the limits."""
    return [*_rows(operator, "forward", *limits), *_rows(operator, "backward", *limits)]


_LONG_SCAN = replace(CASES["gru_scan"], sizes={"B": 1, "L": 4096, "D": 2048})

# The most important first: a run that is short of time leaves out the last.
ROWS: tuple[GpuRow, ...] = (
    *_both("attention", Limit("ratio", 1.0, "torch SDPA, flash"), Limit("ratio", 0.85, "torch SDPA, cuDNN")),
    *_both("gated_short_conv", Limit("copy", COPY), Limit("ratio", 2.0, "causal-conv1d")),
    *_rows("gated_delta_rule", "both", Limit("ratio", 1.1, "fla")),
    *_rows("gated_linear_attention", "both", Limit("ratio", 1.1, "fla")),
    *_rows("selective_scan", "both", Limit("ratio", 1.2, "mamba-ssm")),
    *_rows("diff_attention", "forward", Limit("ratio", 1.6, "two SDPA flash")),
    *_rows("gated_long_conv", "forward", Limit("ratio", 3.0, "torch.fft"), Limit("product", 1.5)),
    *_rows("linear_cross_entropy", "both", Limit("ratio", 1.0, "Liger")),
    GpuRow(_LONG_SCAN, "forward", (Limit("ratio", 665.0, "reference"),), ("cuda", "triton", "reference")),
    *_both("linear_scan", Limit("copy", COPY)),
    *_both("rms_norm", Limit("copy", COPY)),
    *_both("glu", Limit("copy", COPY)),
    *_both("rope", Limit("copy", COPY)),
    *_rows("diff_attention", "both", Limit("ratio", 1.6, "two SDPA flash")),
    *_rows("gated_long_conv", "both", Limit("ratio", 3.0, "torch.fft")),
    # Without a limit, so that the table is complete.
    *_rows("gru_scan", "both"),
    *_rows("lstm_scan", "both"),
    *_rows("short_conv", "both"),
    *_rows("long_conv", "both"),
)


def rows_of(operators: Sequence[str] | None, *, quick: bool) -> list[GpuRow]:
    """The rows, all or those of some operators; with ``quick`` at tiny sizes, those that are then the same
    once."""
    rows = [row for row in ROWS if operators is None or row.case.operator in operators]
    if quick:
        rows = list({(row.name, row.passes): row for row in map(tiny, rows)}.values())
    return rows


_TINY = {"B": 1, "L": 40, "D": 32, "H": 2, "Dh": 16, "Dk": 16, "Dv": 16, "V": 96}


def tiny(row: GpuRow) -> GpuRow:
    """The same at sizes that Triton's interpreter takes a second for."""
    sizes = {name: min(size, _TINY.get(name, size)) for name, size in row.case.sizes.items()}
    if "V" in sizes:
        sizes["N"] = 24
    return replace(row, case=replace(row.case, sizes=sizes))
