"""transformers' root-mean-square norms with and without star_kernels, and how ours are told from others."""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from star_kernels import dispatch
from star_kernels.integrations import norms
from star_kernels.integrations import transformers as integration

transformers = pytest.importorskip("transformers")

WIDTH, GROUP = 48, 16
VALUES = {"hidden_size": WIDTH, "dim": WIDTH, "group_size": GROUP, "n_groups": 3, "activation": "silu"}


@pytest.fixture(autouse=True)
def _disabled() -> Iterator[None]:
    yield
    integration.disable()


def _taken_over() -> list[str]:
    with integration.enable() as coverage:
        return sorted(coverage.norms)


NORMS = _taken_over()


def _class(name: str) -> Any:
    model, _, norm = name.partition(".")
    return getattr(importlib.import_module(f"transformers.models.{model}.modeling_{model}"), norm)


def _built(owner: Any, **changes: Any) -> nn.Module:
    """The norm with random weights."""
    takes = inspect.signature(owner).parameters
    torch.manual_seed(0)
    module: nn.Module = owner(
        **{name: value for name, value in {**VALUES, **changes}.items() if name in takes}
    )
    for tensor in [*module.parameters(), *module.buffers()]:
        tensor.data.normal_()
    return module


def _arguments(module: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """The input and, where the norm takes one, the gate."""
    count = 2 if "gate" in inspect.signature(type(module).forward).parameters else 1
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(count)]


def _results(module: nn.Module, arguments: list[Tensor]) -> list[Tensor]:
    """Output and gradients of a norm."""
    module.zero_grad()
    y = module(*arguments)
    generator = torch.Generator().manual_seed(3)
    dy = torch.randn(y.shape, generator=generator).to(y.dtype)
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return [y, *torch.autograd.grad(y, [*arguments, *parameters], dy)]


def _error(ours: Tensor, exact: Tensor) -> float:
    difference = ours.detach().double() - exact.detach().double()
    return float(difference.norm() / exact.detach().double().norm())


class _Counted:
    """How often a form of rms_norm is called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        found = norms.form

        def form(operator: str, tensor: Tensor) -> Any:
            self.calls += operator == "rms_norm"
            return found(operator, tensor)

        monkeypatch.setattr(norms, "form", form)


def test_norms_of_every_kind_are_taken_over() -> None:
    for name in ("mamba.MambaRMSNorm", "mamba2.MambaRMSNormGated", "recurrent_gemma.RecurrentGemmaRMSNorm"):
        assert name in NORMS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NORMS)
def test_equals_the_original(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    module = _built(_class(name)).to(dtype)
    exact_module = copy.deepcopy(module).double()
    counted = _Counted(monkeypatch)
    for shape in ((1, 1, WIDTH), (2, 5, WIDTH)):
        arguments = _arguments(module, shape, dtype)
        theirs = _results(module, arguments)
        # The original computes in float32 whatever it is given, so float64 gives it inputs, no more digits.
        exact = _results(exact_module, [a.detach().double().requires_grad_() for a in arguments])
        assert counted.calls == 0
        with integration.enable():
            ours = _results(module, arguments)
        assert counted.calls == 1, "the original has answered"
        counted.calls = 0
        for result, original, reference in zip(ours, theirs, exact, strict=True):
            assert result.dtype == original.dtype
            assert result.shape == original.shape
            if dtype == torch.float32:
                assert _error(result, original) < 2e-6
            else:
                assert _error(result, reference) < max(1.5 * _error(original, reference), 5e-3)


@pytest.mark.parametrize(
    "options", [{"n_groups": 1, "norm_before_gate": False}, {"norm_before_gate": False}], ids=str
)
def test_order_of_gate_and_norm_is_the_module_s(options: dict[str, Any]) -> None:
    module = _built(_class("falcon_h1.FalconH1RMSNormGated"), **options)
    arguments = _arguments(module, (2, 5, WIDTH), torch.float32)
    theirs = _results(module, arguments)
    with integration.enable():
        for result, original in zip(_results(module, arguments), theirs, strict=True):
            assert _error(result, original) < 2e-6


def test_activation_that_is_not_ours_goes_to_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = _built(_class("qwen3_next.Qwen3NextRMSNormGated"))
    module.activation = "gelu"
    arguments = _arguments(module, (2, 5, WIDTH), torch.float32)
    expected = module(*arguments)
    with integration.enable():
        assert torch.equal(module(*arguments), expected)


@pytest.mark.parametrize("name", ["mamba.MambaRMSNorm", "nemotron_h.NemotronHRMSNorm"])
def test_mixed_dtypes_keep_the_dtype_of_the_original(name: str) -> None:
    module = _built(_class(name))
    x = torch.randn(2, 5, WIDTH, dtype=torch.bfloat16)
    expected = module(x)
    with integration.enable(), torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, atol=2e-2, rtol=2e-2)


def test_float64_and_other_devices_go_to_the_original() -> None:
    module = _built(_class("mamba.MambaRMSNorm"))
    with integration.enable():
        assert module.to("meta")(torch.empty(2, WIDTH, device="meta")).shape == (2, WIDTH)
    module = _built(_class("mamba.MambaRMSNorm")).double()
    x = torch.randn(2, WIDTH, dtype=torch.float64)
    expected = module(x)
    with integration.enable():
        assert torch.equal(module(x), expected)


def test_inputs_of_any_strides_and_names() -> None:
    module = _built(_class("mamba.MambaRMSNorm"))
    x = torch.randn(2, WIDTH, 3).transpose(1, 2)
    expected = module(x)
    with integration.enable():
        torch.testing.assert_close(module(x), expected)
        torch.testing.assert_close(module(hidden_states=x), expected)
        assert module(torch.randn(0, WIDTH)).shape == (0, WIDTH)
        with pytest.raises(RuntimeError):
            module(torch.randn(2, WIDTH + 1))


def test_subclasses_keep_what_they_change() -> None:
    owner = _class("qwen3_next.Qwen3NextRMSNorm")

    class Centred(owner):  # type: ignore[misc, valid-type]
        def _norm(self, x: Tensor) -> Tensor:
            return super()._norm(x - x.mean(-1, keepdim=True))

    module = _built(Centred)
    x = torch.randn(3, WIDTH) + 2
    expected = module(x)
    with integration.enable():
        assert torch.equal(module(x), expected)


@pytest.mark.parametrize(
    "name", ["mamba.MambaRMSNorm", "mamba2.MambaRMSNormGated", "inkling2.Inkling2UnweightedRMSNorm"]
)
def test_compiles_in_one_graph_and_exports_without_us(name: str) -> None:
    if name not in NORMS:
        pytest.skip(f"this transformers has no {name}")
    module = _built(_class(name))
    arguments = _arguments(module, (2, 5, WIDTH), torch.float32)
    with integration.enable():
        expected = module(*arguments)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*arguments), expected)
        program = torch.export.export(module, tuple(a.detach() for a in arguments))
    assert "star_kernels" not in str(program.graph)
    torch._dynamo.reset()


def test_constants_made_in_inference_mode_serve_in_training() -> None:
    module = _built(_class("falcon_mamba.FalconMambaWeightlessRMSNorm"))
    x = torch.randn(2, 7, requires_grad=True)  # a width that no other test asks for
    module.weight = torch.ones(7)
    with integration.enable():
        with torch.inference_mode():
            module(x)
        module(x).sum().backward()
    assert x.grad is not None


def test_a_backend_in_use_answers_for_norms_too() -> None:
    module = _built(_class("mamba.MambaRMSNorm"))
    x = torch.randn(2, WIDTH)
    with integration.enable(), dispatch.use("reference"):
        expected = module(x)
    torch.testing.assert_close(module(x), expected)


def test_disable_restores_the_very_functions() -> None:
    before = {name: vars(_class(name))["forward"] for name in NORMS}
    with integration.enable():
        assert all(vars(_class(name))["forward"] is not before[name] for name in NORMS)
        signatures = {name: inspect.signature(_class(name).forward) for name in NORMS}
    assert all(vars(_class(name))["forward"] is before[name] for name in NORMS)
    assert all(inspect.signature(_class(name).forward) == signatures[name] for name in NORMS)


# ---------------------------------------------------------------------------------------------------------
# The proof


class _Norm(nn.Module):
    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        scale = torch.rsqrt(hidden_states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * hidden_states * scale


class _AddsTwo(_Norm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        scale = torch.rsqrt(hidden_states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (2 + self.weight) * hidden_states * scale


class _EpsOutside(_Norm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return (
            self.weight
            * hidden_states
            * (torch.rsqrt(hidden_states.pow(2).mean(-1, keepdim=True)) + self.variance_epsilon)
        )


class _LayerNorm(_Norm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        variance = hidden_states.var(-1, correction=0, keepdim=True)
        return (
            self.weight
            * (hidden_states - hidden_states.mean(-1, keepdim=True))
            * torch.rsqrt(variance + self.variance_epsilon)
        )


class _ChangesDtype(_Norm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        scale = torch.rsqrt(hidden_states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight * hidden_states * scale).double()


class _OneToken(_Norm):
    """Another formula for several tokens."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        scale = torch.rsqrt(hidden_states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * hidden_states * scale * hidden_states.shape[1]


class _Option(_Norm):
    def __init__(self, hidden_size: int, eps: float = 1e-6, centred: bool = False) -> None:
        super().__init__(hidden_size, eps)
        self.centred = centred

    def forward(self, hidden_states: Tensor) -> Tensor:
        scale = torch.rsqrt(hidden_states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * (hidden_states - float(self.centred)) * scale


class _Gated(_Norm):
    def forward(self, hidden_states: Tensor, gate: Tensor) -> Tensor:
        scale = torch.rsqrt(hidden_states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * hidden_states * scale * gate.tanh()


class _Broken(_Norm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.rsqrt(hidden_states) * self.missing


def test_a_norm_is_proven() -> None:
    formula = norms.proven(_Norm)
    assert isinstance(formula, norms.Formula)
    assert (formula.weighted, formula.offset, formula.gate, formula.groups) == (True, 0, None, None)
    assert (torch.bfloat16, torch.bfloat16) in formula.dtypes
    assert (torch.bfloat16, torch.float32) not in formula.dtypes  # the original answers in float32


@pytest.mark.parametrize(
    ("owner", "why"),
    [
        (_AddsTwo, "computes none"),
        (_EpsOutside, "computes none"),
        (_LayerNorm, "computes none"),
        (_ChangesDtype, "computes none"),
        (_OneToken, "computes none"),
        (_Gated, "computes none"),
        (_Option, "constructor takes arguments"),
        (_Broken, "can't be tried"),
    ],
)
def test_another_formula_is_left_alone(owner: type, why: str) -> None:
    reason = norms.proven(owner)
    assert isinstance(reason, str)
    assert why in reason


def test_what_is_left_alone_is_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module("transformers.models.mamba.modeling_mamba")
    monkeypatch.setattr(_AddsTwo, "__module__", module.__name__)
    monkeypatch.setattr(module, "MambaAddsTwo", _AddsTwo, raising=False)
    before = vars(_AddsTwo)["forward"]
    with integration.enable(verbose=True) as coverage:
        assert vars(_AddsTwo)["forward"] is before
        assert "mamba._AddsTwo" in coverage.left
    assert "mamba._AddsTwo: computes none of the formulas" in capsys.readouterr().out


def test_the_proof_leaves_random_numbers_and_defaults_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    norms._proven.cache_clear()
    with torch.device("meta"), torch.inference_mode():
        assert isinstance(norms.proven(_class("mamba2.MambaRMSNormGated")), norms.Formula)
    assert torch.equal(torch.rand(3), expected)
