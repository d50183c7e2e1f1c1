"""How much memory a backward pass takes: states are computed again, not kept for every token."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from star_kernels import dispatch

PROGRAM = """
import re
import torch
import star_kernels

def memory(field):  # of this process alone; getrusage's peak is inherited from the one that started it
    with open("/proc/self/status") as file:
        return 1024 * int(re.search(field + r":\\s*(\\d+) kB", file.read()).group(1))

def backward(length, width, states):
    x, dt, z = (torch.rand(1, length, width).requires_grad_() for _ in range(3))
    A, D = (-torch.rand(width, states)).requires_grad_(), torch.rand(width).requires_grad_()
    B, C = (torch.randn(1, length, states).requires_grad_() for _ in range(2))
    inputs = [x, dt, A, B, C, D, z]
    y = star_kernels.selective_scan(*inputs, backend="cpp")
    dy, before = torch.ones_like(y), memory('VmRSS')
    gradients = torch.autograd.grad(y, inputs, dy)
    assert len(gradients) == 7
    return (memory('VmHWM') - before) / sum(4 * value.numel() for value in inputs)

torch.set_num_threads(2)
backward(64, 64, 16)  # threads and code
print(backward(2048, 3072, 16))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's accounts")
@pytest.mark.skipif(dispatch.form("selective_scan", "cpp") is None, reason="without compiled operators")
def test_selective_scan_backward_takes_at_most_twice_its_inputs() -> None:
    """Its gradients, as large as its inputs, among that; all states would be sixteen times as large."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert float(done.stdout) <= 2.0
