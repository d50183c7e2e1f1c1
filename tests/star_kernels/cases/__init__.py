"""The situations in which every operator is compared with its definition: one row a situation."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class Maker:
    """Draws the float64 tensors of a case, the same on every run."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def unit(self, *shape: int) -> Tensor:
        """Rows of length one."""
        return torch.nn.functional.normalize(self.normal(*shape), dim=-1)


def offsets(*values: int) -> Tensor:
    """A cu_seqlens tensor."""
    return torch.tensor(values, dtype=torch.int32)


@dataclass(frozen=True)
class Case:
    """``operator(**make(Maker()))``, by keyword; floating tensors come as float64 and are cast by the test.

    Attributes:
        operator: public name in star_kernels.
        name: what the situation is.
        make: draws the arguments.
        constant: floating arguments that get no gradient.
        float32: floating arguments that stay float32 beside half-precision ones (weights, states).
        float32_output: the result is float32 whatever the dtype (a loss).
        interpreted: whether the tests run it in Triton's interpreter too; it takes minutes for large ones.
        tolerance: multiplies the tolerances, where a case is worse conditioned; say why.
    """

    operator: str
    name: str
    make: Callable[[Maker], dict[str, Any]]
    constant: frozenset[str] = frozenset()
    float32: frozenset[str] = frozenset()
    float32_output: bool = False
    interpreted: bool = True
    tolerance: float = 1.0

    @property
    def id(self) -> str:
        return f"{self.operator}-{self.name}"


def all_cases() -> Iterator[Case]:
    """Every family's cases: each module beside this file lists its own as CASES."""
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda found: found.name):
        yield from importlib.import_module(f"{__name__}.{module.name}").CASES
