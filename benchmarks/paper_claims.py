"""The paper's claims beside what was found here."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from benchmarks.paper_favoured import MOTIFS, PAPER_CLASSES, probability
from benchmarks.paper_judgement import LEVEL
from benchmarks.paper_retrain import Longer
from benchmarks.paper_state import Found, State, search_title
from star.report.numbers import difference, value
from star.search import Evaluation
from star.search.front import candidates

__all__ = ["claims"]

_NOUNS = {"size": "parameters", "cache": "cache", "decode_p50": "time a token"}
_RIVALS = ("Transformer++", "StripedMamba")
_NOTHING = "–"


class _Claim(NamedTuple):
    """What the paper says, what was found, and what the first generation, which is random, has already."""

    paper: str
    here: str
    random: str = _NOTHING


def claims(state: State) -> list[str]:
    """A table of claims; what is not known yet says so."""
    found = {item.name: item for item in state.finished}
    rows = [
        _Claim(
            "quality: all evaluated backbones better than Transformer++ and StripedMamba",
            _every_backbone(state, found.get("quality")),
        ),
        _Claim(
            "quality: the population improves by about 1.0 perplexity", _improvement(found.get("quality"))
        ),
        _Claim(
            "quality + size: 7 of 8 better than Transformer++, with up to 13 % fewer parameters than it and "
            "8 % fewer than StripedMamba",
            _smaller(state, found.get("quality-size"), "size"),
            _first_generation(state, found.get("quality-size"), ("size",)),
        ),
        _Claim(
            "quality + cache: up to 90 % less cache than Transformer++ and 37 % less than StripedMamba at "
            "competitive quality",
            _smaller(state, found.get("quality-cache"), "cache"),
            _first_generation(state, found.get("quality-cache"), ("cache",)),
        ),
        _Claim(
            "quality + size + cache + decode p50: not run",
            _joint(state, found.get("joint")),
            _first_generation(state, found.get("joint"), ("size", "cache")),
        ),
        _Claim(f"favoured classes: {', '.join(PAPER_CLASSES)}", _classes(state)),
        *(_Claim(f"favoured motif: {text}", _motif(state, name)) for text, name in MOTIFS.items()),
    ]
    return [
        *_terms(state),
        "",
        "| the paper, at 125 M to 1 B parameters | here | generation 0, drawn at random |",
        "|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def _terms(state: State) -> list[str]:
    judge = state.judge
    noise = (
        f"the variance between seeds pooled over all genomes ({judge.deviation:.4f} bits per byte, "
        f"{judge.degrees} degrees of freedom)"
        if judge.can_tell
        else "the variance between seeds pooled over all genomes (not known yet)"
    )
    return [
        "Better and worse: by the means of the longer trainings. Clearly: by Student's test with "
        f"{noise}, two-sided at {LEVEL} shared among the {judge.comparisons} of a search (Bonferroni). What "
        "is not clearly worse need not be as good: it is only not told apart by these seeds. A genome of "
        "which a training failed counts as neither.",
    ]


# ---- quality -------------------------------------------------------------------------------------------


def _every_backbone(state: State, found: Found | None) -> str:
    if found is None:
        return "not finished"
    qualities = [item.objectives["quality"] for item in candidates(found.evaluations)]
    all_of_them = []
    for name in _RIVALS:
        if name not in found.references:
            all_of_them.append(f"{name} failed")
            continue
        limit = found.references[name].objectives["quality"]
        all_of_them.append(f"{sum(quality < limit for quality in qualities)} than {name}")
    proxy = (
        f"beside it, of all {len(qualities)} candidates, after the proxy's training alone, better are "
        f"{' and '.join(all_of_them)}"
    )
    if not _all_trained(state, found):
        return f"longer trainings not finished; {proxy}"
    return "; ".join([*(_how_many(state, found.chosen, name) for name in _RIVALS), proxy])


def _improvement(found: Found | None) -> str:
    first, last = (found.mean_quality(0), found.mean_quality(-1)) if found is not None else (None, None)
    if first is None or last is None:
        return "not finished"
    return (
        f"mean of the survivors {first:.3f} → {last:.3f} bits per byte under the proxy, which is "
        f"{2**first:.2f} → {2**last:.2f} perplexity a byte"
    )


def _how_many(state: State, chosen: Sequence[Evaluation], rival: str) -> str:
    base = state.longer[state.layouts[rival]]
    if not state.judge.complete(base):
        return f"trainings of {rival} failed, so nothing is compared with it"
    better = _count(state.judge.better, state, chosen, base)
    clearly = _count(state.judge.clearly_better, state, chosen, base)
    return f"of {len(chosen)} trained longer {better} better than {rival}, {clearly} of them clearly"


def _count(
    holds: Callable[[Longer, Longer], bool], state: State, chosen: Sequence[Evaluation], base: Longer
) -> int:
    return sum(holds(state.longer[item.key], base) for item in chosen)


# ---- sizes ---------------------------------------------------------------------------------------------


def _smaller(state: State, found: Found | None, name: str) -> str:
    """How many of the chosen are better than each layout, and the least of one quantity among those that are
    and those that are not clearly worse."""
    if found is None:
        return "not finished"
    if not _all_trained(state, found):
        return "longer trainings not finished"
    parts = []
    for rival in _RIVALS:
        parts.append(_how_many(state, found.chosen, rival))
        base = state.longer[state.layouts[rival]]
        if state.judge.complete(base):
            for words, holds in (("better", state.judge.better), ("not clearly worse", state.judge.as_good)):
                good = [item for item in found.chosen if holds(state.longer[item.key], base)]
                parts.append(f"least {_NOUNS[name]} of those {words}: {_least(state, good, name, base)}")
    return "; ".join(parts)


def _least(state: State, good: Sequence[Evaluation], name: str, base: Longer) -> str:
    if not good:
        return "there are none" if state.judge.can_tell else "one seed does not tell"
    least = min(good, key=lambda item: state.sizes(item.key)[name])
    return f"{difference(state.sizes(least.key)[name], state.sizes(base.genome)[name])} (id {least.id})"


def _joint(state: State, found: Found | None) -> str:
    """Those that are better than Transformer++ in everything; each number is of one candidate."""
    if found is None:
        return "not finished"
    if not _all_trained(state, found):
        return "longer trainings not finished"
    base = state.longer[state.layouts["Transformer++"]]
    parts = [_how_many(state, found.chosen, "Transformer++")]
    if not state.judge.complete(base):
        return parts[0]
    limits = state.sizes(base.genome)
    for words, holds in (("better", state.judge.better), ("not clearly worse", state.judge.as_good)):
        within = [
            item
            for item in found.chosen
            if holds(state.longer[item.key], base)
            and all(number <= limits[name] for name, number in state.sizes(item.key).items())
        ]
        parts.append(f"{len(within)} {words} with no more parameters, cache and time a token")
        parts += _best_of_each(state, within, limits)
    return "; ".join(parts)


def _best_of_each(state: State, within: Sequence[Evaluation], limits: dict[str, float]) -> list[str]:
    """How far down each quantity goes, with the candidate where it is not the same for all."""
    if not within:
        return []
    least = {name: min(within, key=lambda item: state.sizes(item.key)[name]) for name in limits}
    several = len({item.id for item in least.values()}) > 1
    parts = [
        f"down to {difference(state.sizes(item.key)[name], limits[name])} {_NOUNS[name]}"
        + (f" (id {item.id})" if several else "")
        for name, item in least.items()
    ]
    return parts if several else [f"{', '.join(parts)}, all of id {next(iter(least.values())).id}"]


def _first_generation(state: State, found: Found | None, names: Sequence[str]) -> str:
    """How much less than Transformer++ a random genome has already."""
    if found is None:
        return _NOTHING
    drawn = [item.key for item in found.evaluations if item.generation == 0]
    if not drawn:
        return _NOTHING
    limits = state.sizes(state.layouts["Transformer++"])
    parts = []
    for name in names:
        numbers = [state.sizes(genome)[name] for genome in drawn]
        middle, least = statistics.median(numbers), min(numbers)
        parts.append(
            f"{_NOUNS[name]}: median {value(name, middle)} ({difference(middle, limits[name])} than "
            f"Transformer++), least {value(name, least)} ({difference(least, limits[name])})"
        )
    return "; ".join(parts)


def _all_trained(state: State, found: Found) -> bool:
    trained = [state.layouts[name] for name in _RIVALS] + [item.key for item in found.chosen]
    done = (state.longer[genome] for genome in trained)
    return all(len(item.quality) + item.failed == state.plan.seeds for item in done)


# ---- structures ----------------------------------------------------------------------------------------


def _classes(state: State) -> str:
    """Those of the paper's and all others that are significantly more frequent than in the null."""
    prefix = "LIVs of class "
    parts = []
    for search in dict.fromkeys(test.search for test in state.tests):
        names = [
            test.statistic.removeprefix(prefix)
            for test in state.tests
            if test.search == search
            and test.statistic.startswith(prefix)
            and test.observed > test.expected
            and test.p < LEVEL
        ]
        parts.append(f"{search_title(search)}: {', '.join(names) or 'none'}")
    return "; ".join(parts) or "not simulated"


def _motif(state: State, name: str) -> str:
    parts = [
        f"{search_title(test.search)}: {test.observed:.3f} against {test.expected:.3f} in the null "
        f"(p = {probability(test.p)})"
        for test in state.tests
        if test.statistic == name
    ]
    return "; ".join(parts) or "not simulated"
