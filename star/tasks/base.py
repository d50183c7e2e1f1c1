"""What every synthetic task is: sequences with some positions whose answer is known and asked for."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from numpy.random import Generator

__all__ = ["IGNORED", "Ids", "Sequences", "Task", "accuracy", "distinct"]

IGNORED = -100
"""The target of positions that ask for nothing; the default `ignore_index` of cross entropies."""

Ids = npt.NDArray[np.int64]
Weights = npt.NDArray[np.float64]

Sequences = tuple[Ids, Ids]
"""Inputs and targets, both int64 (count, length). A target is the answer at its position, or `IGNORED`."""


@dataclass(frozen=True)
class Task(ABC):
    """A task at a size. Sizes are fields, so that equal tasks compare equal and go through JSON.

    Every task's sequences have the same length, and targets stand where the answer is to be given: the model
    sees inputs 0..t and answers targets[t].

    Args:
        vocab_size: token ids, special ones among them.
        length: tokens of a sequence.

    Raises:
        ValueError: a size that the task can not have; one line that names it.
    """

    name: ClassVar[str]
    """As it is typed."""
    source: ClassVar[str]
    """The paper that specifies it."""
    reads_last: ClassVar[bool] = False
    """Whether all answers are read from the last position by a decoder, not each at its own position."""

    vocab_size: int
    length: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.type in (int, "int"):
                value = getattr(self, field.name)
                whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
                self.require(field.name, whole, "an integer of at least 0")
        self.require("vocab_size", 2 <= self.vocab_size <= 1 << 20, "2 to 1048576")
        self.require("length", 1 <= self.length <= 1 << 20, "1 to 1048576")
        self.check()

    @abstractmethod
    def check(self) -> None:
        """Raises ValueError for sizes that do not fit together."""

    @abstractmethod
    def sample(self, count: int, rng: Generator) -> Sequences:
        """`count` sequences, drawn from `rng` alone."""

    @property
    @abstractmethod
    def chance(self) -> float:
        """Expected accuracy of one who knows which tokens can be answers at all, and guesses among them."""

    def require(self, name: str, holds: bool, takes: str) -> None:
        """Raises the ValueError of the field `name` unless it `holds`."""
        if not holds:
            raise ValueError(f"task {self.name}: {name} is {getattr(self, name)!r}, takes {takes}")

    def to_json(self) -> dict[str, Any]:
        """A plain dict; `star.tasks.task_from_json` turns it back."""
        return {"name": self.name, **dataclasses.asdict(self)}

    @classmethod
    def sizes(cls) -> dict[str, Any]:
        """Names of the sizes, with their defaults."""
        return {field.name: field.default for field in dataclasses.fields(cls)}

    @classmethod
    def sized(cls, sizes: Mapping[str, Any]) -> Task:
        """The task with these sizes, the others at their defaults; texts are read as the sizes' types.

        Raises:
            ValueError: no such size, or a value that is none; one line.
        """
        defaults = cls.sizes()
        parsed: dict[str, Any] = {}
        for name, value in sizes.items():
            if name not in defaults:
                raise ValueError(f"task {cls.name}: {name!r} is no size of it, takes {', '.join(defaults)}")
            kind = type(defaults[name])
            try:
                parsed[name] = kind(value) if isinstance(value, str) else value
            except ValueError:
                raise ValueError(f"task {cls.name}: {name} is {value!r}, takes {_NAMES[kind]}") from None
            right = isinstance(parsed[name], (int, float) if kind is float else kind)
            if not right or isinstance(parsed[name], bool):
                raise ValueError(f"task {cls.name}: {name} is {value!r}, takes {_NAMES[kind]}")
        return cls(**parsed)


_NAMES: dict[type, str] = {int: "an integer", float: "a number", str: "a text"}


def accuracy(answers: Ids, targets: Ids) -> tuple[int, int]:
    """(right answers, questions): `answers` (count, length) against those `targets` that are not IGNORED."""
    asked = targets != IGNORED
    return int(np.sum(answers[asked] == targets[asked])), int(np.sum(asked))


def distinct(count: int, choices: int, chosen: int, rng: Generator, weights: Weights | None = None) -> Ids:
    """`chosen` different numbers below `choices` in each of `count` rows: (count, chosen).

    weights: (choices,), relative probabilities of the first draw and, renormalised, of the later ones
    (by Gumbel's top-k trick: the order of log-weight + Gumbel noise is that of such draws).
    """
    keys = rng.gumbel(size=(count, choices))
    if weights is not None:
        keys += np.log(weights)
    return np.argsort(-keys, axis=1, kind="stable")[:, :chosen]
