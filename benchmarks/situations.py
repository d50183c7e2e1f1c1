"""The calls that the Triton kernels are compiled, tuned and measured for on a GPU.

Sizes fill a data-centre GPU (batch x length x width = 8 x 4096 x 2048); the operators and their arguments are
those of `star.bench.cases`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from star.bench.cases import CASES, Case, Fill, tensors
from star_kernels.launch import Launch, recording

GPU_SIZES: Mapping[str, tuple[Mapping[str, int], ...]] = {
    "short_conv": ({"B": 8, "L": 4096, "D": 2048, "K": 4},),
    "gated_short_conv": ({"B": 8, "L": 4096, "D": 2048, "K": 3},),
    "long_conv": ({"B": 8, "L": 4096, "D": 2048},),
    "gated_long_conv": (
        {"B": 8, "L": 2048, "D": 2048},
        {"B": 8, "L": 4096, "D": 2048},
        {"B": 8, "L": 8192, "D": 2048},
    ),
    "linear_scan": ({"B": 8, "L": 4096, "D": 2048},),
    "selective_scan": ({"B": 8, "L": 4096, "D": 2048, "N": 16},),
    "gated_linear_attention": (
        {"B": 8, "L": 4096, "H": 16, "Dk": 128, "Dv": 128},
        {"B": 8, "L": 4096, "H": 32, "Dk": 64, "Dv": 64},
    ),
    "gated_delta_rule": (
        {"B": 8, "L": 4096, "H": 16, "Dk": 128, "Dv": 128},
        {"B": 8, "L": 4096, "H": 32, "Dk": 64, "Dv": 64},
    ),
    "gru_scan": ({"B": 8, "L": 4096, "D": 2048},),
    "lstm_scan": ({"B": 8, "L": 4096, "D": 2048},),
    "attention": (
        {"B": 8, "L": 4096, "H": 32, "Dh": 64},
        {"B": 8, "L": 4096, "H": 16, "Dh": 128},
    ),
    "diff_attention": (
        {"B": 8, "L": 4096, "H": 16, "Dh": 64},
        {"B": 8, "L": 4096, "H": 8, "Dh": 128},
    ),
    "rms_norm": ({"B": 8, "L": 4096, "D": 2048},),
    "rope": ({"B": 8, "L": 4096, "H": 32, "Dh": 64},),
    "glu": ({"B": 8, "L": 4096, "D": 2048},),
    "linear_cross_entropy": ({"N": 8192, "D": 2048, "V": 128256},),
}


def cases(operators: list[str] | None = None) -> Iterator[Case]:
    """The timed calls, in the README's order of operators; all of them, or those of the operators named."""
    for operator, case in CASES.items():
        if operators is None or operator in operators:
            for sizes in GPU_SIZES.get(operator, ()):
                yield replace(case, sizes=dict(sizes))


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
