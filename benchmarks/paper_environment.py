"""What an experiment was begun with: versions, processor, and the held-out text; kept beside the plan."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.paper_plan import Folder, Plan
from star.data import load_corpus
from star.proxy import ProxySettings
from star.search.corpus import CorpusRecord
from star.training_directory import write_whole

__all__ = ["differences", "environment", "held_out", "read_environment", "record_environment"]


def environment(plan: Plan, corpus: CorpusRecord) -> dict[str, Any]:
    """Of this machine, now; plain JSON."""
    import torch

    from star.measure.device import device_name

    assert corpus.directory is not None
    text = load_corpus(Path(corpus.directory), name=corpus.name)
    return {
        "versions": {
            "Python": platform.python_version(),
            **{name: _version(name) for name in ("torch", "numpy", "pymoo", "star-kernels")},
        },
        "processor": device_name(torch.device("cpu")),
        "cores": os.cpu_count(),
        "threads": plan.search.proxy.threads or 1,
        "text": {
            "name": corpus.name,
            "content_hash": corpus.content_hash,
            "held_out_tokens": len(text.validation),
            "bytes_per_token": text.bytes_per_token,
        },
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "unknown"


def record_environment(folder: Folder, now: Mapping[str, Any]) -> list[str]:
    """Keep what the experiment was begun with; where that is there already, what differs now."""
    if folder.environment_file.exists():
        return list(differences(read_environment(folder), now))
    write_whole(folder.environment_file, (json.dumps(now, indent=1) + "\n").encode())
    return []


def read_environment(folder: Folder) -> dict[str, Any]:
    """What was recorded; empty before the experiment has begun.

    Raises:
        ValueError: the file is damaged.
    """
    if not folder.environment_file.exists():
        return {}
    try:
        found = json.loads(folder.environment_file.read_bytes())
    except ValueError:
        found = None
    parts = [found] if not isinstance(found, dict) else [found.get("versions"), found.get("text")]
    if not all(isinstance(part, dict) for part in parts):
        raise ValueError(f"{folder.environment_file} is damaged: it holds no versions or no text")
    return found


def differences(then: Any, now: Any, name: str = "") -> Iterator[str]:
    """Each value that two environments have different, as "torch was 2.12, is 2.13"."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys([*then, *now]):
            yield from differences(then.get(key), now.get(key), key)
    elif then != now:
        yield f"{name} was {then}, is {now}"


def held_out(proxy: ProxySettings, text: Mapping[str, Any]) -> tuple[set[int], int]:
    """Which windows of the held-out text an evaluation reads, by their numbers, as
    star.data.Corpus.validation_batches spreads them; and their bytes."""
    available = (text["held_out_tokens"] - 1) // proxy.length
    wanted = min(available, proxy.batch_size * proxy.validation_batches)
    windows = {place * available // wanted for place in range(wanted)}
    return windows, round(len(windows) * proxy.length * text["bytes_per_token"])
