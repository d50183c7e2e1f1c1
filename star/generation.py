"""Text from a trained model: of a run's candidate, of a training directory, or of an export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from star.data.tokenization import Tokenizer
from star.model import StarModel
from star.trained import ShowTraining, open_trained

__all__ = ["Writer", "open_writer"]


@dataclass(frozen=True)
class Writer:
    """A trained model with its tokenizer. `name` says which."""

    name: str
    model: StarModel
    tokenizer: Tokenizer

    def write(
        self, prompt: str, tokens: int, *, temperature: float = 0.8, top_k: int | None = 50, seed: int = 0
    ) -> str:
        """What the model writes after `prompt`; after an empty one, the beginning of a document.

        Raises:
            ValueError: a prompt that is no Unicode, or an option out of range.
        """
        try:
            section = prompt.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"prompt is not valid Unicode: {error.reason}") from error
        ids = [int(id) for id in self.tokenizer.encode_sections([section])[0]] or [self.tokenizer.separator]
        place = next(self.model.parameters()).device
        row = torch.tensor([ids], device=place)
        written = self.model.generate(row, tokens, temperature=temperature, top_k=top_k, seed=seed)
        return self.tokenizer.decode(written[0, len(ids) :].tolist())


def open_writer(directory: Path, id: int | None, show_training: ShowTraining) -> Writer:
    """The trained model of a run's candidate (the best one by default), of a training, or of an export.

    Args, Raises: as `star.trained.open_trained`; ValueError as well for a model without a tokenizer.
    """
    trained = open_trained(directory, id, show_training)
    if trained.tokenizer is None:
        raise ValueError(f"{directory} has no tokenizer.json, so its model knows token ids alone")
    return Writer(trained.name, trained.model, trained.tokenizer)
