"""transformers' root-mean-square norms on star_kernels.rms_norm, class by class, each by proof.

A norm of transformers is seven operators in Python, and a decoded token passes some ten of them. They differ
in little: whether 1 is added to the weight (Gemma, Qwen3-Next), whether there is a weight, a gate before the
norm (Mamba-2) or after it (Gated DeltaNet, Kimi), groups of channels that are normalised apart. No name says
which, so :func:`proven` builds each class small, gives it random weights and compares what it
computes with each of our formulas; a class that equals none is left as it was.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from star_kernels.integrations.covering import constant, form

__all__ = ["Formula", "candidates", "proven", "taken_over"]

_WIDTH, _GROUP, _EPS = 16, 8, 0.1  # of the probes; an eps that shows
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "sigmoid": "sigmoid"}

# Arguments of constructors that the formulas know, with the values under which a class is proven.
_OPTIONS: dict[str, tuple[Any, ...]] = {
    "group_size": (_WIDTH, _GROUP),
    "n_groups": (1, 2),
    "norm_before_gate": (True, False),
    "activation": ("silu", "sigmoid"),
}
_ALWAYS: dict[str, Any] = {"hidden_size": _WIDTH, "dim": _WIDTH, "eps": _EPS}

# Dtypes of input and weight. Float32 shows the formula; the others where it rounds, and to which dtype.
_FLOAT = (torch.float32, torch.float32)
_HALVES = (
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.bfloat16),
)
_TOLERANCES = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclasses.dataclass(frozen=True)
class Formula:
    """What a class of norms computes: x / sqrt(mean(x²) + eps) ⊙ (weight + offset), and a gate.

    Args:
        eps: the attribute that holds eps.
        weighted: whether there is a weight at all.
        offset: added to the weight, 0 or 1.
        gate: None; "before": of x ⊙ activation(gate); "after": times activation(gate); "option": before or
            after as the module's ``norm_before_gate`` says.
        activation: of the gate, or None where it is the module's ``activation``.
        groups: the attribute that holds the width of groups normalised apart ("group_size"), or their
            number ("n_groups"), or None.
        dtypes: pairs of input's and weight's dtype for which the formula is proven.
    """

    eps: str
    weighted: bool
    offset: int = 0
    gate: str | None = None
    activation: str | None = None
    groups: str | None = None
    dtypes: frozenset[tuple[torch.dtype, torch.dtype]] = frozenset()


# ---------------------------------------------------------------------------------------------------------
# The formulas


def _computed(formula: Formula, module: nn.Module, x: Tensor, gate: Tensor | None) -> Any:
    """The formula's value for a module, or NotImplemented where our operators or the proof don't reach."""
    weight: Any = module.weight if formula.weighted else None
    if type(x) is not Tensor:  # a distributed tensor, a traced one
        return NotImplemented
    if weight is not None:
        if (x.dtype, weight.dtype) not in formula.dtypes or weight.device != x.device:
            return NotImplemented
        if weight.dim() != 1 or weight.shape[0] != x.shape[-1]:
            return NotImplemented
    rms_norm = form("rms_norm", x)
    if rms_norm is None:
        return NotImplemented
    width = x.shape[-1]
    group = width
    if formula.groups is not None:
        group = _group_width(formula.groups, module, width)
    if weight is None or group != width:
        scale = constant(1.0, group, x.device)
    else:
        scale = weight if formula.offset == 0 else weight.float() + formula.offset
    eps = getattr(module, formula.eps)
    if gate is None:
        y = _grouped(rms_norm, x, scale, eps, group)
        return y if group == width or weight is None else _weighted(y, weight, formula.offset)

    glu = form("glu", x)
    activation = _ACTIVATIONS.get(formula.activation or module.activation)  # type: ignore[arg-type]
    if glu is None or activation is None:
        return NotImplemented
    if gate.dtype != x.dtype or gate.shape != x.shape or gate.device != x.device:
        return NotImplemented
    after = formula.gate == "after"
    if formula.gate == "option":
        after = bool(module.norm_before_gate)
    if not after:
        x = glu(gate, x, activation)
    y = _grouped(rms_norm, x, scale, eps, group)
    if group != width and weight is not None:
        y = _weighted(y, weight, formula.offset)
    return glu(gate, y.to(gate.dtype), activation) if after else y


def _group_width(attribute: str, module: nn.Module, width: int) -> int:
    value: Any = getattr(module, attribute)
    if attribute == "n_groups":
        return width // int(value)
    return width if value is None else int(value)


def _grouped(rms_norm: Callable[..., Any], x: Tensor, scale: Tensor, eps: float, group: int) -> Tensor:
    if group == x.shape[-1]:
        y: Tensor = rms_norm(x, scale, eps)
        return y
    normed: Tensor = rms_norm(x.unflatten(-1, (-1, group)), scale, eps)
    return normed.flatten(-2)


def _weighted(y: Tensor, weight: Tensor, offset: int) -> Tensor:
    return y * weight if offset == 0 else (y * (weight.float() + offset)).to(y.dtype)


def taken_over(owner: type, original: Callable[..., Any], formula: Formula) -> Callable[..., Any]:
    """A forward for ``owner`` that computes the formula, and asks ``original`` where that does not reach.

    Subclasses, which may have changed what the original relies on, keep the original.
    """
    if formula.gate is None:

        @functools.wraps(original)
        def forward(self: nn.Module, *arguments: Any, **options: Any) -> Any:
            plainly_called = len(arguments) == 1 and not options
            if plainly_called and self.__class__ is owner and not torch.compiler.is_exporting():
                y = _computed(formula, self, arguments[0], None)
                if y is not NotImplemented:
                    return y
            return original(self, *arguments, **options)

        return forward

    @functools.wraps(original)
    def gated(self: nn.Module, *arguments: Any, **options: Any) -> Any:
        if self.__class__ is owner and not torch.compiler.is_exporting():
            gate = arguments[1] if len(arguments) == 2 else options.get("gate")
            if len(arguments) + len(options) == 2 and arguments and type(gate) is Tensor:
                y = _computed(formula, self, arguments[0], gate)
                if y is not NotImplemented:
                    return y
        return original(self, *arguments, **options)

    return gated


# ---------------------------------------------------------------------------------------------------------
# The proof


def candidates(module: Any) -> Iterator[type]:
    """The classes of layers that a modeling module defines whose methods compute an inverse square root."""
    for value in list(vars(module).values()):
        if not inspect.isclass(value) or value.__module__ != module.__name__:
            continue
        if not issubclass(value, nn.Module) or "forward" not in vars(value):
            continue
        methods = [inspect.unwrap(method) for method in vars(value).values() if inspect.isfunction(method)]
        if any("rsqrt" in method.__code__.co_names for method in methods):
            yield value


def proven(owner: type) -> Formula | str:
    """The formula that a class computes, or why there is none."""
    return _proven(owner, vars(owner)["forward"])


@functools.cache
def _proven(owner: type, forward: Callable[..., Any]) -> Formula | str:
    takes = list(inspect.signature(forward).parameters)[1:]
    if takes not in (takes[:1], [*takes[:1], "gate"]):
        return f"forward takes ({', '.join(takes)})"
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.inference_mode(False):
            modules = list(_built(owner))
            if not modules:
                return "its constructor takes arguments that star_kernels does not know"
            with torch.no_grad():
                for formula in _formulas(modules[0], gated=len(takes) == 2):
                    if all(_equal(formula, module, forward, *_FLOAT) for module in modules):
                        reaches = [
                            pair
                            for pair in _HALVES
                            if all(_equal(formula, module, forward, *pair) for module in modules)
                        ]
                        return dataclasses.replace(formula, dtypes=frozenset([_FLOAT, *reaches]))
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError) as error:
        return f"can't be tried: {(str(error) or type(error).__name__).splitlines()[0]}"
    return "computes none of the formulas of star_kernels"


def _built(owner: type) -> Iterator[nn.Module]:
    """Small modules of the class with random weights, one for each of its options; none if it has others."""
    parameters = list(inspect.signature(owner).parameters.values())
    names = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if not set(names) <= {*_ALWAYS, *_OPTIONS}:
        return
    always = {name: _ALWAYS[name] for name in names if name in _ALWAYS}
    choices = [name for name in names if name in _OPTIONS]
    generator = torch.Generator().manual_seed(0)
    for values in itertools.product(*(_OPTIONS[name] for name in choices)):
        module = owner(**always, **dict(zip(choices, values, strict=True))).float()
        for tensor in itertools.chain(module.parameters(), module.buffers()):
            tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
        yield module


def _formulas(module: nn.Module, gated: bool) -> Iterator[Formula]:
    """Every formula that a module with these attributes may compute."""
    has = {*vars(module), *(name for name, _ in module.named_parameters()), *dict(module.named_buffers())}
    eps = next((name for name in ("variance_epsilon", "eps") if getattr(module, name, None) == _EPS), None)
    if eps is None:
        return
    groups = next((name for name in ("group_size", "n_groups") if name in has), None)
    weights = [(True, 0), (True, 1)] if "weight" in has else []
    gates: list[tuple[str | None, str | None]] = [(None, None)]
    if gated:
        orders = ["option"] if "norm_before_gate" in has else ["before", "after"]
        activations = [None] if "activation" in has else ["silu", "sigmoid"]
        gates = list(itertools.product(orders, activations))
    for (weighted, offset), (gate, activation) in itertools.product([*weights, (False, 0)], gates):
        every = frozenset([_FLOAT, *_HALVES])
        yield Formula(eps, weighted, offset, gate, activation, groups, every)


def _equal(
    formula: Formula,
    module: nn.Module,
    forward: Callable[..., Any],
    x_dtype: torch.dtype,
    weight: torch.dtype,
) -> bool:
    """Whether formula and module agree on one token (in float32) and on several, in value and in dtype."""
    module.to(weight)
    for shape in (
        ((1, 1, _WIDTH), (2, 3, _WIDTH)) if weight == x_dtype == torch.float32 else ((2, 3, _WIDTH),)
    ):
        x, gate = (_probe(seed, shape).to(x_dtype) for seed in (1, 2))
        gates = () if formula.gate is None else (gate,)
        theirs = forward(module, x, *gates)
        ours = _computed(formula, module, x, *(gates or (None,)))
        if ours is NotImplemented or ours.dtype != theirs.dtype or ours.shape != theirs.shape:
            return False
        error = float((ours.float() - theirs.float()).norm() / theirs.float().norm())
        if not error <= _TOLERANCES[x_dtype]:
            return False
    return True


@functools.cache
def _probe(seed: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
