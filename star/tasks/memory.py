"""MAD's tasks of keeping and knowing: selective copying, compression, memorisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.random import Generator

from star.tasks.base import IGNORED, Sequences, Task, distinct
from star.tasks.recall import MAD

__all__ = ["Compression", "Memorisation", "SelectiveCopying"]


@dataclass(frozen=True)
class SelectiveCopying(Task):
    """Selective copying: say the tokens again, in their order, without the blanks between them.

    A sequence is `copied` random tokens, spread in their order at random places over the first
    length - copied - 1 positions, blanks in all others of them; then the copy token; then `copied` blanks,
    the targets of which are the tokens.

    Vocabulary: tokens 0..V-3, V-2 is the blank, V-1 the copy token.
    Answers: `copied` a sequence. Chance: 1 / (V - 2).
    """

    name: ClassVar[str] = "selective-copying"
    source: ClassVar[str] = MAD

    vocab_size: int = 16
    length: int = 256
    copied: int = 16

    def check(self) -> None:
        self.require("vocab_size", self.vocab_size >= 4, "at least 4 (two tokens, blank, copy token)")
        most = (self.length - 1) // 2
        self.require("copied", 1 <= self.copied <= most, f"1 to {most} (half of the length)")

    @property
    def chance(self) -> float:
        return 1 / (self.vocab_size - 2)

    def sample(self, count: int, rng: Generator) -> Sequences:
        first = self.length - self.copied - 1
        tokens = rng.integers(0, self.vocab_size - 2, (count, self.copied))
        places = np.sort(distinct(count, first, self.copied, rng), axis=1)
        inputs = np.full((count, self.length), self.vocab_size - 2, dtype=np.int64)
        np.put_along_axis(inputs, places, tokens, axis=1)
        inputs[:, first] = self.vocab_size - 1
        targets = np.full_like(inputs, IGNORED)
        targets[:, first + 1 :] = tokens
        return inputs, targets


@dataclass(frozen=True)
class Compression(Task):
    """Compression: the whole sequence from the state at its last token alone.

    A sequence is length - 1 random tokens and the compression token. A decoder (see
    `star.tasks.training.Autoencoder`: a small network of MAD's form) gets the model's output at the last
    position plus a code of the position asked for, and answers the token that was there.

    Vocabulary: tokens 0..V-2, V-1 is the compression token.
    Answers: length - 1 a sequence (the compression token itself is not asked for). Chance: 1 / (V - 1).
    """

    name: ClassVar[str] = "compression"
    source: ClassVar[str] = MAD
    reads_last: ClassVar[bool] = True

    vocab_size: int = 16
    length: int = 32

    def check(self) -> None:
        self.require("vocab_size", self.vocab_size >= 3, "at least 3 (two tokens, compression token)")
        self.require("length", self.length >= 2, "at least 2")

    @property
    def chance(self) -> float:
        return 1 / (self.vocab_size - 1)

    def sample(self, count: int, rng: Generator) -> Sequences:
        inputs = rng.integers(0, self.vocab_size - 1, (count, self.length))
        inputs[:, -1] = self.vocab_size - 1
        targets = inputs.copy()
        targets[:, -1] = IGNORED
        return inputs, targets


@dataclass(frozen=True)
class Memorisation(Task):
    """Memorisation: facts that no sequence tells, only training does.

    One mapping from keys to values, a bijection drawn from `facts_seed`, holds for all sequences. A sequence
    is pairs (random key, the insert token); the target at the insert token is the key's value, which never
    stands in the input.

    Vocabulary: keys 0..F-1 and values F..2F-1, F = (V - 1) // 2 facts; V-1 is the insert token.
    Answers: length / 2 a sequence. Chance: 1 / F.

    The paper draws a set of 256 sequences once; here each step draws new ones of the same facts.
    """

    name: ClassVar[str] = "memorisation"
    source: ClassVar[str] = MAD

    vocab_size: int = 256
    length: int = 32
    facts_seed: int = 12345

    def check(self) -> None:
        self.require("vocab_size", self.vocab_size >= 5, "at least 5 (two facts, insert token)")
        self.require("length", self.length % 2 == 0, "an even number")

    @property
    def facts(self) -> int:
        return (self.vocab_size - 1) // 2

    @property
    def chance(self) -> float:
        return 1 / self.facts

    def values(self) -> np.ndarray:
        """(facts,): the value of each key."""
        return self.facts + np.random.default_rng(self.facts_seed).permutation(self.facts)

    def sample(self, count: int, rng: Generator) -> Sequences:
        keys = rng.integers(0, self.facts, (count, self.length // 2))
        inputs = np.full((count, self.length), self.vocab_size - 1, dtype=np.int64)
        inputs[:, 0::2] = keys
        targets = np.full_like(inputs, IGNORED)
        targets[:, 1::2] = self.values()[keys]
        return inputs, targets
