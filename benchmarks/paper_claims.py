"""The paper's claims beside what was found here, and which structures each search favours."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.paper_drift import Comparison
from benchmarks.paper_plan import SEARCHES
from benchmarks.paper_retrain import Longer, layouts
from benchmarks.paper_state import Found, State, sizes
from star.report.numbers import difference
from star.search import Evaluation
from star.search.front import candidates

__all__ = ["SIGNIFICANT", "claims", "favoured"]

SIGNIFICANT = 0.05
"""Adjusted p-values below it count as favoured or avoided."""

_PAPER_CLASSES = ("GConv-1", "SA-3", "Rec-1-Diff", "GMemless")
_MOTIFS = {
    "two differential short gated convolutions joined by a featurizer": (
        "GConv-1-Diff pairs with one featurizer"
    ),
    "earlier Toeplitz LIVs lend features to later ones": "convolution with earlier features",
}


def claims(state: State, tests: Sequence[Comparison]) -> list[str]:
    """A table of claims; what is not known yet says so."""
    found = {item.name: item for item in state.finished}
    rows = [
        (
            "quality: all evaluated backbones better than Transformer++ and StripedMamba",
            _every_candidate(found.get("quality")),
        ),
        ("quality: the population improves by about 1.0 perplexity", _improvement(found.get("quality"))),
        (
            "quality + size: 7 of 8 better than Transformer++, with up to 13 % fewer parameters than it and "
            "8 % fewer than StripedMamba",
            _smaller(state, found.get("quality-size"), "size", "parameters"),
        ),
        (
            "quality + cache: up to 90 % less cache than Transformer++ and 37 % less than StripedMamba at "
            "competitive quality",
            _smaller(state, found.get("quality-cache"), "cache", "cache"),
        ),
        ("quality + size + cache + decode p50: not run", _joint(state, found.get("joint"))),
        (f"favoured classes: {', '.join(_PAPER_CLASSES)}", _classes(tests)),
        *((f"favoured motif: {text}", _motif(tests, name)) for text, name in _MOTIFS.items()),
    ]
    return [
        "“Clearly” better: by more than two standard errors of the difference between the means over seeds.",
        "",
        "| the paper, at 125 M to 1 B parameters | here |",
        "|---|---|",
        *(f"| {claim} | {answer} |" for claim, answer in rows),
    ]


def _every_candidate(found: Found | None) -> str:
    if found is None:
        return "not finished"
    qualities = [item.objectives["quality"] for item in candidates(found.evaluations)]
    parts = []
    for name in ("Transformer++", "StripedMamba"):
        if name not in found.references:
            parts.append(f"{name} failed")
            continue
        limit = found.references[name].objectives["quality"]
        parts.append(f"{sum(quality < limit for quality in qualities)} than {name}")
    return f"of {len(qualities)} candidates, after the proxy's training, better are {' and '.join(parts)}"


def _improvement(found: Found | None) -> str:
    first, last = (found.mean_quality(0), found.mean_quality(-1)) if found is not None else (None, None)
    if first is None or last is None:
        return "not finished"
    return (
        f"mean of the survivors {first:.3f} → {last:.3f} bits per byte, which is {2**first:.2f} → "
        f"{2**last:.2f} perplexity a byte"
    )


def _smaller(state: State, found: Found | None, name: str, noun: str) -> str:
    """How many of the chosen are better than Transformer++, and the least of one quantity among those that
    are as good as each layout."""
    if found is None:
        return "not finished"
    if not _all_trained(state, found):
        return "longer trainings not finished"
    base = _layout(state, "Transformer++")
    parts = [_how_many(state, found.chosen, base)]
    for layout in ("Transformer++", "StripedMamba"):
        other = _layout(state, layout)
        good = [item for item in found.chosen if state.longer[item.key].better_than(other)]
        if not good:
            parts.append(f"none as good as {layout}")
            continue
        least = min(sizes(state, item.key)[name] for item in good)
        parts.append(
            f"least {noun} of those better than {layout}: "
            f"{difference(least, sizes(state, other.genome)[name])}"
        )
    return "; ".join(parts)


def _joint(state: State, found: Found | None) -> str:
    if found is None:
        return "not finished"
    if not _all_trained(state, found):
        return "longer trainings not finished"
    base = _layout(state, "Transformer++")
    limits = sizes(state, base.genome)
    both = [
        item
        for item in found.chosen
        if state.longer[item.key].better_than(base)
        and all(number <= limits[name] for name, number in sizes(state, item.key).items())
    ]
    least = {
        name: min(sizes(state, item.key)[name] for item in both) for name in limits if both and limits[name]
    }
    nouns = {"size": "parameters", "cache": "cache", "decode_p50": "time a token"}
    parts = [
        _how_many(state, found.chosen, base),
        f"{len(both)} of these with no more parameters, cache and time a token",
        *(f"down to {difference(number, limits[name])} {nouns[name]}" for name, number in least.items()),
    ]
    return "; ".join(parts)


def _how_many(state: State, chosen: Sequence[Evaluation], base: Longer) -> str:
    better = sum(state.longer[item.key].better_than(base) for item in chosen)
    clearly = sum(state.longer[item.key].clearly_better_than(base) for item in chosen)
    return f"{better} of {len(chosen)} better than Transformer++, {clearly} of them clearly"


def _all_trained(state: State, found: Found) -> bool:
    named = [_layout(state, name) for name in ("Transformer++", "StripedMamba")]
    trained = [*named, *(state.longer[item.key] for item in found.chosen)]
    return all(len(item.quality) + item.failed == state.plan.seeds for item in trained)


def _layout(state: State, name: str) -> Longer:
    return state.longer[layouts(state.plan.search.depth)[name]]


# ---- favoured structures -------------------------------------------------------------------------------


def _significant(tests: Sequence[Comparison]) -> list[Comparison]:
    return [test for test in tests if test.adjusted < SIGNIFICANT]


def _classes(tests: Sequence[Comparison]) -> str:
    if not tests:
        return "not simulated"
    prefix = "LIVs of class "
    parts = []
    for search in dict.fromkeys(test.search for test in tests):
        names = [
            test.statistic.removeprefix(prefix)
            for test in _significant(tests)
            if test.search == search and test.statistic.startswith(prefix) and test.observed > test.expected
        ]
        parts.append(f"{' + '.join(SEARCHES[search])}: {', '.join(names) or 'none'}")
    return "; ".join(parts)


def _motif(tests: Sequence[Comparison], name: str) -> str:
    parts = [
        f"{' + '.join(SEARCHES[test.search])}: {test.observed:.3f} against {test.expected:.3f} by drift "
        f"(p = {_p(test.adjusted)})"
        for test in tests
        if test.statistic == name
    ]
    return "; ".join(parts) or "not simulated"


def favoured(state: State, tests: Sequence[Comparison]) -> list[str]:
    """What the final populations have more or less of than drift leaves."""
    if not tests:
        return ["Not simulated, or no search has finished."]
    lines = [
        f"Final populations against {len(state.drifts)} evolutions without selection (the same operators, "
        "population and generations; fitness a random number that a candidate is born with). Two-sided "
        f"p-values, adjusted for all {len(tests)} tests together (Benjamini and Hochberg). With so many "
        f"drifts no p-value can be below {2 / (1 + len(state.drifts)):.2g} before the adjustment.",
        "",
        "| search | | here | drift | p | adjusted |",
        "|---|---|---|---|---|---|",
    ]
    shown = sorted(_significant(tests), key=lambda test: (list(SEARCHES).index(test.search), test.adjusted))
    for test in shown:
        sign = "more" if test.observed > test.expected else "fewer"
        lines.append(
            f"| {' + '.join(SEARCHES[test.search])} | {sign} {test.statistic} | {test.observed:.3f} "
            f"| {test.expected:.3f} | {_p(test.p)} | {_p(test.adjusted)} |"
        )
    if not shown:
        return [*lines[:1], "", "None differs."]
    others = len(tests) - len(shown)
    return [*lines, "", f"The other {others} do not differ from drift (adjusted p of {SIGNIFICANT} or more)."]


def _p(value: float) -> str:
    return f"{value:.2g}"
