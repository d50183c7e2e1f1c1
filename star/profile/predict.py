"""From a device's table to what a genome takes there: sums over its LIVs, in less than a millisecond.

    prefill, decode   ends + the LIVs' rows + for each LIV its norm and the calibration's share
    decode_p95        the predicted median times the calibration's tail
    peak_memory       weights, caches and held kernels, exactly; lent features; the largest transient of all

A LIV's row is found by its class and by what it computes itself: one that takes its keys and values from
another computes less. Sharing a featurizer saves memory and no time.
"""

from __future__ import annotations

from collections.abc import Sequence

from star import cost, pools
from star.config import ModelConfig
from star.genome import Genome
from star.measure.quantities import at
from star.measure.settings import MeasureSettings
from star.profile.table import Calibration, Ends, LivRow, ProfileTable
from star.sharing import LivPlan, resolve

__all__ = ["Predictor", "Share", "predictor"]

Share = tuple[LivPlan, LivRow]


class Predictor:
    """A table made ready to be asked about many genomes."""

    def __init__(self, table: ProfileTable) -> None:
        self.table = table
        self._config = table.settings.config()
        self._rows = {row.key: row for row in table.rows}
        self._ends = {item.context: item for item in table.ends}
        self._calibrations = {item.context: item for item in table.calibrations}

    def predict(self, genome: Genome) -> dict[str, float]:
        """The quantities of star.measure.quantities, by their names with contexts.

        Raises:
            GenomeError: the genome is not valid.
            ValueError: the table lacks one of its LIVs.
        """
        values: dict[str, float] = {}
        for context in self.table.settings.contexts:
            values |= self._at(genome, context)
        return values

    def shares(self, genome: Genome, context: int) -> list[Share]:
        """Every LIV with its row of the table, in the genome's order."""
        return [(plan, self._row(plan, context)) for plan in resolve(genome)]

    def ends(self, context: int) -> tuple[Ends, Calibration]:
        """What a model takes beside its LIVs."""
        return self._ends[context], self._calibrations[context]

    def _at(self, genome: Genome, context: int) -> dict[str, float]:
        shares = self.shares(genome, context)
        ends, calibration = self.ends(context)
        depth = len(shares)
        prefill = ends.prefill + depth * (ends.norm_prefill + calibration.prefill)
        prefill += sum(row.prefill for _, row in shares)
        decode = ends.decode + depth * (ends.norm_decode + calibration.decode)
        decode += sum(row.decode_p50 for _, row in shares)
        # A calibration that was disturbed could make the sum negative; no part takes less than nothing.
        prefill = max(prefill, max(row.prefill for _, row in shares))
        decode = max(decode, max(row.decode_p50 for _, row in shares))
        values = {
            at("ttft", context): prefill,
            at("prefill", context): 1e3 * context / prefill,
            at("decode_p50", context): decode,
            at("decode_p95", context): decode * calibration.tail,
        }
        memory = self._memory(genome, context, shares, ends, calibration)
        return values if memory is None else {**values, at("peak_memory", context): float(memory)}

    def _memory(
        self, genome: Genome, context: int, shares: Sequence[Share], ends: Ends, calibration: Calibration
    ) -> int | None:
        if ends.norm_transient is None or calibration.memory is None:
            return None
        transients = [row.transient for _, row in shares if row.transient is not None]
        if len(transients) < len(shares):
            return None
        lent = {plan.source for plan, _ in shares}
        features = sum(row.features for plan, row in shares if plan.index in lent)
        known = known_memory(genome, self._config, self.table.settings, context)
        held = sum(row.held for _, row in shares)
        beyond = calibration.memory * len(shares) // calibration.livs
        return known + held + features + max(*transients, ends.norm_transient) + beyond

    def _row(self, plan: LivPlan, context: int) -> LivRow:
        row = self._rows.get((plan.entry.id, plan.computed, context))
        if row is None:
            groups = ", ".join(plan.computed) or "nothing"
            raise ValueError(
                f"profile table has no LIV of class {pools.get(plan.entry.id).name} that computes {groups} "
                f"at {context} tokens: measure one with star profile"
            )
        return row


def predictor(table: ProfileTable) -> Predictor:
    """The table's predictor; the last one is kept, since a search asks the same table each time."""
    if not _last or _last[0].table is not table:
        _last[:] = [Predictor(table)]
    return _last[0]


_last: list[Predictor] = []


def known_memory(genome: Genome, config: ModelConfig, settings: MeasureSettings, context: int) -> int:
    """Bytes that need no measuring: weights, caches, and the two streams of a chunk."""
    from star.measure.whole import ROOM, weight_dtype

    dtype = weight_dtype(settings)
    weights = cost.parameters(genome, config) + config.vocab_size * config.width
    weights += (genome.depth + 1) * config.width
    streams = 2 * min(settings.chunk, context) * config.width
    length = context + settings.decode_steps + ROOM
    cache = cost.cache_bytes(genome, config, length=length, dtype=dtype)
    return (weights + streams) * dtype.itemsize + cache
