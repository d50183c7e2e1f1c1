"""Settings for every test: one thread (tiny operators stall with more), no colours, no network."""

from __future__ import annotations

import importlib.util
import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import pytest
import torch

# The CUDA kernels on the CPU (tests/emulated_cuda.py) in the place of the CPU's own, for the whole process.
EMULATED = os.environ.get("STAR_EMULATED_CUDA")
if EMULATED:
    import star_kernels as star_kernels

    torch.ops.load_library(EMULATED)

# Without a GPU the Triton kernels are tested in Triton's interpreter, which must be chosen before the import.
elif not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if os.environ["TRITON_INTERPRET"] == "1" and importlib.util.find_spec("triton"):
        from tests.interpreter import quicken

        quicken()

# A shell's background jobs, and what they start, ignore Ctrl-C; tests that send it expect that it arrives.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile("default", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("default")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` are skipped where torch sees no CUDA device."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    if EMULATED:
        kept = [item for item in items if runs_emulated(item)]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
        items[:] = kept


def runs_emulated(item: pytest.Item) -> bool:
    """Whether a test reaches an emulated kernel: compiled rows of its operators, and all decode steps."""
    from tests.emulated_cuda import operators

    if item.path.name.startswith("test_steps_"):
        return True
    callspec = getattr(item, "callspec", None)
    if callspec is None or not isinstance(item, pytest.Function):
        return False
    case = callspec.params.get("case")
    # Where no form is left to be tried, the one row of a test has no case.
    operator = callspec.params.get("operator") if case is None else getattr(case, "operator", None)
    compiled = callspec.params.get("backend", "cpp") == "cpp" and "triton" not in item.name
    return compiled and operator in operators()
