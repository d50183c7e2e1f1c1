"""Triton's interpreter, faster: a third of its time goes into preparing what is prepared already.

At every call of one jitted function by another it puts its own functions into `triton.language` again, some
hundred attributes that the kernel's launch, or an earlier call, has put there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

_NEEDED = ("_patch_lang", "GridExecutor", "InterpretedFunction")


def prepare_once() -> bool:
    """Makes calls prepare only modules that are not; False where this Triton's interpreter is not built as
    those of 3.5 to 3.9 are, and is left as it is."""
    from triton import language
    from triton.runtime import interpreter

    is_builtin = getattr(language.core, "is_builtin", None)
    if is_builtin is None or not all(hasattr(interpreter, name) for name in _NEEDED):
        return False
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
        if not told or any(map(is_builtin, told)):
            return prepare(function)
        return nothing_to_undo()

    interpreter._patch_lang = prepare_where_needed
    return True
