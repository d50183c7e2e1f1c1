"""Tables of configurations, packed chunks and the recording of launches."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from star_kernels import dispatch
from star_kernels.launch import Configuration, chunks_of, kernels, recording, tables


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    chunk=st.integers(1, 5),
)
def test_chunks_of_packed_sequences(lengths: list[int], chunk: int) -> None:
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    total = int(offsets[-1])
    sequence, first = chunks_of(offsets, total, chunk)
    wanted = [
        (number, int(offsets[number]) + start)
        for number, length in enumerate(lengths)
        for start in range(0, length, chunk)
    ]
    count = len(wanted)
    assert list(zip(sequence[:count].tolist(), first[:count].tolist(), strict=True)) == wanted
    assert (sequence[count:] == -1).all()


def test_a_table_of_the_users_is_taken_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = {"ROWS": 2, "COLUMNS": 64, "num_warps": 1, "num_stages": 1}
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"configurations": {"glu_forward": {"any": tuned}}}))
    monkeypatch.setenv(tables.VARIABLE, str(path))
    tables.lookup.cache_clear()
    tables._user_table.cache_clear()
    try:
        found = kernels()["glu_forward"].configuration("sm_90", {})
        assert found == Configuration({"ROWS": 2, "COLUMNS": 64}, 1, 1)
        assert kernels()["glu_backward"].configuration("sm_90", {}) != found
    finally:
        tables.lookup.cache_clear()
        tables._user_table.cache_clear()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file"),
        ("{", "no table"),
        ("[]", 'no "configurations"'),
        ('{"configurations": {"glu_forward": {"any": {"ROWS": 4}}}}', "num_warps"),
        ('{"configurations": {"glu_forward": {"any": {"num_warps": 0, "num_stages": 1}}}}', "positive"),
        ('{"configurations": {"glu_forward": 3}}', "glu_forward"),
    ],
)
def test_a_damaged_table_is_named(tmp_path: Path, content: str | None, words: str) -> None:
    path = tmp_path / "table.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=words) as raised:
        tables.read(path)
    assert str(path) in str(raised.value)


SHIPPED = sorted(path.stem for path in tables.SHIPPED.glob("*.json"))


@pytest.mark.parametrize("family", SHIPPED)
def test_shipped_tables_name_kernels_and_configurations_that_tuning_tries(family: str) -> None:
    known = kernels()
    for name, shapes in tables.table_of(family).items():
        assert name in known, f"{family}: {name}"
        for shape, values in shapes.items():
            chosen = Configuration.from_json(values)
            assert chosen in known[name].candidates, f"{family}: {name}, {shape}"


@pytest.mark.parametrize("family", SHIPPED)
def test_shipped_tables_say_where_they_come_from(family: str) -> None:
    assert tables.source_of(family) in ("timed", "compiled, not timed")
    if tables.source_of(family) != "timed":
        content = json.loads((tables.SHIPPED / f"{family}.json").read_text())
        assert content["reasons"].keys() == content["configurations"].keys()


def test_hopper_gets_what_ships_for_it_and_others_the_safe_choice() -> None:
    kernel, shape = kernels()["glu_forward"], "any"
    arguments = {"ROWS": 1}
    assert kernel.shape(arguments) == shape
    assert kernel.shipped("sm_90", arguments) == kernel.safe(arguments)  # the table has nothing for it
    wide = kernels()["attention_forward"]
    head = {"WIDTH": 128, "VALUE_WIDTH": 128, "DIM": 128, "VALUE_DIM": 128, "ALIGNED": True}
    call = {**head, "v": torch.empty(1, dtype=torch.bfloat16), "CAPPED": False}
    assert wide.shipped("sm_90", call) != wide.safe(call)
    assert wide.shipped("sm_80", call) == wide.safe(call)
    assert wide.shipped("sm_90", {**call, "ALIGNED": False}) == wide.safe({**call, "ALIGNED": False})


def test_launches_on_fake_tensors_are_recorded_and_not_run() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    form = dispatch.form("glu", "triton")
    assert form is not None
    with FakeTensorMode(), recording() as launches:
        gate = torch.empty(2, 3, 8, requires_grad=True)
        form(gate, torch.empty(2, 3, 8)).sum().backward()
    assert [launch.kernel.name for launch in launches] == ["glu_forward", "glu_backward"]


def test_without_a_gpu_the_error_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    x = torch.ones(2, 3)
    import star_kernels

    with pytest.raises(ValueError, match=r"does not take torch\.float64"):
        star_kernels.glu(x.double(), x.double(), backend="triton")


def test_the_backend_that_a_table_prefers_goes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def form(name: str) -> Callable[[Tensor], Tensor]:
        return lambda x: x + ("cuda", "triton").index(name)

    monkeypatch.setattr(dispatch, "_implementations", dict(dispatch._implementations))
    for name in ("cuda", "triton"):
        dispatch.register("two_forms", name, form(name))

    def call(x: Tensor) -> Tensor:
        answer: Tensor = dispatch.choose("two_forms", None, x)(x)
        return answer

    x = torch.zeros(1)
    assert call(x).item() == 0.0  # nobody measured: CUDA
    table = tmp_path / "table.json"
    table.write_text(json.dumps({"configurations": {}, "backends": {"two_forms": "triton"}}))
    with tables.using(table):
        assert call(x).item() == 1.0
        assert dispatch.fastest("two_forms", x) == ("triton", "cuda")
        assert torch.compile(call, fullgraph=True, backend="eager")(x).item() == 1.0
    assert call(x).item() == 0.0
    table.write_text(json.dumps({"configurations": {}, "backends": {"two_forms": "fastest"}}))
    with tables.using(table), pytest.raises(ValueError, match=r"table\.json.*backends"):
        call(x)
