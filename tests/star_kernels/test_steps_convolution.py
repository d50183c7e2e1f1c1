"""Decode steps of the convolutions equal their parallel forms, token by token, on every backend."""

from __future__ import annotations

import pytest
import torch

import star_kernels as sk
from star_kernels import dispatch
from tests.conftest import EMULATED

BACKENDS = dispatch.available("short_conv_step", torch.zeros(1))
DTYPES = (torch.float32, torch.bfloat16)
DEVICES_OF_CUDA = [*(["cpu"] if EMULATED else []), pytest.param("cuda", marks=pytest.mark.gpu)]
"""Where the CUDA kernels run: on a GPU, or where they are emulated."""


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
@pytest.mark.parametrize("taps", [2, 3, 4, 6])
@pytest.mark.parametrize("gated", [False, True])
def test_short_steps_on_states_with_channels_first(gated: bool, taps: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    batch, width = 2, 70
    b, c, x = torch.randn(3, batch, width).to(dtype)
    weight, bias = torch.randn(width, taps), torch.randn(width)
    # One input more than the step reads, as transformers keeps them.
    kept = torch.randn(batch, width, taps).to(dtype)
    state = kept[:, :, 1:].transpose(1, 2)
    oldest, copied = kept[:, :, 0].clone(), state.contiguous()
    if gated:
        y, wanted = (sk.gated_short_conv_step(b, c, x, s, weight, bias) for s in (state, copied))
    else:
        y, wanted = (sk.short_conv_step(x, s, weight, bias, activation="silu") for s in (state, copied))
    torch.testing.assert_close(y, wanted, **tolerances(dtype))
    assert torch.equal(state, copied)
    assert torch.equal(kept[:, :, 0], oldest)


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


def at(position: int, kind: str, batch: int) -> int | torch.Tensor:
    """One position in every form that the steps take it in."""
    if kind == "int":
        return position
    dtype = torch.int32 if kind.startswith("int32") else torch.int64
    shape = {"scalar": (), "one": (1,), "each": (batch,)}[kind.split()[1]]
    return torch.full(shape, position, dtype=dtype)


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("kind", ["int32 scalar", "int64 one", "int32 each", "int64 each"])
def test_positions_in_tensors(kind: str, backend: str | None) -> None:
    torch.manual_seed(0)
    batch, width = 3, 5
    b, c, x = torch.randn(3, batch, width)
    kernel, skip = torch.randn(width, 6), torch.randn(width)
    for position in (0, 4, 7):
        histories = torch.randn(batch, 8, width).repeat(2, 1, 1, 1)
        wanted = sk.gated_long_conv_step(b, c, x, histories[0], kernel, skip, position=position)
        y = sk.gated_long_conv_step(
            b, c, x, histories[1], kernel, skip, position=at(position, kind, batch), backend=backend
        )
        torch.testing.assert_close(y, wanted)
        assert torch.equal(histories[0], histories[1])


LONG = [  # batch, width, capacity, kernel length, position
    (1, 40, 600, 600, 590),
    (9, 24, 300, 300, 299),
    (2, 19, 200, 150, 180),
    (3, 264, 90, 200, 64),
    (2, 16, 70, 0, 3),
]
"""Long enough for a GPU to split the history over blocks, for every form of its kernel."""


def long_step(
    dtype: torch.dtype, batch: int, width: int, capacity: int, kernel_length: int, position: int
) -> list[torch.Tensor]:
    """b, c, x, history, kernel, skip, positions; rows of the history that are not filled are NaN."""
    generator = torch.Generator().manual_seed(0)
    b, c, x = torch.randn(3, batch, width, generator=generator).to(dtype)
    history = torch.randn(batch, capacity, width, generator=generator).to(dtype)
    kernel = torch.randn(width, kernel_length, generator=generator) * 0.1
    positions = torch.tensor([max(position - 5 * row, 0) for row in range(batch)])
    for row, place in enumerate(positions.tolist()):
        history[row, place:] = torch.nan
    return [b, c, x, history, kernel, torch.randn(width, generator=generator), positions]


def check_long_step(step: list[torch.Tensor], y: torch.Tensor, history: torch.Tensor) -> None:
    """Row by row against the reference in float64."""
    *gates, before, kernel, skip, positions = (tensor.cpu() for tensor in step)
    for row, place in enumerate(positions.tolist()):
        wide = [tensor[row : row + 1].double() for tensor in (*gates, before)]
        wanted = sk.gated_long_conv_step(
            *wide, kernel.double(), skip.double(), position=place, backend="reference"
        )
        torch.testing.assert_close(y[row : row + 1].double().cpu(), wanted, **tolerances(y.dtype))
        written = (wide[0] * wide[2])[0].to(y.dtype)
        torch.testing.assert_close(history[row, place].cpu(), written)
        assert torch.equal(history[row, :place].cpu(), before[row, :place])
        assert history[row, place + 1 :].isnan().all()


@pytest.mark.parametrize("dtype", dispatch.KERNEL_DTYPES)
@pytest.mark.parametrize("layout", ["taps", "channels", "bfloat16"])
@pytest.mark.parametrize("situation", LONG)
def test_long_histories(situation: tuple[int, int, int, int, int], layout: str, dtype: torch.dtype) -> None:
    step = long_step(dtype, *situation)
    if layout == "channels":
        step[4] = step[4].T.contiguous().T
    elif layout == "bfloat16":
        step[4] = step[4].bfloat16()
    results = []
    for _ in range(2):
        *gates, before, kernel, skip, positions = step
        history = before.clone()
        results.append(sk.gated_long_conv_step(*gates, history, kernel, skip, position=positions))
        check_long_step(step, results[-1], history)
    assert torch.equal(*results)


def tolerances(dtype: torch.dtype) -> dict[str, float]:
    return {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 6e-2}


@pytest.mark.skipif(bool(EMULATED), reason="a GPU's kernels do not show positions to the host")
def test_positions_outside_the_history_raise_on_a_cpu() -> None:
    x, weight = torch.randn(2, 8), torch.randn(8, 3)
    with pytest.raises(ValueError, match="position is -1"):
        sk.long_conv_step(x, torch.zeros(2, 4, 8), weight, position=torch.tensor([0, -1]))


@pytest.mark.parametrize("device", DEVICES_OF_CUDA)
def test_positions_outside_the_history_write_nothing_on_a_gpu(device: str) -> None:
    x, history = torch.randn(3, 8, device=device), torch.randn(3, 4, 8, device=device)
    before, kernel = history.clone(), torch.randn(8, 3, device=device)
    y = sk.long_conv_step(x, history, kernel, position=torch.tensor([4, 2, -1], device=device))
    assert y[::2].isnan().all()
    assert y[1].isfinite().all()
    assert torch.equal(history[::2], before[::2])
    assert torch.equal(history[1, 2], x[1])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({2: torch.zeros(2, 4)}, "has a wrong shape"),
        ({1: torch.zeros(2, 5, dtype=torch.float16)}, "c has a wrong dtype"),
        ({3: torch.zeros(3, 2, 5)}, "state has a wrong shape"),
        ({3: torch.zeros(2, 2, 5, dtype=torch.float16)}, "state has a wrong dtype"),
        ({3: torch.zeros(1, 2, 5).expand(2, 2, 5)}, "state's elements must not share memory"),
        ({4: torch.zeros(5, 0)}, "at least one tap|state has a wrong shape"),
        ({4: torch.zeros(4, 3)}, "weight has a wrong shape"),
        ({5: torch.zeros(4)}, "bias has a wrong shape"),
    ],
)
def test_the_short_step_itself_refuses(wrong: dict[int, torch.Tensor], words: str) -> None:
    arguments = [*torch.randn(3, 2, 5), torch.zeros(2, 2, 5), torch.randn(5, 3), torch.randn(5)]
    for index, value in wrong.items():
        arguments[index] = value
    with pytest.raises(RuntimeError, match=words):
        torch.ops.star_kernels.gated_short_conv_step(*arguments)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({0: torch.zeros(2, 4)}, "b has a wrong shape"),
        ({2: torch.zeros(5)}, "x must be"),
        ({3: torch.zeros(3, 8, 5)}, "history has a wrong shape"),
        ({3: torch.zeros(2, 8, 5, dtype=torch.float16)}, "history has a wrong dtype"),
        ({3: torch.zeros(2, 5, 8).mT}, "history's last dimension"),
        ({3: torch.zeros(1, 8, 5).expand(2, 8, 5)}, "history's elements must not share memory"),
        ({4: torch.zeros(4, 3)}, "kernel has a wrong shape"),
        ({5: torch.zeros(4)}, "skip has a wrong shape"),
        ({6: 8}, "position is outside history"),
        ({6: -1}, "position is outside history"),
        ({6: torch.zeros(3, dtype=torch.int32)}, "position must hold"),
        ({6: torch.zeros(1)}, "position must be int32 or int64"),
    ],
)
def test_the_long_step_itself_refuses(wrong: dict[int, torch.Tensor | int], words: str) -> None:
    arguments = [*torch.randn(3, 2, 5), torch.zeros(2, 8, 5), torch.randn(5, 3), torch.randn(5), 4]
    for index, value in wrong.items():
        arguments[index] = value
    step = torch.ops.star_kernels.gated_long_conv_step
    with pytest.raises(RuntimeError, match=words):
        (step.tensor if isinstance(arguments[6], torch.Tensor) else step.default)(*arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", dispatch.KERNEL_DTYPES)
@pytest.mark.parametrize("situation", [*LONG, (64, 768, 512, 512, 500), (1, 40, 6000, 5000, 5400)])
def test_long_steps_on_a_gpu_in_a_graph(
    situation: tuple[int, int, int, int, int], dtype: torch.dtype
) -> None:
    """A captured step follows the positions that its tensor holds when it is replayed."""
    step = long_step(dtype, *situation)
    *gates, before, kernel, skip, positions = [tensor.cuda() for tensor in step]
    history, place = before.clone(), torch.zeros_like(positions)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = sk.gated_long_conv_step(*gates, history, kernel, skip, position=place, backend="cuda")
    for _ in range(2):
        history.copy_(before)
        place.copy_(positions)
        y.fill_(torch.nan)
        graph.replay()
        check_long_step(step, y, history)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", dispatch.KERNEL_DTYPES)
@pytest.mark.parametrize("taps", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("width", [17, 64, 768])
@pytest.mark.parametrize("gated", [False, True])
def test_short_steps_on_a_gpu_in_a_graph(gated: bool, width: int, taps: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    batch = 5
    b, c, x = torch.randn(3, batch, width, device="cuda").to(dtype)
    weight, bias = torch.randn(width, taps, device="cuda"), torch.randn(width, device="cuda")
    before = torch.randn(batch, taps - 1, width, device="cuda").to(dtype)
    state = before.clone()

    def step(state: torch.Tensor, backend: str) -> torch.Tensor:
        if gated:
            return sk.gated_short_conv_step(b, c, x, state, weight, bias, backend=backend)
        return sk.short_conv_step(x, state, weight, bias, activation="silu", backend=backend)

    final = before.clone()
    wanted = step(final, "reference")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step(state, "cuda")
    for _ in range(2):
        state.copy_(before)
        y.fill_(torch.nan)
        graph.replay()
        torch.testing.assert_close(y, wanted, **tolerances(dtype))
        torch.testing.assert_close(state, final, **tolerances(dtype))


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
    with pytest.raises(ValueError, match=r"position has shape \(3,\); it takes \(B,\)"):
        sk.long_conv_step(x, torch.zeros(2, 4, 8), weight, position=torch.zeros(3, dtype=torch.int32))
    with pytest.raises(TypeError, match=r"position has dtype torch\.float32"):
        sk.long_conv_step(x, torch.zeros(2, 4, 8), weight, position=torch.tensor(1.0))


@pytest.mark.parametrize("shape", [(2, 2, 1), (2, 1, 4), (1, 2, 4)])
def test_what_a_step_writes_into_shares_no_memory(shape: tuple[int, int, int]) -> None:
    x, weight = torch.randn(2, 4), torch.randn(4, 3)
    state = torch.zeros(shape).expand(2, 2, 4)
    with pytest.raises(ValueError, match="state is expanded along dimension"):
        sk.short_conv_step(x, state, weight)
    with pytest.raises(ValueError, match="history is expanded along dimension"):
        sk.long_conv_step(x, state, weight, position=0)


def test_an_unknown_activation_is_named() -> None:
    with pytest.raises(ValueError, match="activation is 'swish'"):
        sk.short_conv_step(torch.randn(2, 8), torch.zeros(2, 2, 8), torch.randn(8, 3), activation="swish")
