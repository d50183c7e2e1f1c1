"""One limit of a table: what it asks for and what was measured."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Check"]


@dataclass(frozen=True)
class Check:
    """What is limited, at which sizes, the limit, what was reached, and whether that is enough.

    ``met`` is None where it was not measured; ``why`` says why a limit is not met, where that is known.
    """

    name: str
    kind: str
    sizes: str
    limit: str
    reached: str
    met: bool | None
    why: str = ""
