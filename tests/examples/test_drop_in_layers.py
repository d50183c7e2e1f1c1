"""The example of layers in other people's models does what it says."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("transformers")

FILE = Path(__file__).parents[2] / "examples" / "drop_in_layers.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("drop_in_layers", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["drop_in_layers"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_models_learn_with_our_layers_inside(example: ModuleType, name: str) -> None:
    torch.manual_seed(0)
    model = getattr(example, name)()
    ours = {n: p for n, p in model.named_parameters() if ".layer." in n}
    assert ours
    before = {n: p.detach().clone() for n, p in ours.items()}
    losses = example.train(model)
    assert losses[-1] < losses[0] - 1
    assert all(not torch.equal(before[n], p) for n, p in ours.items())


def test_our_attention_is_the_llamas(example: ModuleType) -> None:
    """With the weights of a module, the model computes what it computed before."""
    import transformers

    from star_kernels.layers import Attention

    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 64, (2, 12))
    with torch.no_grad():
        expected = model(ids).logits
        for layer in model.model.layers:
            layer.self_attn = example.InPlaceOfAttention(Attention.from_module(layer.self_attn))
        assert torch.allclose(model(ids, use_cache=False).logits, expected, atol=1e-5)


def test_the_printed_lines(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    example.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["gpt2", "llama"]
