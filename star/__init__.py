"""star: genomes of linear input-varying operators, the models they describe, and their evolution.

Everything here is loaded when it is first used, so that `import star` costs nothing and torch is imported
only by what computes:

    from star import Genome, ModelConfig, build_model, baselines, cost, pools
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from star import baselines, cost, pools
    from star.config import ModelConfig
    from star.genome import Genome
    from star.model import build_model

__all__ = ["Genome", "ModelConfig", "baselines", "build_model", "cost", "pools"]

# Public name -> (module, attribute); no attribute: the module itself.
_EXPORTS: dict[str, tuple[str, str | None]] = {
    "Genome": ("star.genome", "Genome"),
    "ModelConfig": ("star.config", "ModelConfig"),
    "baselines": ("star.baselines", None),
    "build_model": ("star.model", "build_model"),
    "cost": ("star.cost", None),
    "pools": ("star.pools", None),
}


def __getattr__(name: str) -> Any:
    """Import a public name on its first use (PEP 562) and keep it."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'star' has no attribute {name!r}")
    module_name, attribute = _EXPORTS[name]
    module = import_module(module_name)
    value = module if attribute is None else getattr(module, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
