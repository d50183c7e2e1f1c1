"""What a search can improve: a registry, one entry an objective. Of every objective's number less is better,
unless the entry says `maximised`; `objective_vector` turns those, so that all vectors are minimised.

Objectives of a device (`device`) are known at several contexts: "ttft@32768" is an objective as "ttft" is,
which means the smallest context that is measured.

An entry names the function that measures it, `star.search.measures` says what such a function gets; it is
imported by the workers alone, so that names, units and titles cost nothing to those who only read a record.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, cast

from star.measure.quantities import split

if TYPE_CHECKING:
    from star.search.measures import Candidate

__all__ = [
    "FORMS",
    "OBJECTIVES",
    "Objective",
    "find",
    "known_names",
    "measured",
    "objective_vector",
    "register",
    "require_objectives",
]

FORMS = ("decimal", "bytes", "count", "percent", "milliseconds", "rate")
"""How people read a value: four decimals, bytes or a number with a prefix, a share of wrong answers in per
cent, a time, a number with a prefix a second."""


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
        trained: whether it takes a training to know it; the others follow from the genome.
        maximised: whether more is better.
        device: whether it is read from the table of a device (star.profile).
        context: of a device's: the tokens that it is asked for; None for the smallest number measured.
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
    maximised: bool = False
    device: bool = False
    context: int | None = None

    def load(self) -> Callable[[Candidate], float]:
        """The function that measures it."""
        module, _, function = self.measure.partition(":")
        loaded = getattr(import_module(module), function)
        if self.device:
            loaded = partial(loaded, name=self.name)
        return cast("Callable[[Candidate], float]", loaded)


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


for _name, _unit, _description, _title, _form in (
    ("ttft", "ms", "from the prompt to the first new token", "time to first token", "milliseconds"),
    ("prefill", "tokens/s", "prompt tokens read a second", "prefill", "rate"),
    ("decode_p50", "ms a token", "a new token over a full cache, the median", "decode p50", "milliseconds"),
    ("decode_p95", "ms a token", "a new token, 95 of 100 within", "decode p95", "milliseconds"),
    ("peak_memory", "bytes", "weights, cache and computation at their peak", "peak memory", "bytes"),
):
    register(
        Objective(
            _name,
            _unit,
            f"{_description}, on the device at the target size",
            measure="star.search.measures:on_device",
            title=_title,
            axis=f"{_title} ({_unit})",
            form=_form,
            maximised=_name == "prefill",
            device=True,
        )
    )


def find(name: str) -> Objective | None:
    """The objective of this name; "ttft@4096" is `ttft` with a context. None if there is none."""
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    try:
        base, context = split(name)
    except ValueError:
        return None
    objective = OBJECTIVES.get(base)
    if objective is None or not objective.device:
        return None
    label = f"at {context}"
    return replace(
        objective,
        name=name,
        title=f"{objective.title} {label}",
        axis=f"{objective.axis} {label}",
        context=context,
    )


def known_names() -> str:
    """All names, for the message about an unknown one."""
    return ", ".join(OBJECTIVES)


def measured(names: Iterable[str]) -> tuple[Objective, ...]:
    """What a search for `names` measures: these and those of `always`, in the registry's order, then those
    with a context."""
    wanted = list(names)
    plain = [item for item in OBJECTIVES.values() if item.always or item.name in wanted]
    others = (find(name) for name in dict.fromkeys(wanted) if name not in OBJECTIVES)
    return (*plain, *(item for item in others if item is not None))


def require_objectives(names: Iterable[str]) -> tuple[str, ...]:
    """The names as a tuple, checked: known, at least one, none twice.

    Raises:
        ValueError: in one line.
    """
    chosen = tuple(names)
    known = known_names()
    for name in chosen:
        if find(name) is None:
            raise ValueError(f"objectives has {name!r}, takes one or more of {known}")
        if chosen.count(name) > 1:
            raise ValueError(f"objectives has {name!r} twice, takes each of {known} once")
    if not chosen:
        raise ValueError(f"objectives is empty, takes one or more of {known}")
    return chosen


def objective_vector(values: Mapping[str, float], names: Iterable[str]) -> tuple[float, ...]:
    """The measured values in the order of `names`, for comparison: less is better in each, so those of
    maximised objectives are negative.

    Raises:
        ValueError: one of them is missing or no finite number.
    """
    vector = []
    for name in names:
        value = values.get(name)
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"objective {name} is {value!r}, takes a finite number")
        objective = find(name)
        vector.append(-float(value) if objective is not None and objective.maximised else float(value))
    return tuple(vector)
