"""Small settings, a small text, and a small model with what a training asks: `hidden` and `head_weight`."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from torch import Tensor, nn

from star.config import ModelConfig
from star.proxy import ProxySettings

CONFIG = ModelConfig(width=16, head_dim=4)
SETTINGS = ProxySettings(
    steps=12, batch_size=2, length=32, warmup_steps=2, learning_rate=3e-3, validation_batches=2, threads=1
)


class StandIn(nn.Module):
    """Embedding tied to the head, and residual layers that share one matrix; sees the last two tokens."""

    def __init__(self, config: ModelConfig, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        shared = nn.Linear(config.width, config.width)
        self.layers = nn.ModuleList([shared, shared])
        self.unused = nn.Linear(config.width, 3)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(std=0.05, generator=generator)

    @property
    def head_weight(self) -> Tensor:
        return self.embedding.weight

    def hidden(self, inputs: Tensor) -> Tensor:
        x: Tensor = self.embedding(inputs)
        x = x + 0.5 * torch.roll(x, 1, dims=1)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def write_texts(folder: Path, count: int = 40, size: int = 900, seed: int = 0) -> Path:
    """`count` different documents of about `size` bytes of words."""
    rng = random.Random(seed)
    words = ["alpha", "beta", "gamma", "the cat", "straße", "\n"]
    folder.mkdir(exist_ok=True)
    for i in range(count):
        text = f"{i} "
        while len(text) < size:
            text += rng.choice(words) + " "
        (folder / f"{i:04d}.txt").write_text(text)
    return folder
