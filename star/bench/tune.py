"""Finds the fastest configuration of every Triton kernel on the device at hand, for `star bench --tune`.

Each operator is called once, forward and backward, while its launches are recorded; then every launch is
repeated with each of its kernel's candidates in turns, and the fastest becomes the line of a table that
`star_kernels` reads (the environment variable STAR_KERNELS_TABLE names it).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from star.bench.cases import Case, Fill, tensors
from star.bench.timing import Timing, interleaved
from star_kernels import dispatch

__all__ = ["Tuned", "faster_backends", "tune", "write_table"]


@dataclass(frozen=True)
class Tuned:
    """The fastest configuration of one kernel for one shape.

    Attributes:
        kernel, shape: as the table files it.
        configuration: its block sizes, num_warps and num_stages.
        seconds: of one launch with it.
        gain: how many times as fast as the configuration that the kernel gets without the user's table.
        refused: candidates that the device can't run, with the reason.
    """

    kernel: str
    shape: str
    configuration: dict[str, int]
    seconds: float
    gain: float
    refused: dict[str, str]


def tune(
    cases: Sequence[Case],
    *,
    dtype: torch.dtype,
    device: torch.device,
    seconds: float = 0.2,
    tell: Callable[[str], None] = lambda text: None,
) -> list[Tuned]:
    """Tunes the kernels of the cases' operators, for about ``seconds`` a kernel and shape.

    Raises:
        ValueError: an operator has no Triton form for this device.
    """
    found: dict[tuple[str, str], Tuned] = {}
    for case in cases:
        for launch in _launches(case, dtype, device):
            key = (launch.kernel.name, launch.shape)
            if key not in found:
                tell(f"{launch.kernel.name}, {launch.shape}")
                found[key] = _fastest(launch, device, seconds)
    return list(found.values())


def _launches(case: Case, dtype: torch.dtype, device: torch.device) -> list[Any]:
    arguments = case.make(case.sizes, Fill.seeded(dtype, device))
    function = dispatch.choose(case.operator, "triton", next(iter(tensors(arguments))))
    from star_kernels.launch import recording

    for position, value in enumerate(arguments):
        if isinstance(value, Tensor) and value.is_floating_point() and position not in case.constants:
            value.requires_grad_(case.gradients)
    with recording() as launches:
        results = [r for r in tensors(function(*arguments, **case.options(case.sizes))) if r.requires_grad]
        if results:
            torch.autograd.backward(results, [torch.randn_like(result) for result in results])
    return launches


def _fastest(launch: Any, device: torch.device, seconds: float) -> Tuned:
    from star_kernels.launch import tables

    shipped = launch.kernel.shipped(tables.family_of(device), launch.arguments)
    tried = (shipped, launch.kernel.safe(launch.arguments), *launch.kernel.candidates)
    candidates = [tried[number] for number in range(len(tried)) if tried[number] not in tried[:number]]
    calls: dict[str, Callable[[], object]] = {}
    by_name, refused = {}, {}
    for candidate in candidates:
        name = ", ".join(f"{block} {size}" for block, size in candidate.to_json().items())
        try:
            launch.run(candidate)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except Exception as error:  # too much shared memory, a shape it can't take: not for this device
            refused[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            continue
        calls[name], by_name[name] = partial(launch.run, candidate), candidate
    timings: dict[str, Timing] = interleaved(calls, seconds, device)
    names = list(timings)
    best = min(names, key=lambda name: timings[name].median)
    return Tuned(
        launch.kernel.name,
        launch.shape,
        by_name[best].to_json(),
        timings[best].median,
        timings[names[0]].median / timings[best].median,
        refused,
    )


def faster_backends(
    cases: Sequence[Case], table: Path, *, dtype: str, device: torch.device, seconds: float = 0.5
) -> dict[str, str]:
    """Which form is faster, with the table's configurations, of every operator with a CUDA and a Triton form:
    over all its cases together, forward and, where there is one, backward.
    """
    from star import bench
    from star_kernels.launch import tables

    total: dict[str, dict[str, float]] = {}
    with tables.using(table):
        for case in cases:
            if any(dispatch.form(case.operator, name) is None for name in ("cuda", "triton")):
                continue
            passes = "both" if case.gradients else "forward"
            calls = bench.calls(
                case, passes, dtype=dtype, device=str(device), backends=("cuda", "triton"), peers=False
            )
            for name, timing in interleaved(calls, seconds, device).items():
                sums = total.setdefault(case.operator, {})
                sums[name] = sums.get(name, 0.0) + timing.median
    return {operator: min(times, key=times.__getitem__) for operator, times in total.items()}


def write_table(
    tuned: Sequence[Tuned], path: Path, device: torch.device, backends: Mapping[str, str] | None = None
) -> None:
    """Writes, or adds to, a table of configurations; the file is whole or unchanged.

    Raises:
        ValueError: ``path`` exists and is no such table.
    """
    from star_kernels.launch import tables

    configurations = tables.read(path) if path.exists() else {}
    preferred = {**(tables.read_backends(path) if path.exists() else {}), **(backends or {})}
    for line in tuned:
        configurations.setdefault(line.kernel, {})[line.shape] = line.configuration
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "Triton's interpreter"
    content = {
        "device": name, "source": "timed", "torch": torch.__version__,
        "backends": preferred, "configurations": configurations,
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    beside.replace(path)
