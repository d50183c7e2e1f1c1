"""Synthetic tasks that say what perplexity hides: can a model recall, copy, compress, memorise?

    from star.tasks import TASKS, open_task

    task = open_task("mqar:pairs=4,length=32")
    inputs, targets = task.sample(16, numpy.random.default_rng(0))    # int64 (16, 32) each

MQAR is Zoology's (arXiv 2312.04927), the other six are MAD's (arXiv 2403.17844), each made from its paper's
specification; `star.tasks.training` trains a model on one. Importing this costs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from star.tasks.base import IGNORED, Ids, Sequences, Task, accuracy
from star.tasks.memory import Compression, Memorisation, SelectiveCopying
from star.tasks.recall import MQAR, FuzzyInContextRecall, InContextRecall, NoisyInContextRecall

__all__ = [
    "IGNORED",
    "MQAR",
    "TASKS",
    "Compression",
    "FuzzyInContextRecall",
    "Ids",
    "InContextRecall",
    "Memorisation",
    "NoisyInContextRecall",
    "SelectiveCopying",
    "Sequences",
    "Task",
    "accuracy",
    "open_task",
    "task_from_json",
]

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        MQAR,
        InContextRecall,
        FuzzyInContextRecall,
        NoisyInContextRecall,
        SelectiveCopying,
        Compression,
        Memorisation,
    )
}


def open_task(text: str) -> Task:
    """The task of a text "NAME" or "NAME:SIZE=VALUE,…", sizes that are not named at their defaults.

    Raises:
        ValueError: no such task or size, or a size that can not be; one line.
    """
    name, colon, rest = text.partition(":")
    sizes: dict[str, str] = {}
    for part in rest.split(",") if colon else ():
        size, equals, value = part.partition("=")
        if not (size.strip() and equals and value.strip()):
            raise ValueError(f"task {text!r} has {part!r}, takes NAME:SIZE=VALUE,SIZE=VALUE")
        if size.strip() in sizes:
            raise ValueError(f"task {text!r} names {size.strip()} twice")
        sizes[size.strip()] = value.strip()
    return _class_of(name.strip()).sized(sizes)


def task_from_json(data: Mapping[str, Any]) -> Task:
    """The task that `Task.to_json` wrote.

    Raises:
        ValueError: as `open_task`.
    """
    if not isinstance(data, Mapping) or not isinstance(data.get("name"), str):
        raise ValueError(f"task is {type(data).__name__} without a name, takes an object with name and sizes")
    return _class_of(data["name"]).sized({name: value for name, value in data.items() if name != "name"})


def _class_of(name: str) -> type[Task]:
    if name not in TASKS:
        raise ValueError(f"task is {name!r}, takes {', '.join(TASKS)}")
    return TASKS[name]
