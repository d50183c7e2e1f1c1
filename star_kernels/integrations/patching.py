"""Replacing attributes of modules and classes, and putting back the very objects that were there."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Replacement:
    """One attribute of a module or class, and what stands in its place.

    Args:
        owner: the module or class.
        name: of the attribute.
        original, replacement: what was there, and what is there while it is replaced.
    """

    owner: Any
    name: str
    original: Any
    replacement: Any


class Patch:
    """Replacements made together and taken back together, last first."""

    def __init__(self) -> None:
        self._made: list[Replacement] = []

    def replace(self, owner: Any, name: str, replacement: Any) -> None:
        """Puts ``replacement`` in the place of ``owner``'s own attribute ``name``."""
        self._made.append(Replacement(owner, name, vars(owner)[name], replacement))
        setattr(owner, name, replacement)

    def undo(self) -> list[str]:
        """Puts everything back; names what is left because someone else has replaced it since."""
        foreign = []
        while self._made:
            made = self._made.pop()
            if vars(made.owner).get(made.name) is made.replacement:
                setattr(made.owner, made.name, made.original)
            else:
                foreign.append(f"{made.owner.__name__}.{made.name}")
        return foreign

    def __len__(self) -> int:
        return len(self._made)


def parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    """The names of the parameters of what a chain of wrappers wraps, without ``*args`` and ``**kwargs``."""
    found = inspect.signature(function).parameters.values()
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return tuple(parameter.name for parameter in found if parameter.kind not in variadic)


def callers(owner: Any, names: set[str]) -> dict[str, tuple[str, ...]]:
    """The classes that a module defines and the given functions of it that their methods call."""
    found: dict[str, tuple[str, ...]] = {}
    for name, value in vars(owner).items():
        if not inspect.isclass(value) or value.__module__ != owner.__name__:
            continue
        called: set[str] = set()
        for method in vars(value).values():
            code = getattr(inspect.unwrap(method), "__code__", None) if callable(method) else None
            called.update(() if code is None else names.intersection(code.co_names))
        if called:
            found[name] = tuple(sorted(called))
    return found
