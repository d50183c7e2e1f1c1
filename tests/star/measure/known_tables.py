"""A device's table with known values, and whole models that take what it says, times a factor."""

from __future__ import annotations

from collections.abc import Collection

from star import pools
from star.genome import Genome
from star.measure.settings import MeasureSettings
from star.profile.predict import Predictor
from star.profile.table import Calibration, Ends, LivRow, ProfileTable

CONTEXTS = (64, 256)
SETTINGS = MeasureSettings(
    width=64,
    head_dim=16,
    vocab_size=256,
    dtype="float32",
    device="cpu",
    threads=1,
    contexts=CONTEXTS,
    chunk=128,
    decode_steps=4,
)


def row(liv_class: int, computed: tuple[str, ...], context: int) -> LivRow:
    """10 ms a class number and 1 ms a computed group, doubled at the longer context; a tenth decoding."""
    prefill = (10.0 * liv_class + len(computed)) * (context // CONTEXTS[0])
    return LivRow(
        liv_class=liv_class,
        computed=computed,
        context=context,
        prefill=prefill,
        decode_p50=prefill / 10,
        decode_p95=prefill / 5,
        held=8 * liv_class,
        transient=1000 * liv_class,
        features=50 * liv_class,
    )


def table(settings: MeasureSettings = SETTINGS, classes: Collection[int] | None = None) -> ProfileTable:
    """All ways to share of all classes, or of some."""
    entries = [entry for entry in pools.all_classes() if classes is None or entry.id in classes]
    ways = [
        (entry.id, tuple(name for name in entry.groups if name not in shared))
        for entry in entries
        for shared in entry.feature_strategies
    ]
    return ProfileTable(
        device_name="abacus",
        versions={"torch": "2.13", "star-kernels": "0.1"},
        settings=settings,
        rows=tuple(row(*way, context) for context in settings.contexts for way in ways),
        ends=tuple(
            Ends(context, prefill=3.0, decode=0.5, norm_prefill=0.25, norm_decode=0.125, norm_transient=10)
            for context in settings.contexts
        ),
        calibrations=tuple(
            Calibration(context, livs=len(entries), prefill=0.75, decode=0.125, tail=1.5, memory=100)
            for context in settings.contexts
        ),
        seconds=12.0,
    )


class Whole:
    """Measures whole models: what the table predicts, times a factor. Counts its calls."""

    def __init__(self, factor: float = 1.25) -> None:
        self.factor = factor
        self.asked: list[str] = []

    def __call__(self, genome: Genome, found: ProfileTable) -> dict[str, float]:
        self.asked.append(genome.key)
        return {name: self.factor * number for name, number in Predictor(found).predict(genome).items()}
