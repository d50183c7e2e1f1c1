"""A checksum in a JSON object over all else that it holds, so that what was changed afterwards is noticed.

It finds damage and edits; whoever computes it anew is not kept from anything.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from star.search.store import canonical_json

__all__ = ["FIELD", "require_checksum", "with_checksum"]

FIELD = "checksum"


def with_checksum(value: Mapping[str, Any]) -> dict[str, Any]:
    """The object with its checksum, in place of one that it may have."""
    content = {name: item for name, item in value.items() if name != FIELD}
    return {**content, FIELD: hashlib.sha256(canonical_json(content).encode()).hexdigest()}


def require_checksum(value: Mapping[str, Any]) -> None:
    """Refuse an object that is not as `with_checksum` left it.

    Raises:
        ValueError: the checksum is missing, or that of something else.
    """
    if value.get(FIELD) != with_checksum(value)[FIELD]:
        raise ValueError("its checksum is not that of its content")
