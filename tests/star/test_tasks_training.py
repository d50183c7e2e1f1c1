"""Trained on the tasks: what is known to solve one does, what can not is at chance; equal runs are equal."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from star.config import ModelConfig
from star.genome import Genome
from star.proxy import ProxySettings
from star.tasks import IGNORED, Compression, open_task
from star.tasks import directory as task_directory
from star.tasks.training import Autoencoder, TaskOutcome, TaskSequences, score, task_model, train_on_task
from star.training_directory import StoppedTraining

CONFIG = ModelConfig(width=64, head_dim=16)
SETTINGS = ProxySettings(
    batch_size=16, learning_rate=3e-3, weight_decay=0.0, validation_batches=16, threads=1, dtype="float32"
)
ATTENTION = Genome.parse("11111-11111")
CONVOLVED_ATTENTION = Genome.parse("21111-21111")  # SA-2: a short convolution shows keys what stood before
CONVOLUTION = Genome.parse("71111-71111")
RECURRENCE = Genome.parse("51111-51111")
MEMORYLESS = Genome.parse("91111")
MQAR = "mqar:vocab_size=32,length=32,pairs=4"


def trained(genome: Genome, task: str, steps: int, **changes: float) -> TaskOutcome:
    settings = dataclasses.replace(SETTINGS, steps=steps, warmup_steps=steps // 10, **changes)  # type: ignore[arg-type]
    outcome = train_on_task(genome, CONFIG, open_task(task), settings)
    assert outcome.ok, outcome.reason
    return outcome


def test_attention_solves_mqar_and_a_gated_convolution_does_not() -> None:
    """Zoology's finding, at width 64 and with equal training."""
    solved = trained(ATTENTION, MQAR, 360).accuracy
    failed = trained(CONVOLUTION, MQAR, 360).accuracy
    assert solved is not None
    assert failed is not None
    assert solved > 0.9
    assert failed < 0.25  # not even which values the sequence holds


@pytest.mark.parametrize(
    ("task", "genome", "steps", "rate", "least"),
    [
        ("in-context-recall:vocab_size=16,length=32", CONVOLVED_ATTENTION, 150, 3e-3, 0.95),
        (
            "noisy-in-context-recall:vocab_size=24,noise_tokens=8,length=32",
            CONVOLVED_ATTENTION,
            150,
            3e-3,
            0.95,
        ),
        (
            "fuzzy-in-context-recall:vocab_size=11,length=32,key_tokens=2,value_tokens=2",
            CONVOLVED_ATTENTION,
            150,
            5e-3,
            0.85,
        ),
        ("selective-copying:vocab_size=6,length=12,copied=3", RECURRENCE, 200, 1e-2, 0.95),
        ("compression:vocab_size=5,length=5", Genome.parse("11111-91111-11111-91111"), 200, 5e-3, 0.8),
        ("memorisation:vocab_size=65,length=16", Genome.parse("71111-91111"), 50, 1e-2, 0.95),
    ],
)
def test_what_is_known_to_solve_a_task_does(
    task: str, genome: Genome, steps: int, rate: float, least: float
) -> None:
    accuracy = trained(genome, task, steps, learning_rate=rate).accuracy
    assert accuracy is not None
    assert accuracy > least


@pytest.mark.parametrize(
    "task",
    [
        MQAR,
        "in-context-recall:vocab_size=16,length=32",
        "noisy-in-context-recall:vocab_size=24,noise_tokens=8,length=32",
        "fuzzy-in-context-recall:vocab_size=11,length=32,value_tokens=1",
        "selective-copying:vocab_size=6,length=12,copied=3",
        "compression:vocab_size=5,length=6",
        "memorisation:vocab_size=17,length=16",
    ],
)
def test_a_model_that_sees_one_token_is_at_chance(task: str) -> None:
    """The answer follows from no single token, so without a mixer of tokens training finds chance alone."""
    accuracy = trained(MEMORYLESS, task, 60).accuracy
    chance = open_task(task).chance
    assert accuracy is not None
    # It may answer one token at all places, which is right in `chance` of them give or take the sample.
    questions = sum(
        int((targets != IGNORED).sum())
        for _, targets in TaskSequences(open_task(task)).validation_batches(16, open_task(task).length, 16)
    )
    assert abs(accuracy - chance) < 6 * (chance * (1 - chance) / questions) ** 0.5


def test_equal_trainings_are_equal_and_seeds_differ() -> None:
    first, again = trained(ATTENTION, MQAR, 6), trained(ATTENTION, MQAR, 6)
    assert dataclasses.replace(first, seconds=0.0) == dataclasses.replace(again, seconds=0.0)
    assert trained(ATTENTION, MQAR, 6, seed=1).curve != first.curve
    assert TaskOutcome.from_json(json.loads(json.dumps(first.to_json()))) == first


def test_held_sequences_are_no_training_sequences() -> None:
    sequences = TaskSequences(open_task(MQAR))
    held = {batch[0].tobytes() for batch in sequences.validation_batches(4, 32, 8)}
    seen = {sequences.batch(step, 4, 32, seed)[0].tobytes() for step in range(8) for seed in range(2)}
    assert len(held) == 8
    assert len(seen) == 16
    assert not held & seen


def test_the_decoder_sees_the_last_output_alone() -> None:
    task = Compression(vocab_size=5, length=6)
    model = task_model(ATTENTION, CONFIG, task, 0)
    assert isinstance(model, Autoencoder)
    ids = torch.randint(0, 4, (2, 6))
    y = model.hidden(ids)
    assert y.shape == (2, 6, 64)
    inner = model.model.hidden
    model.model.hidden = lambda ids: inner(ids) * (torch.arange(6) == 5)[:, None]  # type: ignore[assignment]
    assert torch.equal(model.hidden(ids), y)
    assert not torch.equal(y[:, 0], y[:, 1])
    assert torch.equal(
        task_model(ATTENTION, CONFIG, task, 0).state_dict()["head.weight"], model.state_dict()["head.weight"]
    )


def test_scores_are_of_the_whole_vocabulary() -> None:
    task = open_task(MQAR)
    model = task_model(ATTENTION, CONFIG, task, 0)
    accuracy, bits = score(model, task, SETTINGS)
    assert accuracy < 0.2
    assert bits > 4  # no better than guessing among 32 tokens would be 5


def test_failures_are_outcomes() -> None:
    wild = dataclasses.replace(SETTINGS, steps=20, learning_rate=1e30, gradient_clip=1e30, warmup_steps=0)
    outcome = train_on_task(ATTENTION, CONFIG, open_task(MQAR), wild)
    assert outcome.status == "failed"
    assert outcome.reason.startswith("diverged")
    assert outcome.accuracy is None


def test_a_stopped_training_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    task = open_task("compression:vocab_size=5,length=6")
    settings = dataclasses.replace(SETTINGS, steps=9, warmup_steps=1)
    given = (ATTENTION, CONFIG, task, settings)
    whole = task_directory.train(tmp_path / "whole", *given, evaluate_every=2)
    assert [point.step for point in whole.curve] == [2, 4, 6, 8, 9]
    steps = iter([False, False, False, True])
    with pytest.raises(StoppedTraining):
        task_directory.train(tmp_path / "cut", *given, evaluate_every=2, should_stop=lambda: next(steps))
    assert task_directory.read(tmp_path / "cut").outcome.status == "unfinished"
    ended = task_directory.train(tmp_path / "cut", *given, evaluate_every=2)
    assert dataclasses.replace(ended, seconds=0.0) == dataclasses.replace(whole, seconds=0.0)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]
    assert not (tmp_path / "cut" / "checkpoint.safetensors").exists()
    again = task_directory.train(tmp_path / "cut", *given, evaluate_every=2)
    assert again == ended
    for changed, words in (
        ((ATTENTION, CONFIG, open_task(MQAR), settings), "training with name 'compression', not 'mqar'"),
        ((CONVOLUTION, CONFIG, task, settings), "training of another genome"),
        ((ATTENTION, CONFIG, task, dataclasses.replace(settings, seed=3)), "with seed 0, not 3"),
    ):
        with pytest.raises(ValueError, match=words):
            task_directory.train(tmp_path / "cut", *changed, evaluate_every=2)
    (tmp_path / "cut" / "task.json").write_text("{}")
    with pytest.raises(ValueError, match=r"task\.json is damaged"):
        task_directory.train(tmp_path / "cut", *given, evaluate_every=2)
