"""Tuned configurations: data files, one a device family, and the user's own over them.

A table is JSON: ``{"device": ..., "source": ..., "configurations": {kernel: {shape: {block: size,
"num_warps": n, "num_stages": n}}}}``. ``star bench --tune`` writes one. The file that the environment
variable STAR_KERNELS_TABLE names is read before the shipped ones.

``source`` says where the configurations come from. "compiled, not timed": chosen from what the compiler says
of them (registers, shared memory, and so how many blocks a multiprocessor holds), with the ``reasons`` beside
them; nobody has timed them. "timed": the fastest of what ``star bench --tune`` tried on that device.

``"backends": {operator: "cuda" or "triton"}``, which is optional, says which of an operator's two GPU forms
was faster there; without it the CUDA one goes first.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

SHIPPED = Path(__file__).parent / "tuned"
VARIABLE = "STAR_KERNELS_TABLE"


@functools.cache
def family_of(device: torch.device) -> str:
    """The device's family, such as "sm_90" or "gfx942"; "cpu" for the interpreter."""
    if device.type != "cuda":
        return device.type
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@functools.cache
def lookup(family: str, kernel: str, shape: str) -> dict[str, int] | None:
    """The tuned configuration of a kernel for a shape label, or None: then the safe one answers."""
    for table in (_user_table(), table_of(family)):
        found = table.get(kernel, {}).get(shape)
        if found is not None:
            return dict(found)
    return None


@functools.cache
def table_of(family: str) -> dict[str, dict[str, dict[str, int]]]:
    """The shipped table of a device family; empty where none is shipped."""
    path = SHIPPED / f"{family}.json"
    return read(path) if path.exists() else {}


def source_of(family: str) -> str:
    """Where the configurations of a device family's shipped table come from; "" where none is shipped."""
    path = SHIPPED / f"{family}.json"
    return str(json.loads(path.read_text(encoding="utf-8"))["source"]) if path.exists() else ""


@functools.cache
def _user_table() -> dict[str, dict[str, dict[str, int]]]:
    named = os.environ.get(VARIABLE)
    return read(Path(named)) if named else {}


@functools.cache
def backend_of(family: str, operator: str) -> str | None:
    """Which of an operator's GPU forms was faster on a device family; None where nobody measured it."""
    named = os.environ.get(VARIABLE)
    shipped = SHIPPED / f"{family}.json"
    for path in ([Path(named)] if named else []) + ([shipped] if shipped.exists() else []):
        found = read_backends(path).get(operator)
        if found is not None:
            return found
    return None


@contextmanager
def using(path: Path) -> Iterator[None]:
    """Inside, ``path`` is the user's table, as if STAR_KERNELS_TABLE had named it from the start."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = str(path)
    _forget()
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before
        _forget()


def _forget() -> None:
    for cached in (lookup, _user_table, backend_of):
        cached.cache_clear()


def read_backends(path: Path) -> dict[str, str]:
    """The forms that a table file prefers, by operator.

    Raises:
        ValueError: the file is missing or damaged.
    """
    read(path)
    backends = json.loads(path.read_text(encoding="utf-8")).get("backends", {})
    if not isinstance(backends, dict) or not set(backends.values()) <= {"cuda", "triton"}:
        raise ValueError(f'{path}: "backends" takes operators with "cuda" or "triton", not {backends!r}')
    return backends


def read(path: Path) -> dict[str, dict[str, dict[str, int]]]:
    """The configurations in a table file.

    Raises:
        ValueError: the file is missing or damaged; the message names it and what is wrong.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no table of kernel configurations: {error}") from None
    configurations = content.get("configurations") if isinstance(content, dict) else None
    if not isinstance(configurations, dict):
        raise ValueError(f'{path}: no table of kernel configurations: it has no "configurations"')
    for kernel, shapes in configurations.items():
        for shape, values in shapes.items() if isinstance(shapes, dict) else [("", None)]:
            if not _is_configuration(values):
                raise ValueError(
                    f"{path}: {kernel}, {shape}: a configuration is block sizes, num_warps "
                    f"and num_stages, all positive integers, not {values!r}"
                )
    return configurations


def _is_configuration(values: Any) -> bool:
    return (
        isinstance(values, dict)
        and {"num_warps", "num_stages"} <= values.keys()
        and all(type(value) is int and value > 0 for value in values.values())
    )
