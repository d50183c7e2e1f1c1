"""The device of the joint search: its table, and whole models measured beside what the table predicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from benchmarks.paper_plan import Folder, Plan, append_line, read_lines
from benchmarks.prediction import processor_timer, table_by_processor_time
from star.genome import Genome
from star.measure.errors import MeasurementError, OtherDevice
from star.measure.process import measure_in_process, table_in_process
from star.measure.whole import measure_genome
from star.profile.table import ProfileTable, read_table
from star.search.corpus import CorpusRecord

__all__ = ["device_table", "measure_whole", "not_measured_here", "read_measured"]

Measured = Mapping[str, Mapping[str, float]]
"""By canonical genome the quantities of star.measure.quantities; none where it could not be measured."""


def device_table(
    folder: Folder, plan: Plan, corpus: CorpusRecord, tell: Callable[[str], None]
) -> ProfileTable:
    """The table of the device, measured once an experiment and kept in its folder."""
    if folder.device_file.exists():
        return read_table(folder.device_file)
    settings = plan.search.measure.resolved(corpus.vocab_size)
    measure = table_by_processor_time if plan.cpu_time else table_in_process
    table = measure(settings, tell=lambda text: tell(f"device: {text}"))
    table.write(folder.device_file)
    return table


def not_measured_here(genome: Genome, table: ProfileTable) -> dict[str, float]:
    """In the place of what measures a search's whole front when it ends, which no page shows."""
    raise OtherDevice("whole models are measured when the search is over, those that are trained longer")


def measure_whole(
    folder: Folder, plan: Plan, table: ProfileTable, genomes: Sequence[str], tell: Callable[[str], None]
) -> None:
    """Measure what is not recorded yet of these genomes (canonical), each once, one after the other."""
    there = read_measured(folder)
    missing = [genome for genome in dict.fromkeys(genomes) if genome not in there]
    for number, genome in enumerate(missing, start=1):
        parsed, reason = Genome.parse(genome), None
        values: dict[str, float] = {}
        try:
            values = _by_processor_time(parsed, table) if plan.cpu_time else measure_in_process(parsed, table)
        except OtherDevice as error:  # gone on with elsewhere: left for the machine of the table
            tell(f"nothing is measured: {error}")
            return
        except MeasurementError as error:
            reason = str(error)
        append_line(folder.measured_file, {"genome": genome, "values": values, "reason": reason})
        tell(f"whole model {number} of {len(missing)} measured{f': failed: {reason}' if reason else ''}")


def _by_processor_time(genome: Genome, table: ProfileTable) -> dict[str, float]:
    return measure_genome(genome, table.settings.config(), table.settings, timer=processor_timer)


def read_measured(folder: Folder) -> Measured:
    """What is recorded.

    Raises:
        ValueError: the record is damaged; one line.
    """
    found: dict[str, Mapping[str, float]] = {}
    for number, line in enumerate(read_lines(folder.measured_file), start=1):
        genome, values = line.get("genome"), line.get("values")
        numbers = values.values() if isinstance(values, dict) else [None]
        if not isinstance(genome, str) or not all(
            isinstance(item, (int, float)) and math.isfinite(item) for item in numbers
        ):
            raise ValueError(f"{folder.measured_file} is damaged: line {number} is no measurement")
        found[genome] = values or {}
    return found
