"""What training rests on: the optimizer, weights files, checkpoints."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stand_in import CONFIG, SETTINGS, StandIn, write_texts
from torch import nn

from star import weights
from star.config import ModelConfig
from star.data import Corpus, open_corpus
from star.genome import Genome
from star.optimizer import AdamW, learning_rate
from star.proxy import Progress, train_candidate
from star.training import evaluate, train_model

GENOME = Genome.parse("11111-91111")


# The optimizer


def test_adamw_equals_torchs(corpus: Corpus) -> None:
    ours, theirs = StandIn(CONFIG, seed=0), StandIn(CONFIG, seed=0)
    matrices = [p for p in theirs.parameters() if p.dim() >= 2]
    others = [p for p in theirs.parameters() if p.dim() < 2]
    reference = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    optimizer = AdamW(ours.named_parameters(), weight_decay=0.1)
    for step in range(5):
        inputs = torch.from_numpy(corpus.batch(step, 2, 16, 0)[0])
        for model in (ours, theirs):
            (model.hidden(inputs).square().mean() * 50).backward()
        expected = nn.utils.clip_grad_norm_([p for p in theirs.parameters() if p.grad is not None], 1.0)
        norm = optimizer.gradient_norm()
        assert norm.item() == pytest.approx(expected.item(), rel=1e-5)
        for group in reference.param_groups:
            group["lr"] = 0.01 * (step + 1)
        reference.step()
        reference.zero_grad()
        optimizer.step(0.01 * (step + 1), norm.clamp(min=1.0))
        optimizer.zero_gradients()
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


def test_marked_matrices_do_not_decay() -> None:
    marked, plain = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    marked.no_weight_decay = True  # type: ignore[attr-defined]
    optimizer = AdamW([("marked", marked), ("plain", plain)], weight_decay=0.5)
    for parameter in (marked, plain):
        parameter.grad = torch.zeros(2, 2)
    optimizer.step(0.1, torch.ones(()))
    assert marked.unique().tolist() == [1.0]
    assert plain.unique().tolist() == [pytest.approx(0.95)]


@given(st.integers(1, 500), st.integers(0, 600), st.floats(0, 1))
def test_learning_rate_rises_then_falls(steps: int, warmup: int, final: float) -> None:
    def rate(step: int) -> float:
        return learning_rate(step, steps=steps, warmup_steps=warmup, peak=2.0, final_rate=final)

    rates = [rate(step) for step in range(steps)]
    top = min(warmup, steps)
    assert rates[:top] == sorted(rates[:top])
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(rates[top:]))
    assert all(0 <= r <= 2.0 for r in rates)
    if 1 <= warmup <= steps:
        assert rates[warmup - 1] == 2.0
    if steps - top >= 2:
        assert rates[-1] == pytest.approx(2.0 * final)


# Weights and checkpoints


def test_saved_weights_hold_shared_tensors_once(corpus: Corpus, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    model = StandIn(CONFIG, seed=0)
    outcome = train_candidate(GENOME, CONFIG, SETTINGS, corpus, build=lambda *_: model, save_to=path)
    tensors, about = weights.read_tensors(path)
    assert set(tensors) == {name for name, _ in model.named_parameters()}
    assert about["content_hash"] == corpus.content_hash
    assert Genome.parse(about["genome"]) == GENOME
    assert ModelConfig.from_json(about["config"]) == CONFIG
    fresh = StandIn(CONFIG, seed=9)
    weights.load_weights(fresh, path)
    assert fresh.layers[0] is fresh.layers[1]
    assert evaluate(fresh, corpus, SETTINGS) == outcome.quality
    assert list(tmp_path.iterdir()) == [path]


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    weights.save_weights(StandIn(CONFIG, seed=0), path)
    with pytest.raises(ValueError, match=r"'embedding.weight' has shape \(256, 16\), the model's has"):
        weights.load_weights(StandIn(ModelConfig(width=32, head_dim=4), seed=0), path)
    with pytest.raises(ValueError, match=r"'embedding.weight' is not in the model"):
        weights.load_weights(nn.Module(), path)
    with pytest.raises(ValueError, match=r"'bias' is missing, of 2 missing"):
        weights.load_weights(nn.Linear(2, 2), path)
    for data in (b"", path.read_bytes()[:-1], b"\0" * 100):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="not a weights file of star"):
            weights.load_weights(StandIn(CONFIG, seed=0), path)


def test_weights_that_can_not_be_written_raise(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file or directory"):
        train_candidate(GENOME, CONFIG, SETTINGS, corpus, save_to=tmp_path / "missing" / "weights")


class _Stop(Exception):
    pass


@pytest.fixture
def interrupted(corpus: Corpus, tmp_path: Path) -> Iterator[Path]:
    """The checkpoint of a training that was stopped at step 8, written at step 5."""
    path = tmp_path / "checkpoint.safetensors"

    def stop(progress: Progress) -> None:
        if progress.step == 8:
            raise _Stop

    with pytest.raises(_Stop):
        train_model(StandIn(CONFIG, 0), SETTINGS, corpus, progress=stop, checkpoint=path, checkpoint_every=5)
    return path


def test_resumed_training_ends_with_the_same_bits(corpus: Corpus, interrupted: Path) -> None:
    whole, resumed = StandIn(CONFIG, seed=0), StandIn(CONFIG, seed=7)
    expected = train_model(whole, SETTINGS, corpus)
    steps: list[int] = []
    outcome = train_model(
        resumed, SETTINGS, corpus, checkpoint=interrupted, progress=lambda p: steps.append(p.step)
    )
    assert steps == list(range(6, 13))
    assert (outcome.quality, outcome.curve) == (expected.quality, expected.curve)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    again = train_model(StandIn(CONFIG, seed=3), SETTINGS, corpus, checkpoint=interrupted)
    assert again.quality == expected.quality  # done already: nothing is trained


def test_checkpoints_of_another_training_are_refused(
    corpus: Corpus, interrupted: Path, tmp_path: Path
) -> None:
    model = StandIn(CONFIG, seed=0)
    with pytest.raises(ValueError, match=r"has learning_rate 0.003, the settings 0.001"):
        train_model(model, dataclasses.replace(SETTINGS, learning_rate=1e-3), corpus, checkpoint=interrupted)
    other = open_corpus(write_texts(tmp_path / "other", seed=5), cache_directory=tmp_path)
    with pytest.raises(ValueError, match="another text"):
        train_model(model, SETTINGS, other, checkpoint=interrupted)
    weights.save_weights(model, tmp_path / "weights")
    with pytest.raises(ValueError, match="weights only"):
        train_model(model, SETTINGS, corpus, checkpoint=tmp_path / "weights")
    interrupted.write_bytes(interrupted.read_bytes()[:-10])
    with pytest.raises(ValueError, match="not a weights file"):
        train_model(model, SETTINGS, corpus, checkpoint=interrupted)


def test_equal_weights_are_equal_bytes(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(3.0), "a": torch.ones(5, dtype=torch.bfloat16)}
    files = set()
    for _ in range(10):
        weights.write_tensors(tensors, tmp_path / "w.safetensors", {"genome": "é"})
        files.add((tmp_path / "w.safetensors").read_bytes())
    assert len(files) == 1
    read, about = weights.read_tensors(tmp_path / "w.safetensors")
    assert about == {"genome": "é"}
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
