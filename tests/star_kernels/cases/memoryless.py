"""Situations of the gated memoryless units."""

from __future__ import annotations

from typing import Any

from tests.star_kernels.cases import Case, Maker


def gated(*shape: int, scale: float = 1.0, **others: Any) -> Any:
    def make(draw: Maker) -> dict[str, Any]:
        return {"gate": draw.normal(*shape, scale=scale), "up": draw.normal(*shape)} | others

    return make


CASES = [
    Case("glu", "plain", gated(2, 37, 19)),
    *(
        Case("glu", name, gated(3, 65, scale=3.0, activation=name))
        for name in ("silu", "gelu", "gelu_tanh", "relu", "sigmoid")
    ),
    *(
        Case("glu", f"{name}-far-out", gated(2, 33, scale=60.0, activation=name))
        for name in ("silu", "gelu", "gelu_tanh", "sigmoid")
    ),
    Case("glu", "one-dimension", gated(70)),
    Case("glu", "one", gated(1, 1)),
    Case("glu", "four-dimensions", gated(2, 3, 4, 5)),
    Case("glu", "many", gated(3, 700, 24), interpreted=False),
    Case("glu", "no-rows", gated(2, 0, 8)),
    Case("glu", "no-width", gated(2, 3, 0)),
]
