"""What a device takes for the genomes of a table, predicted from the device's own table (star.profile)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from star.comparison.table import Row, device_label
from star.genome import Genome
from star.measure.quantities import split
from star.profile.predict import Predictor
from star.profile.table import ProfileTable

__all__ = ["with_latencies"]


def with_latencies(rows: Sequence[Row], table: ProfileTable) -> list[Row]:
    """The rows with ttft, prefill, decode_p50, decode_p95 and peak_memory of the device.

    Rows without a device become the device's. Those of another device stay, and their genomes get a row of
    this one, since values of two devices must not be compared. Plain names mean the smallest context that the
    table has, "ttft@32768" a larger one; peak_memory is missing where the device could not say, and all of
    them where the training failed.

    Raises:
        ValueError: the table lacks an LIV class of one of the genomes.
    """
    predictor, device = Predictor(table), device_label(table)
    there = {row.identity for row in rows}
    result: list[Row] = []
    for row in rows:
        its = row.device == device or (row.device == "" and (*row.training, device) not in there)
        result.append(_predicted(row, predictor, device) if its else row)
    there |= {row.identity for row in result}
    for row in rows:
        if (*row.training, device) not in there:
            result.append(_predicted(_without_device(row), predictor, device))
            there.add((*row.training, device))
    return result


def _predicted(row: Row, predictor: Predictor, device: str) -> Row:
    if not row.ok:
        return replace(row, device=device)
    values = _named(predictor.predict(Genome.parse(row.genome)))
    return replace(row, objectives={**values, **row.objectives}, device=device)


def _named(values: Mapping[str, float]) -> dict[str, float]:
    """The smallest context's values by their plain names, those of others with their contexts."""
    split_names = {name: split(name) for name in values}
    smallest = min(context or 0 for _, context in split_names.values())
    return {
        base if context == smallest else name: values[name] for name, (base, context) in split_names.items()
    }


def _without_device(row: Row) -> Row:
    from star.search.objectives import find

    kept = {
        name: number
        for name, number in row.objectives.items()
        if (found := find(name)) is None or not found.device
    }
    return replace(row, objectives=kept, device="")
