"""Situations of the norm and of rotary embedding."""

from __future__ import annotations

from typing import Any

from tests.star_kernels.cases import Case, Maker

FLOAT32 = frozenset({"weight", "cos", "sin"})


def normed(*shape: int, residual: bool = False, scale: float = 1.0, **others: Any) -> Any:
    def make(draw: Maker) -> dict[str, Any]:
        arguments = {"x": draw.normal(*shape, scale=scale), "weight": draw.normal(shape[-1])}
        if residual:
            arguments["residual"] = draw.normal(*shape)
        return arguments | others

    return make


def turned(batch: int, length: int, heads: int, width: int) -> Any:
    def make(draw: Maker) -> dict[str, Any]:
        angle = draw.uniform(length, width // 2, high=6.3)
        return {"x": draw.normal(batch, length, heads, width), "cos": angle.cos(), "sin": angle.sin()}

    return make


ANGLES = frozenset({"cos", "sin"})

CASES = [
    Case("rms_norm", "plain", normed(2, 37, 19), float32=FLOAT32),
    Case("rms_norm", "half-weight", normed(3, 64)),
    Case("rms_norm", "residual", normed(2, 9, 40, residual=True), float32=FLOAT32),
    Case("rms_norm", "one-dimension", normed(70, residual=True), float32=FLOAT32),
    Case("rms_norm", "width-one", normed(5, 1, eps=0.5), float32=FLOAT32),
    Case("rms_norm", "large-eps", normed(4, 24, eps=0.7, residual=True), float32=FLOAT32),
    Case("rms_norm", "no-eps", normed(3, 64, eps=0.0), float32=FLOAT32),
    Case("rms_norm", "many-rows", normed(3, 401, 20), float32=FLOAT32),
    Case("rms_norm", "wide", normed(3, 1500, residual=True), float32=FLOAT32),
    Case("rms_norm", "wider-than-registers", normed(3, 9000, residual=True), float32=FLOAT32),
    Case("rms_norm", "no-rows", normed(2, 0, 8, residual=True), float32=FLOAT32),
    Case("rope", "plain", turned(2, 37, 3, 16), float32=FLOAT32, constant=ANGLES),
    Case("rope", "learned-angles", turned(2, 9, 3, 12), float32=FLOAT32),
    Case("rope", "half-angles", turned(1, 9, 2, 12), constant=ANGLES),
    Case("rope", "narrow", turned(2, 5, 2, 2), float32=FLOAT32, constant=ANGLES),
    Case("rope", "wide", turned(1, 70, 12, 64), float32=FLOAT32, constant=ANGLES),
    Case("rope", "one-token", turned(2, 1, 3, 8), float32=FLOAT32, constant=ANGLES),
    Case("rope", "no-token", turned(2, 0, 3, 8), float32=FLOAT32, constant=ANGLES),
]
