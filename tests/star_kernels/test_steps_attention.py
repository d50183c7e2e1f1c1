"""Decoding over a cache: what one-token calls must agree with, allocate and refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import star_kernels as sk
from star_kernels import dispatch

torch.set_num_threads(1)
BACKENDS = dispatch.available("attention_decode", torch.zeros(1))
compiled = pytest.mark.skipif("cpp" not in BACKENDS, reason="no compiled operators in this installation")


def cache(dtype: torch.dtype = torch.float32, capacity: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of every position (2, 20, 4, 16), and keys and values as two views of one cache."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, capacity, 4, 16, generator=generator).to(dtype)
    both = torch.randn(2, capacity, 4, 16, generator=generator).to(dtype)
    return q, both[:, :, :2], both[:, :, 2:]


def lengths(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [None, 5])
def test_step_by_step_is_attention(backend: str, window: int | None) -> None:
    q, k, v = cache()
    whole = sk.attention(q, k, v, window=window, backend="reference")
    for t in range(q.shape[1]):
        filled = lengths(t + 1, t + 1)
        y = sk.attention_decode(q[:, t], k, v, filled, window=window, backend=backend)
        torch.testing.assert_close(y, whole[:, t], rtol=1e-5, atol=1e-6)


LONG = [  # heads, key heads, key width, value width, capacity, lengths, window
    (1, 1, 64, 64, 700, (700,), None),
    (4, 1, 64, 64, 700, (700,), 300),
    (2, 1, 128, 128, 400, (400, 250), None),
    (6, 1, 96, 64, 300, (17, 300), None),
    (8, 1, 128, 128, 300, (290,), None),
    (9, 1, 40, 256, 150, (150,), None),
    (5, 1, 200, 248, 200, (200,), None),
    (3, 1, 19, 30, 400, (400,), 250),
    (2, 1, 33, 600, 300, (300,), None),
]
"""Long enough for a GPU to split a sequence's cache over blocks, for every form of its kernels."""

ON_A_GPU = [
    *LONG,
    (24, 24, 64, 64, 300, (300,) * 64, None),
    (1, 1, 64, 64, 16384, (16384,), None),
    (4, 1, 128, 128, 16384, (16300,), 9000),
    (8, 1, 128, 128, 16384, (16384,), None),
    (2, 1, 33, 600, 16384, (16001,), None),
]
"""Those, heads enough for whole caches, and more parts of a cache than a warp has lanes to join them with."""


def long_caches(
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    width: int,
    value_width: int,
    capacity: int,
    filled: tuple[int, ...],
    window: int | None,
) -> tuple[tuple[Tensor, ...], int | None]:
    """q, k, v and lengths; NaN beyond the lengths."""
    generator = torch.Generator().manual_seed(0)
    batch = len(filled)
    q = torch.randn(batch, heads, width, generator=generator).to(dtype)
    k = torch.randn(batch, capacity, kv_heads, width, generator=generator).to(dtype)
    v = torch.randn(batch, capacity, kv_heads, value_width, generator=generator).to(dtype)
    for row, length in enumerate(filled):
        k[row, length:], v[row, length:] = torch.nan, torch.nan
    return (q, k, v, lengths(*filled)), window


def reference_decode(q: Tensor, k: Tensor, v: Tensor, filled: Tensor, window: int | None) -> Tensor:
    wide = [tensor.double().cpu() for tensor in (q, k, v)]
    wide[1], wide[2] = wide[1].nan_to_num(), wide[2].nan_to_num()
    return sk.attention_decode(*wide, filled.cpu(), window=window, backend="reference")


def assert_close(got: Tensor, wanted: Tensor) -> None:
    allowed = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[got.dtype]
    assert (got.double().cpu() - wanted).norm() < allowed * wanted.norm()


@compiled
@pytest.mark.parametrize("dtype", dispatch.KERNEL_DTYPES)
@pytest.mark.parametrize("situation", LONG)
def test_long_caches(situation: Any, dtype: torch.dtype) -> None:
    tensors, window = long_caches(dtype, *situation)
    y = sk.attention_decode(*tensors, window=window)
    assert_close(y, reference_decode(*tensors, window))
    assert torch.equal(y, sk.attention_decode(*tensors, window=window))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", dispatch.KERNEL_DTYPES)
@pytest.mark.parametrize("situation", ON_A_GPU)
def test_on_a_gpu_in_a_graph(situation: Any, dtype: torch.dtype) -> None:
    """A captured step is replayed with other queries, caches and lengths than it was captured with."""
    tensors, window = long_caches(dtype, *situation)
    placed = [tensor.cuda() for tensor in tensors]
    wanted = reference_decode(*tensors, window)
    assert_close(sk.attention_decode(*placed, window=window, backend="cuda"), wanted)
    static = [torch.zeros_like(tensor) for tensor in placed]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = sk.attention_decode(*static, window=window, backend="cuda")
    for _ in range(2):
        for into, tensor in zip(static, placed, strict=True):
            into.copy_(tensor)
        y.fill_(torch.nan)
        graph.replay()
        assert_close(y, wanted)


@compiled
@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({0: torch.zeros(2, 4)}, "q must be"),
        ({0: torch.zeros(2, 3, 16)}, "multiple of Hkv"),
        ({0: torch.zeros(2, 4, 0), 1: torch.zeros(2, 20, 2, 0)}, "head width"),
        ({1: torch.zeros(2, 20, 2, 8)}, "k_cache has a wrong shape"),
        ({1: torch.zeros(2, 20, 2, 16, dtype=torch.float16)}, "k_cache has a wrong dtype"),
        ({2: torch.zeros(2, 19, 2, 16)}, "v_cache has a wrong shape"),
        ({2: torch.zeros(2, 20, 2)}, "caches"),
        ({3: lengths(1, 2, 3)}, "lengths has a wrong shape"),
        ({3: torch.tensor([1, 2])}, "lengths has a wrong dtype"),
        ({5: 0}, "window must be positive"),
    ],
)
def test_the_operator_itself_refuses(wrong: dict[int, Any], words: str) -> None:
    q, k, v = cache()
    arguments = [q[:, 0], k, v, lengths(3, 4), None, None]
    for index, value in wrong.items():
        arguments[index] = value
    with pytest.raises((RuntimeError, NotImplementedError), match=words):
        torch.ops.star_kernels.attention_decode(*arguments)


@pytest.mark.parametrize("operator", ["attention", "diff_attention"])
def test_one_query_is_the_last_row(operator: str) -> None:
    q, k, v = cache()
    if operator == "attention":
        rows = [sk.attention(queries, k, v) for queries in (q, q[:, -1:])]
    else:
        lam = torch.tensor(0.3)
        rows = [sk.diff_attention(queries, k, queries * 2, k, v, lam) for queries in (q, q[:, -1:])]
    torch.testing.assert_close(rows[1], rows[0][:, -1:], rtol=1e-5, atol=1e-6)


@compiled
def test_entries_beyond_the_length_are_never_read() -> None:
    q, k, v = cache()
    clean = sk.attention_decode(q[:, 0], k[:, :6], v[:, :6], lengths(6, 3))
    k, v = k.clone(), v.clone()
    k[0, 6:], v[0, 6:], k[1, 3:], v[1, 3:] = (torch.nan,) * 4
    assert torch.equal(sk.attention_decode(q[:, 0], k, v, lengths(6, 3)), clean)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_allocated_but_the_output(dtype: torch.dtype) -> None:
    q, k, v = cache(dtype)
    q, filled = q[:, 0], lengths(20, 7)
    with torch.profiler.profile(profile_memory=True) as profile:
        y = sk.attention_decode(q, k, v, filled)
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert [event.nbytes() for event in changes] == [y.nbytes]


@compiled
@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        ({"lengths": lengths(3, 21)}, ValueError, "lengths holds 21; it takes 0 to Lmax = 20"),
        ({"lengths": torch.tensor([3, 4])}, TypeError, "lengths has dtype .*int64; it takes int32"),
        ({"lengths": None}, TypeError, "lengths is NoneType"),
        ({"k_cache": torch.zeros(2, 20, 3, 16)}, ValueError, "v_cache has shape|divisor of H = 4"),
        ({"v_cache": torch.zeros(2, 19, 2, 16)}, ValueError, "v_cache has shape"),
        ({"q": torch.zeros(2, 4, 8)}, ValueError, "k_cache has shape"),
        ({"window": 0}, ValueError, "window is 0"),
        ({"scale": "1"}, TypeError, "scale is '1'"),
    ],
)
def test_refusals_speak_of_the_arguments(wrong: dict[str, Any], error: type[Exception], words: str) -> None:
    q, k, v = cache()
    arguments = {"q": q[:, 0], "k_cache": k, "v_cache": v, "lengths": lengths(3, 4)} | wrong
    with pytest.raises(error, match=f"attention_decode: .*({words})"):
        sk.attention_decode(**arguments)


def test_second_derivatives_through_a_step() -> None:
    q, k, v = (tensor[:, :4].double() for tensor in cache(capacity=4))
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (q[:, 0], k, v)]

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sk.attention_decode(q, k, v, lengths(4, 2), window=3)

    assert torch.autograd.gradgradcheck(step, leaves)
