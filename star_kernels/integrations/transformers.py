"""One line that puts the models of transformers on star_kernels' operators::

    import star_kernels.integrations.transformers

    star_kernels.integrations.transformers.enable()

From there on every Mamba, Mamba-2, gated delta, Kimi delta, short convolution and RG-LRU layer of the
installed transformers, in models made before or after, in training and in generation, on a CPU and on a GPU,
calls star_kernels instead of transformers' own PyTorch forms, and instead of causal_conv1d, mamba_ssm and fla
where those are installed; and so do the root-mean-square norms of these models. Nothing is written to disk,
no weight and no cache changes its meaning, and :func:`disable` puts back the very functions that were there.

transformers 5.16 and later keep these functions as globals of each modeling module; that is what is replaced.
Earlier ones compute them inside their layers, which are left as they were.
"""

from __future__ import annotations

import functools
import importlib
import re
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from star_kernels.integrations.functions import ADAPTERS, SCANS, adapted, no_shortcut
from star_kernels.integrations.norms import Formula, candidates, proven, taken_over
from star_kernels.integrations.patching import Patch, callers, parameters

__all__ = ["Coverage", "Enabled", "disable", "enable", "is_enabled"]

_patch = Patch()
_coverage: Coverage | None = None
_lock = threading.RLock()

_PACKAGES = re.compile(r"causal[-_]conv1d|mamba[-_]ssm|\bfla\b|flash[-_]linear[-_]attention")
_FUNCTION = re.compile(rf"^def ({'|'.join(ADAPTERS)})\(", re.MULTILINE)
_HUB_FUNCTION = re.compile(r"use_kernel_func_from_hub_with_fallback\(\s*\"(\w+)\"[^)]*\)\s*def (\w+)\(")
_CLASSES = {name.partition(".")[0] for name in SCANS}
_CLASS = re.compile(rf"^class ({'|'.join(_CLASSES)})\(", re.MULTILINE)


@dataclass(frozen=True)
class Coverage:
    """What runs on star_kernels and what does not.

    Args:
        version: of the installed transformers.
        covered: "model_type.Layer" to the names of the functions it calls that were replaced.
        norms: "model_type.Norm" of the root-mean-square norms that were replaced.
        left: "model_type", "model_type.function" or "model_type.Norm" to why it was left as it was.
    """

    version: str
    covered: dict[str, tuple[str, ...]]
    norms: tuple[str, ...]
    left: dict[str, str]

    def __str__(self) -> str:
        lines = [f"transformers {self.version} on star_kernels:"]
        lines += [f"  {layer}: {', '.join(names)}" for layer, names in sorted(self.covered.items())]
        lines += [f"  {norm}: forward" for norm in sorted(self.norms)]
        if len(lines) == 1:
            lines.append("  nothing")
        if self.left:
            lines.append("left as it was:")
            lines += [f"  {name}: {why}" for name, why in sorted(self.left.items())]
        return "\n".join(lines)


class Enabled:
    """What :func:`enable` returns: the coverage, and a context whose end undoes what the call has done."""

    def __init__(self, coverage: Coverage, first: bool) -> None:
        self.coverage = coverage
        self._first = first

    def __enter__(self) -> Coverage:
        return self.coverage

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._first:
            disable()

    def __repr__(self) -> str:
        layers, norms = len(self.coverage.covered), len(self.coverage.norms)
        counts = f"{layers} layers, {norms} norms, {len(self.coverage.left)} left"
        return f"<transformers {self.coverage.version} on star_kernels: {counts}>"


def enable(*, verbose: bool = False) -> Enabled:
    """Puts the layers of the installed transformers on star_kernels' operators, until :func:`disable`.

    A second call changes nothing. As a context, ``with enable(): ...``, it ends where the context ends,
    unless an earlier call had enabled it. Imports the modeling modules concerned.

    A call that our operators do not cover, for instance of packed sequences, goes to the function that was
    replaced. So does every call on a device, or in a dtype, for which only the plain definition of an
    operator exists.

    Args:
        verbose: print which layers are covered, by which functions, and what is left as it was and why.

    Returns:
        the coverage, and the context.

    Raises:
        ImportError: transformers is not installed.
    """
    global _coverage
    with _lock:
        first = _coverage is None
        if _coverage is None:
            try:
                _coverage = _replace_all()
            except BaseException:
                _patch.undo()
                raise
        coverage = _coverage
    if verbose:
        print(coverage)
    return Enabled(coverage, first)


def disable() -> None:
    """Puts back the functions that :func:`enable` has replaced; nothing if it has not been called.

    Warns where another package has replaced one of them in the meantime: that one is left alone.
    """
    global _coverage
    with _lock:
        foreign = _patch.undo()
        _coverage = None
    if foreign:
        warnings.warn(
            f"star_kernels: left alone because another package has replaced them: {', '.join(foreign)}",
            stacklevel=2,
        )


def is_enabled() -> bool:
    """Whether :func:`enable` is in force."""
    return _coverage is not None


def _replace_all() -> Coverage:
    try:
        transformers = importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ImportError(
            "star_kernels.integrations.transformers needs the package transformers: "
            "pip install 'star-kernels[hf]'"
        ) from error
    covered: dict[str, tuple[str, ...]] = {}
    norms: list[str] = []
    left: dict[str, str] = {}
    for found in _modeling_modules(Path(str(transformers.__file__)).parent):
        left.update(found.left)
        if not found.concerned:
            continue
        try:
            module = importlib.import_module(f"transformers.models.{found.model}.{found.module}")
        except (ImportError, RuntimeError) as error:  # a model with a dependency that is not installed
            left[found.model] = f"can't be imported: {str(error).splitlines()[0]}"
            continue
        _replace_functions(found.model, module, found.functions, covered, left)
        norms += _replace_norms(found.model, module, left)
    return Coverage(transformers.__version__, covered, tuple(norms), left)


@dataclass(frozen=True)
class _ModelingModule:
    """What the source of one modeling module says before it is imported."""

    model: str
    module: str
    functions: list[str]
    concerned: bool
    left: dict[str, str]


@functools.cache
def _modeling_modules(package: Path) -> list[_ModelingModule]:
    """The modules that define a function or class we stand in for, found without importing the others."""
    modules = []
    for source in sorted(package.glob("models/*/modeling_*.py")):
        text = source.read_text(encoding="utf-8")
        functions, model = _FUNCTION.findall(text), source.parent.name
        concerned = bool(functions or _CLASS.search(text))
        left = {
            f"{model}.{name}": f"star_kernels has nothing for {kernel}"
            for kernel, name in _HUB_FUNCTION.findall(text)
            if name not in ADAPTERS
        }
        if not concerned and "slow_forward" in text and _PACKAGES.search(text):
            left[model] = "computes these functions inside its layers, as transformers did before 5.16"
        if concerned or left:
            modules.append(_ModelingModule(model, source.stem, functions, concerned, left))
    return modules


def _replace_functions(
    model: str,
    module: Any,
    functions: list[str],
    covered: dict[str, tuple[str, ...]],
    left: dict[str, str],
) -> None:
    """Replaces the known functions and methods of one modeling module."""
    replaced = set()
    for name in functions:
        adapter, original = ADAPTERS[name], getattr(module, name)
        problem = _mismatch(original, adapter)
        if problem:
            left[f"{model}.{name}"] = problem
        else:
            _patch.replace(module, name, adapted(original, adapter))
            replaced.add(name)
    for layer, names in callers(module, replaced).items():
        covered[f"{model}.{layer}"] = names
    for path, adapter in SCANS.items():
        layer, _, method = path.partition(".")
        original = vars(getattr(module, layer, object)).get(method)
        if original is None:
            continue
        problem = _mismatch(original, adapter, skip=1)
        if problem:
            left[f"{model}.{path}"] = problem
        else:
            _patch.replace(getattr(module, layer), method, adapted(original, adapter))
            covered[f"{model}.{layer}"] = (method,)


def _replace_norms(model: str, module: Any, left: dict[str, str]) -> list[str]:
    """Replaces the root-mean-square norms of one modeling module; which ones."""
    replaced = []
    for norm in candidates(module):
        formula = proven(norm)
        if isinstance(formula, Formula):
            _patch.replace(norm, "forward", taken_over(norm, vars(norm)["forward"], formula))
            replaced.append(f"{model}.{norm.__name__}")
        else:
            left[f"{model}.{norm.__name__}"] = formula
    return replaced


def _mismatch(original: Any, adapter: Any, skip: int = 0) -> str:
    """Why an adapter can't stand in for a function of this transformers; empty where it can."""
    if adapter is no_shortcut:
        return ""
    takes, known = parameters(original)[skip:], parameters(adapter)[skip:]
    return "" if takes == known else f"takes ({', '.join(takes)}), not ({', '.join(known)})"
