"""Situations of the recurrences."""

from __future__ import annotations

from typing import Any

from tests.star_kernels.cases import Case, Maker, offsets


def options(
    draw: Maker, sequences: int, shape: tuple[int, ...], state: bool, packed: tuple[int, ...] | None
) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    if state:
        arguments |= {"initial_state": draw.normal(sequences, *shape), "return_final_state": True}
    if packed:
        arguments["cu_seqlens"] = offsets(*packed)
    return arguments


def linear(
    batch: int, length: int, width: int, *, state: bool = False, packed: tuple[int, ...] | None = None
) -> Any:
    def make(draw: Maker) -> dict[str, Any]:
        return {
            "decay": draw.uniform(batch, length, width, low=-0.3, high=1.0),
            "x": draw.normal(batch, length, width),
        } | options(draw, len(packed) - 1 if packed else batch, (width,), state, packed)

    return make


def selective(
    batch: int,
    length: int,
    width: int,
    states: int,
    groups: int = 0,
    *,
    gate: bool = False,
    skip: bool = False,
    softplus: bool = False,
    state: bool = False,
    packed: tuple[int, ...] | None = None,
) -> Any:
    def make(draw: Maker) -> dict[str, Any]:
        shape = (batch, length, groups, states) if groups else (batch, length, states)
        arguments: dict[str, Any] = {
            "x": draw.normal(batch, length, width),
            "dt": draw.normal(batch, length, width) if softplus else draw.uniform(batch, length, width),
            "A": -draw.uniform(width, states, low=0.1, high=4.0),
            "B": draw.normal(*shape),
            "C": draw.normal(*shape),
        }
        if skip:
            arguments["D"] = draw.normal(width)
        if gate:
            arguments["z"] = draw.normal(batch, length, width)
        if softplus:
            arguments |= {"dt_bias": draw.normal(width), "dt_softplus": True}
        return arguments | options(draw, len(packed) - 1 if packed else batch, (width, states), state, packed)

    return make


def matrix(
    batch: int,
    length: int,
    heads: int,
    keys: int,
    values: int,
    *,
    delta: bool,
    decay: str | None = None,
    strength: float = 1.0,
    key_heads: int | None = None,
    state: bool = False,
    packed: tuple[int, ...] | None = None,
    **others: Any,
) -> Any:
    def make(draw: Maker) -> dict[str, Any]:
        query_heads = key_heads or heads
        arguments: dict[str, Any] = {
            "q": draw.normal(batch, length, query_heads, keys),
            "k": draw.unit(batch, length, query_heads, keys),
            "v": draw.normal(batch, length, heads, values),
        }
        if delta:
            arguments["beta"] = draw.uniform(batch, length, heads)
        if decay:
            shape = (batch, length, heads) + ((keys,) if decay == "key" else ())
            arguments["log_decay"] = -draw.uniform(*shape, high=strength)
        sequences = len(packed) - 1 if packed else batch
        return arguments | options(draw, sequences, (heads, keys, values), state, packed) | others

    return make


def both(name: str, *sizes: int, interpreted: bool = True, **situation: Any) -> list[Case]:
    """Linear attention and the delta rule in one situation."""
    kept = frozenset({"initial_state", "log_decay"})
    return [
        Case(
            operator,
            name,
            matrix(*sizes, delta=operator == "gated_delta_rule", **situation),
            float32=kept,
            interpreted=interpreted,
        )
        for operator in ("gated_linear_attention", "gated_delta_rule")
    ]


def cells(
    name: str,
    batch: int,
    length: int,
    width: int,
    *,
    state: bool = False,
    weight: float = 1.0,
    interpreted: bool = True,
) -> list[Case]:
    """The GRU and the LSTM in one situation; Newton's iterations fail with large weights."""

    def gru(draw: Maker) -> dict[str, Any]:
        arguments: dict[str, Any] = {n: draw.normal(batch, length, width) for n in ("xz", "xr", "xh")}
        arguments |= {n: draw.normal(width, scale=weight) for n in ("az", "ar", "ah")}
        return arguments | options(draw, batch, (width,), state, None)

    def lstm(draw: Maker) -> dict[str, Any]:
        arguments: dict[str, Any] = {n: draw.normal(batch, length, width) for n in ("xf", "xo", "xz")}
        arguments |= {n: draw.normal(width, scale=weight) for n in ("af", "ao", "az")}
        return arguments | {"return_final_state": state}

    return [
        Case("gru_scan", name, gru, float32=frozenset({"initial_state"}), interpreted=interpreted),
        Case("lstm_scan", name, lstm, interpreted=interpreted),
    ]


STATE = frozenset({"initial_state"})
WEIGHTS = frozenset({"A", "D", "dt_bias", "initial_state"})
EVERYTHING: dict[str, Any] = {"gate": True, "skip": True, "softplus": True, "state": True}

CASES = [
    Case("linear_scan", "few", linear(1, 33, 3)),
    Case("linear_scan", "few-state", linear(1, 18, 4, state=True), float32=STATE),
    Case("linear_scan", "few-blocks", linear(1, 2, 70, state=True)),
    Case("linear_scan", "few-packed", linear(1, 33, 2, state=True, packed=(0, 1, 1, 18, 33))),
    Case("linear_scan", "plain", linear(2, 37, 19), interpreted=False),
    Case("linear_scan", "state", linear(2, 21, 16, state=True), float32=STATE, interpreted=False),
    Case("linear_scan", "blocks", linear(1, 5, 300, state=True), interpreted=False),
    Case("linear_scan", "one-token", linear(2, 1, 8, state=True)),
    Case("linear_scan", "no-token", linear(2, 0, 8, state=True)),
    Case("linear_scan", "no-batch", linear(0, 4, 8)),
    Case("linear_scan", "packed", linear(1, 29, 12, state=True, packed=(0, 1, 1, 14, 29)), interpreted=False),
    Case("selective_scan", "few", selective(1, 10, 16, 3), float32=WEIGHTS),
    Case("selective_scan", "few-pieces", selective(1, 33, 16, 2, **EVERYTHING), float32=WEIGHTS),
    Case("selective_scan", "few-groups", selective(1, 3, 66, 3, 2, **EVERYTHING), float32=WEIGHTS),
    Case(
        "selective_scan",
        "few-packed",
        selective(1, 18, 2, 2, **EVERYTHING, packed=(0, 0, 17, 18)),
        float32=WEIGHTS,
    ),
    *(
        Case("selective_scan", name, make, interpreted=False, float32=kept)
        for name, make, kept in (
            ("plain", selective(2, 37, 19, 4), WEIGHTS),
            ("everything", selective(2, 70, 40, 16, **EVERYTHING), WEIGHTS),
            ("half-weights", selective(2, 33, 8, 2, **EVERYTHING), frozenset()),
            ("odd-states", selective(1, 40, 9, 7, gate=True, state=True), WEIGHTS),
            ("one-state", selective(3, 33, 5, 1, softplus=True), WEIGHTS),
            ("groups", selective(2, 35, 24, 5, 3, **EVERYTHING), WEIGHTS),
            ("blocks", selective(1, 34, 130, 3, **EVERYTHING), WEIGHTS),
            ("many-states", selective(2, 19, 6, 40, **EVERYTHING), WEIGHTS),
        )
    ),
    Case("selective_scan", "one-group", selective(1, 5, 6, 1, 1, skip=True)),
    Case("selective_scan", "one-token", selective(2, 1, 8, 4, **EVERYTHING), float32=WEIGHTS),
    Case("selective_scan", "no-token", selective(2, 0, 8, 4, **EVERYTHING), float32=WEIGHTS),
    Case("selective_scan", "no-batch", selective(0, 4, 8, 4), float32=WEIGHTS),
    Case(
        "selective_scan",
        "packed",
        selective(1, 90, 12, 4, 2, **EVERYTHING, packed=(0, 1, 1, 40, 90)),
        float32=WEIGHTS,
        interpreted=False,
    ),
    *both("few", 1, 33, 1, 8, 8),
    *both("plain", 2, 37, 3, 8, 8, interpreted=False),
    *both("head-decay", 2, 70, 2, 16, 24, decay="head", state=True, interpreted=False),
    *both("key-decay", 2, 70, 2, 16, 24, decay="key", state=True, interpreted=False),
    *both("strong-head-decay", 1, 40, 2, 8, 8, decay="head", strength=100.0, state=True),
    *both("strong-key-decay", 1, 40, 2, 8, 8, decay="key", strength=100.0, state=True),
    *both("shared-keys", 1, 20, 4, 5, 7, key_heads=2, decay="head", scale=0.7, interpreted=False),
    *both("shared-keys-key-decay", 1, 35, 6, 5, 3, key_heads=2, decay="key", state=True, interpreted=False),
    *both("wide", 1, 18, 1, 40, 33, decay="key", state=True),
    *both("few-head-decay", 1, 35, 2, 5, 18, decay="head", key_heads=1, state=True, scale=0.7),
    *both("few-key-decay", 1, 35, 1, 18, 5, decay="key", state=True),
    *both("few-packed", 1, 36, 1, 5, 3, decay="key", state=True, packed=(0, 1, 1, 34, 36)),
    *both("one-token", 2, 1, 2, 8, 8, decay="head", state=True, interpreted=False),
    *both("few-one-token", 1, 1, 2, 8, 8, decay="head", state=True),
    *both("no-token", 2, 0, 2, 8, 8, decay="key", state=True),
    *both("no-batch", 0, 4, 2, 8, 8, decay="head"),
    *both("packed", 1, 90, 2, 8, 12, decay="key", state=True, packed=(0, 1, 1, 40, 90), interpreted=False),
    *cells("few", 1, 9, 3),
    *cells("few-state", 1, 10, 4, state=True),
    *cells("few-walked", 1, 6, 5, state=True),
    *cells("plain", 2, 37, 19, interpreted=False),
    *cells("state", 2, 21, 16, state=True, interpreted=False),
    *cells("blocks", 1, 12, 150, state=True, interpreted=False),
    *cells("tiles", 1, 150, 5, state=True, interpreted=False),
    *cells("not-contracting", 1, 150, 5, state=True, weight=4.0, interpreted=False),
    *cells("one-token", 2, 1, 8, state=True),
    *cells("no-token", 2, 0, 8, state=True),
    *cells("no-batch", 0, 4, 8),
]
