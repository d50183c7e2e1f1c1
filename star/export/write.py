"""A model put together as a directory: configuration, weights, tokenizer, card and drawing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from star import draw, weights
from star.export import directory as layout
from star.export.card import PICTURE, card
from star.export.native import Native, as_native
from star.export.tokenizer import tokenizer_files

if TYPE_CHECKING:
    from star.trained import Trained

__all__ = ["export"]


def export(trained: Trained, directory: Path, *, native: bool = False, replace: bool = False) -> str:
    """Write the model to `directory`, whole or not at all.

    Args:
        trained: model, tokenizer and what is known of them.
        directory: must not exist, or be empty.
        native: as a class of transformers that computes the same.
        replace: an export that is there gives way.

    Returns:
        The class that loads it.

    Raises:
        ValueError: the directory holds something, the genome is no native class, or the tokenizer can not
            be written so that its ids stay.
        OSError: no room, or no right to write; nothing is left behind.
    """
    model = trained.model
    if native:
        chosen = as_native(model)
    else:
        chosen = Native("StarForCausalLM", layout.config_of(model), layout.named_tensors(model))
    files = {} if trained.tokenizer is None else tokenizer_files(trained.tokenizer)
    config = dict(chosen.config)
    if trained.tokenizer is not None:
        end = trained.tokenizer.separator
        special = {f"{name}_token_id": end for name in ("bos", "eos", "pad")}
        config |= special
        files["generation_config.json"] = _json(special)
    files[layout.CONFIG] = _json(config)
    text = card(
        model,
        trained.facts,
        architecture=chosen.architecture,
        has_tokenizer=trained.tokenizer is not None,
        remark=chosen.remark,
    )
    files["README.md"] = text.encode("utf-8")
    about = {"genome": str(model.genome), "config": model.config.to_json()}

    def write(folder: Path) -> None:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        draw.save(model.genome, folder / PICTURE)
        weights.write_tensors(chosen.tensors, folder / layout.WEIGHTS, about)

    layout.publish(directory, write, replace=replace)
    return chosen.architecture


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode("utf-8")
