"""Layers of star_kernels inside models that are not ours: a GPT-2 and a Llama of transformers.

    python examples/drop_in_layers.py

Both models are small and random. In the GPT-2 a gated short convolution takes one attention's place; in the
Llama one attention becomes ours with the same weights, and a gated delta rule takes the other's place. Then
both learn a short text by heart, for a few steps on the CPU.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from star_kernels.layers import Attention, GatedDeltaNet, GatedShortConv

TEXT = b"Linear input-varying operators: a matrix that the input itself makes. " * 4
STEPS = 15


class InPlaceOfAttention(nn.Module):
    """What transformers expects of an attention module: it gives the output, and no attention weights.

    Our layers are causal and see every token, so masks are not needed: sequences of one length, no padding.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, None]:
        return self.layer(hidden_states), None


def gpt2() -> transformers.GPT2LMHeadModel:
    """A GPT-2 of two blocks; the second one mixes tokens by a gated short convolution."""
    config = transformers.GPT2Config(vocab_size=256, n_positions=128, n_embd=64, n_layer=2, n_head=4)
    model = transformers.GPT2LMHeadModel(config)
    layer = GatedShortConv(config.n_embd, kernel_size=4, residual_layers=4)
    model.transformer.h[1].attn = InPlaceOfAttention(layer)
    return model


def llama() -> transformers.LlamaForCausalLM:
    """A Llama of two layers: the first's weights in our attention, a gated delta rule in the second."""
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config)
    first, second = model.model.layers
    first.self_attn = InPlaceOfAttention(Attention.from_module(first.self_attn))
    second.self_attn = InPlaceOfAttention(GatedDeltaNet(64, key_heads=2, value_heads=4, key_head_dim=16))
    return model


def train(model: nn.Module, steps: int = STEPS) -> list[float]:
    """The losses of ``steps`` steps on pieces of the text."""
    data = torch.tensor(list(TEXT))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        batch = torch.stack([data[start : start + 64] for start in range(step, step + 4 * 37, 37)])
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    """Trains both and prints how far they came."""
    for make in (gpt2, llama):
        torch.manual_seed(0)
        losses = train(make())
        print(f"{make.__name__}: loss {losses[0]:.3f} at first, {losses[-1]:.3f} after {len(losses)} steps")


if __name__ == "__main__":
    main()
