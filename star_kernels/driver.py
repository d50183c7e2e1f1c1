"""Whether the NVIDIA driver and GPUs at hand can run the CUDA operators of this installation.

Asked of the driver's management library (NVML), which initialises no CUDA: a process that has initialised it
could no longer fork workers that use it.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass


@dataclass(frozen=True)
class Installed:
    """What NVML says of a machine: the CUDA release of its driver, as 13000, and its GPUs' capabilities."""

    cuda_version: int
    capabilities: tuple[tuple[int, int], ...]


def installed(library: str = "libnvidia-ml.so.1") -> Installed | None:
    """The driver and the GPUs of this machine, or None where NVML is not there or does not answer."""
    try:
        nvml = ctypes.CDLL(library)
    except OSError:
        return None
    try:
        if nvml.nvmlInit_v2() != 0:
            return None
        try:
            return _ask(nvml)
        finally:
            nvml.nvmlShutdown()
    except AttributeError:  # a library older than these functions
        return None


def _ask(nvml: ctypes.CDLL) -> Installed | None:
    version, count = ctypes.c_int(), ctypes.c_uint()
    if nvml.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(version)) != 0:
        return None
    if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
        return None
    capabilities = []
    for index in range(count.value):
        device, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
        if nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(device)) != 0:
            continue
        asked = nvml.nvmlDeviceGetCudaComputeCapability(device, ctypes.byref(major), ctypes.byref(minor))
        if asked == 0:
            capabilities.append((major.value, minor.value))
    return Installed(version.value, tuple(capabilities))


def problem(cuda_version: int, architectures: str, machine: Installed | None) -> str | None:
    """Why operators built with CUDA ``cuda_version`` (as 13000) for ``architectures`` (as "80;100+PTX") can't
    run on ``machine``, in one sentence; None where they can, or where nothing is known of the machine.

    A driver runs what any release of its own major version built, or of an earlier one.
    """
    if machine is None:
        return None
    if machine.cuda_version // 1000 < cuda_version // 1000:
        return (
            f"the NVIDIA driver goes up to CUDA {_release(machine.cuda_version)}, and the CUDA operators of "
            f"this installation are built with {_release(cuda_version)}: a newer driver, or a build with an "
            "older nvcc, puts that right"
        )
    archs = architectures.split(";")
    if machine.capabilities and not any(
        covers(arch, capability) for arch in archs for capability in machine.capabilities
    ):
        found = ", ".join(sorted({f"{major}.{minor}" for major, minor in machine.capabilities}))
        return (
            f"the CUDA operators of this installation are compiled for {', '.join(archs)}, and the GPUs here "
            f"have compute capability {found}"
        )
    return None


def covers(arch: str, capability: tuple[int, int]) -> bool:
    """Whether code for ``arch`` ("80", "90a", "100f" or "100+PTX") runs on a GPU of ``capability``."""
    number = arch.removesuffix("+PTX")
    digits = number.rstrip("af")
    built = int(digits[:-1]), int(digits[-1])
    if number.endswith("a"):
        return capability == built
    if arch.endswith("+PTX") and capability >= built:
        return True
    return capability[0] == built[0] and capability[1] >= built[1]


def _release(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"
