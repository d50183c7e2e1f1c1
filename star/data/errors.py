"""The one error of `star.data`."""

from __future__ import annotations

__all__ = ["DataError"]


class DataError(ValueError):
    """A text source, a tokenizer or a cache that can't be used; the message is one line and names it."""
