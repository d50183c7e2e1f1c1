"""Generators against their specifications, sequence by sequence, and how tasks are named and sized."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from star.tasks import (
    IGNORED,
    MQAR,
    TASKS,
    Compression,
    FuzzyInContextRecall,
    InContextRecall,
    Memorisation,
    NoisyInContextRecall,
    SelectiveCopying,
    Sequences,
    Task,
    accuracy,
    open_task,
    task_from_json,
)

EVERY = [
    *(task() for task in TASKS.values()),
    MQAR(vocab_size=9, length=12, pairs=3),
    MQAR(vocab_size=64, length=40, pairs=4, power=1.0, filler="random"),
    InContextRecall(vocab_size=4, length=4),
    NoisyInContextRecall(vocab_size=6, length=20, noise_tokens=2, noise=0.9),
    FuzzyInContextRecall(vocab_size=9, length=16, key_tokens=4, value_tokens=4),
    SelectiveCopying(vocab_size=4, length=3, copied=1),
    Compression(vocab_size=3, length=2),
    Memorisation(vocab_size=6, length=2),
]


def drawn(task: Task, count: int = 200, seed: int = 0) -> Sequences:
    return task.sample(count, np.random.default_rng(seed))


# ---- all of them ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", EVERY, ids=str)
def test_shapes_vocabulary_and_seeds(task: Task) -> None:
    inputs, targets = drawn(task)
    assert inputs.shape == targets.shape == (200, task.length)
    assert inputs.dtype == targets.dtype == np.int64
    assert inputs.min() >= 0
    assert inputs.max() < task.vocab_size
    asked = targets != IGNORED
    assert asked.any(axis=1).all()
    assert targets[asked].min() >= 0
    assert targets[asked].max() < task.vocab_size
    assert all(np.array_equal(a, b) for a, b in zip((inputs, targets), drawn(task), strict=True))
    assert not np.array_equal(inputs, drawn(task, seed=1)[0])


@pytest.mark.parametrize("task", [task() for task in TASKS.values()], ids=lambda task: task.name)
def test_chance_is_the_accuracy_of_guessing_among_the_answers(task: Task) -> None:
    """Answers are drawn evenly, so a guesser that knows which tokens are answers is right in `chance`."""
    _, targets = drawn(task, 3000)
    asked = targets != IGNORED
    possible = np.unique(targets[asked])
    assert len(possible) == pytest.approx(1 / task.chance)
    guesses = np.random.default_rng(7).choice(possible, size=targets.shape)
    right, questions = accuracy(guesses, targets)
    deviation = (task.chance * (1 - task.chance) / questions) ** 0.5
    assert abs(right / questions - task.chance) < 5 * deviation


@pytest.mark.parametrize("task", EVERY, ids=str)
def test_json_and_names(task: Task) -> None:
    assert task_from_json(task.to_json()) == task
    sizes = ",".join(f"{name}={value}" for name, value in task.to_json().items() if name != "name")
    assert open_task(f"{task.name}:{sizes}") == task


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mqra", "task is 'mqra', takes mqar, in-context-recall"),
        ("mqar:", "NAME:SIZE=VALUE"),
        ("mqar:pairs", "NAME:SIZE=VALUE"),
        ("mqar:pairs=2,pairs=3", "names pairs twice"),
        ("mqar:keys=2", "'keys' is no size of it, takes vocab_size, length, pairs"),
        ("mqar:pairs=two", "pairs is 'two', takes an integer"),
        ("mqar:pairs=0", "pairs is 0, takes 1 to 16"),
        ("mqar:length=63", "length is 63, takes an even number"),
        ("mqar:power=nan", "power is nan"),
        ("mqar:filler=grey", "filler is 'grey', takes blank or random"),
        ("mqar:vocab_size=1", "vocab_size is 1"),
        ("in-context-recall:vocab_size=15", "vocab_size is 15, takes an even number"),
        ("noisy-in-context-recall:noise=1", "noise is 1"),
        ("noisy-in-context-recall:noise_tokens=32", "noise_tokens is 32, takes 1 to 30"),
        ("fuzzy-in-context-recall:length=11", "length is 11, takes at least 12"),
        ("fuzzy-in-context-recall:key_tokens=8", "key_tokens is 8, takes 1 to 7"),
        ("selective-copying:copied=128", "copied is 128, takes 1 to 127"),
        ("compression:length=1", "length is 1, takes at least 2"),
        ("memorisation:vocab_size=4", "vocab_size is 4, takes at least 5"),
        ("memorisation:facts_seed=-1", "facts_seed is -1, takes an integer of at least 0"),
    ],
)
def test_refusals_are_one_line(text: str, words: str) -> None:
    with pytest.raises(ValueError, match="task") as error:
        open_task(text)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_names_cost_no_torch() -> None:
    code = "import sys, star.tasks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_accuracy_counts_what_is_asked() -> None:
    targets = np.array([[1, IGNORED, 3], [IGNORED, 0, 2]])
    assert accuracy(np.array([[1, 1, 0], [9, 0, 2]]), targets) == (3, 4)


# ---- recall --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [MQAR(), MQAR(vocab_size=64, length=40, pairs=4, filler="random")], ids=str)
def test_mqar_asks_for_each_key_once(task: MQAR) -> None:
    shown = 2 * task.pairs
    for inputs, targets in zip(*drawn(task), strict=True):
        keys, values = inputs[0:shown:2], inputs[1:shown:2]
        assert len(set(keys)) == len(set(values)) == task.pairs
        assert keys.min() >= 1
        assert keys.max() < task.vocab_size // 2 <= values.min()
        places = np.flatnonzero(targets != IGNORED)
        assert len(places) == task.pairs
        assert places.min() >= shown
        assert not (places % 2).any()
        assert {int(inputs[place]): int(targets[place]) for place in places} == dict(
            zip(keys.tolist(), values.tolist(), strict=True)
        )
        if task.filler == "blank":
            assert np.count_nonzero(inputs) == 3 * task.pairs


def test_mqar_gaps_follow_the_power_law() -> None:
    task = MQAR(pairs=1, length=34, power=0.01)
    _, targets = drawn(task, 20000)
    counts = np.bincount((np.argmax(targets != IGNORED, axis=1) - 2) // 2, minlength=16)
    law = np.arange(1, 17.0) ** -0.99
    expected = 20000 * law / law.sum()
    assert np.all(np.abs(counts - expected) < 5 * np.sqrt(expected))
    evenly = np.bincount(
        (np.argmax(drawn(MQAR(pairs=1, length=34, power=1.0), 20000)[1] >= 0, axis=1) - 2) // 2
    )
    assert np.all(np.abs(evenly - 1250) < 5 * 1250**0.5)


@pytest.mark.parametrize(
    "task", [InContextRecall(), NoisyInContextRecall(), NoisyInContextRecall(noise=0.9)], ids=str
)
def test_in_context_recall_asks_again_for_what_was_shown(task: InContextRecall) -> None:
    half = task.tokens // 2
    noisy = 0
    for inputs, targets in zip(*drawn(task), strict=True):
        known: dict[int, int] = {}
        for place in range(0, task.length, 2):
            key, value = int(inputs[place]), int(inputs[place + 1])
            assert targets[place + 1] == IGNORED
            if key >= task.tokens:
                noisy += 1
                assert value >= task.tokens
                assert targets[place] == IGNORED
                continue
            assert key < half <= value < task.tokens
            assert targets[place] == known.get(key, IGNORED)
            assert known.setdefault(key, value) == value
        assert targets[-2] != IGNORED
    share = task.noise if isinstance(task, NoisyInContextRecall) else 0.0
    assert noisy / (200 * task.length / 2) == pytest.approx(share, abs=0.03)


def test_fuzzy_recall_keys_and_values_of_several_tokens() -> None:
    """Read back with the keys' and values' halves: a key ends where a value begins."""
    task = FuzzyInContextRecall()
    half, padding = 7, 15
    key_sizes: Counter[int] = Counter()
    for inputs, targets in zip(*drawn(task), strict=True):
        pad = int(np.argmax(inputs != padding))
        assert pad < 2 * (task.key_tokens + task.value_tokens)
        assert not np.any(inputs[pad:] == padding)
        known: dict[tuple[int, ...], tuple[int, ...]] = {}
        expected = [IGNORED] * pad
        place = pad
        while place < task.length:
            middle = next(p for p in range(place, task.length) if inputs[p] >= half)
            end = next((p for p in range(middle, task.length) if inputs[p] < half), task.length)
            key, value = tuple(inputs[place:middle].tolist()), tuple(inputs[middle:end].tolist())
            assert len(set(key)) == len(key) <= task.key_tokens
            assert len(set(value)) == len(value) <= task.value_tokens
            key_sizes[len(key)] += key not in known
            answers = list(value) if key in known else [IGNORED] * len(value)
            expected += [IGNORED] * (len(key) - 1) + answers + [IGNORED]
            assert known.setdefault(key, value) == value
            last_was_asked, place = answers[0] != IGNORED, end
        assert targets.tolist() == expected
        assert last_was_asked
    assert set(key_sizes) == {1, 2, 3}


# ---- keeping and knowing -------------------------------------------------------------------------------


def test_selective_copying_keeps_the_order() -> None:
    task = SelectiveCopying()
    inputs, targets = drawn(task)
    first = task.length - task.copied - 1
    for row, asked in zip(inputs, targets, strict=True):
        tokens = row[:first][row[:first] != 14]
        assert len(tokens) == 16
        assert row[first] == 15
        assert (row[first + 1 :] == 14).all()
        assert (asked[: first + 1] == IGNORED).all()
        assert asked[first + 1 :].tolist() == tokens.tolist()
    # Places are spread evenly: each of the first ones holds a token in 16 of 239.
    share = (inputs[:, :first] != 14).mean()
    assert share == pytest.approx(16 / first)
    assert (inputs[:, : first // 2] != 14).mean() == pytest.approx(share, rel=0.1)


def test_compression_asks_for_everything_that_was_read() -> None:
    inputs, targets = drawn(Compression())
    assert (inputs[:, -1] == 15).all()
    assert (targets[:, -1] == IGNORED).all()
    assert np.array_equal(inputs[:, :-1], targets[:, :-1])
    assert Compression.reads_last
    assert not any(task.reads_last for task in TASKS.values() if task is not Compression)


def test_memorisation_has_one_mapping_for_all_sequences() -> None:
    task = Memorisation()
    inputs, targets = drawn(task)
    assert (inputs[:, 1::2] == 255).all()
    assert (targets[:, 0::2] == IGNORED).all()
    facts = set(zip(inputs[:, 0::2].ravel().tolist(), targets[:, 1::2].ravel().tolist(), strict=True))
    assert len(facts) == len({key for key, _ in facts}) == len({value for _, value in facts}) == task.facts
    assert {value for _, value in facts} == set(range(127, 254))
    assert Memorisation(facts_seed=1).values().tolist() != task.values().tolist()
