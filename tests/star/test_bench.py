"""Timing of operators: every case runs on every backend, peers agree, and the numbers fit together."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

import star_kernels
from star import bench
from star.bench import peers
from star.bench.timing import interleaved
from star_kernels import dispatch

SMALL = {"B": 2, "L": 5, "D": 8, "K": 3, "N": 4, "H": 2, "Dh": 4, "Dk": 4, "Dv": 4, "V": 7}
OPERATORS = [*bench.CASES, *bench.STEPS]


def small(operator: str) -> bench.Case:
    case = bench.case(operator)
    return case.with_shape([SMALL[name] for name in case.sizes])


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("passes", bench.PASSES)
def test_every_operator_is_timed_on_every_backend(operator: str, passes: str) -> None:
    case = small(operator)
    if passes != "forward" and not case.gradients:
        with pytest.raises(ValueError, match="no backward pass"):
            bench.measure(case, passes=passes)
        return
    result = bench.measure(case, threads=1, passes=passes, seconds=0.0)
    assert {timing.name for timing in result.backends} == set(dispatch.fastest(operator, torch.zeros(1)))
    assert result.default.name == result.backends[0].name
    for timing in (*result.backends, *result.peers, result.copy, result.product):
        assert 0 < timing.fastest <= timing.median
        assert timing.samples >= 3
    known = {peer.name for peer in peers.PEERS.get(operator, ())}
    assert known == {timing.name for timing in result.peers} | set(result.absent)
    assert result.bytes > 0
    assert result.operations > 0


def test_every_public_operator_has_a_case() -> None:
    functions = {name for name in dispatch.operators() if hasattr(star_kernels, name)}
    assert functions == set(OPERATORS)


@pytest.mark.parametrize(
    ("operator", "peer"),
    [
        pytest.param(name, peer, id=f"{name}-{peer.name}")
        for name in peers.PEERS
        for peer in peers.PEERS[name]
    ],
)
def test_peers_compute_the_same(operator: str, peer: peers.Peer) -> None:
    function = peers.load(peer)
    if isinstance(function, str):
        pytest.skip(function)
    arguments = arguments_of(small(operator))
    ours = getattr(star_kernels, operator)(*arguments, backend="reference")
    theirs = peer.restore(function(*peer.arrange(*arguments)))
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


def arguments_of(case: bench.Case) -> tuple[Any, ...]:
    return case.make(case.sizes, bench.Fill.seeded(torch.float32, torch.device("cpu")))


def test_absent_packages_are_named() -> None:
    def find() -> Any:
        raise ImportError("No module named 'other'")

    assert peers.load(peers.Peer("other", find)) == "No module named 'other'"


def test_the_reference_is_timed_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: asked.append(function) or function)
    result = bench.measure(small("glu"), threads=1, seconds=0.0, compiled=True)
    assert [timing.name for timing in result.backends][-1] == bench.COMPILED
    assert asked[0].keywords == {"backend": "reference"}
    assert result.compile_seconds is not None


def test_what_can_not_be_compiled_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise torch._dynamo.exc.Unsupported("no such thing")

    monkeypatch.setattr(torch, "compile", lambda function, **options: refuse)
    result = bench.measure(small("glu"), threads=1, seconds=0.0, compiled=True)
    assert bench.COMPILED not in [timing.name for timing in result.backends]
    assert "no such thing" in result.absent[bench.COMPILED]
    assert result.compile_seconds is None


def test_peers_are_chosen_by_the_start_of_their_names() -> None:
    names = [timing.name for timing in bench.measure(small("gated_long_conv"), seconds=0.0, peers=()).peers]
    assert names == []
    result = bench.measure(small("gated_long_conv"), seconds=0.0, peers=("rfft, (B, L",))
    assert [timing.name for timing in result.peers] == ["rfft, (B, L, D)"]
    assert result.best_peer() is result.peers[0]
    assert result.best_peer(("fla",)) is None


def test_a_long_call_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("star.bench.timing.LONG_CALL", 0.01)
    made: list[float] = []
    calls = {"long": lambda: made.append(time.sleep(0.02) or 0.0), "short": lambda: None}
    timings = interleaved(calls, 0.0, torch.device("cpu"))
    assert len(made) == timings["long"].samples == 1
    assert timings["short"].samples >= 3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_moves_half_the_bytes(dtype: str) -> None:
    whole = bench.measure(small("glu"), threads=1, seconds=0.0)
    half = bench.measure(small("glu"), dtype=dtype, threads=1, seconds=0.0)
    assert 2 * half.bytes == whole.bytes


def test_bytes_count_each_tensor_once() -> None:
    case = bench.case("rope", [1, 2, 3, 4])
    x, angles = 2 * 3 * 4 * 4, 2 * (2 * 2 * 4)
    arguments = arguments_of(case)
    results = star_kernels.rope(*arguments)
    assert case.bytes_moved("forward", arguments, results) == 2 * x + angles
    assert case.bytes_moved("backward", arguments, results) == 2 * x + angles  # without x itself
    assert case.bytes_moved("both", arguments, results) == 4 * x + 2 * angles


def test_operations_are_those_of_the_definition() -> None:
    case = bench.case("linear_cross_entropy", [2, 3, 5])
    assert case.operations("forward") == 2 * 2 * 3 * 5
    assert case.operations("both") == 3 * case.operations("forward")


def test_fractions_are_of_the_yardsticks() -> None:
    timing = bench.Timing("reference", median=2.0, fastest=1.0, samples=3)
    copy = bench.Timing("copy", median=0.5, fastest=0.5, samples=3)
    product = bench.Timing("product", median=1.0, fastest=1.0, samples=3)
    result = bench.Measurement(
        operator="glu",
        sizes={"B": 1},
        dtype="float32",
        device="cpu",
        threads=1,
        passes="forward",
        bytes=100,
        operations=40,
        backends=(timing,),
        peers=(),
        absent={},
        copy=copy,
        product=product,
        product_operations=200,
    )
    assert result.bandwidth(timing) == 50.0
    assert result.copy_fraction(timing) == 0.25
    assert result.rate(timing) == 20.0
    assert result.product_fraction(timing) == 0.1
    assert result.to_json()["backends"]["reference"]["copy_fraction"] == 0.25


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: bench.case("magic"), "operator is 'magic', takes one of short_conv"),
        (lambda: bench.case("glu", [1, 2]), "glu takes 3 sizes: B L D"),
        (lambda: bench.case("glu", [1, 0, 2]), "shape is '1,0,2'"),
        (lambda: bench.measure(small("glu"), dtype="int8"), "dtype is 'int8'"),
        (lambda: bench.measure(small("glu"), device="meta"), "device is 'meta'"),
        (lambda: bench.measure(small("glu"), passes="sideways"), "passes is 'sideways'"),
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
