"""Decode steps of the convolutions equal their parallel forms, token by token, on every backend."""

from __future__ import annotations

import pytest
import torch

import star_kernels as sk
from star_kernels import dispatch

BACKENDS = dispatch.available("short_conv_step", torch.zeros(1))
DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("taps", [1, 2, 3, 4])
@pytest.mark.parametrize("gated", [False, True])
def test_short_steps(gated: bool, taps: int, backend: str | None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    batch, length, width = 3, 6, 17
    b, c, x = torch.randn(3, batch, length, width).to(dtype)
    weight, bias = torch.randn(width, taps), torch.randn(width)
    state = torch.randn(batch, taps - 1, width).to(dtype)
    options = {"initial_state": state.clone(), "return_final_state": True, "backend": "reference"}
    if gated:
        wanted, final = sk.gated_short_conv(b, c, x, weight, bias, **options)
    else:
        wanted, final = sk.short_conv(x, weight, bias, activation="silu", **options)
    for t in range(length):
        if gated:
            y = sk.gated_short_conv_step(b[:, t], c[:, t], x[:, t], state, weight, bias, backend=backend)
        else:
            y = sk.short_conv_step(x[:, t], state, weight, bias, activation="silu", backend=backend)
        torch.testing.assert_close(y, wanted[:, t], **tolerances(dtype))
    torch.testing.assert_close(state, final)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kernel_length", [4, 9])
def test_long_steps(kernel_length: int, gated: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    batch, length, width = 2, 7, 5
    b, c, x = torch.randn(3, batch, length, width).to(dtype)
    kernel, skip = torch.randn(width, kernel_length), torch.randn(width)
    history = torch.full((batch, 8, width), torch.nan, dtype=dtype)
    wanted = sk.gated_long_conv(b, c, x, kernel, skip) if gated else sk.long_conv(x, kernel, skip)
    for t in range(length):
        if gated:
            y = sk.gated_long_conv_step(b[:, t], c[:, t], x[:, t], history, kernel, skip, position=t)
        else:
            y = sk.long_conv_step(x[:, t], history, kernel, skip, position=t)
        torch.testing.assert_close(y, wanted[:, t], **tolerances(dtype))


def tolerances(dtype: torch.dtype) -> dict[str, float]:
    return {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 6e-2}


def test_a_wrong_state_is_named() -> None:
    x, weight = torch.randn(2, 8), torch.randn(8, 3)
    with pytest.raises(
        ValueError, match=r"short_conv_step: state has shape \(2, 3, 8\); it takes \(B, K-1, D\)"
    ):
        sk.short_conv_step(x, torch.zeros(2, 3, 8), weight)
    with pytest.raises(TypeError, match=r"state has dtype torch\.float64"):
        sk.short_conv_step(x, torch.zeros(2, 2, 8, dtype=torch.float64), weight)
    with pytest.raises(ValueError, match="position is 4"):
        sk.long_conv_step(x, torch.zeros(2, 4, 8), weight, position=4)
