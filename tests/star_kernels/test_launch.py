"""Tables of configurations, packed chunks and the recording of launches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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


def test_shipped_tables_name_kernels_and_blocks_that_exist() -> None:
    known = kernels()
    for path in tables.SHIPPED.glob("*.json"):
        for name, shapes in tables.read(path).items():
            assert name in known, f"{path.name}: {name}"
            for values in shapes.values():
                assert (
                    Configuration.from_json(values).blocks.keys() == known[name].candidates[0].blocks.keys()
                )


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
