"""Timing of operators: every case runs on every backend, and the numbers fit together."""

from __future__ import annotations

import pytest
import torch

import star_kernels
from star import bench
from star_kernels import dispatch

SMALL = {"B": 2, "L": 5, "D": 8, "K": 3, "N": 4, "H": 2, "Dh": 4, "Dk": 4, "Dv": 4, "V": 7}
OPERATORS = list(bench.CASES)


def small(operator: str) -> bench.Case:
    case = bench.case(operator)
    return case.with_shape([SMALL[name] for name in case.sizes])


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_every_operator_is_timed_on_every_backend(operator: str, backward: bool) -> None:
    case = small(operator)
    if backward and not case.gradients:
        with pytest.raises(ValueError, match="no backward pass"):
            bench.measure(case, backward=True)
        return
    result = bench.measure(case, threads=1, backward=backward, seconds=0.0)
    backends = {timing.backend for timing in result.timings}
    assert backends == set(dispatch.available(operator, torch.zeros(1)))
    assert all(0 < timing.fastest <= timing.median for timing in result.timings)
    assert all(timing.samples >= 3 for timing in result.timings)
    assert result.bytes > 0


def test_every_public_operator_has_a_case() -> None:
    functions = {name for name in dispatch.operators() if hasattr(star_kernels, name)}
    without = {name for name in functions - set(OPERATORS) if not name.endswith("_step")}
    assert not without


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_moves_half_the_bytes(dtype: str) -> None:
    whole = bench.measure(small("glu"), threads=1, seconds=0.0)
    half = bench.measure(small("glu"), dtype=dtype, threads=1, seconds=0.0)
    assert 2 * half.bytes == whole.bytes


def test_fractions_are_of_the_copy() -> None:
    timing = bench.Timing("reference", median=2.0, fastest=1.0, samples=3)
    copy = bench.Timing("copy", median=0.5, fastest=0.5, samples=3)
    result = bench.Measurement("glu", {"B": 1}, "float32", "cpu", 1, False, 100, (timing,), copy)
    assert result.bandwidth(timing) == 50.0
    assert result.copy_fraction(timing) == 0.25
    assert result.to_json()["backends"]["reference"]["copy_fraction"] == 0.25


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: bench.case("magic"), "operator is 'magic', takes one of short_conv"),
        (lambda: bench.case("glu", [1, 2]), "glu takes 3 sizes: B L D"),
        (lambda: bench.case("glu", [1, 0, 2]), "shape is '1,0,2'"),
        (lambda: bench.measure(small("glu"), dtype="int8"), "dtype is 'int8'"),
        (lambda: bench.measure(small("glu"), device="meta"), "device is 'meta'"),
    ],
)
def test_wrong_input_is_named(call: object, says: str) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match=says):
        call()


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    bench.measure(small("glu"), threads=before + 1, seconds=0.0)
    assert torch.get_num_threads() == before
