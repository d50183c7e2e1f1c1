"""Decode steps that a CUDA graph can capture: nothing in them depends on a number of the host."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from star import Genome, ModelConfig, build_model, decoding, pools
from star.decoding import DecodeStep, GraphStep
from star.model import StarModel

SIZES = ModelConfig(width=32, head_dim=8, vocab_size=48)
EVERY_CLASS = "-".join(f"{entry.id}.1.1.1.1" for entry in pools.all_classes())
SHARING = "11214-92123-11214-73232-73232-84146-84146-55252-55252-92123"


def model_of(genome: str, **options: Any) -> StarModel:
    return build_model(Genome.parse(genome), SIZES, seed=0, **options).eval()


def prompts(batch: int = 3, length: int = 7) -> Tensor:
    return torch.randint(0, SIZES.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))


class Replayed(DecodeStep):
    """Stands in for a captured graph, which knows no number of the host: computes with wrong ones."""

    made = 0

    def __init__(self, model: StarModel, *arguments: Any) -> None:
        super().__init__(model, *arguments)
        type(self).made += 1
        self.weights = decoding._weights_version(model)
        self.compute(model)  # as the warm-up does
        self.cache.reset()

    def __call__(self, model: StarModel, ids: Tensor) -> Tensor:
        positions = [layer.position for layer in self.cache.layers]
        for layer in self.cache.layers:
            layer.position = 0
        super().__call__(model, ids)
        for layer, position in zip(self.cache.layers, positions, strict=True):
            layer.position = position
        self.cache.skip(1)
        return self.hidden


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> type[Replayed]:
    monkeypatch.setattr(decoding, "GraphStep", Replayed)
    monkeypatch.setattr(decoding, "require_cuda", lambda device: None)
    monkeypatch.setattr(Replayed, "made", 0)
    return Replayed


@pytest.mark.parametrize("genome", [EVERY_CLASS, SHARING], ids=["every class", "sharing"])
@pytest.mark.parametrize("cache_dtype", [None, torch.bfloat16], ids=["", "bfloat16"])
@torch.no_grad()
def test_a_step_is_the_models_own(genome: str, cache_dtype: torch.dtype | None) -> None:
    model = model_of(genome)
    ids = prompts(3, 12)
    step = Replayed(model, 3, 20, cache_dtype)
    memory = model.allocate_cache(3, 20, cache_dtype)
    torch.testing.assert_close(model.hidden(ids[:, :5], step.cache), model.hidden(ids[:, :5], memory))
    for place in range(5, 12):
        token = ids[:, place : place + 1]
        expected = model.hidden(token, memory)
        # A cache in bfloat16 rounds what differs in the last digit of float32 to either side.
        off = 1e-4 if cache_dtype is None else 2e-2
        torch.testing.assert_close(step(model, token), expected, rtol=off, atol=off)
    assert step.cache.position == 12
    assert step.cache.lengths is not None
    assert step.cache.lengths.tolist() == [12] * 3


@pytest.mark.parametrize("genome", [EVERY_CLASS, SHARING], ids=["every class", "sharing"])
def test_a_step_reads_nothing_on_the_host(genome: str) -> None:
    """Tensors without values: whatever asks for one raises an error."""
    with FakeTensorMode(), torch.no_grad():
        model = build_model(Genome.parse(genome), SIZES)
        step = DecodeStep(model, 2, 16)
        step(model, torch.zeros(2, 1, dtype=torch.int64))
        assert step.hidden.shape == (2, 1, SIZES.width)


class TestGenerate:
    def test_gives_the_same_tokens(self, replayed: type[Replayed]) -> None:
        model = model_of(EVERY_CLASS)
        for options in ({"temperature": 0.0}, {"top_k": 9, "seed": 3}):
            expected = model.generate(prompts(), 9, **options)
            assert model.generate(prompts(), 9, cuda_graph=True, **options).tolist() == expected.tolist()

    def test_one_graph_serves_a_batch_size(self, replayed: type[Replayed]) -> None:
        model = model_of("11111-51111")
        for length in (5, 9, 30):
            model.generate(prompts(2, length), 3, cuda_graph=True)
        assert replayed.made == 1
        model.generate(prompts(3), 3, cuda_graph=True)
        model.generate(prompts(2, 300), 3, cuda_graph=True)
        assert replayed.made == 3
        assert len(decoding._idle[model]) == 2

    def test_other_weights_take_another_graph(self, replayed: type[Replayed]) -> None:
        model = model_of("11111-81111-51111")
        model.generate(prompts(), 3, cuda_graph=True)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
        expected = model.generate(prompts(), 6, temperature=0)
        assert model.generate(prompts(), 6, temperature=0, cuda_graph=True).tolist() == expected.tolist()
        assert replayed.made == 2

    def test_graphs_go_with_the_model(self, replayed: type[Replayed]) -> None:
        model = model_of("11111")
        model.generate(prompts(), 3, cuda_graph=True)
        copy.deepcopy(model)
        before = len(decoding._idle)
        del model
        gc.collect()
        assert len(decoding._idle) == before - 1

    def test_names_the_layer_that_can_not(
        self, replayed: type[Replayed], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = model_of("91111-11111")
        monkeypatch.setattr(type(model.layers[1]), "decodes_by_row", False)
        with pytest.raises(ValueError, match=r"LIV 2 \(SA-1\) decodes all rows at one place"):
            model.generate(prompts(), 3, cuda_graph=True)

    def test_is_refused_where_there_is_no_gpu(self) -> None:
        with pytest.raises(ValueError, match="the model is on 'cpu'; it takes a CUDA device"):
            model_of("11111").generate(prompts(), 3, cuda_graph=True)


class TestTransformers:
    @pytest.fixture
    def model(self) -> Any:
        pytest.importorskip("transformers", reason="needs the extra hf (transformers)")
        from star.hf import StarConfig, StarForCausalLM

        torch.manual_seed(0)
        return StarForCausalLM(StarConfig.of(Genome.parse(EVERY_CLASS), SIZES, pad_token_id=0)).eval()

    @pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"max_new_tokens": 300, "num_beams": 2}])
    def test_gives_the_same_tokens(
        self, model: Any, replayed: type[Replayed], monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
    ) -> None:
        monkeypatch.setattr("star.hf.modeling.require_cuda", lambda device: None)
        mask = torch.ones(3, 7, dtype=torch.int64)
        mask[1, :4] = 0
        given = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, **options}
        expected = model.generate(prompts(), **given)
        assert model.generate(prompts(), cuda_graph=True, **given).tolist() == expected.tolist()
        gc.collect()
        model.generate(prompts(), cuda_graph=True, **given)
        assert replayed.made == 1

    def test_is_refused_where_there_is_no_gpu(self, model: Any) -> None:
        with pytest.raises(ValueError, match="the model is on 'cpu'; it takes a CUDA device"):
            model.generate(prompts(), max_new_tokens=3, cuda_graph=True)


@pytest.mark.gpu
class TestOnAGpu:
    @pytest.mark.parametrize("genome", [EVERY_CLASS, SHARING], ids=["every class", "sharing"])
    def test_gives_the_same_tokens(self, genome: str) -> None:
        model = model_of(genome, device="cuda")
        ids = prompts().cuda()
        for _ in range(2):
            for options in ({"temperature": 0.0}, {"top_k": 9, "seed": 3}):
                expected = model.generate(ids, 20, **options)
                assert model.generate(ids, 20, cuda_graph=True, **options).tolist() == expected.tolist()

    def test_a_replay_allocates_nothing(self) -> None:
        model = model_of(EVERY_CLASS, device="cuda")
        step = GraphStep(model, 2, 64)
        token = torch.ones(2, 1, dtype=torch.int64, device="cuda")
        step(model, token)
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        for _ in range(5):
            step(model, token)
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before

    def test_refuses_autocast(self) -> None:
        model = model_of("11111", device="cuda")
        with torch.autocast("cuda"), pytest.raises(ValueError, match="autocast"):
            model.generate(prompts().cuda(), 3, cuda_graph=True)

    def test_in_transformers_with_padding(self) -> None:
        pytest.importorskip("transformers", reason="needs the extra hf (transformers)")
        from star.hf import StarConfig, StarForCausalLM

        torch.manual_seed(0)
        model = StarForCausalLM(StarConfig.of(Genome.parse(EVERY_CLASS), SIZES, pad_token_id=0)).cuda().eval()
        mask = torch.ones(3, 7, dtype=torch.int64, device="cuda")
        mask[1, :4] = 0
        given = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
        for beams in (1, 3):
            expected = model.generate(prompts().cuda(), num_beams=beams, **given)
            found = model.generate(prompts().cuda(), num_beams=beams, cuda_graph=True, **given)
            assert found.tolist() == expected.tolist()
