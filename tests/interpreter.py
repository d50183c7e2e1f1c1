"""Triton's interpreter, without what costs the tests a third of their time and shows nothing in them."""

from __future__ import annotations

import dataclasses


def quicken() -> None:
    """Leaves the interpreter as it is where another Triton has it arranged in another way.

    Every addition of integers is done a second time in 64 bits, to find an overflow: the tests' tensors are
    small. And the table of NumPy's types is made anew, some ten thousand times a test.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    builder = getattr(interpreter, "interpreter_builder", None)
    if builder is not None and hasattr(builder.options, "sanitize_overflow"):
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    slow = getattr(interpreter, "_get_np_dtype", None)
    if slow is None:
        return
    known: dict[tl.dtype, object] = {}

    def numpy_dtype(dtype: tl.dtype) -> object:
        scalar = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        if isinstance(scalar, tl.pointer_type):
            return slow(scalar)
        if scalar not in known:
            known[scalar] = slow(scalar)
        return known[scalar]

    interpreter._get_np_dtype = numpy_dtype
