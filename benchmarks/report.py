"""The Markdown of `benchmarks.cpu`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

from benchmarks.checks import Check
from benchmarks.training_step import COMPILED, DEFAULT, LAYOUTS, REFERENCE
from star.bench import Measurement, Timing

if TYPE_CHECKING:
    from benchmarks.cpu import Results

__all__ = ["document", "limits", "table", "time_text", "times"]

_MET = {True: "yes", False: "**no**", None: "–"}


def document(results: Results) -> str:
    """The whole file."""
    parts = (
        ["# Operators on a CPU", _introduction(results)],
        ["## Limits", limits(results.checks)],
        ["## Times", _TIMES, times(results.measurements)],
        ["## Decode steps", _STEPS, _steps(results.steps)],
        ["## Whole models", f"{results.conditions['model']}. {_MODELS}", _models(results.models)],
    )
    return "\n\n".join(text for part in parts for text in part) + "\n"


def _introduction(results: Results) -> str:
    conditions = results.conditions
    measurements = [measurement for _, measurement in results.measurements]
    copies = sorted(m.bytes / m.copy.median / 1e9 for m in measurements)
    products = sorted(m.product_operations / m.product.median / 1e9 for m in measurements)
    text = (
        "Remade by `python -m benchmarks.cpu --compile` (`make bench-cpu`). Medians of samples taken in "
        f"turns within one run, {conditions['dtype']}, {conditions['threads']} threads, "
        f"torch {conditions['torch']}, {conditions['instructions']}. This machine's own yardsticks, "
        "measured beside each operator: a copy "
        f"{_range(copies)} GB/s (read and written bytes; of as many bytes as the operator moves), a product "
        f"of two 1024 x 1024 matrices {_range(products)} GFLOP/s. The run took {conditions['seconds']} s."
    )
    if conditions["quick"]:
        text += "\n\n**A quick run at tiny sizes: it shows that everything runs, nothing about speed.**"
    if not conditions["compiled"]:
        text += "\n\n**Without the compiled operators.**"
    return text


_TIMES = (
    "The first line of an operator is what a call without `backend=` gets. Bytes count each tensor once, "
    "operations those of the definition (see `star/bench/cases.py`). One sample: the call takes over five "
    "seconds and was made once."
)

_STEPS = (
    "One token at batch 1, as a user calls it; `_empty` is a dispatched C++ operator of one argument that "
    "does nothing. With all sizes 1 a step is the call alone."
)

_MODELS = (
    "One training step (forward, loss, backward, clipping, AdamW): the default "
    'backends against `dispatch.use("reference")`.'
)


def limits(checks: Sequence[Check]) -> str:
    """One line a limit."""
    lines = [
        (
            check.name,
            check.sizes,
            check.limit,
            check.reached,
            _MET[check.met],
            "" if check.met else check.why,
        )
        for check in checks
    ]
    return table(("case", "sizes", "at least", "reached", "met", "why not"), lines)


class Named(Protocol):
    """A row of a table: anything with a name."""

    @property
    def name(self) -> str: ...


def times(measurements: Sequence[tuple[Named, Measurement]]) -> str:
    """One line a form of an operator."""
    lines: list[tuple[str, ...]] = []
    for row, measurement in measurements:
        ours = measurement.default.median
        for timing in (*measurement.backends, *measurement.peers):
            lines.append(
                (
                    row.name if timing is measurement.default else "",
                    timing.name,
                    time_text(timing.median),
                    f"{timing.median / ours:.3g}x",
                    f"{measurement.bandwidth(timing) / 1e9:.3g}",
                    f"{measurement.copy_fraction(timing):.0%}",
                    f"{measurement.rate(timing) / 1e9:.3g}",
                    f"{measurement.product_fraction(timing):.1%}",
                    str(timing.samples),
                )
            )
        lines.extend(("", name, "not installed", *[""] * 6) for name in measurement.absent)
    heads = ("operator", "form", "median", "time", "GB/s", "of a copy", "GFLOP/s", "of a product", "samples")
    return table(heads, lines, right=range(2, 9))


def _steps(steps: dict[str, Timing]) -> str:
    empty = next(iter(steps.values())).median
    lines = [
        (name, time_text(timing.median), f"{timing.median / empty:.2f}x") for name, timing in steps.items()
    ]
    return table(("step", "median", "of an empty operator"), lines, right=(1, 2))


def _models(models: dict[str, dict[str, float]]) -> str:
    lines = []
    for layout, numbers in models.items():
        cells = [time_text(numbers[key]) if key in numbers else "–" for key in (DEFAULT, REFERENCE, COMPILED)]
        compiling = time_text(numbers["compile"]) if "compile" in numbers else "–"
        lines.append((LAYOUTS[layout][0], *cells, compiling))
    heads = ("layout", "default", "reference", "reference, torch.compile", "compiling it")
    return table(heads, lines, right=range(1, 5))


def table(heads: Sequence[str], lines: Iterable[Sequence[str]], right: Iterable[int] = ()) -> str:
    aligned = set(right)
    rule = ["---:" if column in aligned else "---" for column in range(len(heads))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, rule, *lines))


def time_text(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{1e6 * seconds:.3g} µs"
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _range(values: Sequence[float]) -> str:
    low, high = (f"{value:.3g}" for value in (values[0], values[-1]))
    return low if low == high else f"{low} to {high}"
