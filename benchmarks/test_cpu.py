"""The table's cases under pytest-benchmark: `python -m pytest benchmarks/test_cpu.py`.

One benchmark a backend and a fast peer, grouped by case: `--benchmark-save` and `--benchmark-compare` follow
a change. Limits are judged by `benchmarks.cpu`, in one interleaved run, and nothing is asserted here.
`QUICK=1` takes tiny sizes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from benchmarks.rows import ROWS, STEP_ROWS, Row, quick
from star.bench import calls

THREADS = 2
SLOW = (
    "transformers mamba_selective_scan",
    "transformers Recurrent",
    "transformers torch_recurrent",
    "Python",
)
"""Starts of the names of peers that take seconds to minutes a call."""

ALL = [*ROWS, *(Row(case, "forward") for case in STEP_ROWS)]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


def _names(row: Row) -> list[str]:
    return [name for name in calls(quick(row.case), row.passes) if not name.startswith(SLOW)]


@pytest.mark.parametrize(
    ("row", "name"),
    [pytest.param(row, name, id=f"{row.name}-{name}") for row in ALL for name in _names(row)],
)
def test_speed(benchmark: Any, row: Row, name: str) -> None:
    case = quick(row.case) if os.environ.get("QUICK") else row.case
    call: Callable[[], object] = calls(case, row.passes)[name]
    benchmark.group = row.name
    with torch.set_grad_enabled(row.passes != "forward"):
        benchmark(call)
