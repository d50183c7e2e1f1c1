"""Which kernels a call would launch: recorded on fake tensors, without a GPU and without computing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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


def _recorded(call: Callable[[], object]) -> list[Launch]:
    with recording() as launches:
        results = [result for result in tensors(call()) if result.requires_grad]
        if results:
            torch.autograd.backward(results, [torch.empty_like(result) for result in results])
    return launches
