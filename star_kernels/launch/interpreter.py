"""What Triton's interpreter needs to run our kernels on Triton 3.5 to 3.9, and in three quarters of the time.

It is there for tests and for looking into kernels (TRITON_INTERPRET=1); on a GPU nothing of this is used.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

_NEEDED = ("_patch_lang", "GridExecutor", "InterpretedFunction", "InterpreterBuilder", "TensorHandle")


def repair() -> bool:
    """Changes the interpreter, once; False where this Triton's is not built as those of 3.5 to 3.9 are, and
    is left as it is."""
    from triton import language
    from triton.runtime import interpreter

    known = all(hasattr(interpreter, name) for name in _NEEDED) and hasattr(language.core, "is_builtin")
    if known and not hasattr(interpreter._patch_lang, "repaired"):
        _prepare_once(language, interpreter)
        _call_truths_truths(language, interpreter)
    return known


def _prepare_once(language: Any, interpreter: Any) -> None:
    """Lets calls from one jitted function to another prepare only modules that are not.

    The interpreter puts its own functions into ``triton.language``, some hundred attributes, at every launch,
    where it is needed, and at every call inside of one, where it was a quarter of all time.
    """
    prepare: Callable[..., Any] = interpreter._patch_lang
    # What a launch gets, to undo its preparations with; since 3.6.
    nothing_to_undo = getattr(interpreter, "_LangPatchScope", lambda: None)

    @functools.cache
    def modules_seen_by(function: Callable[..., Any]) -> tuple[ModuleType, ...]:
        seen = [value for value in function.__globals__.values() if isinstance(value, ModuleType)]
        return tuple(module for module in (language, language.core) if module in seen)

    def prepare_where_needed(function: Callable[..., Any]) -> Any:
        modules = modules_seen_by(function)
        # Builtins are replaced, and put back, all at once: one of a module, one of its tensors tell.
        told = [builtin for module in modules for builtin in (module.arange, module.tensor.__add__)]
        if told and not any(map(language.core.is_builtin, told)):
            return nothing_to_undo()
        undo = prepare(function)
        # 3.5 asks int() of an array of one number here, which numpy 2.4 refuses.
        language.tensor.__index__ = lambda self: int(self.handle.data.item())
        return undo

    prepare_where_needed.repaired = True  # type: ignore[attr-defined]
    interpreter._patch_lang = prepare_where_needed


def _call_truths_truths(language: Any, interpreter: Any) -> None:
    """Gives the result of a comparison, an array of truths, their type; it has that of the operands.

    A scalar's comparison otherwise becomes a block of int32, and 3.9 refuses masks of those.
    """
    builder = interpreter.InterpreterBuilder
    compute: Callable[..., Any] = builder.binary_op

    def binary_op(self: Any, left: Any, right: Any, operation: Callable[..., Any]) -> Any:
        result = compute(self, left, right, operation)
        if result.data.dtype == bool:
            result.dtype = language.int1
        return result

    builder.binary_op = binary_op
