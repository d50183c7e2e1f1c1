"""Choosing a backend for everything inside a block."""

from __future__ import annotations

import pytest
import torch

import star_kernels
from star_kernels import dispatch

X = torch.randn(2, 5, 8)
STATE = torch.zeros(2, 8)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backends that answered, in order, of `glu` and `linear_scan_step`."""
    answered: list[str] = []

    def recording(backend: str) -> object:
        def form(*arguments: object, **options: object) -> object:
            answered.append(backend)
            return arguments[0]

        return form

    for operator in ("glu", "linear_scan_step"):
        forms = {
            backend: dispatch.Implementation(recording(backend), None, None)  # type: ignore[arg-type]
            for backend in ("cpp", "reference")
        }
        monkeypatch.setitem(dispatch._implementations, operator, forms)
    return answered


def test_use_holds_inside_and_is_put_back(asked: list[str]) -> None:
    with dispatch.use("reference"):
        star_kernels.glu(X, X)
        star_kernels.linear_scan_step(X[:, 0], X[:, 0], STATE)
        with dispatch.use(None):
            star_kernels.glu(X, X)
        star_kernels.glu(X, X)
    star_kernels.glu(X, X)
    assert asked == ["reference", "reference", "cpp", "reference", "cpp"]


def test_use_is_put_back_after_an_error(asked: list[str]) -> None:
    with pytest.raises(RuntimeError, match="inside"), dispatch.use("reference"):
        raise RuntimeError("inside")
    star_kernels.glu(X, X)
    assert asked == ["cpp"]


def test_a_named_backend_is_kept(asked: list[str]) -> None:
    with dispatch.use("reference"):
        star_kernels.glu(X, X, backend="cpp")
        star_kernels.linear_scan_step(X[:, 0], X[:, 0], STATE, backend="cpp")
    with dispatch.use("cpp"):
        star_kernels.glu(X, X)
        star_kernels.linear_scan_step(X[:, 0], X[:, 0], STATE)
    assert asked == ["cpp"] * 4


def test_what_a_backend_does_not_cover_raises() -> None:
    with dispatch.use("cuda"), pytest.raises(ValueError, match="glu: backend 'cuda' is not available"):
        star_kernels.glu(X, X)
    with pytest.raises(ValueError, match="backend is 'fast'; it takes None or 'cuda'"), dispatch.use("fast"):
        pass


def test_a_whole_model_agrees_under_the_reference() -> None:
    from star import ModelConfig, baselines, build_model

    model = build_model(baselines.striped_mamba(4), ModelConfig(width=64, head_dim=16), seed=0)
    ids = torch.randint(256, (1, 9), generator=torch.Generator().manual_seed(0))
    fastest = model(ids)
    with dispatch.use("reference"):
        reference = model(ids)
    torch.testing.assert_close(fastest, reference, rtol=1e-4, atol=1e-4)
