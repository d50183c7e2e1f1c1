"""Which implementation answers a call.

Every operator has a ``reference``; compiled and Triton forms register themselves here with the devices and
dtypes they cover. ``backend=None`` takes the fastest that covers the call, a name takes that one or says
in one sentence why it cannot.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from star_kernels import driver

BACKENDS = ("cuda", "triton", "cpp", "torch", "reference")
"""Fastest first: the order in which ``backend=None`` tries them. "torch" is a form that rests on a fused
kernel of PyTorch's own, which is not the operator's definition but faster than it (softmax attention)."""

OLDEST_TRITON = (3, 5)
"""The version that comes with the oldest torch there are compiled operators for."""

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Implementation:
    """One form of one operator: a function with the reference's signature, and what it covers.

    With ``by_name_only``, ``backend=None`` never takes it: it proves itself there and is not fast.
    """

    function: Callable[..., Any]
    device_type: str | None
    dtypes: tuple[torch.dtype, ...] | None
    by_name_only: bool = False

    def problem(self, tensor: Tensor) -> str | None:
        """Why this form does not take a call on this tensor, or None where it does."""
        if self.device_type is not None and tensor.device.type != self.device_type:
            return f"runs on {self.device_type}, and the tensors are on {tensor.device.type}"
        if self.dtypes is not None and tensor.dtype not in self.dtypes:
            return f"does not take {tensor.dtype}"
        return None


_implementations: dict[str, dict[str, Implementation]] = {}
_problems: dict[str, str] = {}  # why a backend is not there at all
_in_use: str | None = None  # what `use` puts in the place of backend=None


def load_compiled() -> bool:
    """Loads the compiled CPU operators once; False where this installation has none."""
    try:
        importlib.import_module("star_kernels._C")
    except ImportError as error:
        _problems["cpp"] = (
            "this installation has no compiled CPU operators (built without a C++ compiler): "
            f"{str(error).splitlines()[0]}"
        )
        return False
    return True


def load_cuda() -> bool:
    """Loads the CUDA operators once, where torch and the machine have CUDA; False where they can't run.

    Whether a GPU is there is asked without initialising CUDA, so a process may still fork after the import.
    """
    problem = _cuda_problem()
    if problem is not None:
        _problems["cuda"] = problem
    return problem is None


@functools.cache
def _cuda_problem() -> str | None:
    """Why the CUDA operators are not there, in one sentence, or None where they are loaded."""
    if not torch.version.cuda:
        return "this torch is built without CUDA, which the CUDA operators need"
    if not torch.cuda.device_count():
        return "torch finds no CUDA device"
    if not load_compiled():
        return _problems["cpp"]
    try:
        module = importlib.import_module("star_kernels._C_cuda")
    except ImportError as error:
        return (
            "this installation has no CUDA operators (built without nvcc, or not loadable): "
            f"{str(error).splitlines()[0]}"
        )
    return driver.problem(module.cuda_version, module.architectures, driver.installed())


def load_triton(family: str) -> bool:
    """Imports a family's Triton kernels where they can run; False where they can't.

    They can with a torch built for GPUs, and, on CPU tensors, in Triton's interpreter (TRITON_INTERPRET=1).
    Elsewhere Triton is not imported.
    """
    if not (torch.version.cuda or torch.version.hip or os.environ.get("TRITON_INTERPRET") == "1"):
        _problems["triton"] = "this torch is built without GPUs, which the Triton kernels need"
        return False
    try:
        version = importlib.import_module("triton").__version__
    except ImportError as error:
        _problems["triton"] = f"the Triton kernels need the package triton: {str(error).splitlines()[0]}"
        return False
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        _problems["triton"] = f"the Triton kernels need triton >= {oldest}, and {version} is installed"
        return False
    importlib.import_module(f"star_kernels.{family}.triton")
    return True


def register(
    operator: str,
    backend: str,
    function: Callable[..., Any],
    *,
    device_type: str | None = None,
    dtypes: tuple[torch.dtype, ...] | None = None,
    by_name_only: bool = False,
) -> None:
    """Adds one form of an operator. ``device_type`` and ``dtypes`` None mean: covers all of them."""
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; it takes one of {', '.join(BACKENDS)}")
    form = Implementation(function, device_type, dtypes, by_name_only)
    _implementations.setdefault(operator, {})[backend] = form


def register_compiled(operator: str, function: Callable[..., Any], *, cuda: bool = False) -> None:
    """Adds an operator's C++ form, and, with ``cuda``, the CUDA one: the same function, since the dispatcher
    of torch takes a GPU's tensors to csrc/<family>/*cuda*.cu, where those are loaded."""
    register(operator, "cpp", function, device_type="cpu", dtypes=KERNEL_DTYPES)
    if cuda and load_cuda():
        register(operator, "cuda", function, device_type="cuda", dtypes=KERNEL_DTYPES)


@contextmanager
def use(backend: str | None) -> Iterator[None]:
    """Inside, ``backend=None`` means ``backend``, for every operator: a whole model on one backend.

        with dispatch.use("reference"):
            model(ids)

    Calls that name a backend keep it. A call that ``backend`` does not cover raises, as if it had named it.
    None puts the choice of the fastest back. Holds for all threads of the process, and for what a backward
    pass computes again, so the backward pass belongs inside as well.

    Raises:
        ValueError: ``backend`` is no backend's name.
    """
    global _in_use
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; it takes None or {', '.join(map(repr, BACKENDS))}")
    before, _in_use = _in_use, backend
    try:
        yield
    finally:
        _in_use = before


def in_use() -> str | None:
    """The backend that :func:`use` has put in the place of ``backend=None``, if any."""
    return _in_use


def choose(operator: str, backend: str | None, tensor: Tensor) -> Callable[..., Any]:
    """The implementation of ``operator`` that answers a call whose first tensor is ``tensor``.

    Raises:
        ValueError: ``backend`` is no backend's name, or does not cover this call.
    """
    forms = _implementations[operator]
    if backend is None:
        backend = _in_use
    if backend is None and forward_ad._current_level >= 0 and not torch.compiler.is_compiling():
        backend = "reference"  # the only form that has forward-mode derivatives
    if backend is None:
        for name in _order(operator, tensor):
            candidate = forms.get(name)
            if candidate is None or candidate.by_name_only:
                continue
            if candidate.problem(tensor) is None:
                return candidate.function
    if backend not in BACKENDS:
        raise ValueError(
            f"{operator}: backend is {backend!r}; it takes None or {', '.join(map(repr, BACKENDS))}"
        )
    named = forms.get(backend)
    if named is None:
        why = _problems.get(backend, "it has none for this operator")
        raise ValueError(f"{operator}: backend {backend!r} is not available: {why}")
    problem = named.problem(tensor)
    if problem is not None:
        raise ValueError(f"{operator}: backend {backend!r} {problem}")
    return named.function


def _order(operator: str, tensor: Tensor) -> tuple[str, ...]:
    """The backends in the order in which a call tries them: where CUDA and Triton compete, the one first that
    the tables of tuned configurations say was faster on the tensor's device."""
    forms = _implementations[operator]
    if "cuda" not in forms or "triton" not in forms:
        return BACKENDS
    measured = _measured(operator, str(tensor.device))
    return BACKENDS if measured is None else (measured, *(name for name in BACKENDS if name != measured))


def _measured(operator: str, device: str) -> str | None:
    from star_kernels.launch import tables  # imports Triton, which has been imported for the form

    return tables.backend_of(tables.family_of(torch.device(device)), operator)


# What torch.compiler.assume_constant_result sets, which would load the compiler here, with every import.
_measured._dynamo_marked_constant = True  # type: ignore[attr-defined]


def form(operator: str, backend: str) -> Callable[..., Any] | None:
    """One form of an operator whatever it covers, or None where there is none."""
    found = _implementations.get(operator, {}).get(backend)
    return None if found is None else found.function


def step(
    operator: str, backend: str | None, check: Callable[[], None], *arguments: Any, **options: Any
) -> Any:
    """Answers one decode step that :func:`compiled_step` passed on: states the contract, then computes."""
    check()
    with torch.no_grad():
        return choose(operator, backend, arguments[0])(*arguments, **options)


Step = TypeVar("Step", bound=Callable[..., Any])


def compiled_step(function: Step) -> Step:
    """Puts the compiled form of a public decode step before it, where microseconds count.

    The compiled steps check their arguments themselves, so the contract, which says in words what is wrong,
    is asked only where they refuse, and where another backend answers.
    """
    on_cpu, on_cuda = form(function.__name__, "cpp"), form(function.__name__, "cuda")
    if on_cpu is None:
        return function

    @functools.wraps(function)
    def step(*arguments: Any, **options: Any) -> Any:
        if _in_use is None and "backend" not in options:
            try:
                first = arguments[0]
                if first.is_cpu:
                    return on_cpu(*arguments, **options)
                if on_cuda is not None and first.is_cuda:
                    return on_cuda(*arguments, **options)
            except (RuntimeError, TypeError, AttributeError, IndexError, ZeroDivisionError):
                pass
        return function(*arguments, **options)

    return cast(Step, step)


def available(operator: str, tensor: Tensor) -> tuple[str, ...]:
    """The backends that cover a call of ``operator`` whose first tensor is ``tensor``, fastest first."""
    forms = _implementations[operator]
    order = _order(operator, tensor)
    return tuple(name for name in order if name in forms and forms[name].problem(tensor) is None)


def fastest(operator: str, tensor: Tensor) -> tuple[str, ...]:
    """The same without those that are taken by name only: the first is what ``backend=None`` takes."""
    forms = _implementations[operator]
    return tuple(name for name in available(operator, tensor) if not forms[name].by_name_only)


def operators() -> tuple[str, ...]:
    """The names of all operators that have an implementation."""
    return tuple(sorted(_implementations))
