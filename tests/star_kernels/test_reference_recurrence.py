"""The recurrences' definitions against literal loops of their equations, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import star_kernels as sk
from star_kernels.recurrence import chunks

torch.set_num_threads(1)

LENGTHS = (0, 1, 2, 17, 70, 133)


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_()


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    assert torch.isfinite(actual).all()
    norm = expected.norm().clamp_min(1e-12)
    assert ((actual - expected).norm() / norm).item() < tolerance


def same_with_gradients(
    actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], inputs: list[Tensor]
) -> None:
    """Outputs agree, and so do the gradients of one random functional of all of them."""
    for one, other in zip(actual, expected, strict=True):
        close(one, other)
    weights = [random(*one.shape, seed=9).detach() for one in actual]
    gradients = []
    for outputs in (actual, expected):
        total = sum((one * weight).sum() for one, weight in zip(outputs, weights, strict=True))
        gradients.append(torch.autograd.grad(total, inputs, allow_unused=True))
    for one, other, value in zip(*gradients, inputs, strict=True):
        zeros = torch.zeros_like(value)
        close(zeros if one is None else one, zeros if other is None else other)


def stacked(outputs: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(outputs, dim=1) if outputs else like[:, :0]


def literal_selective_scan(x, dt, A, B, C, D, z, dt_bias, softplus, state):
    if B.dim() == 4:
        B, C = (t.repeat_interleave(x.shape[2] // t.shape[2], dim=2) for t in (B, C))
    else:
        B, C = B[:, :, None], C[:, :, None]
    outputs = []
    for t in range(x.shape[1]):
        step = dt[:, t] if dt_bias is None else dt[:, t] + dt_bias
        step = torch.log1p(torch.exp(step)) if softplus else step
        state = torch.exp(step[..., None] * A) * state + (step * x[:, t])[..., None] * B[:, t]
        y = (state * C[:, t]).sum(-1)
        y = y if D is None else y + D * x[:, t]
        outputs.append(y if z is None else y * z[:, t] * torch.sigmoid(z[:, t]))
    return stacked(outputs, x), state


def literal_matrix_state(q, k, v, beta, log_decay, scale, state):
    """Gated linear attention where beta is None, the gated delta rule elsewhere."""
    q, k = (t.repeat_interleave(v.shape[2] // t.shape[2], dim=2) for t in (q, k))
    outputs = []
    for t in range(v.shape[1]):
        if log_decay is not None:
            decay = log_decay[:, t].exp()
            state = state * (decay[..., None] if decay.dim() == 3 else decay[..., None, None])
        value = v[:, t]
        if beta is not None:
            value = beta[:, t, :, None] * (value - torch.einsum("bhkv,bhk->bhv", state, k[:, t]))
        state = state + k[:, t, :, :, None] * value[:, :, None, :]
        outputs.append(scale * torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return stacked(outputs, v), state


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("with_state", [False, True])
def test_linear_scan(length: int, with_state: bool) -> None:
    decay, x, state = random(2, length, 5), random(2, length, 5, seed=1), random(2, 5)
    before = state if with_state else torch.zeros_like(state)
    outputs, h = [], before
    for t in range(length):
        h = decay[:, t] * h + x[:, t]
        outputs.append(h)
    actual = sk.linear_scan(decay, x, initial_state=state if with_state else None, return_final_state=True)
    same_with_gradients(actual, (stacked(outputs, x), h), [decay, x, *([state] if with_state else [])])


@pytest.mark.parametrize("length", [1, 2, 3, 8, 21])
def test_linear_scan_by_pairs(length: int) -> None:
    from star_kernels.recurrence.reference import _scan, _scan_by_pairs

    decay, x = random(2, length, 3), random(2, length, 3, seed=1)
    close(_scan_by_pairs(decay, x), _scan(decay, x, torch.zeros(2, 3, dtype=torch.float64))[0])


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("groups", [0, 1, 3])
@pytest.mark.parametrize("everything", [False, True])
def test_selective_scan(length: int, groups: int, everything: bool) -> None:
    batch, width, states = 2, 6, 4
    x, dt = random(batch, length, width), random(batch, length, width, seed=1)
    A = -random(width, states).detach().exp()
    A.requires_grad_()
    shape = (batch, length, groups, states) if groups else (batch, length, states)
    B, C = random(*shape, seed=2), random(*shape, seed=3)
    D, z, dt_bias, state = None, None, None, torch.zeros(batch, width, states, dtype=torch.float64)
    inputs = [x, dt, A, B, C]
    if everything:
        D, z, dt_bias = random(width), random(batch, length, width, seed=4), random(width, seed=5)
        state = random(batch, width, states)
        inputs += [D, z, dt_bias, state]
    expected = literal_selective_scan(x, dt, A, B, C, D, z, dt_bias, everything, state)
    actual = sk.selective_scan(
        x,
        dt,
        A,
        B,
        C,
        D,
        z,
        dt_bias,
        dt_softplus=everything,
        initial_state=state if everything else None,
        return_final_state=True,
    )
    same_with_gradients(actual, expected, inputs)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("decay", [None, "head", "key"])
@pytest.mark.parametrize("rule", ["linear", "delta"])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_matrix_states(length: int, decay: str | None, rule: str, heads: int) -> None:
    batch, value_heads, keys, values = 2, 4, 5, 3
    q, k = (random(batch, length, heads, keys, seed=i, scale=0.5) for i in (0, 1))
    v, beta = random(batch, length, value_heads, values, seed=2), random(batch, length, value_heads).sigmoid()
    shape = (batch, length, value_heads) + ((keys,) if decay == "key" else ())
    log_decay = None if decay is None else (-random(*shape, seed=3).detach().exp()).requires_grad_()
    state = random(batch, value_heads, keys, values)
    extra = [] if log_decay is None else [log_decay]
    if rule == "linear":
        actual = sk.gated_linear_attention(q, k, v, log_decay, initial_state=state, return_final_state=True)
        expected = literal_matrix_state(q, k, v, None, log_decay, 1 / math.sqrt(keys), state)
        same_with_gradients(actual, expected, [q, k, v, state, *extra])
    else:
        arguments = (q, k, v, beta, log_decay)
        actual = sk.gated_delta_rule(*arguments, scale=0.7, initial_state=state, return_final_state=True)
        expected = literal_matrix_state(*arguments, 0.7, state)
        same_with_gradients(actual, expected, [q, k, v, beta, state, *extra])


@pytest.mark.parametrize("decay", ["head", "key"])
@pytest.mark.parametrize("rule", ["linear", "delta"])
def test_strong_decays_cancel_nothing(decay: str, rule: str) -> None:
    """A log-decay of -1000 or -inf between weak ones costs no accuracy, in float32 either."""
    length, heads, keys = 2 * chunks.CHUNK, 2, 4
    shape = (1, length, heads) + ((keys,) if decay == "key" else ())
    log_decay = -random(*shape).detach().abs() / 10
    log_decay[:, 5], log_decay[:, 40], log_decay[:, 70] = -1000.0, -torch.inf, -80.0
    q, k, v = (random(1, length, heads, keys, seed=i, scale=0.5).detach() for i in range(3))
    beta = None if rule == "linear" else random(1, length, heads).sigmoid().detach()
    state = torch.zeros(1, heads, keys, keys, dtype=torch.float64)
    expected, _ = literal_matrix_state(q, k, v, beta, log_decay, 1.0, state)
    arguments = [t.float().requires_grad_() for t in (q, k, v, *([] if beta is None else [beta]), log_decay)]
    function = sk.gated_linear_attention if rule == "linear" else sk.gated_delta_rule
    y = function(*arguments, scale=1.0, backend="reference")
    assert ((y - expected).norm() / expected.norm()).item() < 1e-6
    y.sum().backward()
    assert all(torch.isfinite(tensor.grad).all() for tensor in arguments)


def literal_gru(xz, xr, xh, az, ar, ah, h):
    outputs = []
    for t in range(xz.shape[1]):
        z, r = torch.sigmoid(xz[:, t] + az * h), torch.sigmoid(xr[:, t] + ar * h)
        h = (1 - z) * h + z * torch.tanh(xh[:, t] + ah * (r * h))
        outputs.append(h)
    return stacked(outputs, xz), h


def literal_lstm(xf, xo, xz, af, ao, az, c, h):
    outputs = []
    for t in range(xf.shape[1]):
        f, o = torch.sigmoid(xf[:, t] + af * h), torch.sigmoid(xo[:, t] + ao * h)
        c = f * c + (1 - f) * torch.tanh(xz[:, t] + az * h)
        h = o * torch.tanh(c)
        outputs.append(h)
    return stacked(outputs, xf), c, h


@pytest.mark.parametrize("length", LENGTHS)
def test_cells(length: int) -> None:
    inputs = [random(2, length, 5, seed=i) for i in range(3)] + [
        random(5, seed=i, scale=2.0) for i in range(3)
    ]
    c, h = random(2, 5), random(2, 5, seed=1)
    actual = sk.gru_scan(*inputs, initial_state=h, return_final_state=True)
    same_with_gradients(actual, literal_gru(*inputs, h), [*inputs, h])
    y, after = sk.lstm_scan(*inputs, initial_state=(c, h), return_final_state=True)
    same_with_gradients((y, *after), literal_lstm(*inputs, c, h), [*inputs, c, h])


def packed_calls():
    length, offsets = 30, torch.tensor([0, 7, 7, 8, 30], dtype=torch.int32)
    x, decay = random(1, length, 6), random(1, length, 6, seed=1)
    yield "linear_scan", (decay, x), offsets, (6,)
    B, C = random(1, length, 3, seed=1), random(1, length, 3, seed=2)
    A = -random(6, 3).detach().exp()
    yield "selective_scan", (x, decay, A, B, C), offsets, (6, 3)
    q, k, v = (random(1, length, 2, 4, seed=i, scale=0.5) for i in range(3))
    log_decay = -random(1, length, 2, 4).detach().exp()
    beta = random(1, length, 2).sigmoid().detach()
    yield "gated_linear_attention", (q, k, v, log_decay), offsets, (2, 4, 4)
    yield "gated_delta_rule", (q, k, v, beta, log_decay), offsets, (2, 4, 4)


@pytest.mark.parametrize(
    ("name", "arguments", "offsets", "shape"),
    list(packed_calls()),
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_packed_sequences_stay_apart(name, arguments, offsets, shape) -> None:
    function, sequences = getattr(sk, name), len(offsets) - 1
    states = random(sequences, *shape)
    y, finals = function(*arguments, initial_state=states, return_final_state=True, cu_seqlens=offsets)
    for i, (start, end) in enumerate(zip(offsets.tolist(), offsets[1:].tolist(), strict=False)):
        pieces = [tensor[:, start:end] if tensor.shape[0] == 1 else tensor for tensor in arguments]
        alone, final = function(*pieces, initial_state=states[i : i + 1], return_final_state=True)
        close(y[:, start:end], alone)
        close(finals[i : i + 1], final)


def test_steps_equal_the_whole_sequence() -> None:
    length = 9
    x, decay = random(2, length, 6).detach(), random(2, length, 6, seed=1).detach()
    state = torch.zeros(2, 6, dtype=torch.float64)
    y = torch.stack([sk.linear_scan_step(decay[:, t], x[:, t], state) for t in range(length)], dim=1)
    close(y, sk.linear_scan(decay, x))

    B, C = (random(2, length, 3, 2, seed=i).detach() for i in (1, 2))
    A, D, bias, z = -random(6, 2).detach().exp(), random(6).detach(), random(6, seed=1).detach(), x.flip(1)
    state = torch.zeros(2, 6, 2, dtype=torch.float64)
    steps = [
        sk.selective_scan_step(
            x[:, t], decay[:, t], A, B[:, t], C[:, t], state, D, z[:, t], bias, dt_softplus=True
        )
        for t in range(length)
    ]
    close(torch.stack(steps, dim=1), sk.selective_scan(x, decay, A, B, C, D, z, bias, dt_softplus=True))

    q, k = (random(2, length, 2, 4, seed=i, scale=0.5).detach() for i in (0, 1))
    v, beta = random(2, length, 4, 3).detach(), random(2, length, 4).sigmoid().detach()
    log_decay = -random(2, length, 4, 4).detach().exp()
    state = torch.zeros(2, 4, 4, 3, dtype=torch.float64)
    steps = [
        sk.gated_linear_attention_step(q[:, t], k[:, t], v[:, t], log_decay[:, t], state)
        for t in range(length)
    ]
    close(torch.stack(steps, dim=1), sk.gated_linear_attention(q, k, v, log_decay))
    state.zero_()
    steps = [
        sk.gated_delta_rule_step(q[:, t], k[:, t], v[:, t], beta[:, t], log_decay[:, t], state, scale=0.3)
        for t in range(length)
    ]
    close(torch.stack(steps, dim=1), sk.gated_delta_rule(q, k, v, beta, log_decay, scale=0.3))

    inputs, weights = (x, decay, x.flip(0)), (D, bias, D.flip(0))
    h, c = torch.zeros(2, 6, dtype=torch.float64), torch.zeros(2, 6, dtype=torch.float64)
    steps = [sk.gru_scan_step(*(tensor[:, t] for tensor in inputs), *weights, h) for t in range(length)]
    close(torch.stack(steps, dim=1), sk.gru_scan(*inputs, *weights))
    h.zero_()
    steps = [sk.lstm_scan_step(*(tensor[:, t] for tensor in inputs), *weights, c, h) for t in range(length)]
    close(torch.stack(steps, dim=1), sk.lstm_scan(*inputs, *weights))
