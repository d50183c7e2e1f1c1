"""What a search can minimise. Every objective is a number of which less is better."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

__all__ = ["OBJECTIVES", "Objective", "objective_vector", "require_objectives"]


@dataclass(frozen=True)
class Objective:
    """A column of the front.

    Attributes:
        name: as it is typed and stored.
        unit: what one of it is.
        description: one line for people.
    """

    name: str
    unit: str
    description: str


OBJECTIVES: dict[str, Objective] = {
    objective.name: objective
    for objective in (
        Objective("quality", "bits per byte", "cross entropy on held-out text after the proxy training"),
        Objective("size", "parameters", "weights without embeddings, norms and biases"),
        Objective("cache", "bytes", "inference cache of one sequence of 4096 tokens in bfloat16"),
        Objective("flops", "FLOPs", "forward pass over one sequence of the proxy's length"),
    )
}


def require_objectives(names: Iterable[str]) -> tuple[str, ...]:
    """The names as a tuple, checked: known, at least one, none twice.

    Raises:
        ValueError: in one line.
    """
    chosen = tuple(names)
    known = ", ".join(OBJECTIVES)
    for name in chosen:
        if name not in OBJECTIVES:
            raise ValueError(f"objectives has {name!r}, takes one or more of {known}")
        if chosen.count(name) > 1:
            raise ValueError(f"objectives has {name!r} twice, takes each of {known} once")
    if not chosen:
        raise ValueError(f"objectives is empty, takes one or more of {known}")
    return chosen


def objective_vector(measured: Mapping[str, float], names: Iterable[str]) -> tuple[float, ...]:
    """The measured values in the order of `names`, for comparison.

    Raises:
        ValueError: one of them is missing or no finite number.
    """
    vector = []
    for name in names:
        value = measured.get(name)
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"objective {name} is {value!r}, takes a finite number")
        vector.append(float(value))
    return tuple(vector)
