"""The layouts that people know, by the names under which a search records them."""

from __future__ import annotations

from collections.abc import Callable

from star import baselines
from star.genome import Genome
from star.search.settings import SearchSettings

__all__ = ["BASELINES", "seeds"]

BASELINES: dict[str, Callable[[int], Genome]] = {
    "Transformer++": baselines.transformer_pp,
    "StripedMamba": baselines.striped_mamba,
    "LFM2": baselines.lfm2,
}


def seeds(settings: SearchSettings) -> list[Genome]:
    """What a search begins with beside random genomes: the layouts, where the settings say so."""
    return [layout(settings.depth) for layout in BASELINES.values()] if settings.seed_baselines else []
