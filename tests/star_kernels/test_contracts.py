"""Bad arguments of every public function: one error that names the argument, never a crash."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import star_kernels
from star_kernels import dispatch
from tests.star_kernels.cases import Case, Maker, all_cases

FIRST_CASES = list({case.operator: case for case in reversed(list(all_cases()))}.values())
NAMES = {case.operator: case for case in FIRST_CASES}


def arguments_of(case: Case) -> dict[str, Any]:
    return {
        name: value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in case.make(Maker()).items()
    }


# What may go wrong with one tensor. Each gives something that no operator takes in its place.
TENSOR_FAULTS: dict[str, Callable[[Tensor], Any]] = {
    "text": lambda t: "text",
    "number": lambda t: 3.5,
    "list": lambda t: [1.0, 2.0],
    "numpy": lambda t: t.numpy(),
    "complex": lambda t: t.to(torch.complex64),
    "bool": lambda t: t.bool(),
    "int16": lambda t: t.to(torch.int16),
    "sparse": lambda t: t.to_sparse(),
    "scalar": lambda t: t.new_zeros(()) if t.dim() else t.new_zeros(2, 3, 4, 5, 6),
    "more-dims": lambda t: t[None, None, None, None],
    "larger": lambda t: t.repeat([3] * t.dim()) if t.dim() else t.new_zeros(7, 11),
    "other-device": lambda t: t.to("meta"),
}

LEGAL = {("rms_norm", "x", "more-dims")}
"""What is no fault: a norm takes any number of leading dimensions."""


@st.composite
def faulty_calls(draw: st.DrawFn) -> tuple[str, str, str]:
    operator = draw(st.sampled_from(sorted(NAMES)))
    tensors = [name for name, value in arguments_of(NAMES[operator]).items() if isinstance(value, Tensor)]
    return operator, draw(st.sampled_from(tensors)), draw(st.sampled_from(sorted(TENSOR_FAULTS)))


@settings(max_examples=400)
@given(faulty_calls())
def test_a_faulty_tensor_is_named(faulty: tuple[str, str, str]) -> None:
    operator, name, fault = faulty
    assume(faulty not in LEGAL)
    arguments = arguments_of(NAMES[operator])
    arguments[name] = TENSOR_FAULTS[fault](arguments[name])
    with pytest.raises((ValueError, TypeError)) as caught:
        getattr(star_kernels, operator)(**arguments)
    message = str(caught.value)
    assert message.startswith(f"{operator}: "), message
    assert "\n" not in message
    # A wrong size may be seen in another argument's disagreement with it; then both are named.
    assert re.search(rf"\b{name}\b", message) or fault in ("larger", "other-device"), message


@pytest.mark.parametrize("operator", sorted(NAMES))
@pytest.mark.parametrize("backend", ["", "fast", "CPP", 3])
def test_an_unknown_backend_is_named(operator: str, backend: Any) -> None:
    with pytest.raises(ValueError, match="backend is"):
        getattr(star_kernels, operator)(**arguments_of(NAMES[operator]), backend=backend)


@pytest.mark.parametrize("operator", sorted(NAMES))
def test_a_backend_that_does_not_cover_the_call_says_why(operator: str) -> None:
    arguments = arguments_of(NAMES[operator])
    missing = [name for name in dispatch.BACKENDS if name not in dispatch.available(operator, torch.zeros(1))]
    assert "reference" not in missing
    for backend in missing:
        with pytest.raises(ValueError, match=rf"{operator}: backend '{backend}'"):
            getattr(star_kernels, operator)(**arguments, backend=backend)


@pytest.mark.parametrize("operator", sorted(NAMES))
def test_arguments_beside_tensors_are_checked(operator: str) -> None:
    """Flags, choices and numbers of another type."""
    import inspect

    arguments = arguments_of(NAMES[operator])
    for name, parameter in inspect.signature(getattr(star_kernels, operator)).parameters.items():
        kind = str(parameter.annotation)
        if "Tensor" in kind or name == "backend" or parameter.kind is not parameter.KEYWORD_ONLY:
            continue
        wrong: list[Any] = ["sideways", object()] if "str" not in kind else [7, object()]
        for value in wrong:
            with pytest.raises((ValueError, TypeError)) as caught:
                getattr(star_kernels, operator)(**(arguments | {name: value}))
            assert str(caught.value).startswith(f"{operator}: {name}"), str(caught.value)


@pytest.mark.parametrize("offsets", [[], [0], [1, 5], [0, 9, 4], [0, -1, 5], [0, 2**30], [[0, 5]]], ids=repr)
def test_offsets_that_pack_nothing_right_are_refused(offsets: list[Any]) -> None:
    x, weight = torch.randn(1, 5, 4), torch.randn(4, 3)
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32)
    with pytest.raises(ValueError, match="short_conv: cu_seqlens"):
        star_kernels.short_conv(x, weight, cu_seqlens=cu_seqlens)


def test_offsets_of_another_integer_type_are_refused() -> None:
    with pytest.raises(TypeError, match=r"cu_seqlens has dtype torch\.int64; it takes int32"):
        star_kernels.short_conv(torch.randn(1, 5, 4), torch.randn(4, 3), cu_seqlens=torch.tensor([0, 5]))


def test_packed_sequences_need_a_batch_of_one() -> None:
    with pytest.raises(ValueError, match="packs sequences into a batch of 1; x has batch 2"):
        star_kernels.short_conv(
            torch.randn(2, 5, 4), torch.randn(4, 3), cu_seqlens=torch.tensor([0, 5], dtype=torch.int32)
        )
