"""Which kernels a call would launch: recorded on fake tensors, without a GPU and without computing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from star.bench.cases import Case, Fill, tensors
from star_kernels.launch import Launch, recording


def launches_of_case(case: Case, dtype: torch.dtype, form: Callable[..., Any]) -> list[Launch]:
    """What a call of ``form`` with the case's arguments, and its backward pass, would launch; runs none."""
    with FakeTensorMode():
        arguments = case.make(case.sizes, Fill.seeded(dtype, torch.device("cpu")))
        for position, value in enumerate(arguments):
            if isinstance(value, Tensor) and value.is_floating_point() and position not in case.constants:
                value.requires_grad_(case.gradients)
        return _recorded(lambda: form(*arguments, **case.options(case.sizes)))


def launches_of_call(form: Callable[..., Any], arguments: Mapping[str, Any]) -> list[Launch]:
    """The same for a call by keyword with real tensors, of which only shapes and strides are used."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        given = {
            name: mode.from_tensor(value) if isinstance(value, Tensor) else value
            for name, value in arguments.items()
        }
        return _recorded(lambda: form(**given))


WIDE = (64, 128)
"""Head widths of the timed calls, for which configurations ship of which the operator tests' small calls have
nothing."""


def wide_calls(dtype: torch.dtype) -> Iterator[tuple[str, dict[str, Any]]]:
    """Calls by keyword with heads of these widths, in the situations that change their kernels' code."""
    offsets = torch.tensor([0, 100, 256], dtype=torch.int32)
    kinds: tuple[dict[str, Any], ...] = ({}, {"window": 64}, {"cu_seqlens": offsets}, {"causal": False})
    for width in WIDE:
        for options in kinds:
            unaligned = 0 if options else 1  # the first element after a 16-byte boundary: no TMA
            q, v = (_heads(4, width, dtype, unaligned) for _ in range(2))
            k = _heads(2, width, dtype, unaligned)
            yield "attention", {"q": q, "k": k, "v": _heads(2, width, dtype, unaligned), **options}
            if "cu_seqlens" not in options:  # it takes no packed sequences
                pairs = {"q1": q, "k1": k, "q2": q, "k2": k}
                v = _heads(2, width, dtype, unaligned)
                yield "diff_attention", {**pairs, "v": v, "lam": torch.tensor(0.3), **options}
        for packed in (None, offsets):
            q, k = (_heads(2, width, dtype) for _ in range(2))
            gates = {"log_decay": torch.empty(1, 256, 4), "cu_seqlens": packed}
            matrix = {"q": q, "k": k, "v": _heads(4, width, dtype), **gates}
            states = {"initial_state": torch.empty(1 if packed is None else 2, 4, width, width)}
            yield "gated_linear_attention", {**matrix, **states}
            yield "gated_delta_rule", {**matrix, **states, "beta": torch.empty(1, 256, 4, dtype=dtype)}


def _heads(heads: int, width: int, dtype: torch.dtype, first: int = 0) -> Tensor:
    rows = torch.empty(1, 256, heads, width + 8, dtype=dtype)[..., first : first + width]
    return rows.requires_grad_()


def _recorded(call: Callable[[], object]) -> list[Launch]:
    with recording() as launches:
        results = [result for result in tensors(call()) if result.requires_grad]
        if results:
            torch.autograd.backward(results, [torch.empty_like(result) for result in results])
    return launches
