"""The evolutionary search: NSGA-II over genomes, its record, and the workers that train candidates.

    from star.search import RunStore, front, preset, resume, search

    search(preset("demo"), "runs/first")
    with RunStore.open("runs/first") as record:
        for evaluation in front.front(record.evaluations(), record.settings().objectives):
            print(evaluation.key, evaluation.objectives)

Names are loaded when they are first used: reading a record costs neither pymoo nor torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from star.search.errors import DiskFull, RunDamaged, RunError, RunInUse, SearchInterrupted
    from star.search.front import dominates_first_generation, hypervolume_by_generation
    from star.search.objectives import OBJECTIVES
    from star.search.run import resume, search
    from star.search.settings import PRESETS, DataSettings, SearchSettings, preset
    from star.search.store import Evaluation, RunStore

_MODULES = {
    "DataSettings": "settings",
    "DiskFull": "errors",
    "Evaluation": "store",
    "OBJECTIVES": "objectives",
    "PRESETS": "settings",
    "RunDamaged": "errors",
    "RunError": "errors",
    "RunInUse": "errors",
    "RunStore": "store",
    "SearchInterrupted": "errors",
    "SearchSettings": "settings",
    "dominates_first_generation": "front",
    "hypervolume_by_generation": "front",
    "preset": "settings",
    "resume": "run",
    "search": "run",
}

__all__ = [
    "OBJECTIVES",
    "PRESETS",
    "DataSettings",
    "DiskFull",
    "Evaluation",
    "RunDamaged",
    "RunError",
    "RunInUse",
    "RunStore",
    "SearchInterrupted",
    "SearchSettings",
    "dominates_first_generation",
    "hypervolume_by_generation",
    "preset",
    "resume",
    "search",
]


def __getattr__(name: str) -> Any:
    """Import a public name on its first use (PEP 562) and keep it."""
    if name not in _MODULES:
        raise AttributeError(f"module 'star.search' has no attribute {name!r}")
    value = getattr(import_module(f"star.search.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
