"""The recurrences against code that shares nothing with ours: transformers' plain PyTorch functions."""

from __future__ import annotations

import importlib
import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import star_kernels as sk
from star_kernels import dispatch

pytest.importorskip("transformers")

BACKENDS = dispatch.available("linear_scan", torch.zeros(1))
LENGTH = 70


def theirs(model: str, name: str) -> Any:
    """A function of one of transformers' models, without the decorator that looks for faster ones."""
    return inspect.unwrap(
        getattr(importlib.import_module(f"transformers.models.{model}.modeling_{model}"), name)
    )


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert ((actual - expected).norm() / expected.norm()).item() < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_scan_is_the_scan_of_recurrent_gemma(backend: str) -> None:
    scan = theirs("recurrent_gemma", "RecurrentGemmaRglru")._rnn_scan
    decay, x, state = draw(2, LENGTH, 24).sigmoid(), draw(2, LENGTH, 24, seed=1), draw(2, 24)
    wanted, last = scan(None, x, decay, torch.zeros(2, LENGTH, 1, dtype=torch.bool), state)
    y, final = sk.linear_scan(decay, x, initial_state=state, return_final_state=True, backend=backend)
    close(y, wanted)
    close(final, last)


@pytest.mark.parametrize("backend", BACKENDS)
def test_selective_scan_is_mambas(backend: str) -> None:
    x, dt, z = (draw(2, LENGTH, 24, seed=i) for i in range(3))
    A, B, C = -draw(24, 16).exp(), draw(2, LENGTH, 16, seed=3), draw(2, LENGTH, 16, seed=4)
    D, bias = draw(24, seed=5), draw(24, seed=6)
    wanted, last = theirs("mamba", "mamba_selective_scan")(
        x.mT, dt.mT, A, B.mT, C.mT, D, z.mT, bias, delta_softplus=True, return_last_state=True
    )
    y, final = sk.selective_scan(
        x, dt, A, B, C, D, z, bias, dt_softplus=True, return_final_state=True, backend=backend
    )
    close(y, wanted.mT)
    close(final, last)


@pytest.mark.parametrize("backend", dispatch.available("selective_scan_step", torch.zeros(1)))
def test_selective_step_is_mambas(backend: str) -> None:
    x, dt, z = (draw(2, 24, seed=i) for i in range(3))
    A, B, C = -draw(24, 16).exp(), draw(2, 16, seed=3), draw(2, 16, seed=4)
    D, bias, state = draw(24, seed=5), draw(24, seed=6), draw(2, 24, 16)
    kept = state.clone()
    update = theirs("mamba", "mamba_selective_state_update")
    wanted = update(kept, x, dt, A, B, C, D, bias, dt_softplus=True, z=z)
    wanted = wanted[0] if isinstance(wanted, tuple) else wanted
    y = sk.selective_scan_step(x, dt, A, B, C, state, D, z, bias, dt_softplus=True, backend=backend)
    close(y, wanted.view_as(y))


@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_attention_with_a_decay_a_head_is_mamba2(backend: str) -> None:
    heads, groups, keys, values = 4, 2, 8, 12
    v, dt, A = draw(2, LENGTH, heads, values), draw(2, LENGTH, heads).sigmoid(), -draw(heads).exp()
    k, q = draw(2, LENGTH, groups, keys, seed=1), draw(2, LENGTH, groups, keys, seed=2)
    wanted, last = theirs("mamba2", "mamba2_chunk_scan")(v, dt, A, k, q, 16, return_final_states=True)
    y, final = sk.gated_linear_attention(
        q, k, v * dt[..., None], A * dt, scale=1.0, return_final_state=True, backend=backend
    )
    close(y, wanted.view_as(y))
    close(final, last.mT)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gated_delta_rule_is_qwen3_nexts(backend: str) -> None:
    heads, keys, values = 3, 8, 12
    q, v = draw(2, LENGTH, heads, keys), draw(2, LENGTH, heads, values)
    k = torch.nn.functional.normalize(draw(2, LENGTH, heads, keys, seed=1), dim=-1)
    beta, log_decay = draw(2, LENGTH, heads).sigmoid(), -draw(2, LENGTH, heads, seed=1).exp()
    state = draw(2, heads, keys, values)
    wanted, last = theirs("qwen3_next", "torch_recurrent_gated_delta_rule")(
        q, k, v, log_decay, beta, initial_state=state, output_final_state=True
    )
    y, final = sk.gated_delta_rule(
        q,
        k,
        v,
        beta,
        log_decay,
        scale=1 / math.sqrt(keys),
        initial_state=state,
        return_final_state=True,
        backend=backend,
    )
    close(y, wanted)
    close(final, last)
