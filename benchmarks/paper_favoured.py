"""Which structures the final populations have more or less of than their null."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from benchmarks.paper_drift import Comparison, class_identity
from benchmarks.paper_judgement import LEVEL
from benchmarks.paper_state import State, search_title

__all__ = ["MOTIFS", "PAPER_CLASSES", "favoured", "probability"]

PAPER_CLASSES = ("GConv-1", "SA-3", "Rec-1-Diff", "GMemless")
MOTIFS = {
    "two differential short gated convolutions joined by a featurizer": (
        "GConv-1-Diff pairs with one featurizer"
    ),
    "earlier Toeplitz LIVs lend features to later ones": "convolution with earlier features",
}

_NULL = (
    "Each final population against its null: evolutions by the same algorithm, operators, population, "
    "generations and number of objectives, for an inherited fitness that prefers no class (every gene at "
    "every place has an effect drawn at random, and they add up), so that lineages take over and carry along "
    "what stands in them. p: two-sided, for all statistics of a search together (Westfall and Young's "
    "maximum). It concerns this one run of each search: another run is another sample. Beyond what the paper "
    f"names, what differs at p < {LEVEL} is listed."
)


def favoured(state: State) -> list[str]:
    """The section of the page."""
    found = [item for item in state.finished if state.drifts_of(item.name)]
    if not found:
        return ["Not simulated, or no search has finished."]
    lines = [
        _NULL,
        "",
        "Alike: mean share of the places at which two genomes of the final population have LIVs of one "
        "class; for the null, its mean ± standard deviation over the evolutions.",
        "",
        "| search | evolutions | alike, here | alike, null |",
        "|---|---|---|---|",
    ]
    for item in found:
        drifts = [drift.identity for drift in state.drifts_of(item.name)]
        lines.append(
            f"| {search_title(item.name)} | {len(drifts)} | {class_identity(item.final_population()):.3f} "
            f"| {statistics.mean(drifts):.3f} ± {statistics.pstdev(drifts):.3f} |"
        )
    lines += ["", "| search | | here | null | p |", "|---|---|---|---|---|"]
    for item in found:
        tests = {test.statistic: test for test in state.tests if test.search == item.name}
        lines += [_row(item.name, name, tests.get(name)) for name in _shown(tests)]
    return lines


def _shown(tests: Mapping[str, Comparison]) -> list[str]:
    """What the paper names, then what else is significant, the clearest first."""
    named = [*(f"LIVs of class {name}" for name in PAPER_CLASSES), *MOTIFS.values()]
    others = [test for test in tests.values() if test.statistic not in named and test.p < LEVEL]
    return [*named, *(test.statistic for test in sorted(others, key=lambda test: test.p))]


def _row(search: str, name: str, test: Comparison | None) -> str:
    if test is None:
        return f"| {search_title(search)} | {name} | no LIV of the family | – | – |"
    significant = test.p < LEVEL
    sign = ("**more** " if test.observed > test.expected else "**fewer** ") if significant else ""
    return (
        f"| {search_title(search)} | {sign}{name} | {test.observed:.3f} | {test.expected:.3f} "
        f"| {probability(test.p)} |"
    )


def probability(value: float) -> str:
    """A p-value with two digits."""
    return f"{value:.2g}"
