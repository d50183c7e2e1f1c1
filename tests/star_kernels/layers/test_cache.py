"""Inference caches on their own: what is allocated, shared, written and counted."""

from __future__ import annotations

import pytest
import torch

from star_kernels.cache import CacheTensor, LayerCache, ModelCache

WANTED = [
    CacheTensor("key", (8, 3), "position", ("key",)),
    CacheTensor("mixed", (8, 5), "position", ("key", "value")),
    CacheTensor("tail", (2, 3), "tail"),
    CacheTensor("state", (3, 4), "state"),
]


def allocate(
    source: LayerCache | None = None, shared: tuple[str, ...] = (), dtype: torch.dtype = torch.bfloat16
) -> LayerCache:
    return LayerCache.allocate(WANTED, 2, 8, dtype=dtype, device="cpu", source=source, shared=shared)


@pytest.mark.parametrize(
    ("dtype", "state"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_states_are_at_least_float32(dtype: torch.dtype, state: torch.dtype) -> None:
    cache = allocate(dtype=dtype)
    assert {name: tensor.dtype for name, tensor in cache.tensors.items()} == {
        "key": dtype,
        "mixed": dtype,
        "tail": dtype,
        "state": state,
    }
    assert cache.tensors["key"].shape == (2, 8, 3)


def test_only_position_tensors_of_shared_groups_alone_are_common() -> None:
    source = allocate()
    cache = allocate(source, ("key",))
    common = {name for name in cache.tensors if cache.tensors[name] is source.tensors[name]}
    assert common == cache.aliased == {"key"}
    both = allocate(source, ("value", "key"))
    assert both.aliased == {"key", "mixed"}


def test_a_source_without_such_a_tensor_lends_none() -> None:
    source = LayerCache.allocate(WANTED[2:], 2, 8, dtype=torch.float32, device="cpu")
    assert not allocate(source, ("key", "value")).aliased


def test_extend_writes_behind_what_was_read() -> None:
    cache = allocate(dtype=torch.float32)
    cache.position = 3
    new = torch.ones(2, 2, 3)
    seen = cache.extend("key", new)
    assert seen.shape == (2, 5, 3)
    assert not seen[:, :3].any()
    assert (seen[:, 3:] == 1).all()
    assert seen.data_ptr() == cache.tensors["key"].data_ptr()
    assert cache.extend("key", new.double()).dtype == torch.float64


def test_extend_leaves_a_common_tensor_to_its_owner() -> None:
    source = allocate()
    cache = allocate(source, ("key",))
    cache.extend("key", torch.ones(2, 2, 3))
    assert not source.tensors["key"].any()


def test_bytes_of_a_model_count_common_tensors_once() -> None:
    source = allocate()
    cache = allocate(source, ("key",))
    own = 2 * 2 * (8 * 3 + 8 * 5 + 2 * 3) + 2 * 4 * 3 * 4
    assert source.nbytes == cache.nbytes == own
    assert ModelCache([source, cache]).nbytes == 2 * own - 2 * 2 * 8 * 3


def test_derive_computes_once() -> None:
    cache, calls = allocate(), []

    def compute() -> torch.Tensor:
        calls.append(1)
        return torch.ones(1)

    assert cache.derive("kernel", compute) is cache.derive("kernel", compute)
    assert len(calls) == 1


def test_reset_and_reorder() -> None:
    cache = ModelCache([allocate(), allocate()])
    for number, tensor in enumerate(cache.tensors()):
        tensor[0], tensor[1] = number, number + 1
    cache.reorder(torch.tensor([1, 1]))
    assert all((tensor == number + 1).all() for number, tensor in enumerate(cache.tensors()))
    cache.layers[0].position = cache.layers[1].position = 5
    assert (cache.position, cache.max_length) == (5, 8)
    cache.reset()
    assert cache.position == 0
    assert not any(tensor.any() for tensor in cache.tensors())
