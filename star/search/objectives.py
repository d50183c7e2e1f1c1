"""What a search can minimise: a registry, one entry an objective. Every objective is a number of which less
is better.

An entry names the function that measures it, `star.search.measures` says what such a function gets; it is
imported by the workers alone, so that names, units and titles cost nothing to those who only read a record.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from star.search.measures import Candidate

__all__ = [
    "FORMS",
    "OBJECTIVES",
    "Objective",
    "measured",
    "objective_vector",
    "register",
    "require_objectives",
]

FORMS = ("decimal", "bytes", "count", "percent")
"""How people read a value: four decimals, bytes or a number with a prefix, a share in per cent."""


@dataclass(frozen=True)
class Objective:
    """A column of the front.

    Attributes:
        name: as it is typed and stored.
        unit: what one of it is.
        description: one line for people.
        measure: "package.module:function", from a `star.search.measures.Candidate` to the value.
        title: the head of a column.
        axis: with its unit, for the axis of a plot.
        form: one of `FORMS`.
        always: measured for every candidate, since it costs next to nothing; others where they are searched.
        trained: whether it takes a training or a device to know it; the others follow from the genome.
    """

    name: str
    unit: str
    description: str
    measure: str
    title: str
    axis: str
    form: str = "count"
    always: bool = False
    trained: bool = False

    def load(self) -> Callable[[Candidate], float]:
        """The function that measures it."""
        module, _, function = self.measure.partition(":")
        return cast("Callable[[Candidate], float]", getattr(import_module(module), function))


OBJECTIVES: dict[str, Objective] = {}


def register(objective: Objective) -> None:
    """Add an objective.

    Raises:
        ValueError: the name is taken, or the form is none.
    """
    if objective.name in OBJECTIVES:
        raise ValueError(f"objective {objective.name} is there already")
    if objective.form not in FORMS:
        raise ValueError(
            f"objective {objective.name}: form is {objective.form!r}, takes {' or '.join(FORMS)}"
        )
    OBJECTIVES[objective.name] = objective


register(
    Objective(
        "quality",
        "bits per byte",
        "cross entropy on held-out text after the proxy training",
        measure="star.search.measures:quality",
        title="bits per byte",
        axis="held-out bits per byte",
        form="decimal",
        always=True,
        trained=True,
    )
)
register(
    Objective(
        "size",
        "parameters",
        "weights without embeddings, norms and biases",
        measure="star.search.measures:size",
        title="parameters",
        axis="parameters",
        always=True,
    )
)
register(
    Objective(
        "cache",
        "bytes",
        "inference cache of one sequence of 4096 tokens in bfloat16",
        measure="star.search.measures:cache",
        title="cache",
        axis="cache (bytes)",
        form="bytes",
        always=True,
    )
)
register(
    Objective(
        "flops",
        "FLOPs",
        "forward pass over one sequence of the proxy's length",
        measure="star.search.measures:flops",
        title="FLOPs",
        axis="forward pass (FLOPs)",
        always=True,
    )
)
register(
    Objective(
        "recall",
        "share of wrong answers",
        "questions of multi-query associative recall that are answered wrongly after training on them",
        measure="star.search.measures:recall",
        title="recall error",
        axis="wrong answers in associative recall",
        form="percent",
        trained=True,
    )
)


def measured(names: Iterable[str]) -> tuple[Objective, ...]:
    """What a search for `names` measures: these and those of `always`, in the registry's order."""
    wanted = set(names)
    return tuple(item for item in OBJECTIVES.values() if item.always or item.name in wanted)


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


def objective_vector(values: Mapping[str, float], names: Iterable[str]) -> tuple[float, ...]:
    """The measured values in the order of `names`, for comparison.

    Raises:
        ValueError: one of them is missing or no finite number.
    """
    vector = []
    for name in names:
        value = values.get(name)
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"objective {name} is {value!r}, takes a finite number")
        vector.append(float(value))
    return tuple(vector)
