"""The proxy trainer: outcomes of good and bad candidates, determinism, curves, checkpoints."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stand_in import StandIn
from test_data_corpus import write_texts
from test_data_tokenization import write_tokenizer
from torch import Tensor, nn

from star import weights
from star.config import ModelConfig
from star.data import Corpus, DataError, open_corpus
from star.genome import Genome
from star.model import build_model
from star.optimizer import AdamW, learning_rate
from star.proxy import CurvePoint, Outcome, Progress, ProxySettings, train_candidate
from star.training import Diverged, evaluate, failure_reason, train_model

CONFIG = ModelConfig(width=16, head_dim=4)
SETTINGS = ProxySettings(
    steps=12, batch_size=2, length=32, warmup_steps=2, learning_rate=3e-3, validation_batches=2, threads=1
)
GENOME = Genome.parse("11111-91111")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    return open_corpus(write_texts(folder / "texts"), cache_directory=folder)


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
    assert all(a >= b - 1e-12 for a, b in zip(rates[top:], rates[top + 1 :], strict=False))
    assert all(0 <= r <= 2.0 for r in rates)
    if 1 <= warmup <= steps:
        assert rates[warmup - 1] == 2.0
    if steps - top >= 2:
        assert rates[-1] == pytest.approx(2.0 * final)


# Weights and checkpoints


def test_saved_weights_hold_shared_tensors_once(corpus: Corpus, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    model = StandIn(CONFIG, seed=0)
    outcome = train(corpus, build=lambda *_: model, save_to=path)
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
        train(corpus, save_to=tmp_path / "missing" / "weights")


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
        train_model(model, varied(learning_rate=1e-3), corpus, checkpoint=interrupted)
    other = open_corpus(write_texts(tmp_path / "other", seed=5), cache_directory=tmp_path)
    with pytest.raises(ValueError, match="another text"):
        train_model(model, SETTINGS, other, checkpoint=interrupted)
    weights.save_weights(model, tmp_path / "weights")
    with pytest.raises(ValueError, match="weights only"):
        train_model(model, SETTINGS, corpus, checkpoint=tmp_path / "weights")
    interrupted.write_bytes(interrupted.read_bytes()[:-10])
    with pytest.raises(ValueError, match="not a weights file"):
        train_model(model, SETTINGS, corpus, checkpoint=interrupted)
