"""How each operator is called for timing, and what the call moves and computes at least.

One list for `star bench`, for the suites under benchmarks/ and for the committed tables.

Bytes count every tensor once: forward the arguments and the results; backward what it needs of the arguments
(a scan its states instead of its inputs, which are as large), the gradients of the results and those of the
arguments. A kernel that keeps nothing else and reads nothing twice moves as many.

Floating-point operations are those of the definition, a multiply-add two, a transcendental function one;
backward counts as two forward passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["CASES", "STEPS", "Case", "Fill", "case", "tensors"]

Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Fill:
    """Makes the tensors of a case: seeded, in one dtype, on one device."""

    dtype: torch.dtype
    device: torch.device
    generator: torch.Generator

    @classmethod
    def seeded(cls, dtype: torch.dtype, device: torch.device) -> Fill:
        return cls(dtype, device, torch.Generator(device).manual_seed(0))

    def normal(self, *shape: int) -> Tensor:
        """Activations."""
        return torch.randn(shape, generator=self.generator, device=self.device).to(self.dtype)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        values = torch.rand(shape, generator=self.generator, device=self.device) * (high - low) + low
        return values.to(self.dtype)

    def unit(self, *shape: int) -> Tensor:
        """Activations of norm 1 along the last dimension."""
        values = torch.randn(shape, generator=self.generator, device=self.device)
        return torch.nn.functional.normalize(values, dim=-1).to(self.dtype)

    def weight(self, *shape: int) -> Tensor:
        """Parameters: small, float32."""
        return 0.1 * torch.randn(shape, generator=self.generator, device=self.device)

    def state(self, *shape: int) -> Tensor:
        """An empty recurrent state, float32."""
        return torch.zeros(shape, device=self.device)


def _no_options(sizes: Sizes) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Case:
    """One operator's call.

    Args:
        operator: its name in `star_kernels`.
        sizes: by name, with defaults.
        make: positional arguments from the sizes.
        flops: of one forward pass at those sizes.
        options: keyword arguments from the sizes.
        gradients: whether it has a backward pass.
        needless: positions of arguments whose values the backward pass does not need.
        constants: positions of arguments without a gradient.
    """

    operator: str
    sizes: Sizes
    make: Callable[[Sizes, Fill], tuple[Any, ...]]
    flops: Callable[[Sizes], float]
    options: Callable[[Sizes], dict[str, Any]] = field(default=_no_options)
    gradients: bool = True
    needless: tuple[int, ...] = ()
    constants: tuple[int, ...] = ()

    def with_shape(self, shape: Sequence[int]) -> Case:
        """The same with other sizes.

        Raises:
            ValueError: another number of sizes, or one below 1.
        """
        names = " ".join(self.sizes)
        if len(shape) != len(self.sizes) or min(shape) < 1:
            got = ",".join(str(size) for size in shape)
            raise ValueError(f"shape is {got!r}, {self.operator} takes {len(self.sizes)} sizes: {names}")
        return replace(self, sizes=dict(zip(self.sizes, shape, strict=True)))

    def bytes_moved(self, passes: str, arguments: Sequence[Any], results: object) -> int:
        """Of one call with these arguments and results; `passes` as in `star.bench.measure`."""
        forward = _bytes(tensors(arguments)) + _bytes(tensors(results))
        read = [value for position, value in enumerate(arguments) if position not in self.needless]
        varied = [value for position, value in enumerate(arguments) if position not in self.constants]
        floating = [tensor for tensor in tensors(varied) if tensor.is_floating_point()]
        backward = _bytes(tensors(read)) + _bytes(tensors(results)) + _bytes(floating)
        return {"forward": forward, "backward": backward, "both": forward + backward}[passes]

    def operations(self, passes: str) -> float:
        """Floating-point operations of one call."""
        return self.flops(self.sizes) * {"forward": 1, "backward": 2, "both": 3}[passes]


def tensors(value: object) -> list[Tensor]:
    """All tensors in nested tuples and lists, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in tensors(item)]
    return []


def _bytes(values: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in values)


# --------------------------------------------------------------------------------------------------------
# Arguments


def _tokens(n: Sizes, f: Fill, count: int) -> tuple[Tensor, ...]:
    return tuple(f.normal(n["B"], n["L"], n["D"]) for _ in range(count))


def _token(n: Sizes, f: Fill, count: int) -> tuple[Tensor, ...]:
    return tuple(f.normal(n["B"], n["D"]) for _ in range(count))


def _vectors(n: Sizes, f: Fill, count: int) -> tuple[Tensor, ...]:
    return tuple(f.weight(n["D"]) for _ in range(count))


def _heads(n: Sizes, f: Fill, count: int) -> tuple[Tensor, ...]:
    return tuple(f.normal(n["B"], n["L"], n["H"], n["Dh"]) for _ in range(count))


def _linear_scan(n: Sizes, f: Fill) -> tuple[Any, ...]:
    return f.uniform(n["B"], n["L"], n["D"], low=0.5, high=1.0), *_tokens(n, f, 1)


def _selective_scan(n: Sizes, f: Fill, *token: int) -> tuple[Any, ...]:
    place = token or (n["B"], n["L"])
    x, dt = f.normal(*place, n["D"]), f.uniform(*place, n["D"], low=0.001, high=0.1)
    projections = f.normal(*place, n["N"]), f.normal(*place, n["N"])
    decay = -torch.arange(1, n["N"] + 1, dtype=torch.float32, device=f.device).repeat(n["D"], 1)
    return x, dt, decay, *projections, f.weight(n["D"]), f.normal(*place, n["D"])


def _selective_scan_step(n: Sizes, f: Fill) -> tuple[Any, ...]:
    *before, skip, z = _selective_scan(n, f, n["B"])
    return *before, f.state(n["B"], n["D"], n["N"]), skip, z


def _linear_attention(n: Sizes, f: Fill, *token: int) -> tuple[Any, ...]:
    place = token or (n["B"], n["L"])
    q, v = f.normal(*place, n["H"], n["Dk"]), f.normal(*place, n["H"], n["Dv"])
    return q, f.unit(*place, n["H"], n["Dk"]), v, f.uniform(*place, n["H"], low=-0.1, high=-0.001)


def _delta_rule(n: Sizes, f: Fill, *token: int) -> tuple[Any, ...]:
    q, k, v, log_decay = _linear_attention(n, f, *token)
    return q, k, v, f.uniform(*(token or (n["B"], n["L"])), n["H"]), log_decay


def _matrix_state(n: Sizes, f: Fill) -> Tensor:
    return f.state(n["B"], n["H"], n["Dk"], n["Dv"])


def _attention_decode(n: Sizes, f: Fill) -> tuple[Any, ...]:
    lengths = torch.full((n["B"],), n["L"], dtype=torch.int32, device=f.device)
    return f.normal(n["B"], n["H"], n["Dh"]), *_heads(n, f, 2), lengths


def _rope(n: Sizes, f: Fill) -> tuple[Any, ...]:
    angles = f.uniform(n["L"], n["Dh"] // 2, high=2 * math.pi).float()
    return *_heads(n, f, 1), angles.cos(), angles.sin()


def _linear_cross_entropy(n: Sizes, f: Fill) -> tuple[Any, ...]:
    targets = torch.randint(n["V"], (n["N"],), generator=f.generator, device=f.device)
    return f.normal(n["N"], n["D"]), f.weight(n["V"], n["D"]).to(f.dtype), targets


# --------------------------------------------------------------------------------------------------------
# Floating-point operations


def _each(count: float, *names: str) -> Callable[[Sizes], float]:
    """`count` operations for each element of a tensor with these sizes."""
    return lambda n: count * math.prod(n[name] for name in names)


def _fft_flops(n: Sizes) -> float:
    """As three real transforms of 2 L points a channel (the kernel's once) and their product would take."""
    points = 2 * n["L"]
    transform = 2.5 * points * math.log2(points)
    return n["D"] * ((2 * n["B"] + 1) * transform + 3 * n["B"] * points)


def _attention_flops(products: int) -> Callable[[Sizes], float]:
    """So many products of each query with each of the keys or values it sees."""
    return lambda n: products * n["B"] * n["H"] * n["L"] * (n["L"] + 1) * n["Dh"]


# --------------------------------------------------------------------------------------------------------
# The operators

_TOKENS = {"B": 4, "L": 2048, "D": 768}
_HEADS = {"B": 1, "L": 2048, "H": 12, "Dh": 64}
_KEYS = {"B": 1, "L": 2048, "H": 12, "Dk": 64, "Dv": 64}
_TOKEN = {"B": 1, "D": 768}
_BLD = ("B", "L", "D")
_STATE = ("B", "L", "H", "Dk", "Dv")


def _taps(gated: bool) -> Callable[[Sizes], float]:
    return lambda n: n["B"] * n.get("L", 1) * n["D"] * (2 * n["K"] + 2 * gated)


CASES: dict[str, Case] = {
    case.operator: case
    for case in (
        Case(
            "short_conv",
            {**_TOKENS, "K": 3},
            lambda n, f: (*_tokens(n, f, 1), f.weight(n["D"], n["K"])),
            _taps(gated=False),
        ),
        Case(
            "gated_short_conv",
            {**_TOKENS, "K": 3},
            lambda n, f: (*_tokens(n, f, 3), f.weight(n["D"], n["K"])),
            _taps(gated=True),
        ),
        Case(
            "long_conv",
            {**_TOKENS, "B": 2},
            lambda n, f: (*_tokens(n, f, 1), f.weight(n["D"], n["L"])),
            _fft_flops,
        ),
        Case(
            "gated_long_conv",
            {**_TOKENS, "B": 2},
            lambda n, f: (*_tokens(n, f, 3), f.weight(n["D"], n["L"])),
            _fft_flops,
        ),
        Case("linear_scan", _TOKENS, _linear_scan, _each(2, *_BLD)),
        Case(
            "selective_scan", {"B": 1, "L": 2048, "D": 1536, "N": 16}, _selective_scan, _each(7, *_BLD, "N")
        ),
        Case("gated_linear_attention", _KEYS, _linear_attention, _each(5, *_STATE)),
        Case("gated_delta_rule", _KEYS, _delta_rule, _each(7, *_STATE)),
        Case("gru_scan", _TOKENS, lambda n, f: (*_tokens(n, f, 3), *_vectors(n, f, 3)), _each(14, *_BLD)),
        Case("lstm_scan", _TOKENS, lambda n, f: (*_tokens(n, f, 3), *_vectors(n, f, 3)), _each(15, *_BLD)),
        Case("attention", _HEADS, lambda n, f: _heads(n, f, 3), _attention_flops(2)),
        Case(
            "diff_attention",
            _HEADS,
            lambda n, f: (*_heads(n, f, 5), torch.tensor(0.3, device=f.device)),
            _attention_flops(3),
        ),
        Case(
            "attention_decode",
            {**_HEADS, "B": 8},
            _attention_decode,
            _each(4, "B", "L", "H", "Dh"),
            gradients=False,
        ),
        Case("glu", _TOKENS, lambda n, f: _tokens(n, f, 2), _each(5, *_BLD)),
        Case("rms_norm", _TOKENS, lambda n, f: (*_tokens(n, f, 1), f.weight(n["D"])), _each(4, *_BLD)),
        Case(
            "rope", {**_HEADS, "B": 4}, _rope, _each(3, "B", "L", "H", "Dh"), needless=(0,), constants=(1, 2)
        ),
        Case(
            "linear_cross_entropy",
            {"N": 4096, "D": 768, "V": 4096},
            _linear_cross_entropy,
            _each(2, "N", "D", "V"),
        ),
    )
}
"""The operators in the order of the README's table, at sizes of models with 100 million parameters."""

STEPS: dict[str, Case] = {
    case.operator: case
    for case in (
        Case(
            "short_conv_step",
            {**_TOKEN, "K": 3},
            lambda n, f: (*_token(n, f, 1), f.normal(n["B"], n["K"] - 1, n["D"]), f.weight(n["D"], n["K"])),
            _taps(gated=False),
            gradients=False,
        ),
        Case(
            "gated_short_conv_step",
            {**_TOKEN, "K": 3},
            lambda n, f: (*_token(n, f, 3), f.normal(n["B"], n["K"] - 1, n["D"]), f.weight(n["D"], n["K"])),
            _taps(gated=True),
            gradients=False,
        ),
        Case(
            "long_conv_step",
            {**_TOKEN, "L": 2048},
            lambda n, f: (*_token(n, f, 1), *_tokens(n, f, 1), f.weight(n["D"], n["L"])),
            _each(2, *_BLD),
            lambda n: {"position": n["L"] - 1},
            gradients=False,
        ),
        Case(
            "gated_long_conv_step",
            {**_TOKEN, "L": 2048},
            lambda n, f: (*_token(n, f, 3), *_tokens(n, f, 1), f.weight(n["D"], n["L"])),
            _each(2, *_BLD),
            lambda n: {"position": n["L"] - 1},
            gradients=False,
        ),
        Case(
            "linear_scan_step",
            _TOKEN,
            lambda n, f: (f.uniform(n["B"], n["D"], low=0.5), *_token(n, f, 1), f.state(n["B"], n["D"])),
            _each(2, "B", "D"),
            gradients=False,
        ),
        Case(
            "selective_scan_step",
            {**_TOKEN, "N": 16},
            _selective_scan_step,
            _each(7, "B", "D", "N"),
            gradients=False,
        ),
        Case(
            "gated_linear_attention_step",
            {"B": 1, "H": 12, "Dk": 64, "Dv": 64},
            lambda n, f: (*_linear_attention(n, f, n["B"]), _matrix_state(n, f)),
            _each(5, "B", "H", "Dk", "Dv"),
            gradients=False,
        ),
        Case(
            "gated_delta_rule_step",
            {"B": 1, "H": 12, "Dk": 64, "Dv": 64},
            lambda n, f: (*_delta_rule(n, f, n["B"]), _matrix_state(n, f)),
            _each(7, "B", "H", "Dk", "Dv"),
            gradients=False,
        ),
        Case(
            "gru_scan_step",
            _TOKEN,
            lambda n, f: (*_token(n, f, 3), *_vectors(n, f, 3), f.state(n["B"], n["D"])),
            _each(14, "B", "D"),
            gradients=False,
        ),
        Case(
            "lstm_scan_step",
            _TOKEN,
            lambda n, f: (
                *_token(n, f, 3),
                *_vectors(n, f, 3),
                f.state(n["B"], n["D"]),
                f.state(n["B"], n["D"]),
            ),
            _each(15, "B", "D"),
            gradients=False,
        ),
    )
}
"""One decode step of each stateful operator, at batch 1 and width 768; the long convolutions at their last
position, with the whole history behind them."""


def case(operator: str, shape: Sequence[int] | None = None) -> Case:
    """The case of an operator or of a step.

    Raises:
        ValueError: no such operator, or sizes that it does not take.
    """
    known = CASES | STEPS
    if operator not in known:
        raise ValueError(f"operator is {operator!r}, takes one of {', '.join(known)}")
    found = known[operator]
    return found if shape is None else found.with_shape(shape)
