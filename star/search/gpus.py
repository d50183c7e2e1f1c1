"""How many local workers there are, and which GPU each of them gets."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from star.search.settings import SearchSettings

__all__ = ["FindGpus", "Placement", "place", "visible_gpus"]

FindGpus = Callable[[], tuple[str, ...]]

# Where no such file is there is no GPU, and torch need not be imported to know that: NVIDIA, AMD, WSL.
_DEVICE_FILES = ("nvidia[0-9]*", "kfd", "dxg")


@dataclass(frozen=True)
class Placement:
    """Local workers.

    Attributes:
        workers: how many.
        gpus: given to them by turns, as CUDA_VISIBLE_DEVICES names them; none where nothing is given out.
    """

    workers: int
    gpus: tuple[str, ...] = ()


def place(settings: SearchSettings, find_gpus: FindGpus) -> Placement:
    """The workers that the settings ask for, on this machine.

    Without `workers_per_gpu` there are as many as for a CPU, since each needs a core to drive its GPU.

    Raises:
        ValueError: `workers_per_gpu`, or the device cuda, on a machine without GPUs.
    """
    device, sharing = settings.proxy.device, settings.workers_per_gpu
    if device.startswith("cuda:"):  # all workers on this one
        return Placement(settings.worker_count() if sharing is None else sharing)
    gpus = () if device == "cpu" else find_gpus()
    if device == "cuda" and not gpus:
        raise ValueError("device is 'cuda', and this machine has no GPU that torch can use")
    if sharing is None:
        return Placement(settings.worker_count(), gpus)
    if not gpus:
        raise ValueError(f"workers_per_gpu is {sharing}, and this machine has no GPU that torch can use")
    return Placement(sharing * len(gpus), gpus)


def visible_gpus() -> tuple[str, ...]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them. Imports torch where there may
    be any."""
    if not any(any(Path("/dev").glob(pattern)) for pattern in _DEVICE_FILES):
        return ()
    import torch

    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return tuple(named[:count]) if named else tuple(map(str, range(count)))
