"""Learning rates across width: what each kind of parameter gets, and that activations move alike."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from stand_in import CONFIG, SETTINGS, StandIn
from torch import Tensor

from star import pools
from star.config import ModelConfig
from star.data import Corpus
from star.genome import Genome
from star.model import StarModel, build_model
from star.optimizer import AdamW
from star.parametrization import POWERS, kinds, rate_scales, scale_initial_weights
from star.proxy import ProxySettings, train_candidate
from star.training import Training

BASE = 16
MUP = replace(SETTINGS, parametrization="mup", base_width=BASE)
GENOME = Genome.parse("11111-91111-31111-71111-81111-91111")


def at_width(width: int) -> ModelConfig:
    return replace(CONFIG, width=width)


def model_of(width: int, settings: ProxySettings, genome: Genome = GENOME) -> StarModel:
    model = build_model(genome, at_width(width), seed=0)
    scale_initial_weights(model, settings)
    return model


# What each parameter gets


def test_kinds_of_the_parameters_of_known_layers() -> None:
    found = kinds(build_model(Genome.parse("51111-91111-71111-11.1.1.1.1"), CONFIG, seed=0))
    assert found["embedding.weight"] == "embedding"
    assert found["norm.weight"] == "final norm"
    assert found["norms.0.weight"] == "vector"
    assert {name for name, kind in found.items() if kind == "readout"} == set()
    for name, kind in found.items():
        last = ".".join(name.split(".")[2:])
        if last.endswith(("A_log", "bias", "D", "lam", "log_decay")):
            assert kind == "vector", name
        elif "conv" in last or "filter_fn" in last:
            assert kind == "input", name
        elif "proj" in last:
            assert kind == "hidden", name


@pytest.mark.parametrize("entry", pools.all_classes(), ids=lambda entry: entry.name)
def test_every_class_has_a_kind_for_every_parameter(entry: pools.LivClass) -> None:
    model = build_model(Genome.parse(f"{entry.id}.1.1.1.1"), CONFIG, seed=0)
    found = kinds(model)
    assert found.keys() == {name for name, _ in model.named_parameters()}
    assert set(found.values()) <= set(POWERS)
    assert "hidden" in found.values()


@pytest.fixture
def own_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Class 90 is GLA, whose decays have a fixed rank; 91 the LSTM cell, whose blocks are of fixed number."""
    monkeypatch.setattr(pools, "_registry", dict(pools._registry))
    for number, layer, arguments in (
        (90, "GatedLinearAttention", {"gate_rank": 4}),
        (91, "LSTMScan", {"blocks": 2}),
    ):
        pools.register(
            replace(
                pools.get(9),
                id=number,
                name=layer,
                family="own",
                layer=f"star_kernels.layers:{layer}",
                layer_arguments=arguments,
                shareable=(),
            )
        )


def test_layers_of_other_packages_are_classified_by_their_shapes(own_classes: None) -> None:
    model = build_model(Genome.parse("90.1.1.1.1-91.1.1.1.1"), CONFIG, seed=0)
    found = {name.removeprefix("layers."): kind for name, kind in kinds(model).items()}
    assert found["0.gk_proj.0.weight"] == "readout"
    assert found["0.gk_proj.1.weight"] == "input"
    assert found["0.q_proj.weight"] == "hidden"
    assert found["0.g_norm_swish_gate.weight"] == "vector"
    assert (found["1.A"], found["1.b"], found["1.B"]) == ("vector", "vector", "hidden")
    settings = replace(MUP, base_width=CONFIG.width // 4)
    ranked = model.get_parameter("layers.0.gk_proj.0.weight")
    before = ranked.detach().clone()
    scale_initial_weights(model, settings)
    torch.testing.assert_close(ranked.detach(), before / 2)
    assert rate_scales(model, settings)["layers.0.gk_proj.0.weight"] == 0.25


def test_another_model_is_refused() -> None:
    model = StandIn(replace(CONFIG, width=32), seed=0)
    with pytest.raises(ValueError, match=r"'mup', takes a model of star\.build_model, not StandIn"):
        scale_initial_weights(model, MUP)


# Width by width


def test_at_the_base_width_nothing_changes(corpus: Corpus) -> None:
    """Equal to the last bit, of any model: the scales are not even looked for."""
    outcomes = [train_candidate(GENOME, CONFIG, settings, corpus) for settings in (SETTINGS, MUP)]
    assert outcomes[0].quality == outcomes[1].quality
    assert outcomes[0].curve == outcomes[1].curve
    assert rate_scales(StandIn(CONFIG, seed=0), MUP) == {}


def test_twice_the_width() -> None:
    plain, scaled = model_of(2 * BASE, SETTINGS), model_of(2 * BASE, MUP)
    weights = dict(plain.named_parameters())
    changed = {
        name for name, parameter in scaled.named_parameters() if not torch.equal(parameter, weights[name])
    }
    assert changed == {"embedding.weight", "norm.weight"}
    torch.testing.assert_close(scaled.embedding.weight, plain.embedding.weight * 2**0.5)
    assert scaled.norm.weight.unique().tolist() == [0.5]
    scales = rate_scales(scaled, MUP)
    assert scales["embedding.weight"] == 1
    assert scales["norm.weight"] == 0.5
    assert scales["norms.0.weight"] == 1
    assert scales["layers.0.q_proj.weight"] == 0.5
    assert scales["layers.1.down_proj.weight"] == 0.5


def movement(corpus: Corpus, width: int, settings: ProxySettings) -> tuple[float, float]:
    """Root mean square, after a few steps, of how the normalised stream and the logits have changed."""
    model = model_of(width, settings)
    ids = torch.from_numpy(corpus.batch(99, 2, 32, 0)[0])

    def look() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            hidden = model.hidden(ids)
            return hidden / model.norm.weight, hidden @ model.head_weight.T

    before = look()
    training = Training(model, settings, corpus)
    while not training.done:
        training.train_step()
    stream, logits = (after - first for after, first in zip(look(), before, strict=True))
    return stream.square().mean().sqrt().item(), logits.square().mean().sqrt().item()


def test_activations_move_alike_at_every_width(corpus: Corpus) -> None:
    """The coordinate check of Tensor Programs V: with one rate for all, wide models do not run away."""
    short = {"steps": 4, "warmup_steps": 0, "schedule": "constant", "learning_rate": 2e-2}
    growth = {}
    for settings in (replace(SETTINGS, **short), replace(MUP, **short)):
        narrow, wide = (movement(corpus, width, settings) for width in (BASE, 16 * BASE))
        growth[settings.parametrization] = [a / b for a, b in zip(wide, narrow, strict=True)]
    stream, logits = growth["mup"]
    assert 0.8 < stream < 1.25
    assert logits < 1.25
    assert growth["standard"][1] > 2 * logits


def test_logits_start_smaller_the_wider() -> None:
    """As output weights of variance 1 / fan-in² do; but for the token itself, which the head is tied to."""
    ids = torch.arange(64)
    sizes = []
    for width in (BASE, 16 * BASE):
        with torch.no_grad():
            logits = model_of(width, MUP)(ids[None])[0]
        logits[ids, ids] = 0
        sizes.append(logits.square().mean().sqrt().item())
    assert sizes[1] == pytest.approx(sizes[0] / 4, rel=0.1)


def test_weight_decay_is_that_of_the_unscaled_rate() -> None:
    parameters = {name: torch.nn.Parameter(torch.ones(2, 2)) for name in ("slow", "full")}
    optimizer = AdamW(parameters.items(), weight_decay=0.5, rate_scales={"slow": 0.25})
    for parameter in parameters.values():
        parameter.grad = torch.zeros(2, 2)
    optimizer.step(0.1, torch.ones(()))
    for parameter in parameters.values():
        assert parameter.unique().tolist() == [pytest.approx(0.95)]
    for parameter in parameters.values():
        parameter.grad = torch.ones(2, 2)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer.weight_decay = 0.0
    optimizer.step(0.1, torch.ones(()))
    moved = {name: (before[name] - parameter).max().item() for name, parameter in parameters.items()}
    assert moved["slow"] == pytest.approx(moved["full"] / 4, rel=1e-4)


def test_a_transferred_training_is_stopped_and_gone_on_with(corpus: Corpus, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    whole, stopped, resumed = (Training(model_of(2 * BASE, MUP), MUP, corpus) for _ in range(3))
    while not whole.done:
        whole.train_step()
    for _ in range(5):
        stopped.train_step()
    stopped.save(path)
    resumed.restore(path)
    while not resumed.done:
        resumed.train_step()
    assert resumed.outcome().quality == whole.outcome().quality
    plain = Training(model_of(2 * BASE, SETTINGS), SETTINGS, corpus)
    with pytest.raises(ValueError, match="has parametrization 'mup', the settings 'standard'"):
        plain.restore(path)
