"""Which drivers and GPUs the CUDA operators take, and what is said of the others."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

import star_kernels
from star_kernels import dispatch, driver

ARCHITECTURES = "80;90a;100+PTX;120"


@pytest.mark.parametrize(
    ("arch", "capability", "runs"),
    [
        ("80", (8, 0), True),
        ("80", (8, 9), True),
        ("86", (8, 0), False),
        ("80", (9, 0), False),
        ("80", (7, 5), False),
        ("90a", (9, 0), True),
        ("90a", (9, 1), False),
        ("100", (10, 3), True),
        ("100", (12, 0), False),
        ("100f", (10, 3), True),
        ("100+PTX", (11, 0), True),
        ("100+PTX", (13, 0), True),
        ("100+PTX", (9, 0), False),
    ],
)
def test_which_gpus_an_architecture_covers(arch: str, capability: tuple[int, int], runs: bool) -> None:
    assert driver.covers(arch, capability) is runs


@pytest.mark.parametrize(
    "capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 1), (13, 0)]
)
def test_every_gpu_since_the_a100_is_served(capability: tuple[int, int]) -> None:
    assert driver.problem(13000, ARCHITECTURES, driver.Installed(13000, (capability,))) is None


def test_unfit_drivers_and_gpus_are_told_in_one_sentence() -> None:
    old = driver.problem(13000, ARCHITECTURES, driver.Installed(12040, ((9, 0),)))
    assert old is not None
    assert "up to CUDA 12.4" in old
    assert "built with 13.0" in old
    small = driver.problem(12080, ARCHITECTURES, driver.Installed(13000, ((7, 5), (6, 1))))
    assert small is not None
    assert "compute capability 6.1, 7.5" in small
    # Of two GPUs one is enough, and where nothing is known nothing is refused.
    assert driver.problem(12080, ARCHITECTURES, driver.Installed(13000, ((7, 5), (8, 0)))) is None
    assert driver.problem(13000, ARCHITECTURES, None) is None


def test_a_machine_without_a_driver_is_not_an_error() -> None:
    assert driver.installed("libno-such-library.so") is None
    assert driver.installed("libc.so.6") is None  # a library without NVML's functions


@pytest.fixture
def asked_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The state of the CUDA operators is asked again inside, and once more afterwards."""
    dispatch._cuda_problem.cache_clear()
    monkeypatch.setattr(dispatch, "_problems", dict(dispatch._problems))
    yield monkeypatch
    dispatch._cuda_problem.cache_clear()


def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if torch had CUDA and a device."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.parametrize("situation", ["as it is", "no object", "old driver"])
def test_a_named_backend_says_what_is_missing(asked_anew: pytest.MonkeyPatch, situation: str) -> None:
    """The other backends answer all the same."""
    told = "without CUDA|no CUDA device"
    if situation != "as it is":
        on_cuda(asked_anew)
        imported = dispatch.importlib.import_module

        def instead(name: str) -> object:
            if name != "star_kernels._C_cuda":
                return imported(name)
            if situation == "no object":
                raise ImportError("No module named 'star_kernels._C_cuda'")
            return SimpleNamespace(cuda_version=13000, architectures=ARCHITECTURES)

        asked_anew.setattr(dispatch.importlib, "import_module", instead)
        asked_anew.setattr(driver, "installed", lambda: driver.Installed(12040, ((9, 0),)))
        told = {"no object": "built without nvcc", "old driver": "up to CUDA 12.4"}[situation]
        if situation == "old driver":
            pytest.importorskip("star_kernels._C")
    assert dispatch.load_cuda() is False
    x = torch.randn(2, 3, 4)
    with pytest.raises(ValueError, match=told) as caught:
        star_kernels.rms_norm(x, torch.ones(4), backend="cuda")
    assert re.search("backend 'cuda'", str(caught.value))
    assert "\n" not in str(caught.value)
    assert star_kernels.rms_norm(x, torch.ones(4)).shape == x.shape
