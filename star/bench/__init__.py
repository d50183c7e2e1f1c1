"""Timing of the public operators, backend by backend and beside their peers, on the machine at hand.

Everything is timed in turns within one run, and medians are compared. Two yardsticks take their turns as
well: a plain copy that moves as many bytes as the operator's tensors hold, and a product of two matrices. An
operator that is limited by memory can not be faster than the first, one limited by arithmetic not faster than
the second.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import star_kernels
from star.bench.cases import CASES, STEPS, Case, Fill, case, tensors
from star.bench.gpu_peers import GPU_PEERS
from star.bench.peers import PEERS, load
from star.bench.timing import (
    COMPILE_CALLS,
    Timing,
    copy_call,
    interleaved,
    matrix_product_call,
    threads_set,
)
from star_kernels import dispatch

__all__ = [
    "CASES",
    "DTYPES",
    "PASSES",
    "STEPS",
    "Case",
    "Fill",
    "Measurement",
    "Timing",
    "calls",
    "case",
    "device_named",
    "measure",
]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PASSES = ("forward", "backward", "both")
COMPILED = "reference, torch.compile"

_COPY = "copy"
_PRODUCT = "matrix product"


@dataclass(frozen=True)
class Measurement:
    """An operator on this machine.

    Attributes:
        operator, sizes, dtype, device, threads, passes: what was timed.
        bytes, operations: that the call moves and computes at least, see `star.bench.cases`.
        backends: ours, fastest form first as `star_kernels` prefers them; with `compiled` the reference under
            torch.compile as well.
        peers: other people's, as far as they are installed.
        absent: what could not be timed, and why: peers, and the reference that could not be compiled.
        copy: the copy of `bytes`.
        product: the product of two matrices, of `product_operations`.
        compile_seconds: that torch.compile took, where it was asked for and could.
    """

    operator: str
    sizes: Mapping[str, int]
    dtype: str
    device: str
    threads: int
    passes: str
    bytes: int
    operations: float
    backends: tuple[Timing, ...]
    peers: tuple[Timing, ...]
    absent: Mapping[str, str]
    copy: Timing
    product: Timing
    product_operations: float
    compile_seconds: float | None = None

    @property
    def default(self) -> Timing:
        """The backend that a call without `backend=` gets."""
        return self.backends[0]

    def best_peer(self, names: tuple[str, ...] = ("",)) -> Timing | None:
        """The fastest of the peers whose names start so."""
        counted = [timing for timing in self.peers if timing.name.startswith(names)]
        return min(counted, key=lambda timing: timing.median, default=None)

    def bandwidth(self, timing: Timing) -> float:
        """Bytes a second that the call would move if it touched each tensor once."""
        return self.bytes / timing.median

    def copy_fraction(self, timing: Timing) -> float:
        """Its speed over that of the copy: 1 is as fast as moving the bytes alone."""
        return self.copy.median / timing.median

    def rate(self, timing: Timing) -> float:
        """Floating-point operations a second."""
        return self.operations / timing.median

    def product_fraction(self, timing: Timing) -> float:
        """Its rate over that of the matrix product."""
        return self.rate(timing) * self.product.median / self.product_operations

    def to_json(self) -> dict[str, Any]:
        return {
            "operator": self.operator,
            "sizes": dict(self.sizes),
            "dtype": self.dtype,
            "device": self.device,
            "threads": self.threads,
            "passes": self.passes,
            "bytes": self.bytes,
            "operations": self.operations,
            "copy_seconds": self.copy.median,
            "copy_bytes_per_second": self.bytes / self.copy.median,
            "matrix_product_operations_per_second": self.product_operations / self.product.median,
            "backends": {timing.name: self._numbers(timing) for timing in self.backends},
            "peers": {timing.name: self._numbers(timing) for timing in self.peers},
            "absent": dict(self.absent),
            "compile_seconds": self.compile_seconds,
        }

    def _numbers(self, timing: Timing) -> dict[str, float]:
        return {
            "median_seconds": timing.median,
            "fastest_seconds": timing.fastest,
            "samples": timing.samples,
            "bytes_per_second": self.bandwidth(timing),
            "copy_fraction": self.copy_fraction(timing),
            "operations_per_second": self.rate(timing),
            "matrix_product_fraction": self.product_fraction(timing),
        }


def measure(
    case: Case,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    threads: int | None = None,
    passes: str = "forward",
    seconds: float = 2.0,
    compiled: bool = False,
    peers: tuple[str, ...] = ("",),
    backends: tuple[str, ...] | None = None,
) -> Measurement:
    """Times every backend that covers the case, and its peers, in turns, for about `seconds` in all.

    Args:
        passes: "forward" (without gradients), "backward" (alone, after one forward pass) or "both".
        threads: of the CPU; torch's own number by default.
        compiled: the reference under torch.compile as well. Compiling is not in the time, and may take
            minutes where the reference is a loop over tokens.
        peers: starts of the names of those that are timed, where they are installed; all by default. What
            takes longer than `star.bench.timing.LONG_CALL` is called once, whatever `seconds` says.
        backends: those of ours that are timed, the first as the default; by default all that cover the case.

    Raises:
        ValueError: no such dtype, device or passes, or backward of an operator that has none.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}, takes one of {', '.join(DTYPES)}")
    if passes not in PASSES:
        raise ValueError(f"passes is {passes!r}, takes one of {', '.join(PASSES)}")
    if passes != "forward" and not case.gradients:
        raise ValueError(f"{case.operator} has no backward pass")
    place = device_named(device)
    compile_seconds: float | None = None
    arguments = case.make(case.sizes, Fill.seeded(DTYPES[dtype], place))
    with threads_set(threads):
        ours = _backend_calls(case, arguments, passes, compiled, backends)
        others, absent = _peer_calls(case, arguments, passes, peers)
        if place.type == "cuda":
            with torch.set_grad_enabled(passes != "forward"):
                eager = {name: call for name, call in ours.items() if name != COMPILED}
                absent |= _drop_failing(eager) | _drop_failing(others)
            if not eager:
                raise RuntimeError(next(absent[name] for name in ours if name in absent))
            ours = {name: call for name, call in ours.items() if name not in absent}
            backends = None if backends is None else tuple(name for name in backends if name in ours)
        with torch.no_grad():
            function = getattr(star_kernels, case.operator)
            named = None if backends is None else backends[0]
            results = function(*arguments, **case.options(case.sizes), backend=named)
        moved = case.bytes_moved(passes, arguments, results)
        product, product_operations = matrix_product_call(DTYPES[dtype], place)
        yardsticks = {_COPY: copy_call(moved, place), _PRODUCT: product}
        with torch.set_grad_enabled(passes != "forward"):
            if compiled:
                compile_seconds, problem = _compile(ours[COMPILED])
                if problem:
                    del ours[COMPILED]
                    absent[COMPILED] = problem
            timings = interleaved({**ours, **others, **yardsticks}, seconds, place)
        used = torch.get_num_threads()
    return Measurement(
        operator=case.operator,
        sizes=case.sizes,
        dtype=dtype,
        device=str(place),
        threads=used,
        passes=passes,
        bytes=moved,
        operations=case.operations(passes),
        backends=tuple(timings[name] for name in ours),
        peers=tuple(timings[name] for name in others),
        absent=absent,
        copy=timings[_COPY],
        product=timings[_PRODUCT],
        product_operations=product_operations,
        compile_seconds=compile_seconds,
    )


def calls(
    case: Case,
    passes: str = "forward",
    *,
    dtype: str = "float32",
    device: str = "cpu",
    backends: tuple[str, ...] | None = None,
    peers: bool = True,
) -> dict[str, Callable[[], object]]:
    """What `measure` times, by name, for another clock: the backends, the default first, and the peers.

    To be called with gradients enabled, but for "forward".
    """
    arguments = case.make(case.sizes, Fill.seeded(DTYPES[dtype], device_named(device)))
    others, _ = _peer_calls(case, arguments, passes, ("",)) if peers else ({}, {})
    return _backend_calls(case, arguments, passes, compiled=False, backends=backends) | others


def device_named(name: str) -> torch.device:
    """The device that a user named.

    Raises:
        ValueError: it is none that operators are timed on, or not in this machine.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device is {name!r}, takes cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {name!r}, takes cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {name!r}, and this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def _backend_calls(
    case: Case, arguments: tuple[Any, ...], passes: str, compiled: bool, backends: tuple[str, ...] | None
) -> dict[str, Callable[[], object]]:
    function, options = getattr(star_kernels, case.operator), case.options(case.sizes)
    first = next(argument for argument in arguments if isinstance(argument, Tensor))

    def on(backend: str) -> Callable[..., Any]:
        return partial(function, **options, backend=backend)

    functions = {backend: on(backend) for backend in backends or dispatch.fastest(case.operator, first)}
    if compiled:
        functions[COMPILED] = torch.compile(on("reference"), dynamic=False)
    return {
        name: _call(function, _fresh(arguments), passes, case.constants)
        for name, function in functions.items()
    }


def _compile(call: Callable[[], object]) -> tuple[float | None, str]:
    """The seconds until a compiled call has settled, or why it can not be compiled."""
    began = time.perf_counter()
    try:
        for _ in range(COMPILE_CALLS):
            call()
    except torch._dynamo.exc.TorchDynamoException as error:
        return None, str(error).strip().splitlines()[0]
    return time.perf_counter() - began, ""


def _peer_calls(
    case: Case, arguments: tuple[Any, ...], passes: str, names: tuple[str, ...]
) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    calls, absent = {}, {}
    device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
    for peer in (*PEERS.get(case.operator, ()), *GPU_PEERS.get(case.operator, ())):
        if not peer.name.startswith(names) or device.type not in peer.devices:
            continue
        function = load(peer)
        if isinstance(function, str):
            absent[peer.name] = function
        else:
            calls[peer.name] = _call(function, peer.arrange(*_fresh(arguments)), passes, peer.constants)
    return calls, absent


def _drop_failing(calls: dict[str, Callable[[], object]]) -> dict[str, str]:
    """Takes out the backends or peers that can't answer the call at all, and says why by name.

    For GPUs: on a CPU all of them are known to run, and some take minutes. A package of
    another version, a size that it does not take or too little memory must not end a run.
    """
    problems = {}
    for name, call in list(calls.items()):
        try:
            call()
            torch.cuda.synchronize()
        except Exception as error:
            del calls[name]
            problems[name] = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    return problems


def _fresh(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copies: steps change their states in place, and gradients need leaves of their own."""
    return tuple(value.clone() if isinstance(value, Tensor) else value for value in arguments)


def _call(
    function: Callable[..., Any], arguments: tuple[Any, ...], passes: str, constants: tuple[int, ...]
) -> Callable[[], object]:
    if passes == "forward":
        return partial(function, *arguments)
    leaves = [
        value.requires_grad_()
        for position, value in enumerate(arguments)
        if isinstance(value, Tensor) and value.is_floating_point() and position not in constants
    ]
    gradients: list[Tensor] = []
    kept: list[Tensor] = []

    def run() -> list[Tensor]:
        """Results with a gradient; the gradients that arrive at them are ones, made once."""
        results = [result for result in tensors(function(*arguments)) if result.requires_grad]
        gradients.extend(torch.ones_like(result) for result in results[len(gradients) :])
        return results

    def both() -> object:
        return torch.autograd.grad(run(), leaves, gradients, allow_unused=True)

    def backward() -> object:
        if not kept:
            kept.extend(run())
        return torch.autograd.grad(kept, leaves, gradients, allow_unused=True, retain_graph=True)

    return both if passes == "both" else backward
