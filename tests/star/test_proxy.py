"""The proxy: outcomes of good and bad candidates, determinism, curves, settings."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stand_in import CONFIG, SETTINGS, StandIn, write_texts
from test_data_tokenization import write_tokenizer
from torch import Tensor, nn

from star import weights
from star.config import ModelConfig
from star.data import Corpus, DataError, open_corpus
from star.genome import Genome
from star.model import build_model
from star.proxy import CurvePoint, Outcome, Progress, ProxySettings, train_candidate
from star.training import Diverged, evaluate, failure_reason

GENOME = Genome.parse("11111-91111")


def build(genome: Genome, config: ModelConfig, seed: int) -> nn.Module:
    return StandIn(config, seed)


def train(corpus: Corpus, settings: ProxySettings = SETTINGS, **options: Any) -> Outcome:
    return train_candidate(GENOME, CONFIG, settings, corpus, **{"build": build} | options)


def varied(**changes: Any) -> ProxySettings:
    return dataclasses.replace(SETTINGS, **changes)


# Good candidates


def test_a_candidate_learns(corpus: Corpus) -> None:
    outcome = train(corpus, varied(steps=150, learning_rate=1e-2))
    assert outcome.ok
    assert outcome.quality == outcome.curve[-1].validation
    assert outcome.quality is not None
    assert outcome.quality < 5 < outcome.curve[0].train
    assert outcome.tokens == 150 * 2 * 32
    assert outcome.seconds > 0


def test_same_settings_give_the_same_bits(corpus: Corpus) -> None:
    first, second = (dataclasses.replace(train(corpus), seconds=0.0) for _ in range(2))
    assert first == second
    assert train(corpus, varied(seed=1)).quality != first.quality


SCRIPT = """
import sys, torch
sys.path[:0] = sys.argv[2:]
torch.set_num_threads(1)
from star.data import load_corpus
import test_proxy
outcome = test_proxy.train(load_corpus(sys.argv[1]))
print(repr(outcome.quality), outcome.curve, "torch._dynamo" in sys.modules)
"""


def test_processes_agree_and_never_load_the_compiler(corpus: Corpus) -> None:
    """Loading torch._dynamo takes a second, which the first candidate of every worker would pay."""
    command = [sys.executable, "-c", SCRIPT, str(corpus.directory), *sys.path]
    environment = os.environ | {"PYTHONHASHSEED": "5"}
    process = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    outcome = train(corpus)
    assert process.stdout.strip() == f"{outcome.quality!r} {outcome.curve} False", process.stderr


def test_quality_is_bits_per_byte_of_held_out_text(corpus: Corpus) -> None:
    model = StandIn(CONFIG, seed=0).eval()
    nats = tokens = 0.0
    for inputs, targets in corpus.validation_batches(2, 32, 2):
        logits = model.hidden(torch.from_numpy(inputs)) @ model.head_weight.T
        flat = torch.from_numpy(targets).flatten()
        nats += nn.functional.cross_entropy(logits.flatten(0, 1), flat, reduction="sum").item()
        tokens += flat.numel()
    assert evaluate(model, corpus, SETTINGS) == pytest.approx(nats / tokens / math.log(2), rel=1e-6)
    assert not model.training


def test_quality_with_a_tokenizer_counts_bytes(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "bpe.json", ["<|endoftext|>"])
    corpus = open_corpus(write_texts(tmp_path / "texts"), tokenizer=tokenizer, cache_directory=tmp_path)
    config = ModelConfig(width=16, head_dim=4, vocab_size=corpus.vocab_size)
    outcome = train_candidate(GENOME, config, varied(steps=1, learning_rate=1e-9), corpus, build=build)
    assert outcome.quality is not None
    uniform = math.log2(corpus.vocab_size) / corpus.bytes_per_token
    assert outcome.quality == pytest.approx(uniform, rel=0.05)


@pytest.mark.parametrize(
    ("steps", "every", "points", "evaluated"),
    [(12, 0, 12, [12]), (12, 5, 3, [5, 10, 12]), (1, 0, 1, [1]), (60, 0, 20, [60]), (4, 9, 1, [4])],
)
def test_curve(corpus: Corpus, steps: int, every: int, points: int, evaluated: list[int]) -> None:
    curve = train(corpus, varied(steps=steps, evaluate_every=every)).curve
    assert len(curve) == points
    assert [point.step for point in curve if point.validation is not None] == evaluated
    assert curve[-1].step == steps


def test_evaluating_more_often_changes_nothing(corpus: Corpus) -> None:
    assert train(corpus, varied(evaluate_every=3)).quality == train(corpus).quality


def test_progress_is_told_after_every_step(corpus: Corpus) -> None:
    told: list[Progress] = []
    outcome = train(corpus, progress=told.append)
    assert [progress.step for progress in told] == list(range(1, 13))
    assert {progress.steps for progress in told} == {12}
    assert told[-1].validation == outcome.quality


def test_bfloat16_is_close_to_float32(corpus: Corpus) -> None:
    half, full = train(corpus, varied(dtype="bfloat16")), train(corpus)
    assert half.quality == pytest.approx(full.quality, rel=1e-2)
    assert half.quality != full.quality


def test_thread_count_is_restored(corpus: Corpus) -> None:
    torch.set_num_threads(2)
    train(corpus)
    assert torch.get_num_threads() == 2


# Candidates from genomes

EVERY_CLASS = "-".join(f"{liv}.1.1.1.1" for liv in range(1, 18))
SHARING = "71211-92211-71211-11112-21112-92211"


@pytest.mark.parametrize("text", [EVERY_CLASS, SHARING])
def test_genomes_train_and_their_weights_come_back(corpus: Corpus, tmp_path: Path, text: str) -> None:
    genome = Genome.parse(text)
    path = tmp_path / "weights.safetensors"
    outcome = train_candidate(genome, CONFIG, SETTINGS, corpus, save_to=path)
    assert outcome.ok, outcome.reason
    assert outcome.curve[-1].train < outcome.curve[0].train
    model = build_model(genome, CONFIG, seed=5)
    weights.load_weights(model, path)
    assert evaluate(model, corpus, SETTINGS) == outcome.quality
    again = train_candidate(genome, CONFIG, SETTINGS, corpus)
    assert (again.quality, again.curve) == (outcome.quality, outcome.curve)


def test_every_class_trains_in_bfloat16(corpus: Corpus) -> None:
    outcome = train_candidate(Genome.parse(EVERY_CLASS), CONFIG, varied(steps=3, dtype="bfloat16"), corpus)
    assert outcome.ok, outcome.reason


def test_an_invalid_genome_fails(corpus: Corpus) -> None:
    outcome = train_candidate(Genome.parse("11211-21211"), CONFIG, SETTINGS, corpus)
    assert outcome.reason.startswith("GenomeError: ")


# Bad candidates


class Broken(StandIn):
    """A stand-in whose forward does something to its result from a given call on."""

    def __init__(self, action: Callable[[Tensor], Tensor], after: int) -> None:
        super().__init__(CONFIG, seed=0)
        self.action, self.calls = action, after

    def hidden(self, inputs: Tensor) -> Tensor:
        self.calls -= 1
        x = super().hidden(inputs)
        return self.action(x) if self.calls < 0 else x


class _NanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * torch.nan


def _raise(error: BaseException) -> Callable[[Tensor], Tensor]:
    def action(x: Tensor) -> Tensor:
        raise error

    return action


BAD = {
    "nan loss": (lambda x: x * torch.nan, "diverged: loss is nan at step 3"),
    "infinite loss": (lambda x: x * torch.inf, "diverged: loss is"),
    "nan gradient": (_NanGradient.apply, "diverged: gradient norm is nan at step 3"),
    "rising loss": (lambda x: x * 1e3, "diverged: loss rose from"),
    "exception": (_raise(ValueError("a layer is\nwrong")), "ValueError: a layer is"),
    "no message": (_raise(NotImplementedError()), "NotImplementedError: no message"),
    "no memory": (_raise(MemoryError("big")), "out of memory: big"),
    "no GPU memory": (_raise(torch.OutOfMemoryError("CUDA out of memory")), "out of memory: CUDA"),
    "no CPU memory": (lambda x: torch.empty(2**58), "out of memory: "),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_candidates_fail_with_a_reason(corpus: Corpus, case: str, tmp_path: Path) -> None:
    action, reason = BAD[case]
    broken = Broken(action, after=3)
    outcome = train(corpus, build=lambda *_: broken, save_to=tmp_path / "weights")
    assert (outcome.status, outcome.quality) == ("failed", None)
    assert outcome.reason.startswith(reason)
    assert "\n" not in outcome.reason
    assert [point.step for point in outcome.curve[:3]] == [1, 2, 3]
    assert outcome.tokens >= 3 * 2 * 32
    assert outcome.seconds > 0
    assert not (tmp_path / "weights").exists()
    assert Outcome.from_json(json.loads(json.dumps(outcome.to_json(), allow_nan=False))) == outcome


def test_held_out_divergence_fails(corpus: Corpus) -> None:
    outcome = train(corpus, build=lambda *_: Broken(lambda x: x * torch.nan, after=12))
    assert outcome.reason == "diverged: held-out loss is nan after step 12"
    assert len(outcome.curve) == 11


def test_too_large_a_learning_rate_fails(corpus: Corpus) -> None:
    outcome = train(corpus, varied(steps=60, learning_rate=30.0))
    assert outcome.reason.startswith("diverged: ")


def test_a_model_that_can_not_be_built_fails(corpus: Corpus) -> None:
    outcome = train(corpus, build=lambda *_: _raise(KeyError("no such layer"))(torch.empty(0)))
    assert (outcome.status, outcome.reason) == ("failed", "KeyError: 'no such layer'")
    assert (outcome.curve, outcome.tokens) == ((), 0)


def test_interrupts_pass(corpus: Corpus) -> None:
    for error in (KeyboardInterrupt(), SystemExit(3)):
        broken = Broken(_raise(error), after=1)
        with pytest.raises(type(error)):
            train(corpus, build=lambda *_, broken=broken: broken)


def test_failed_candidates_are_freed(corpus: Corpus) -> None:
    import weakref

    made: list[weakref.ref[nn.Module]] = []

    def build_broken(*_: object) -> nn.Module:
        model = Broken(_raise(ValueError("wrong")), after=2)
        made.append(weakref.ref(model))
        return model

    assert not train(corpus, build=build_broken).ok
    assert made[0]() is None


def test_settings_that_no_candidate_could_meet_are_refused(corpus: Corpus) -> None:
    with pytest.raises(ValueError, match="vocab_size is 300, but the text has 256 token ids"):
        train_candidate(
            GENOME, ModelConfig(width=16, head_dim=4, vocab_size=300), SETTINGS, corpus, build=build
        )
    with pytest.raises(DataError, match="length 100000"):
        train(corpus, varied(length=100_000))
    with pytest.raises(ValueError, match="device is 'cuda:99', but there are"):
        train(corpus, varied(device="cuda:99"))


def test_reasons_are_short_lines() -> None:
    assert failure_reason(ValueError("x" * 10_000)) == "ValueError: " + "x" * 500
    assert failure_reason(Diverged("up")) == "diverged: up"


# Settings and outcomes as JSON


@given(
    st.builds(
        ProxySettings,
        steps=st.integers(1, 10**6),
        learning_rate=st.floats(1e-9, 1e3),
        seed=st.integers(0, 2**63 - 1),
        threads=st.none() | st.integers(1, 64),
        device=st.sampled_from(["auto", "cpu", "cuda", "cuda:3"]),
    )
)
def test_settings_there_and_back(settings: ProxySettings) -> None:
    assert ProxySettings.from_json(json.loads(json.dumps(settings.to_json()))) == settings


def test_outcomes_there_and_back() -> None:
    curve = (CurvePoint(1, 8.0, None), CurvePoint(2, 1 / 3, 7.5))
    outcome = Outcome("ok", "", 7.5, curve, 1.25, 99)
    assert Outcome.from_json(json.loads(json.dumps(outcome.to_json()))) == outcome


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("steps", 1.5),
        ("steps", True),
        ("batch_size", -1),
        ("length", 0),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("learning_rate", "fast"),
        ("weight_decay", -0.1),
        ("gradient_clip", 0),
        ("final_rate", 1.5),
        ("warmup_steps", -1),
        ("seed", 2**63),
        ("threads", 0),
        ("dtype", "float16"),
        ("device", "tpu"),
        ("device", "cpu:1"),
    ],
)
def test_settings_out_of_range_are_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"ProxySettings: {name} is "):
        varied(**{name: value})


def test_unknown_settings_are_named() -> None:
    with pytest.raises(ValueError, match="unknown field 'speed'"):
        ProxySettings.from_json({"speed": 1})
