"""Associative recall, which value followed this key before: MQAR and MAD's three in-context recall tasks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.random import Generator

from star.tasks.base import IGNORED, Ids, Sequences, Task, distinct

__all__ = ["MQAR", "FuzzyInContextRecall", "InContextRecall", "NoisyInContextRecall"]

ZOOLOGY = "Zoology (arXiv 2312.04927), section 4 and appendix E"
MAD = "MAD (arXiv 2403.17844), section 3.1"


@dataclass(frozen=True)
class MQAR(Task):
    """Multi-query associative recall.

    A sequence begins with `pairs` pairs (key, value), all keys different, all values different. Behind them
    every key comes once more, and its value is the target there. The gap between the pairs' end and a query
    is 2g, where the places g in 0..G-1 of the G = (length - 2 pairs) / 2 that there are follow the power law
    P(g) ∝ (g + 1)^(power - 1), each place used once. All else is filler.

    Vocabulary: 0 is the blank; keys are 1..V/2-1, values V/2..V-1.
    Answers: `pairs` a sequence. Chance: 1 / values. One who only knows which values the sequence holds is
    right in 1 / `pairs`.

    Args:
        pairs: key-value pairs of a sequence.
        power: of the law of gaps; 1 spreads the queries evenly.
        filler: "blank", or "random" for tokens of the whole vocabulary, whatever they mean.

    The defaults are small, for CPUs; the paper's are 8192 tokens, lengths 64 to 512 with 4 to 64 pairs.
    """

    name: ClassVar[str] = "mqar"
    source: ClassVar[str] = ZOOLOGY

    vocab_size: int = 64
    length: int = 64
    pairs: int = 8
    power: float = 0.01
    filler: str = "blank"

    def check(self) -> None:
        self.require("length", self.length % 2 == 0, "an even number")
        most = min(self.length // 4, self.vocab_size // 2 - 1)
        self.require(
            "pairs", 1 <= self.pairs <= most, f"1 to {most} (a quarter of the length, fewer than keys)"
        )
        self.require("power", 0 < self.power <= 10, "a number above 0 to 10")
        self.require("filler", self.filler in ("blank", "random"), "blank or random")

    @property
    def chance(self) -> float:
        return 1 / (self.vocab_size - self.vocab_size // 2)

    def sample(self, count: int, rng: Generator) -> Sequences:
        first_value = self.vocab_size // 2
        keys = 1 + distinct(count, first_value - 1, self.pairs, rng)
        values = first_value + distinct(count, self.vocab_size - first_value, self.pairs, rng)
        shown = 2 * self.pairs
        places = (self.length - shown) // 2
        law = np.arange(1, places + 1, dtype=np.float64) ** (self.power - 1)
        queries = shown + 2 * distinct(count, places, self.pairs, rng, law)
        if self.filler == "blank":
            inputs = np.zeros((count, self.length), dtype=np.int64)
        else:
            inputs = rng.integers(0, self.vocab_size, (count, self.length))
        inputs[:, 0:shown:2], inputs[:, 1:shown:2] = keys, values
        np.put_along_axis(inputs, queries, keys, axis=1)
        targets = np.full_like(inputs, IGNORED)
        np.put_along_axis(targets, queries, values, axis=1)
        return inputs, targets


@dataclass(frozen=True)
class InContextRecall(Task):
    """MAD's in-context recall: pairs all through the sequence, asked again as soon as a key comes back.

    The sequence is pairs (key, value), each key drawn anew from all; the first time, a key gets a random
    value, which it keeps for the sequence. Where a key comes that was there before, its value is the target.
    The last pair's key is one of those.

    Vocabulary: keys are 0..V/2-1, values V/2..V-1.
    Answers: a varying number a sequence, at least one. Chance: 1 / values.
    """

    name: ClassVar[str] = "in-context-recall"
    source: ClassVar[str] = MAD

    vocab_size: int = 16
    length: int = 128

    def check(self) -> None:
        self.require("vocab_size", self.vocab_size % 2 == 0, "an even number")
        self.require("length", self.length % 2 == 0 and self.length >= 4, "an even number from 4 on")

    @property
    def tokens(self) -> int:
        """Keys and values together; above them come noise tokens."""
        return self.vocab_size

    @property
    def chance(self) -> float:
        return 2 / self.tokens

    def sample(self, count: int, rng: Generator) -> Sequences:
        return self.pairs(count, rng, np.zeros((count, self.length // 2), dtype=np.bool_))

    def pairs(self, count: int, rng: Generator, noise: np.ndarray) -> Sequences:
        """Sequences with noise tokens in place of the pairs where `noise` (count, pairs) says so."""
        half = self.tokens // 2
        number = self.length // 2
        keys = rng.integers(0, half, (count, number))
        seen = _ever_before(keys, half, noise)
        rows = np.arange(count)
        # The last pair asks for a key that was shown: a random one of the pairs before it that are no noise.
        shown = np.where(noise[:, :-1], -np.inf, rng.random((count, number - 1))).argmax(axis=1)
        keys[:, -1], seen[:, -1] = keys[rows, shown], True
        values = half + rng.integers(0, half, (count, half))
        inputs = np.empty((count, self.length), dtype=np.int64)
        inputs[:, 0::2] = keys
        inputs[:, 1::2] = np.take_along_axis(values, keys, axis=1)
        targets = np.full_like(inputs, IGNORED)
        targets[:, 0::2] = np.where(seen & ~noise, inputs[:, 1::2], IGNORED)
        if noise.any():
            drawn = rng.integers(self.tokens, self.vocab_size, inputs.shape)
            inputs = np.where(np.repeat(noise, 2, axis=1), drawn, inputs)
        return inputs, targets


@dataclass(frozen=True)
class NoisyInContextRecall(InContextRecall):
    """MAD's noisy in-context recall: as in-context recall, with noise between the pairs.

    Each pair but the last is, with probability `noise`, two random tokens of a vocabulary of their own; at
    least one pair is none.

    Vocabulary: as in-context recall on the first V - noise_tokens ids; noise is the last `noise_tokens`.
    Chance: 1 / values.

    Args:
        noise_tokens: size of the noise's vocabulary.
        noise: share of noise, 0 up to less than 1.
    """

    name: ClassVar[str] = "noisy-in-context-recall"

    vocab_size: int = 32
    noise_tokens: int = 16
    noise: float = 0.2

    def check(self) -> None:
        super().check()
        most = self.vocab_size - 2
        self.require("noise_tokens", 1 <= self.noise_tokens <= most, f"1 to {most}")
        self.require("noise_tokens", self.noise_tokens % 2 == 0, "an even number")
        self.require("noise", 0 <= self.noise < 1, "a number from 0 to below 1")

    @property
    def tokens(self) -> int:
        return self.vocab_size - self.noise_tokens

    def sample(self, count: int, rng: Generator) -> Sequences:
        noise = rng.random((count, self.length // 2)) < self.noise
        noise[np.arange(count), rng.integers(0, self.length // 2 - 1, count)] = False
        noise[:, -1] = False
        return self.pairs(count, rng, noise)


@dataclass(frozen=True)
class FuzzyInContextRecall(Task):
    """MAD's fuzzy in-context recall: keys and values are several tokens long, of lengths that vary.

    A key is 1 to `key_tokens` different tokens of the keys' half, a value 1 to `value_tokens` of the values'
    half, lengths drawn evenly and anew for each pair; a key that was there before keeps its value, and all
    tokens of that value are targets. The last pair is a repeated one; what is left of the length is padding
    in front.

    Vocabulary: keys 0..(V-1)/2-1, values up to V-2, V-1 is padding.
    Answers: at least one a sequence. Chance: 1 / value tokens, for each token of a value.
    """

    name: ClassVar[str] = "fuzzy-in-context-recall"
    source: ClassVar[str] = MAD

    vocab_size: int = 16
    length: int = 128
    key_tokens: int = 3
    value_tokens: int = 3

    def check(self) -> None:
        half = (self.vocab_size - 1) // 2
        self.require("key_tokens", 1 <= self.key_tokens <= half, f"1 to {half} (the keys' half)")
        self.require("value_tokens", 1 <= self.value_tokens <= half, f"1 to {half} (the values' half)")
        least = 2 * (self.key_tokens + self.value_tokens)
        self.require("length", self.length >= least, f"at least {least} (two of the longest pairs)")

    @property
    def chance(self) -> float:
        return 1 / (self.vocab_size - 1 - (self.vocab_size - 1) // 2)

    def sample(self, count: int, rng: Generator) -> Sequences:
        inputs = np.full((count, self.length), self.vocab_size - 1, dtype=np.int64)
        targets = np.full_like(inputs, IGNORED)
        for row in range(count):
            tokens, answers = self._sequence(rng)
            inputs[row, -len(tokens) :] = tokens
            targets[row, -len(tokens) :] = answers
        return inputs, targets

    def _sequence(self, rng: Generator) -> tuple[list[int], list[int]]:
        """One sequence without padding, at most `length` long, and its targets."""
        values: dict[tuple[int, ...], tuple[int, ...]] = {}
        tokens: list[int] = []
        answers: list[int] = []

        def add(key: tuple[int, ...]) -> None:
            known = key in values
            value = values.setdefault(key, values.get(key) or self._motif(rng, self.value_tokens, True))
            tokens.extend(key + value)
            # Each token of the value is asked for at the position before it.
            answers.extend([IGNORED] * (len(key) - 1))
            answers.extend(value if known else [IGNORED] * len(value))
            answers.append(IGNORED)

        longest = self.key_tokens + self.value_tokens
        while len(tokens) + 2 * longest <= self.length:
            add(self._motif(rng, self.key_tokens, False))
        add(list(values)[int(rng.integers(len(values)))])
        return tokens, answers

    def _motif(self, rng: Generator, most: int, value: bool) -> tuple[int, ...]:
        half = (self.vocab_size - 1) // 2
        choices = np.arange(half, self.vocab_size - 1) if value else np.arange(half)
        size = int(rng.integers(1, most + 1))
        return tuple(rng.choice(choices, size=size, replace=False).tolist())


def _ever_before(keys: Ids, number: int, noise: np.ndarray) -> np.ndarray:
    """Whether each of `keys` (count, pairs), numbers below `number`, was in its row before, noise apart."""
    there = np.zeros((len(keys), number), dtype=np.bool_)
    before = np.zeros(keys.shape, dtype=np.bool_)
    rows = np.arange(len(keys))
    for place in range(keys.shape[1]):
        before[:, place] = there[rows, keys[:, place]]
        there[rows, keys[:, place]] |= ~noise[:, place]
    return before
