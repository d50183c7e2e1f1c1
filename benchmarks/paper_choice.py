"""Which candidates of a search are trained longer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from star.search import Evaluation
from star.search.front import candidates
from star.search.objectives import objective_vector
from star.search.ranking import fronts

__all__ = ["RULE", "Choice", "choose", "quality_of"]

RULE = (
    "Of each search {best} are trained longer. The first {first} are the best of its final front by the "
    "proxy's bits per byte. The other {others} are front members that the proxy found no worse than "
    "Transformer++, those first that have least of what was searched for beside quality (of several, by "
    "turns). Where there are too few, and in the search for quality alone, the next by the proxy follow, "
    "from the front and then from the fronts behind it."
)
"""To be formatted with `best`, `first` and `others`."""

NEXT = "next"


class Choice(NamedTuple):
    """A candidate, and what it is trained longer for: an objective that it is good in, or `NEXT`."""

    evaluation: Evaluation
    why: str


def choose(
    evaluations: Iterable[Evaluation],
    objectives: Sequence[str],
    count: int,
    reference: Evaluation | None,
) -> list[Choice]:
    """At most `count` candidates, by `RULE`.

    Args:
        evaluations: of the search.
        objectives: of the search, quality first.
        count: how many.
        reference: Transformer++ under the proxy. Where it is missing or has failed, no candidate is known to
            be no worse, and the next by the proxy follow.
    """
    competing = candidates(evaluations)
    if not competing:
        return []
    rank = fronts(np.array([objective_vector(item.objectives, objectives) for item in competing]))
    ordered = sorted(
        (int(level), item.objectives["quality"], item.id, item)
        for level, item in zip(rank, competing, strict=True)
    )
    best = [item for level, *_, item in ordered if level == 0]
    chosen = {item.id: Choice(item, "quality") for item in best[: count - count // 2]}
    limit = quality_of(reference)
    good = [item for item in best if limit is not None and item.objectives["quality"] <= limit]
    turn = 0
    others = objectives[1:]
    while others and len(chosen) < count:
        left = [item for item in good if item.id not in chosen]
        if not left:
            break
        name = others[turn % len(others)]
        # The order of `good` is by quality, and that decides where the others are equal.
        least = min(left, key=lambda item: objective_vector(item.objectives, [name]))
        chosen[least.id] = Choice(least, name)
        turn += 1
    for *_, item in ordered:
        if len(chosen) >= count:
            break
        chosen.setdefault(item.id, Choice(item, NEXT))
    return list(chosen.values())


def quality_of(evaluation: Evaluation | None) -> float | None:
    """Its bits per byte under the proxy; None where there is none or it has failed."""
    if evaluation is None or not evaluation.ok:
        return None
    objectives: Mapping[str, float] = evaluation.objectives
    return objectives["quality"]
