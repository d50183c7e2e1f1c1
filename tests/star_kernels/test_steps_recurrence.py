"""Decode steps of the recurrences equal their parallel forms, token by token, on every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import star_kernels as sk
from star_kernels import dispatch

BACKENDS = (None, *dispatch.available("linear_scan_step", torch.zeros(1)))
PLACES = [
    *((backend, "cpu") for backend in BACKENDS),
    *(pytest.param(backend, "cuda", marks=pytest.mark.gpu) for backend in (None, "cuda")),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LENGTH = 6

Situation = tuple[list[Tensor], list[Tensor], dict[str, Any], tuple[tuple[int, ...], ...]]


def draw(*shape: int) -> Tensor:
    return torch.randn(shape)


def linear(width: int) -> Situation:
    return [torch.rand(2, LENGTH, width), draw(2, LENGTH, width)], [], {}, ((2, width),)


def selective(width: int, states: int, groups: int, *, everything: bool) -> Situation:
    shape = (2, LENGTH, groups, states) if groups else (2, LENGTH, states)
    tokens = [draw(2, LENGTH, width), torch.rand(2, LENGTH, width), draw(*shape), draw(*shape)]
    weights = [-torch.rand(width, states)]
    if everything:
        tokens.append(draw(2, LENGTH, width))
        weights += [draw(width), draw(width)]
    return tokens, weights, {"dt_softplus": everything}, ((2, width, states),)


def matrix(heads: int, keys: int, values: int, decay: str | None, *, delta: bool) -> Situation:
    tokens = [draw(2, LENGTH, 2, keys), torch.nn.functional.normalize(draw(2, LENGTH, 2, keys), dim=-1)]
    tokens.append(draw(2, LENGTH, heads, values))
    if delta:
        tokens.append(torch.rand(2, LENGTH, heads))
    if decay:
        tokens.append(-torch.rand(2, LENGTH, heads, *([keys] if decay == "key" else [])))
    return tokens, [], {}, ((2, heads, keys, values),)


def cell(width: int, states: int) -> Situation:
    tokens = [draw(2, LENGTH, width) for _ in range(3)]
    return tokens, [draw(width) for _ in range(3)], {}, ((2, width),) * states


def selective_call(tokens: list[Tensor], weights: list[Tensor]) -> dict[str, Any]:
    x, dt, B, C, *gate = tokens
    named = {"x": x, "dt": dt, "A": weights[0], "B": B, "C": C}
    return named | ({"z": gate[0], "D": weights[1], "dt_bias": weights[2]} if gate else {})


def matrix_call(names: tuple[str, ...]) -> Callable[[list[Tensor], list[Tensor]], dict[str, Any]]:
    def name(tokens: list[Tensor], weights: list[Tensor]) -> dict[str, Any]:
        return {"log_decay": None} | dict(zip(names, tokens, strict=False))

    return name


def names_of(*names: str) -> Callable[[list[Tensor], list[Tensor]], dict[str, Any]]:
    return lambda tokens, weights: dict(zip(names, [*tokens, *weights], strict=True))


LINEAR = names_of("decay", "x")
ATTENTION = matrix_call(("q", "k", "v", "log_decay"))
DELTA = matrix_call(("q", "k", "v", "beta", "log_decay"))
GRU = names_of("xz", "xr", "xh", "az", "ar", "ah")
LSTM = names_of("xf", "xo", "xz", "af", "ao", "az")
SITUATIONS = [
    ("linear_scan", LINEAR, lambda: linear(19)),
    ("selective_scan", selective_call, lambda: selective(70, 16, 0, everything=True)),
    ("selective_scan", selective_call, lambda: selective(12, 5, 3, everything=True)),
    ("selective_scan", selective_call, lambda: selective(9, 2, 0, everything=False)),
    ("selective_scan", selective_call, lambda: selective(6, 132, 2, everything=True)),
    ("gated_linear_attention", ATTENTION, lambda: matrix(2, 8, 16, None, delta=False)),
    ("gated_linear_attention", ATTENTION, lambda: matrix(4, 7, 75, "head", delta=False)),
    ("gated_linear_attention", ATTENTION, lambda: matrix(2, 8, 5, "key", delta=False)),
    ("gated_delta_rule", DELTA, lambda: matrix(2, 8, 16, None, delta=True)),
    ("gated_delta_rule", DELTA, lambda: matrix(4, 7, 75, "head", delta=True)),
    ("gated_delta_rule", DELTA, lambda: matrix(2, 8, 5, "key", delta=True)),
    ("gated_linear_attention", ATTENTION, lambda: matrix(2, 300, 44, "key", delta=False)),
    ("gated_delta_rule", DELTA, lambda: matrix(2, 1100, 12, "head", delta=True)),
    ("gru_scan", GRU, lambda: cell(75, 1)),
    ("gru_scan", GRU, lambda: cell(16, 1)),
    ("lstm_scan", LSTM, lambda: cell(75, 2)),
    ("lstm_scan", LSTM, lambda: cell(16, 2)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("backend", "device"), PLACES)
@pytest.mark.parametrize(("operator", "name", "make"), SITUATIONS)
def test_steps(
    operator: str,
    name: Callable[[list[Tensor], list[Tensor]], dict[str, Any]],
    make: Callable[[], Situation],
    backend: str | None,
    device: str,
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(0)
    tokens, weights, options, shapes = make()
    # Every other row of a wider tensor, as a slice of a fused projection is.
    tokens = [torch.stack([token, token], dim=1).to(device, dtype)[:, 0] for token in tokens]
    weights = [weight.to(device) for weight in weights]
    states = [torch.stack([draw(*shape)] * 2, dim=1).to(device)[:, 1] for shape in shapes]
    initial = tuple(state.clone() for state in states)
    wanted, finals = getattr(sk, operator)(
        **name(tokens, weights),
        **options,
        initial_state=initial if len(initial) > 1 else initial[0],
        return_final_state=True,
        backend="reference",
    )
    state_names = ("state",) if len(states) == 1 else ("state_c", "state_h")
    for t in range(LENGTH):
        arguments = name([token[:, t] for token in tokens], weights)
        given = dict(zip(state_names, states, strict=True))
        y = getattr(sk, f"{operator}_step")(**arguments, **given, **options, backend=backend)
        assert y.dtype == dtype
        torch.testing.assert_close(y, wanted[:, t], **tolerances(dtype))
    finals = finals if isinstance(finals, tuple) else (finals,)
    for state, final in zip(states, finals, strict=True):
        torch.testing.assert_close(state, final, **tolerances(torch.float32))


@pytest.mark.gpu
@pytest.mark.parametrize(("operator", "name", "make"), SITUATIONS)
def test_steps_are_captured_in_cuda_graphs(
    operator: str,
    name: Callable[[list[Tensor], list[Tensor]], dict[str, Any]],
    make: Callable[[], Situation],
) -> None:
    """A replayed step updates its state as a call does, and reads what its inputs hold then."""
    torch.manual_seed(0)
    tokens, weights, options, shapes = make()
    weights = [weight.cuda() for weight in weights]
    states, wanted_states = ([torch.zeros(shape, device="cuda") for shape in shapes] for _ in range(2))
    state_names = ("state",) if len(states) == 1 else ("state_c", "state_h")
    inputs = [token[:, 0].cuda() for token in tokens]
    step = getattr(sk, f"{operator}_step")

    def call(tokens: list[Tensor], states: list[Tensor]) -> Tensor:
        given = dict(zip(state_names, states, strict=True))
        y: Tensor = step(**name(tokens, weights), **given, **options, backend="cuda")
        return y

    call(inputs, states)  # loads the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call(inputs, states)
    for state in states:
        state.zero_()
    for t in range(LENGTH):
        current = [token[:, t].cuda() for token in tokens]
        for static, token in zip(inputs, current, strict=True):
            static.copy_(token)
        graph.replay()
        assert torch.equal(y, call(current, wanted_states))
    for state, wanted in zip(states, wanted_states, strict=True):
        assert torch.equal(state, wanted)


def tolerances(dtype: torch.dtype) -> dict[str, float]:
    return {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}


def test_wrong_arguments_are_named() -> None:
    x = torch.randn(2, 8)
    with pytest.raises(ValueError, match=r"linear_scan_step: state has shape \(2, 7\); it takes \(B, D\)"):
        sk.linear_scan_step(x, x, torch.zeros(2, 7))
    with pytest.raises(
        TypeError, match=r"linear_scan_step: state has dtype torch.bfloat16; it takes torch.float32"
    ):
        sk.linear_scan_step(x, x, torch.zeros(2, 8, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="linear_scan_step: state is expanded along dimension 0"):
        sk.linear_scan_step(x, x, torch.zeros(1, 8).expand(2, 8))
    q, v = torch.randn(2, 2, 4), torch.randn(2, 2, 3)
    narrow = torch.randn(2, 2, 0)
    with pytest.raises(ValueError, match="gated_linear_attention_step: q has Dk = 0; it takes at least 1"):
        sk.gated_linear_attention_step(narrow, narrow, v, None, torch.zeros(2, 2, 0, 3))
    with pytest.raises(ValueError, match="gated_linear_attention: q has Dk = 0; it takes at least 1"):
        sk.gated_linear_attention(narrow[None], narrow[None], v[None])
    with pytest.raises(TypeError, match="gated_linear_attention_step: scale is 'a'"):
        sk.gated_linear_attention_step(q, q, v, None, torch.zeros(2, 2, 4, 3), scale="a")
    with pytest.raises(TypeError, match="selective_scan_step: B is NoneType"):
        sk.selective_scan_step(x, x, torch.zeros(8, 2), None, None, torch.zeros(2, 8, 2))
    with pytest.raises(TypeError, match="gru_scan_step: ah is NoneType"):
        sk.gru_scan_step(x, x, x, x[0], x[0], None, torch.zeros(2, 8))
    with pytest.raises(TypeError, match="lstm_scan_step: state_c is NoneType"):
        sk.lstm_scan_step(x, x, x, x[0], x[0], x[0], None, torch.zeros(2, 8))


SELECTIVE_NAMES = ("x", "dt", "A", "B", "C", "state", "D", "z", "dt_bias")
MATRIX_NAMES = ("q", "k", "v", "log_decay", "state")
ARGUMENTS: dict[str, tuple[tuple[str, ...], list[Any]]] = {
    "linear_scan_step": (("decay", "x", "state"), [(2, 8), (2, 8), (2, 8)]),
    "selective_scan_step": (
        SELECTIVE_NAMES,
        [(2, 8), (2, 8), (8, 4), (2, 4), (2, 4), (2, 8, 4), (8,), (2, 8), (8,), False],
    ),
    "gated_linear_attention_step": (
        MATRIX_NAMES,
        [(2, 2, 4), (2, 2, 4), (2, 2, 3), (2, 2, 4), (2, 2, 4, 3), 1.0],
    ),
    "gated_delta_rule_step": (
        (*MATRIX_NAMES[:3], "beta", *MATRIX_NAMES[3:]),
        [(2, 2, 4), (2, 2, 4), (2, 2, 3), (2, 2), (2, 2, 4), (2, 2, 4, 3), 1.0],
    ),
    "gru_scan_step": (("x", "x", "x", "a", "a", "a", "state"), [(2, 8)] * 3 + [(8,)] * 3 + [(2, 8)]),
    "lstm_scan_step": (
        ("x", "x", "x", "a", "a", "a", "state_c", "state"),
        [(2, 8)] * 3 + [(8,)] * 3 + [(2, 8)] * 2,
    ),
}
"""Arguments of the operators themselves: names, and tensors by their shapes."""

WEIGHTS = frozenset({"A", "D", "dt_bias", "a", "log_decay"})
"""Those that are converted to float32 where it takes that."""


@pytest.mark.skipif("cpp" not in BACKENDS, reason="needs the compiled operators")
@pytest.mark.parametrize("operator", ARGUMENTS)
def test_operators_refuse_wrong_arguments(operator: str) -> None:
    """Called past the public functions, with any argument wrong, an operator raises and touches nothing."""
    names, shapes = ARGUMENTS[operator]
    op = getattr(torch.ops.star_kernels, operator)
    right = [torch.rand(shape) if isinstance(shape, tuple) else shape for shape in shapes]
    op(*right)
    for i, name in enumerate(names):
        states = [argument.clone() for at, argument in zip(names, right, strict=False) if "state" in at]
        wrong = [right[i][..., :-1], right[i][None], right[i].to("meta")]
        if name not in WEIGHTS:
            wrong.append(right[i].to(torch.int64))
        if "state" in name:
            wrong.append(right[i].to(torch.bfloat16))
            wrong.append(right[i].mT.contiguous().mT)
        for value in wrong:
            with pytest.raises((RuntimeError, NotImplementedError)):
                op(*right[:i], value, *right[i + 1 :])
        kept = [argument for at, argument in zip(names, right, strict=False) if "state" in at]
        assert all(torch.equal(before, after) for before, after in zip(states, kept, strict=True))
