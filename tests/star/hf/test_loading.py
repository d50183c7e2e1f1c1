"""Saving and loading: the same logits, shared weights once; damage and bad intent are refused in a line."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

transformers = pytest.importorskip("transformers", reason="needs the extra hf (transformers)")

from star import Genome, ModelConfig  # noqa: E402
from star.hf import StarConfig, StarForCausalLM  # noqa: E402

SIZES = ModelConfig(width=32, head_dim=8, vocab_size=48)
GENOME = "13211-13211-72212-72212-51111-91111"
IDS = torch.randint(0, 48, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> StarForCausalLM:
    torch.manual_seed(0)
    return StarForCausalLM(StarConfig.of(Genome.parse(GENOME), SIZES)).eval()


@pytest.fixture
def saved(model: StarForCausalLM, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def rewrite(directory: Path, change: Any) -> None:
    """Changes the tensors of the weights file."""
    path = directory / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


def refusal(directory: Path, **options: Any) -> str:
    """The one line with which both ways of loading refuse."""
    said = []
    for load in (StarForCausalLM.from_pretrained, transformers.AutoModelForCausalLM.from_pretrained):
        with pytest.raises((ValueError, OSError)) as caught:
            load(directory, **options)
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert len(said[0].splitlines()) == 1
    return said[0]


class TestLoads:
    @pytest.mark.parametrize("load", [StarForCausalLM, transformers.AutoModelForCausalLM])
    def test_the_same_logits(self, model: StarForCausalLM, saved: Path, load: Any) -> None:
        again = load.from_pretrained(saved)
        assert type(again) is StarForCausalLM
        assert torch.equal(logits(again), logits(model))
        assert again.num_parameters() == model.num_parameters()

    def test_shared_weights_are_stored_once_and_tied_again(self, model: StarForCausalLM, saved: Path) -> None:
        stored = safetensors.torch.load_file(saved / "model.safetensors")
        assert sum(tensor.numel() for tensor in stored.values()) == model.num_parameters()
        again = StarForCausalLM.from_pretrained(saved)
        first, second = again.model.layers[0], again.model.layers[1]
        assert first.featurizer is second.featurizer
        assert again.head_weight is again.get_input_embeddings().weight

    def test_in_bfloat16(self, model: StarForCausalLM, saved: Path) -> None:
        again = StarForCausalLM.from_pretrained(saved, dtype=torch.bfloat16)
        assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}
        assert torch.equal(logits(again), logits(model.to(torch.bfloat16)))
        assert again.generate(IDS, max_new_tokens=3, do_sample=False).shape == (2, 12)

    @pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto"])
    def test_on_one_device(self, model: StarForCausalLM, saved: Path, device_map: Any) -> None:
        pytest.importorskip("accelerate", reason="device_map needs accelerate")
        again = StarForCausalLM.from_pretrained(saved, device_map=device_map)
        assert torch.equal(logits(again), logits(model))

    def test_in_shards(self, model: StarForCausalLM, tmp_path: Path) -> None:
        model.save_pretrained(tmp_path, max_shard_size="20KB")
        assert len([*tmp_path.glob("model-*.safetensors")]) > 1
        assert torch.equal(logits(StarForCausalLM.from_pretrained(tmp_path)), logits(model))

    def test_without_values_on_the_meta_device(self) -> None:
        config = StarConfig.of(Genome.parse(GENOME), SIZES)
        with torch.device("meta"):
            empty = StarForCausalLM(config)
        assert all(parameter.is_meta for parameter in empty.parameters())


class TestRefuses:
    def test_a_pickle_and_never_reads_it(self, saved: Path, tmp_path: Path) -> None:
        class Hostile:
            def __reduce__(self) -> Any:
                return os.mkdir, (str(tmp_path / "executed"),)

        (saved / "model.safetensors").unlink()
        (saved / "pytorch_model.bin").write_bytes(pickle.dumps({"model.norm.weight": Hostile()}))
        assert "pytorch_model.bin is a pickle" in refusal(saved)
        assert "use_safetensors is False" in refusal(saved, use_safetensors=False)
        assert not (tmp_path / "executed").exists()

    def test_a_pickle_beside_the_weights_is_ignored(self, model: StarForCausalLM, saved: Path) -> None:
        (saved / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
        assert torch.equal(logits(StarForCausalLM.from_pretrained(saved)), logits(model))

    def test_a_truncated_file(self, saved: Path) -> None:
        path = saved / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        assert "not a sound safetensors file" in refusal(saved)

    def test_a_missing_tensor(self, saved: Path) -> None:
        rewrite(saved, lambda tensors: tensors.pop("model.norm.weight"))
        assert "tensor 'model.norm.weight' is missing" in refusal(saved)

    def test_a_tensor_too_many(self, saved: Path) -> None:
        rewrite(saved, lambda tensors: tensors.update(extra=torch.zeros(2)))
        assert "tensor 'extra' is not in the model" in refusal(saved)

    def test_a_tensor_of_another_shape(self, saved: Path) -> None:
        rewrite(saved, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(7)}))
        assert "tensor 'model.norm.weight' has shape (7,), the model's has (32,)" in refusal(saved)

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"genome": "11211-21211"}, "gene 2"),
            ({"genome": "99999"}, "gene 1"),
            ({"genome": 7}, "genome is 7"),
            ({"genome": "91111"}, "is missing, and"),
            ({"width": 33}, "width is 33"),
            ({"tie_word_embeddings": False}, "tie_word_embeddings is false"),
        ],
    )
    def test_a_wrong_configuration(self, saved: Path, changes: dict[str, Any], says: str) -> None:
        path = saved / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        assert says in refusal(saved)

    def test_parts_on_several_devices(self, saved: Path) -> None:
        pytest.importorskip("accelerate", reason="device_map needs accelerate")
        assert "it takes one device" in refusal(saved, device_map={"model.embedding": "cpu", "model": "meta"})
