"""Every operator, on every backend, against its definition in float64. One body; operators add rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import star_kernels
from star_kernels import contracts, dispatch
from tests.star_kernels.cases import Case, Maker, all_cases

CASES = list(all_cases())
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Relative error ‖a − b‖ / ‖b‖ allowed in each dtype."""


def cast(
    case: Case,
    dtype: torch.dtype,
    layout: Callable[[Tensor], Tensor] = lambda t: t,
    device: str = "cpu",
) -> dict[str, Any]:
    """The case's arguments in ``dtype``, rounded there, as leaves that ask for gradients."""
    arguments = {}
    for name, value in case.make(Maker()).items():
        if isinstance(value, Tensor):
            value = value.to(device)
        if isinstance(value, Tensor) and value.is_floating_point():
            wide = dtype if dtype == torch.float64 or name not in case.float32 else torch.float32
            value = layout(value.to(wide)).detach().requires_grad_(name not in case.constant)
        arguments[name] = value
    return arguments


def widen(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same numbers in float64, on the CPU."""
    return {
        name: value.detach().cpu().double().requires_grad_(value.requires_grad)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value.cpu()
        if isinstance(value, Tensor)
        else value
        for name, value in arguments.items()
    }


def run(operator: str, arguments: dict[str, Any], backend: str) -> dict[str, Tensor]:
    """Outputs and, for a fixed weighting of the outputs, the gradient of every leaf."""
    result = getattr(star_kernels, operator)(**arguments, backend=backend)
    outputs = list(flatten(result))
    leaves = {n: v for n, v in arguments.items() if isinstance(v, Tensor) and v.requires_grad}
    draw = Maker(1)
    loss = sum((output.double() * draw.normal(*output.shape).to(output.device)).sum() for output in outputs)
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    named = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        named[f"gradient of {name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return {name: value.cpu() for name, value in named.items()}


def flatten(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [tensor for part in result for tensor in flatten(part)]


def error(got: Tensor, wanted: Tensor) -> float:
    assert got.shape == wanted.shape
    assert torch.isfinite(got).all() or not torch.isfinite(wanted).all()
    scale = wanted.norm().item()
    distance = (got.double() - wanted).norm().item()
    return distance / scale if scale > 0 else distance


def fast_backends(operator: str) -> list[str]:
    return [name for name in dispatch.available(operator, torch.zeros(1)) if name != "reference"]


def backends(case: Case) -> list[str]:
    """The forms that a case is tried on."""
    fast = fast_backends(case.operator)
    return fast if case.interpreted else [name for name in fast if name != "triton"]


def places(case: Case) -> list[tuple[str, str, Any]]:
    """Where a case is tried: backend, device, marks. A GPU's forms are listed without one, and skipped."""
    gpu = [name for name in ("cuda", "triton") if dispatch.form(case.operator, name) is not None]
    here = [(backend, "cpu", ()) for backend in backends(case)]
    return [*here, *((backend, "cuda", pytest.mark.gpu) for backend in gpu)]


LEADING = [
    case
    for operator in dict.fromkeys(case.operator for case in CASES)
    for case in [case for case in CASES if case.operator == operator and case.interpreted][:3]
]


def thorough(case: Case, backend: str, device: str) -> bool:
    """Whether all dtypes and layouts are tried; Triton's interpreter, which takes seconds a case, tries all
    cases in float32 and the rest with an operator's first few. A GPU tries everything."""
    return backend != "triton" or device == "cuda" or case in LEADING


def label(case_id: str, backend: str, device: str, *rest: object) -> str:
    names = [case_id, backend if device == "cpu" else f"{backend}.{device}", *map(str, rest)]
    return "-".join(names)


ROWS = [
    pytest.param(
        case,
        backend,
        device,
        dtype,
        marks=marks,
        id=label(case.id, backend, device, str(dtype).removeprefix("torch.")),
    )
    for case in CASES
    for backend, device, marks in [("reference", "cpu", ()), *places(case)]
    for dtype in DTYPES
    if dtype == torch.float32 or thorough(case, backend, device)
]


@pytest.mark.parametrize(("case", "backend", "device", "dtype"), ROWS)
def test_agrees_with_the_definition(case: Case, backend: str, device: str, dtype: torch.dtype) -> None:
    arguments = cast(case, dtype, device=device)
    wanted = run(case.operator, widen(arguments), "reference")
    got = run(case.operator, arguments, backend)
    assert got.keys() == wanted.keys()
    assert got["output 0"].dtype == (torch.float32 if case.float32_output else dtype)
    if backend == "reference" and dtype != torch.float32:
        return  # the reference in half precision is what others are compared with, below
    lost = run(case.operator, arguments, "reference") if dtype != torch.float32 else None
    for name in wanted:
        distance = error(got[name], wanted[name])
        allowed = DTYPES[dtype] * case.tolerance
        if lost is not None:
            allowed = max(allowed, min(2 * error(lost[name], wanted[name]), 5 * allowed))
        assert distance < allowed, f"{name}: relative error {distance:.2e}, allowed {allowed:.2e}"


def fused_view(tensor: Tensor) -> Tensor:
    """A view of a fused projection: the last dimension contiguous, rows apart."""
    if tensor.dim() == 0:
        return tensor
    return torch.cat([tensor, torch.full_like(tensor, torch.nan)], dim=-1)[..., : tensor.shape[-1]]


def transposed(tensor: Tensor) -> Tensor:
    """The last dimension not contiguous."""
    if tensor.dim() > 1:
        return tensor.mT.contiguous().mT
    return tensor.repeat_interleave(2)[::2] if tensor.dim() else tensor


LAYOUT_ROWS = [
    pytest.param(
        case, backend, device, layout, marks=marks, id=label(case.id, backend, device, layout.__name__)
    )
    for case in CASES
    for backend, device, marks in places(case)
    for layout in (fused_view, transposed)
    if thorough(case, backend, device)
]


@pytest.mark.parametrize(("case", "backend", "device", "layout"), LAYOUT_ROWS)
def test_strides_do_not_matter(
    case: Case, backend: str, device: str, layout: Callable[[Tensor], Tensor]
) -> None:
    plain = run(case.operator, cast(case, torch.float32, device=device), backend)
    viewed = run(case.operator, cast(case, torch.float32, layout, device), backend)
    for name in plain:
        assert error(viewed[name], plain[name].double()) < 1e-6, name


PACKED = [case for case in CASES if "cu_seqlens" in case.make(Maker())]
FIRST_PACKED = {case.operator: case for case in sorted(reversed(PACKED), key=lambda case: case.interpreted)}
PACKED_ROWS = [
    pytest.param(case, backend, device, marks=marks, id=label(case.operator, backend, device))
    for case in FIRST_PACKED.values()
    for backend, device, marks in places(case)
]


def with_offsets(case: Case, device: str, values: Tensor) -> dict[str, Any]:
    return cast(case, torch.float32, device=device) | {"cu_seqlens": values.to(device)}


@pytest.mark.parametrize(("case", "backend", "device"), PACKED_ROWS)
def test_strides_of_offsets_do_not_matter(case: Case, backend: str, device: str) -> None:
    offsets = case.make(Maker())["cu_seqlens"]
    column = torch.stack([offsets, torch.zeros_like(offsets)], dim=1).to(device)[:, 0]
    plain = run(case.operator, with_offsets(case, device, offsets), backend)
    viewed = run(case.operator, with_offsets(case, device, offsets) | {"cu_seqlens": column}, backend)
    for name in plain:
        assert torch.equal(viewed[name], plain[name]), name


@pytest.mark.parametrize(
    ("case", "backend", "device"), [row for row in PACKED_ROWS if "triton" in row.values]
)
def test_triton_keeps_unchecked_offsets_within_the_tensors(
    case: Case, backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the values of offsets are not looked at: what falls or leaves the tensor is brought back."""
    monkeypatch.setattr(contracts, "holds_values", lambda tensor: False)
    drawn = case.make(Maker())["cu_seqlens"]
    length, sequences = int(drawn[-1]), drawn.shape[0] - 1
    middle = length // 2
    wild, kept = torch.full((2, sequences + 1), middle, dtype=torch.int32)
    wild[0], kept[0] = -7, 0
    wild[2:-1:2] = -(2**30)
    wild[-1], kept[-1] = 2**30, length
    wanted = run(case.operator, with_offsets(case, device, kept), backend)
    got = run(case.operator, with_offsets(case, device, wild), backend)
    for name in wanted:
        assert torch.equal(got[name], wanted[name]), name


FIRST_CASES = list({case.operator: case for case in reversed(CASES)}.values())
FIRST_ROWS = [
    pytest.param(case, backend, device, marks=marks, id=label(case.operator, backend, device))
    for case in FIRST_CASES
    for backend, device, marks in places(case)
]


@pytest.mark.parametrize(("case", "backend", "device"), FIRST_ROWS)
def test_same_bits_whatever_the_threads(case: Case, backend: str, device: str) -> None:
    if backend == "torch":
        pytest.skip("PyTorch promises the same bits for the same number of threads only")
    results = []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        results.append(run(case.operator, cast(case, torch.float32, device=device), backend))
    torch.set_num_threads(1)
    for name in results[0]:
        assert all(torch.equal(results[0][name], other[name]) for other in results[1:]), name


@pytest.mark.parametrize(("case", "backend", "device"), FIRST_ROWS)
def test_compiles_without_graph_breaks(case: Case, backend: str, device: str) -> None:
    torch._dynamo.reset()
    function = getattr(star_kernels, case.operator)
    arguments = cast(case, torch.float32, device=device)
    compiled = torch.compile(lambda **a: function(**a, backend=backend), fullgraph=True, backend="aot_eager")
    wanted = flatten(function(**arguments, backend=backend))
    for got, other in zip(flatten(compiled(**arguments)), wanted, strict=True):
        torch.testing.assert_close(got, other)


@pytest.mark.parametrize("case", FIRST_CASES, ids=lambda case: case.operator)
def test_gradient_checkpointing(case: Case) -> None:
    function = getattr(star_kernels, case.operator)
    arguments = cast(case, torch.float32)
    leaves = [v for v in arguments.values() if isinstance(v, Tensor) and v.requires_grad]
    plain = sum(output.sum() for output in flatten(function(**arguments)))
    again = sum(output.sum() for output in flatten(checkpoint(function, use_reentrant=False, **arguments)))
    for wanted, got in zip(
        torch.autograd.grad(plain, leaves, allow_unused=True),
        torch.autograd.grad(again, leaves, allow_unused=True),
        strict=True,
    ):
        assert (wanted is None and got is None) or torch.equal(wanted, got)


@pytest.mark.parametrize(("case", "backend", "device"), FIRST_ROWS)
def test_second_derivatives_are_right_or_refused(case: Case, backend: str, device: str) -> None:
    arguments = cast(case, torch.float32, device=device)
    leaves = [v for v in arguments.values() if isinstance(v, Tensor) and v.requires_grad]
    loss = sum(
        output.square().sum()
        for output in flatten(getattr(star_kernels, case.operator)(**arguments, backend=backend))
    )
    first = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
    total = sum(gradient.square().sum() for gradient in first if gradient is not None)
    refusal = ""
    try:
        second = torch.autograd.grad(total, leaves, allow_unused=True)
    except RuntimeError as raised:
        refusal = str(raised)
    if refusal:
        assert case.operator in refusal
        assert "second derivative" in refusal
        return
    wide = widen(arguments)
    wide_leaves = [v for v in wide.values() if isinstance(v, Tensor) and v.requires_grad]
    reference = getattr(star_kernels, case.operator)(**wide, backend="reference")
    loss = sum(output.square().sum() for output in flatten(reference))
    first = torch.autograd.grad(loss, wide_leaves, create_graph=True, allow_unused=True)
    total = sum(gradient.square().sum() for gradient in first if gradient is not None)
    wanted = torch.autograd.grad(total, wide_leaves, allow_unused=True)
    for got, right in zip(second, wanted, strict=True):
        assert got is not None or right is None
        if right is not None:
            assert error(got.cpu(), right) < 1e-4


@pytest.mark.parametrize(("case", "backend", "device"), FIRST_ROWS)
def test_autocast(case: Case, backend: str, device: str) -> None:
    arguments = {n: v for n, v in cast(case, torch.float32, device=device).items()}
    with torch.autocast(device, dtype=torch.bfloat16):
        outputs = flatten(getattr(star_kernels, case.operator)(**arguments, backend=backend))
    wanted = flatten(getattr(star_kernels, case.operator)(**widen(arguments), backend="reference"))
    for got, right in zip(outputs, wanted, strict=True):
        assert error(got.detach().cpu(), right.detach()) < 3e-2 * case.tolerance


def tangents(case: Case, arguments: dict[str, Any], backend: str | None) -> list[Tensor]:
    """Of all outputs, for a tangent of ones of the first argument."""
    given = {name: v.detach() if isinstance(v, Tensor) else v for name, v in arguments.items()}
    first = next(iter(given))
    with forward_ad.dual_level():
        given[first] = forward_ad.make_dual(given[first], torch.ones_like(given[first]))
        outputs = flatten(getattr(star_kernels, case.operator)(**given, backend=backend))
        found = [forward_ad.unpack_dual(output).tangent for output in outputs]
    return [tangent for tangent in found if tangent is not None]


@pytest.mark.parametrize(("case", "backend", "device"), FIRST_ROWS)
def test_forward_mode_is_right_or_refused(case: Case, backend: str, device: str) -> None:
    arguments = cast(case, torch.float32, device=device)
    for chosen in (None, backend):
        try:
            got = tangents(case, arguments, chosen)
        except RuntimeError:  # the form has none, or, of the fused loss, no form has
            assert chosen is not None or case.operator == "linear_cross_entropy"
            continue
        wanted = tangents(case, widen(arguments), "reference")
        assert len(got) == len(wanted) > 0
        assert all(error(a.cpu(), b) < 1e-4 for a, b in zip(got, wanted, strict=True))


def compiled_operators() -> list[str]:
    return sorted(
        {case.operator for case in CASES if "cpp" in dispatch.available(case.operator, torch.zeros(1))}
    )


@pytest.mark.parametrize("operator", compiled_operators())
def test_opcheck(operator: str) -> None:
    """torch.library.opcheck on what the public function really dispatches to, as recorded."""
    from torch.utils._python_dispatch import TorchDispatchMode

    calls: list[tuple[Any, Any, Any]] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "star_kernels":
                calls.append((func, args, kwargs or {}))
            return func(*args, **(kwargs or {}))

    for case in [case for case in CASES if case.operator == operator][:3]:
        arguments = cast(case, torch.float32)
        with Record():
            run(operator, arguments, "cpp")
    assert calls or operator in STEPLESS_TORCH_FORMS, (
        f"{operator}: backend cpp dispatched no compiled operator"
    )
    for func, args, kwargs in calls:
        detached = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), args)
        torch.library.opcheck(func, detached, kwargs)


STEPLESS_TORCH_FORMS = frozenset({"attention"})
"""Operators whose "cpp" form may rest on torch's own kernels alone."""


def triton_operators() -> list[str]:
    return sorted({case.operator for case in CASES if dispatch.form(case.operator, "triton") is not None})


@pytest.mark.parametrize("operator", triton_operators())
def test_opcheck_of_triton_operators(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for the operators that launch Triton kernels; eager calls go past the dispatcher to them."""
    from star_kernels.launch import INTERPRETED, Operator

    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("needs Triton's interpreter or a GPU")
    calls: list[tuple[Any, Any]] = []
    original = Operator.__call__

    def record(self: Operator, *arguments: Any) -> Any:
        calls.append((self.definition, arguments))
        return original(self, *arguments)

    monkeypatch.setattr(Operator, "__call__", record)
    case = next(case for case in CASES if case.operator == operator)
    run(operator, cast(case, torch.float32, device="cpu" if INTERPRETED else "cuda"), "triton")
    monkeypatch.undo()
    assert calls
    for definition, arguments in calls:
        detached = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), arguments)
        torch.library.opcheck(definition, detached)
