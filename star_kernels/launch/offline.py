"""Compiles recorded launches for a GPU that need not be here, and reads what the compiler used.

Triton's own compiler and the disassembler that comes with it do all of it; no driver is touched.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from star_kernels.launch.kernel import Configuration, Launch
from star_kernels.launch.support import INTERPRETED


@dataclass(frozen=True)
class Target:
    """A device family to compile for, and how much shared memory one of its blocks may use."""

    family: str
    gpu: GPUTarget
    shared_limit: int


TARGETS = {
    "sm_80": Target("sm_80", GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": Target("sm_90", GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": Target("sm_100", GPUTarget("cuda", 100, 32), 227 * 1024),
    "sm_120": Target("sm_120", GPUTarget("cuda", 120, 32), 99 * 1024),
    "gfx942": Target("gfx942", GPUTarget("hip", "gfx942", 64), 64 * 1024),
}

_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
    torch.uint8: "u8",
    torch.int8: "i8",
}


@dataclass(frozen=True)
class Compiled:
    """What one kernel takes of a device.

    Attributes:
        registers: a thread.
        local: bytes of local memory a thread: registers that were spilled, or arrays that found no register.
        shared: bytes of shared memory a block.
        seconds: that compiling took; near 0 where Triton's cache had it.
    """

    registers: int
    local: int
    shared: int
    seconds: float


def compile_launch(launch: Launch, configuration: Configuration, target: Target) -> Compiled:
    """Compiles a recorded launch as Triton would for these arguments on that device.

    Raises:
        RuntimeError: the process runs Triton's interpreter, whose kernels can't be compiled.
        Exception: whatever Triton's compiler raises.
    """
    if INTERPRETED:
        raise RuntimeError("compiling needs a process without TRITON_INTERPRET=1")
    signature, constants, attributes = _specialise(launch, configuration)
    source = ASTSource(launch.kernel.function, signature, constants, attributes)
    options = {"num_warps": configuration.num_warps, "num_stages": configuration.num_stages}
    began = time.perf_counter()
    compiled = triton.compile(source, target=target.gpu, options=options)
    seconds = time.perf_counter() - began
    registers, local = _amd_usage(compiled) if target.gpu.backend == "hip" else _nvidia_usage(compiled)
    return Compiled(registers, local, compiled.metadata.shared, seconds)


def _specialise(launch: Launch, configuration: Configuration) -> tuple[dict[str, str], dict[str, Any], Any]:
    """Argument types, constants, and which arguments are multiples of 16, as Triton's launcher has them."""
    values = {**launch.arguments, **configuration.blocks}
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for position, parameter in enumerate(launch.kernel.function.params):
        value = values[parameter.name]
        fixed = parameter.do_not_specialize
        kind = "constexpr" if parameter.is_constexpr else "i32" if fixed and value == 1 else _type_of(value)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[parameter.name] = value
        elif kind.startswith("*") or (not fixed and kind in ("i32", "i64") and value % 16 == 0):
            attributes[(position,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _type_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + _TYPES[value.dtype]
    if value is None or value is True or value is False or (isinstance(value, int) and value == 1):
        return "i1" if isinstance(value, bool) else "constexpr"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    if isinstance(value, float):
        return "fp32"
    raise TypeError(f"a kernel argument is {value!r}; offline compiling takes tensors and numbers")


def _nvidia_usage(compiled: Any) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return usage["REG"], max(usage["STACK"], usage["LOCAL"])


def _amd_usage(compiled: Any) -> tuple[int, int]:
    text = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", text)
        return int(found.group(1)) if found else 0

    return field("vgpr_count") + field("agpr_count"), field("private_segment_fixed_size")
