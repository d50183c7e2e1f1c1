"""An export on disk, written at once and read with care: config.json, weights, and what else belongs to it.

    config.json         model_type "star", the genome and the sizes
    model.safetensors   the weights, named "model.*" and each stored once
    tokenizer.json, tokenizer_config.json, generation_config.json, README.md, backbone.svg

This module needs no transformers; `star.hf` reads the same files with it. Nothing is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from star import weights
from star.config import ModelConfig
from star.genome import Genome
from star.model import StarModel

__all__ = [
    "CONFIG",
    "MODEL_TYPE",
    "PREFIX",
    "TOKENIZER",
    "WEIGHTS",
    "config_of",
    "is_export",
    "load_weights",
    "named_tensors",
    "publish",
    "read_config",
    "read_model_type",
    "weight_files",
]

MODEL_TYPE = "star"
PREFIX = "model."
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
TOKENIZER = "tokenizer.json"
_CONFIG_BYTES_AT_MOST = 1 << 20
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# --------------------------------------------------------------------------------------------------------
# What is in it


def config_of(model: StarModel) -> dict[str, Any]:
    """config.json of a model, as `star.hf.StarConfig` reads it."""
    return {
        "architectures": ["StarForCausalLM"],
        "model_type": MODEL_TYPE,
        "genome": str(model.genome),
        **model.config.to_json(),
        "dtype": str(model.embedding.weight.dtype).removeprefix("torch."),
        "tie_word_embeddings": True,
        "use_cache": True,
    }


def named_tensors(model: StarModel) -> dict[str, Tensor]:
    """The tensors of model.safetensors, each once."""
    return {f"{PREFIX}{name}": tensor for name, tensor in weights.unique_tensors(model).items()}


# --------------------------------------------------------------------------------------------------------
# Reading


def is_export(directory: Path) -> bool:
    """Whether it looks like a model's directory, and not like a run or a training."""
    others = ("run.db", "training.json")
    return (directory / CONFIG).is_file() and not any((directory / name).exists() for name in others)


def read_config(directory: Path) -> tuple[Genome, ModelConfig, torch.dtype]:
    """Genome, sizes and dtype of an export.

    Raises:
        ValueError: config.json is damaged, of another kind of model, or names no model that can be built.
        OSError: it can not be read.
    """
    path = directory / CONFIG
    value = _read_json(path)
    kind = value.get("model_type")
    if kind != MODEL_TYPE:
        raise ValueError(
            f"{directory} holds a model of type {kind!r}; star takes {MODEL_TYPE!r}, transformers the others"
        )
    try:
        if not isinstance(value.get("genome"), str):
            raise ValueError("genome is missing")
        genome = Genome.parse(value["genome"]).require_valid()
        names = [field.name for field in dataclasses.fields(ModelConfig)]
        config = ModelConfig.from_json({name: value[name] for name in names if name in value})
        dtype = value.get("dtype", "float32")
        if dtype not in _DTYPES:
            raise ValueError(f"dtype is {dtype!r}, takes one of {', '.join(_DTYPES)}")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return genome, config, _DTYPES[dtype]


def read_model_type(directory: Path) -> str | None:
    """The `model_type` of a model's directory; None where it names none or can not be read."""
    try:
        kind = _read_json(directory / CONFIG).get("model_type")
    except (OSError, ValueError):
        return None
    return kind if isinstance(kind, str) else None


def load_weights(model: StarModel, directory: Path) -> None:
    """Fills the model with the export's weights.

    Raises:
        ValueError: no sound safetensors file, or tensors that are not exactly the model's.
    """
    paths = weight_files(directory)
    if not paths:
        pickles = sorted(path.name for path in directory.glob("*.bin"))
        instead = f" ({pickles[0]} is a pickle, which may run anything, and is not read)" if pickles else ""
        raise ValueError(f"{directory} has no {WEIGHTS}{instead}")
    tensors: dict[str, Tensor] = {}
    for path in paths:
        tensors |= weights.read_plain(path)
    where = f"weights {str(directory / WEIGHTS)!r}"
    weights.copy_tensors(tensors, named_tensors(model), where)


def weight_files(directory: Path) -> list[Path]:
    """The files that hold an export's weights, by transformers' names: one, or else numbered ones."""
    whole = directory / WEIGHTS
    return [whole] if whole.is_file() else sorted(directory.glob("model-*-of-*.safetensors"))


def _read_json(path: Path) -> Mapping[str, Any]:
    with open(path, "rb") as file:
        raw = file.read(_CONFIG_BYTES_AT_MOST + 1)
    if len(raw) > _CONFIG_BYTES_AT_MOST:
        raise ValueError(f"{path} is larger than {_CONFIG_BYTES_AT_MOST} bytes: no configuration is")
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {str(error).splitlines()[0]}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}, not an object")
    return value


# --------------------------------------------------------------------------------------------------------
# Writing


def publish(directory: Path, write: Callable[[Path], None], *, replace: bool = False) -> None:
    """A directory with what `write` puts into it, whole or not at all.

    Args:
        directory: must not exist, or be empty; its parents are made.
        write: fills the folder it is given.
        replace: an export that is there gives way to the new one.

    Raises:
        ValueError: something is there that is not to be replaced.
        OSError: no room, or no right to write; nothing is left behind, and what was there stays.
    """
    occupied = directory.is_symlink() or directory.exists()
    if occupied and not directory.is_dir():
        raise ValueError(f"{directory} is there already and no directory")
    is_empty = occupied and not directory.is_symlink() and not any(directory.iterdir())
    if occupied and not is_empty:
        if not replace:
            raise ValueError(f"{directory} is there already; --force replaces an export")
        if directory.is_symlink() or not is_export(directory):
            raise ValueError(f"{directory} is no export, so it is not replaced; name another directory")
    directory.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        write(folder)
        for path in [*folder.rglob("*"), folder]:
            _flush_to_disk(path)
        folder.chmod(0o755)  # mkdtemp's 0700 would lock other users out
        if occupied and not is_empty:
            before = folder.with_name(f"{folder.name}.before")
            os.rename(directory, before)
            try:
                os.rename(folder, directory)
            except BaseException:  # an interruption, too
                os.rename(before, directory)
                raise
            shutil.rmtree(before)
        else:
            os.rename(folder, directory)
        _flush_to_disk(directory.parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
