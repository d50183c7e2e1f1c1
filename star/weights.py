"""Weights and checkpoints as safetensors files: a tensor that several modules share is stored once.

Files appear under their name by one rename, whole or not at all. What else belongs to a file stands as JSON
in its header. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

__all__ = ["load_weights", "read_about", "read_plain", "read_tensors", "save_weights", "write_tensors"]

_ABOUT = "about"


def unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers by their first name, each tensor once."""
    saved = model.state_dict(keep_vars=True)
    seen: set[int] = set()
    tensors: dict[str, Tensor] = {}
    for name, tensor in saved.items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor
    return tensors


def save_weights(model: nn.Module, path: str | Path, about: Mapping[str, Any] | None = None) -> None:
    """Writes the model's weights to `path`, with `about` (JSON values) in the header. Raises OSError."""
    write_tensors(unique_tensors(model), path, about or {})


def load_weights(model: nn.Module, path: str | Path) -> dict[str, Any]:
    """Fills the model with the weights at `path`; returns what `save_weights` was given as `about`.

    Raises ValueError when the file is no safetensors file or its tensors are not exactly the model's.
    """
    tensors, about = read_tensors(path)
    copy_tensors(tensors, unique_tensors(model), f"weights {str(path)!r}")
    return about


def copy_tensors(source: Mapping[str, Tensor], target: Mapping[str, Tensor], where: str) -> None:
    """Copies tensors by name. Raises ValueError when names or shapes differ."""
    if missing := sorted(set(target) - set(source)):
        raise ValueError(f"{where}: tensor {missing[0]!r} is missing, of {len(missing)} missing")
    if extra := sorted(set(source) - set(target)):
        raise ValueError(f"{where}: tensor {extra[0]!r} is not in the model, of {len(extra)} such")
    for name, tensor in target.items():
        if source[name].shape != tensor.shape:
            got, takes = tuple(source[name].shape), tuple(tensor.shape)
            raise ValueError(f"{where}: tensor {name!r} has shape {got}, the model's has {takes}")
    with torch.no_grad():
        for name, tensor in target.items():
            tensor.copy_(source[name])


def _in_one_order(data: bytes) -> bytes:
    """The same file with its metadata sorted: safetensors writes them in another order every time, and equal
    weights shall be equal bytes."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8, and offsets count from there
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def write_tensors(tensors: Mapping[str, Tensor], path: str | Path, about: Mapping[str, Any]) -> None:
    """Writes tensors and JSON as one safetensors file, atomically. Raises OSError."""
    path = Path(path)
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = _in_one_order(
        safetensors.torch.save(plain, metadata={"format": "pt", _ABOUT: json.dumps(about, sort_keys=True)})
    )
    partial = path.with_name(f"{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the JSON of a file that `write_tensors` wrote. Raises ValueError when it is damaged."""
    about = read_about(path)
    return read_plain(path), about


def read_plain(path: str | Path) -> dict[str, Tensor]:
    """The tensors of any safetensors file. Raises ValueError when it is damaged."""
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"weights {str(path)!r}: not a sound safetensors file: {error}") from error


def read_about(path: str | Path) -> dict[str, Any]:
    """The JSON in the file's header alone. Raises ValueError when there is none."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})[_ABOUT])
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"weights {str(path)!r}: not a weights file of star: {error}") from error
    if not isinstance(about, dict):
        raise ValueError(f"weights {str(path)!r}: not a weights file of star: header holds no object")
    return about
