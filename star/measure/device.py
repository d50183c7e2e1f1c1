"""The clock and the memory gauge of a device."""

from __future__ import annotations

import ctypes
import platform
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

__all__ = ["PeakMemory", "Timer", "device_name", "device_timer"]

Timer = Callable[[Callable[[], object]], float]
"""Calls something and says how many seconds it took."""

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): resets VmHWM, the peak of the resident set, to its present size


def device_timer(device: torch.device) -> Timer:
    """Wall time, on a GPU until its work is done."""
    wait = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)

    def timer(call: Callable[[], object]) -> float:
        wait()
        began = time.perf_counter()
        call()
        wait()
        return time.perf_counter() - began

    return timer


def device_name(device: torch.device) -> str:
    """The chip's name, "AMD EPYC 7763" or "NVIDIA H200"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


class PeakMemory:
    """Bytes that were in use at their peak since `begin`, beyond those in use then.

    On a GPU what torch has allocated; on a CPU the resident set of this process, which only Linux lets one
    reset (`supported`).
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._base = 0

    @property
    def supported(self) -> bool:
        return self._device.type == "cuda" or (sys.platform == "linux" and _CLEAR.exists())

    def begin(self) -> None:
        """Forget the peak until now. Garbage of Python's should have been collected before."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._base = torch.cuda.memory_allocated(self._device)
        elif self.supported:
            _return_freed_memory()
            _CLEAR.write_text(_RESET_PEAK)
            self._base = _kilobytes("VmRSS")

    def taken(self) -> int | None:
        """Bytes since `begin`; None where this machine can not say."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return max(0, torch.cuda.max_memory_allocated(self._device) - self._base)
        return max(0, _kilobytes("VmHWM") - self._base) * 1024 if self.supported else None


def _kilobytes(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"{_STATUS} has no {name}")
    return int(found[1])


def _return_freed_memory() -> None:
    """Freed memory that the C library keeps would hide what is taken from it next (glibc only)."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):  # another C library, which has no such call
        return
