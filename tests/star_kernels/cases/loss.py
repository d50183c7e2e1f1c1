"""Situations of the fused loss."""

from __future__ import annotations

from typing import Any

import torch

from tests.star_kernels.cases import Case, Maker

FLOAT32 = frozenset({"weight"})


def classified(rows: int, width: int, classes: int, ignored: slice | None = None, **others: Any) -> Any:
    def make(draw: Maker) -> dict[str, Any]:
        targets = torch.randint(classes, (rows,), generator=draw.generator)
        if ignored is not None:
            targets[ignored] = others.get("ignore_index", -100)
        return {
            "x": draw.normal(rows, width),
            "weight": draw.normal(classes, width),
            "targets": targets,
        } | others

    return make


def case(name: str, make: Any, float32: frozenset[str] = FLOAT32, interpreted: bool = True) -> Case:
    return Case(
        "linear_cross_entropy", name, make, float32=float32, float32_output=True, interpreted=interpreted
    )


CASES = [
    case("plain", classified(37, 19, 50)),
    case("half-weight", classified(37, 24, 50), float32=frozenset()),
    case("ignored", classified(40, 16, 33, slice(None, None, 3))),
    case("own-ignore-index", classified(40, 16, 33, slice(5, 30), ignore_index=3)),
    case("several-chunks", classified(301, 8, 9001), interpreted=False),
    case("several-pieces", classified(70, 9, 700, slice(None, None, 5))),
    case("one-row", classified(1, 8, 12)),
]
