"""The device that a search is for: its table before the first candidate, and whole models against the table.

Objectives and budgets of a device are predicted from a table that is measured once, becomes part of the
settings, and is recorded with them: from then on they follow from the genome, and a run that is killed and
resumed finds what it would have found. How good the predictions are is measured beside the search: each
tenth candidate between two generations, when no worker keeps the device busy, and the front at the end. What
was measured goes into the run's diary, each candidate once. It decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from star import pools
from star.genome import Genome
from star.measure.errors import MeasurementError, OtherDevice
from star.measure.quantities import split
from star.measure.settings import MeasureSettings
from star.profile.cached import agrees, find_or_measure
from star.profile.table import ProfileTable
from star.search.errors import RunDamaged, RunError
from star.search.events import (
    DeviceMeasured,
    DeviceUnsteady,
    Event,
    GenerationFinished,
    Listener,
    RunFinished,
)
from star.search.layouts import BASELINES
from star.search.settings import SearchSettings
from star.search.store import Evaluation, RunStore, StoredEvent

__all__ = ["KIND", "WholeModels", "needed_classes", "read_measured", "with_table"]

KIND = "measured"
"""Of the diary's lines that hold what was measured of one candidate."""

FindTable = Callable[..., ProfileTable]
MeasureWhole = Callable[[Genome, ProfileTable], dict[str, float]]


def with_table(
    settings: SearchSettings, listener: Listener, find_table: FindTable = find_or_measure
) -> SearchSettings:
    """The settings with the table of their device, where they need one and have none.

    Args:
        settings: with the vocabulary of the text.
        listener: is told what is measured, and whether the table is unsteady.
        find_table: as `star.profile.cached.find_or_measure`.

    Raises:
        ValueError: the device is not in this machine, or the table does not hold what is searched for.
        RunError: the device can not be measured.
    """
    names = settings.of_device()
    if not names:
        return settings
    classes = needed_classes(settings)
    table = settings.profile
    if table is None:
        chosen = settings.measure.resolved(settings.model.vocab_size)
        _require_contexts(names, chosen)
        try:
            table = find_table(chosen, classes, tell=lambda text: listener(DeviceMeasured(text)))
        except MeasurementError as error:
            raise RunError(f"the device can not be measured: {error}") from error
    else:
        chosen = agrees(table, settings.measure)
        _require_contexts(names, chosen)
    for warning in filter(None, (table.warning(), _other_vocabulary(table, settings))):
        listener(DeviceUnsteady(warning))
    return replace(settings, measure=chosen, profile=table.require_classes(classes))


def _other_vocabulary(table: ProfileTable, settings: SearchSettings) -> str | None:
    """That a table's models end in another head than those of the text, which shifts all predictions."""
    of_table, of_text = table.settings.vocab_size, settings.model.vocab_size
    if of_table == of_text:
        return None
    return (
        f"the profile table is of models of {of_table} token ids, and the text has {of_text}: predictions, "
        f"and budgets, are of the former (star profile --vocab-size {of_text} measures the latter)"
    )


def needed_classes(settings: SearchSettings) -> set[int]:
    """LIV classes that a candidate or a reference of the search may have."""
    layouts = BASELINES.values() if settings.references or settings.seed_baselines else ()
    known = {gene.liv_class for layout in layouts for gene in layout(settings.depth)}
    return {pools.get(number).id for number in settings.pool.classes} | known


def _require_contexts(names: Sequence[str], settings: MeasureSettings) -> None:
    for name in names:
        context = split(name)[1]
        if context is not None and context not in settings.contexts:
            listed = ", ".join(map(str, settings.contexts))
            raise ValueError(f"{name} is asked for, and the contexts that are measured are {listed}")


@dataclass(frozen=True)
class WholeModels:
    """Listens to a search and measures whole candidates where it rests.

    Attributes:
        settings: of the search, with the table.
        store: its record.
        listener: is told what is measured.
        measure: `star.measure.process.measure_in_process`, unless a test puts something else here.
    """

    settings: SearchSettings
    store: RunStore
    listener: Listener
    measure: MeasureWhole

    def __call__(self, event: Event) -> None:
        if self.settings.profile is None:
            return
        every = self.settings.measure.every
        if isinstance(event, GenerationFinished) and every:
            due = [item for item in self.store.evaluations() if item.id % every == 0 and item.ok]
            self._measure([item for item in due if (item.generation or 0) <= event.generation])
        elif isinstance(event, RunFinished):
            self._measure([item for item in self.store.evaluations() if item.id in event.front])

    def _measure(self, evaluations: Sequence[Evaluation]) -> None:
        known = read_measured(self.store.events())
        table = self.settings.profile
        assert table is not None
        for item in evaluations:
            if item.id in known:
                continue
            self.listener(DeviceMeasured(f"candidate {item.id} as a whole"))
            record: dict[str, Any] = {"id": item.id}
            try:
                record["values"] = self.measure(Genome.parse(item.key), table)
            except OtherDevice as error:  # a search for a device elsewhere; nothing to compare with here
                self.listener(DeviceMeasured(f"nothing: {error}"))
                return
            except MeasurementError as error:
                record |= {"values": {}, "reason": str(error)}
            self.store.append_event(KIND, **record)


def read_measured(events: Sequence[StoredEvent]) -> dict[int, dict[str, float]]:
    """What was measured of whole candidates, by their ids; nothing where it could not be.

    Raises:
        RunDamaged: the diary's lines are not what a search writes.
    """
    measured: dict[int, dict[str, float]] = {}
    for event in events:
        if event.kind != KIND:
            continue
        id, values = event.data.get("id"), event.data.get("values")
        if not (isinstance(id, int) and isinstance(values, dict) and all(map(_is_number, values.values()))):
            raise RunDamaged("the record is damaged: what was measured on the device is no list of numbers")
        measured[id] = values
    return measured


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e30
