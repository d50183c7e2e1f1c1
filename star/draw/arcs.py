"""What a drawing of a genome shows: a colour for every family, an arc for every sharing group."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from star.sharing import LivPlan

# Fill colours, told apart in the common forms of colour blindness (after Okabe and Ito) and dark enough for
# white text. A family of one's own gets the last.
FAMILY_COLOURS = {
    "attention": "#2f6fb0",
    "recurrence": "#0b8a6a",
    "convolution": "#c4600c",
    "memoryless": "#6b7280",
}
OTHER_FAMILY_COLOUR = "#9a4f96"


def family_colour(family: str) -> str:
    """Fill colour of an LIV family, "#rrggbb"."""
    return FAMILY_COLOURS.get(family, OTHER_FAMILY_COLOUR)


def family_order(family: str) -> tuple[int, str]:
    """Sorts families as the legend names them; those of one's own come last, by name."""
    known = list(FAMILY_COLOURS)
    return (known.index(family) if family in known else len(known), family)


@dataclass(frozen=True)
class Arc:
    """One sharing group.

    Args:
        members: indices of its LIVs, first to last, at least two.
        names: feature groups in which the members have a part, "key, value" (empty for featurizers).
        number: counts the groups of one margin from 0, in the order of their first LIVs.
    """

    members: tuple[int, ...]
    names: str
    number: int


def featurizer_arcs(plans: Sequence[LivPlan]) -> list[Arc]:
    """Groups of LIVs that use one featurizer."""
    return _arcs((plan.featurizer_owner, plan.index) for plan in plans)


def feature_arcs(plans: Sequence[LivPlan]) -> list[Arc]:
    """Groups of LIVs that use the same features; the first computes them."""
    names = {plan.source: ", ".join(plan.shared) for plan in plans if plan.source is not None}
    return _arcs(((plan.index if plan.source is None else plan.source, plan.index) for plan in plans), names)


def _arcs(links: Iterable[tuple[int, int]], names: dict[int, str] | None = None) -> list[Arc]:
    """Groups of two and more from pairs (first member, member)."""
    groups: dict[int, list[int]] = {}
    for first, member in links:
        groups.setdefault(first, []).append(member)
    large = sorted((first, members) for first, members in groups.items() if len(members) > 1)
    return [
        Arc(tuple(members), (names or {}).get(first, ""), number)
        for number, (first, members) in enumerate(large)
    ]


def lanes(arcs: Iterable[Arc]) -> list[list[Arc]]:
    """The arcs in lanes in which none overlap; short ones in the first lanes, near the backbone."""
    found: list[list[Arc]] = []
    for arc in sorted(arcs, key=lambda arc: (arc.members[-1] - arc.members[0], arc.members[0])):
        for lane in found:
            if all(
                arc.members[-1] < other.members[0] or other.members[-1] < arc.members[0] for other in lane
            ):
                lane.append(arc)
                break
        else:
            found.append([arc])
    return found
