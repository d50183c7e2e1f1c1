"""How well a table of single LIVs predicts whole models: random genomes, predicted and then measured.

    python -m benchmarks.prediction --out benchmarks/results/prediction.md
    python -m benchmarks.prediction --width 768 --context 4096 --genomes 4 --out FILE

The machine should have nothing else to do. Where that can not be had, --cpu-time counts the process's own
processor seconds on one thread instead of the clock's; memory needs no quiet machine. The file has a section
for each size and device; the same ones again replace theirs.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from star.genome import Genome
from star.measure.errors import MeasurementError
from star.measure.process import measure_in_process
from star.measure.quantities import relative_errors
from star.measure.settings import MeasureSettings
from star.measure.whole import measure_genome
from star.profile.livs import measure_table
from star.profile.predict import Predictor
from star.profile.table import ProfileTable
from star.report.numbers import title, value

Values = Mapping[str, float]
Result = TypeVar("Result")

TITLE = "# Predictions from single LIVs"


def main() -> None:
    chosen = _arguments()
    settings = MeasureSettings(
        width=chosen.width,
        device=chosen.device,
        dtype=chosen.dtype,
        contexts=tuple(chosen.context),
        threads=1 if chosen.cpu_time else chosen.threads,
        seconds=chosen.seconds,
    ).resolved(vocab_size=256)
    table, measure = _on_processor(settings) if chosen.cpu_time else _on_clock(settings)
    predictor = Predictor(table)
    rng = np.random.default_rng(chosen.seed)
    pairs: list[tuple[Values, Values]] = []
    for number in range(1, chosen.genomes + 1):
        genome = Genome.random(chosen.depth, rng)
        pairs.append((predictor.predict(genome), measure(genome)))
        print(f"{number} of {chosen.genomes}", _line(*pairs[-1]), flush=True)
    text = section(table, pairs, chosen.depth, chosen.cpu_time, _microseconds(table, chosen.depth))
    print(text)
    if chosen.out is not None:
        before = chosen.out.read_text(encoding="utf-8") if chosen.out.exists() else ""
        chosen.out.write_text(with_section(before, text), encoding="utf-8")


def _on_clock(settings: MeasureSettings) -> tuple[ProfileTable, Callable[[Genome], Values]]:
    """Wall time, every model in a process of its own."""
    from star.measure.process import table_in_process

    table = table_in_process(settings, tell=print)
    return table, lambda genome: measure_in_process(genome, table)


def _on_processor(settings: MeasureSettings) -> tuple[ProfileTable, Callable[[Genome], Values]]:
    """Processor seconds, every model in a process of its own, whose memory is that model's alone."""
    table = _alone(_processor_table, settings)
    return table, lambda genome: _alone(_processor_whole, genome, settings)


def _alone(function: Callable[..., Result], *arguments: object) -> Result:
    """What a function of this module returns in a new process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def _processor_table(settings: MeasureSettings) -> ProfileTable:
    whole = partial(measure_genome, timer=processor_timer)
    return measure_table(settings, tell=_say, timer=processor_timer, whole=whole)


def _processor_whole(genome: Genome, settings: MeasureSettings) -> Values:
    return measure_genome(genome, settings.config(), settings, timer=processor_timer)


def _say(text: str) -> None:
    print(text, flush=True)


def processor_timer(call: Callable[[], object]) -> float:
    """Processor seconds of a call."""
    began = time.process_time()
    call()
    return time.process_time() - began


def table_by_processor_time(settings: MeasureSettings, *, tell: Callable[[str], None]) -> ProfileTable:
    """The table of a device in processor seconds of this process, without memory, which it may have used for
    something else before."""
    whole = partial(measure_genome, timer=processor_timer)
    table = measure_table(settings, tell=tell, timer=processor_timer, whole=whole)
    return replace(table, calibrations=tuple(replace(item, memory=None) for item in table.calibrations))


def _microseconds(table: ProfileTable, depth: int) -> float:
    """Of one prediction, of genomes that were not asked for before."""
    predictor = Predictor(table)
    rng = np.random.default_rng(1)
    genomes = [Genome.random(depth, rng) for _ in range(100)]
    began = time.process_time()
    for genome in genomes:
        predictor.predict(genome)
    return 1e6 * (time.process_time() - began) / len(genomes)


def section(
    table: ProfileTable, pairs: list[tuple[Values, Values]], depth: int, cpu_time: bool, microseconds: float
) -> str:
    """Markdown: the circumstances, and the errors by quantity."""
    settings = table.settings
    clock = "processor seconds" if cpu_time else "wall time"
    lines = [
        f"## Width {settings.width}, {settings.dtype}, contexts {', '.join(map(str, settings.contexts))}, "
        f"{table.device_name} ({settings.device}), {clock}",
        "",
        f"{table.device_name} ({settings.device}, threads {settings.threads}, load {os.getloadavg()[0]:.1f} "
        f"at the end), {clock}, torch {table.versions['torch']}; width {settings.width}, {settings.dtype}; "
        f"{len(pairs)} random genomes of {depth} LIVs. The table took {table.seconds:.0f} s, a prediction "
        f"{microseconds:.0f} µs.",
        "",
        "| quantity | measured, median | median error | largest error |",
        "|---|---|---|---|",
    ]
    for name, errors in relative_errors(pairs).items():
        middle = statistics.median(measured[name] for _, measured in pairs)
        lines.append(
            f"| {title(name)} | {value(name, middle)} | {statistics.median(errors):.1%} | {max(errors):.1%} |"
        )
    warning = table.warning()
    if warning is not None:
        lines += ["", f"Warning: {warning}."]
    command = shlex.join(["python", "-m", "benchmarks.prediction", *sys.argv[1:]])
    return "\n".join([*lines, "", f"`{command}`", ""])


def with_section(text: str, new: str) -> str:
    """The file's text with the section in the place of the one of the same heading, or at its end."""
    _, *known = re.split(r"^(?=## )", text, flags=re.MULTILINE)
    sections = {part.partition("\n")[0]: part.strip() for part in [*known, new]}
    return "\n\n".join([TITLE, *sections.values()]) + "\n"


def _line(predicted: Values, measured: Values) -> str:
    known = [name for name in measured if name in predicted]
    return ", ".join(f"{name} {predicted[name] / measured[name] - 1:+.1%}" for name in known)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--context", type=int, nargs="+", default=[1024])
    parser.add_argument("--depth", type=int, default=24)
    parser.add_argument("--genomes", type=int, default=12)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, MeasurementError, OSError) as error:
        print(f"prediction: {error}", file=sys.stderr)
        sys.exit(2)
