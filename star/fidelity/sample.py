"""Which candidates of a run are retrained: its front, and the others evenly over their ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from star.search.budgets import judged
from star.search.front import candidates, front
from star.search.settings import SearchSettings
from star.search.store import Evaluation

__all__ = ["FRONT_SHARE", "Member", "spread", "stratified_sample"]

FRONT_SHARE = 2 / 3
"""No more of a sample than this comes from the front, or nothing would be known about the rest."""


@dataclass(frozen=True)
class Member:
    """A candidate that is retrained, and whether it is on the front."""

    evaluation: Evaluation
    on_front: bool


def stratified_sample(
    evaluations: Sequence[Evaluation], settings: SearchSettings, count: int
) -> list[Member]:
    """The front, then the others at quantiles of their quality under the proxy.

    A front that would leave less than a third of the sample to the others is thinned evenly, by its first
    objective. Both parts come in an order in which every beginning is spread over all of the part (van der
    Corput's): a larger sample holds a smaller one, whose trainings need not be done again.

    Args:
        evaluations: of the run; references, and what failed or was stopped at a rung, are never drawn.
        settings: of the run, for its objectives and budgets.
        count: how many; all candidates where there are fewer.

    Returns:
        Members by id. Nothing is random.
    """
    best = front(judged(evaluations, settings.budgets), settings.objectives)
    on_front = {item.id for item in best}
    others = [item for item in candidates(evaluations) if item.id not in on_front]
    others.sort(key=lambda item: (item.objectives["quality"], item.id))
    room = max(round(count * FRONT_SHARE), count - len(others))
    places = _evenly(len(best), min(room, len(best)))
    chosen = [Member(best[place], on_front=True) for place in places]
    rest = spread(len(others))[: count - len(chosen)]
    chosen += [Member(others[place], on_front=False) for place in rest]
    return sorted(chosen, key=lambda member: member.evaluation.id)


def _evenly(length: int, count: int) -> list[int]:
    """`count` places from 0 to length - 1: both ends, then those between as `spread` has them."""
    between = [1 + place for place in spread(length - 2)] if length > 2 else []
    return sorted([*dict.fromkeys((0, length - 1)), *between][:count])


def spread(length: int) -> list[int]:
    """All places from 0 to length - 1, every beginning spread over all: counts with their bits reversed."""
    bits = max(1, (length - 1).bit_length())
    reversed_counts = (int(f"{number:0{bits}b}"[::-1], 2) for number in range(2**bits))
    return [place for place in reversed_counts if place < length]
