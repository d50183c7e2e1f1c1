"""Kernels and their launch: which configuration a call gets, and what is recorded instead of run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from star_kernels.launch import tables


@dataclass(frozen=True)
class Configuration:
    """How one kernel is compiled: its block sizes and what Triton's compiler is told."""

    blocks: Mapping[str, int] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2

    def to_json(self) -> dict[str, int]:
        return {**self.blocks, "num_warps": self.num_warps, "num_stages": self.num_stages}

    @staticmethod
    def from_json(values: Mapping[str, int]) -> Configuration:
        blocks = {name: value for name, value in values.items() if name not in ("num_warps", "num_stages")}
        return Configuration(blocks, values["num_warps"], values["num_stages"])

    def __getitem__(self, block: str) -> int:
        return self.blocks[block]


@dataclass(frozen=True)
class Launch:
    """One recorded launch: what compile checks and tuning need to repeat it."""

    kernel: Kernel
    shape: str
    grid: Callable[[Configuration], tuple[int, ...]]
    arguments: dict[str, Any]

    def run(self, configuration: Configuration) -> None:
        self.kernel.run(configuration, self.grid, self.arguments)


class Kernel:
    """One Triton kernel with the configurations that it may be compiled in.

    Args:
        name: unique; "<operator>_<part>", as the tables of tuned configurations name it.
        function: what ``triton.jit`` made.
        candidates: configurations that tuning tries. The first is the safe one, that any device of compute
            capability 8.0 or later and any gfx942 runs: at most 64 KiB of shared memory.
        shape: turns the constants of a launch that a tuned table tells apart into a short label, such as
            "head_dim=64"; one label for all if None.
        choose: the safe configuration of a launch where it depends on the arguments; the first candidate
            if None.
    """

    def __init__(
        self,
        name: str,
        function: Any,
        candidates: tuple[Configuration, ...],
        *,
        shape: Callable[[dict[str, Any]], str] | None = None,
        choose: Callable[[dict[str, Any]], Configuration] | None = None,
    ) -> None:
        self.name = name
        self.function = function
        self.candidates = candidates
        self._shape = shape
        self._choose = choose
        if name in _kernels:
            raise ValueError(f"two kernels are named {name}")
        _kernels[name] = self

    def shape(self, arguments: dict[str, Any]) -> str:
        """The label under which a tuned table files a launch with these arguments."""
        return "any" if self._shape is None else self._shape(arguments)

    def safe(self, arguments: dict[str, Any]) -> Configuration:
        """What a device without a tuned table gets."""
        return self.candidates[0] if self._choose is None else self._choose(arguments)

    def shipped(self, family: str, arguments: dict[str, Any]) -> Configuration:
        """What a call gets on this device family where the user has no table."""
        found = tables.table_of(family).get(self.name, {}).get(self.shape(arguments))
        return self.safe(arguments) if found is None else Configuration.from_json(found)

    def configuration(self, family: str, arguments: dict[str, Any]) -> Configuration:
        """What a call gets: of the user's table, the shipped one of this device family, or the safe one."""
        tuned = tables.lookup(family, self.name, self.shape(arguments))
        return self.safe(arguments) if tuned is None else Configuration.from_json(tuned)

    def launch(self, grid: Callable[[Configuration], tuple[int, ...]], **arguments: Any) -> None:
        """Runs the kernel on the device of its first tensor argument.

        Args:
            grid: the number of programs, given the configuration. A grid with a 0 in it runs nothing.
            arguments: the kernel's arguments by name, its constants that are no block sizes among them.
        """
        first = next(value for value in arguments.values() if isinstance(value, Tensor))
        if _records is not None:
            _records.append(Launch(self, self.shape(arguments), grid, arguments))
            if isinstance(first, FakeTensor):
                return
        if isinstance(first, FakeTensor) or torch.compiler.is_compiling():
            return
        self.run(self.configuration(tables.family_of(first.device), arguments), grid, arguments)

    def run(
        self,
        configuration: Configuration,
        grid: Callable[[Configuration], tuple[int, ...]],
        arguments: dict[str, Any],
    ) -> None:
        """Runs the kernel in one configuration."""
        size = grid(configuration)
        if 0 in size:
            return
        first = next(value for value in arguments.values() if isinstance(value, Tensor))
        elsewhere = first.is_cuda and first.device.index != torch.cuda.current_device()
        with torch.cuda.device(first.device) if elsewhere else nullcontext():
            self.function[size](
                **arguments,
                **configuration.blocks,
                num_warps=configuration.num_warps,
                num_stages=configuration.num_stages,
            )


_kernels: dict[str, Kernel] = {}
_records: list[Launch] | None = None


def kernels() -> dict[str, Kernel]:
    """Every kernel of the families imported so far, by name."""
    return dict(_kernels)


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Inside, launches are recorded; those on fake tensors (torch's FakeTensorMode) are only recorded."""
    global _records
    before, _records = _records, []
    try:
        yield _records
    finally:
        _records = before
