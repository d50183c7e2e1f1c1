"""Situations of the convolutions."""

from __future__ import annotations

from typing import Any

from tests.star_kernels.cases import Case, Maker, offsets


def short(
    batch: int,
    length: int,
    width: int,
    taps: int,
    *,
    gated: bool,
    bias: bool = False,
    state: bool = False,
    packed: tuple[int, ...] | None = None,
    **others: Any,
) -> Any:
    def make(draw: Maker) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "x": draw.normal(batch, length, width),
            "weight": draw.normal(width, taps),
        }
        if gated:
            arguments |= {"b": draw.normal(batch, length, width), "c": draw.normal(batch, length, width)}
        if bias:
            arguments["bias"] = draw.normal(width)
        sequences = len(packed) - 1 if packed else batch
        if state:
            arguments |= {
                "initial_state": draw.normal(sequences, taps - 1, width),
                "return_final_state": True,
            }
        if packed:
            arguments["cu_seqlens"] = offsets(*packed)
        return arguments | others

    return make


def both(name: str, *sizes: int, interpreted: bool = True, **options: Any) -> list[Case]:
    """The plain and the gated form of one situation."""
    return [
        Case("short_conv", name, short(*sizes, gated=False, **options), interpreted=interpreted),
        Case("gated_short_conv", name, short(*sizes, gated=True, **options), interpreted=interpreted),
    ]


def long(batch: int, length: int, width: int, kernel_length: int, *, gated: bool, skip: bool) -> Any:
    def make(draw: Maker) -> dict[str, Any]:
        arguments = {
            "x": draw.normal(batch, length, width),
            "kernel": draw.normal(width, kernel_length, scale=0.2),
        }
        if gated:
            arguments |= {"b": draw.normal(batch, length, width), "c": draw.normal(batch, length, width)}
        if skip:
            arguments["skip"] = draw.normal(width)
        return arguments

    return make


CASES = [
    *both("plain", 2, 37, 19, 3),
    *both("bias-state", 2, 21, 16, 4, bias=True, state=True),
    *both("five-taps", 1, 9, 33, 5, bias=True, state=True, interpreted=False),
    *both("two-taps", 3, 8, 8, 2, state=True, interpreted=False),
    *both("one-tap", 2, 5, 7, 1, bias=True, state=True),
    *both("shorter-than-taps", 2, 2, 8, 4, state=True),
    *both("one-token", 2, 1, 8, 3, bias=True, state=True),
    *both("no-token", 2, 0, 8, 3, state=True),
    *both("no-batch", 0, 4, 8, 3),
    *both("packed", 1, 29, 12, 3, packed=(0, 1, 1, 14, 29), interpreted=False),
    *both("packed-state", 1, 29, 12, 4, bias=True, state=True, packed=(0, 2, 2, 20, 29)),
    *both("many-chunks", 1, 300, 8, 3, bias=True, state=True, interpreted=False),
    *both("two-spans", 1, 35, 70, 3, bias=True, state=True),
    *both("nine-taps", 1, 20, 5, 9, bias=True, state=True),
    *both("wide-packed", 1, 70, 264, 3, bias=True, state=True, packed=(0, 33, 33, 34, 70), interpreted=False),
    Case(
        "short_conv",
        "silu",
        short(2, 37, 19, 4, gated=False, bias=True, state=True, activation="silu"),
        interpreted=False,
    ),
    Case(
        "short_conv", "small-silu", short(2, 9, 7, 3, gated=False, bias=True, state=True, activation="silu")
    ),
    Case(
        "short_conv",
        "silu-packed",
        short(1, 90, 12, 3, gated=False, state=True, packed=(0, 5, 70, 90), activation="silu"),
        interpreted=False,
    ),
    Case(
        "short_conv",
        "small-silu-packed",
        short(1, 40, 6, 3, gated=False, state=True, packed=(0, 5, 34, 40), activation="silu"),
    ),
    Case("long_conv", "plain", long(2, 33, 7, 33, gated=False, skip=False)),
    Case("long_conv", "skip-long-kernel", long(2, 20, 5, 31, gated=False, skip=True)),
    Case("long_conv", "short-kernel", long(1, 130, 6, 17, gated=False, skip=True), interpreted=False),
    Case("long_conv", "several-tiles", long(4, 130, 2, 200, gated=False, skip=True)),
    Case("long_conv", "one-token", long(2, 1, 5, 4, gated=False, skip=True)),
    Case("long_conv", "no-token", long(2, 0, 5, 4, gated=False, skip=True)),
    *(Case("long_conv", f"no-kernel-{n}", long(2, n, 5, 0, gated=False, skip=True)) for n in (4, 5)),
    Case("gated_long_conv", "plain", long(2, 33, 7, 33, gated=True, skip=False)),
    Case("gated_long_conv", "skip", long(1, 130, 6, 64, gated=True, skip=True), interpreted=False),
    Case("gated_long_conv", "several-tiles", long(4, 130, 2, 45, gated=True, skip=True)),
    Case("gated_long_conv", "no-token", long(2, 0, 5, 4, gated=True, skip=True)),
]
