"""Settings: round trips, refusals in one line, presets, and what importing them costs."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from star.pools import Pool
from star.search.objectives import OBJECTIVES
from star.search.settings import EXECUTION, PRESETS, DataSettings, SearchSettings, preset

some_settings = st.builds(
    SearchSettings,
    objectives=st.permutations(list(OBJECTIVES)).flatmap(
        lambda names: st.integers(1, len(names)).map(lambda count: tuple(names[:count]))
    ),
    population=st.integers(2, 64),
    generations=st.integers(1, 100),
    depth=st.integers(1, 48),
    pool=st.builds(
        Pool,
        classes=st.sets(st.integers(1, 17), min_size=1).map(tuple),
        max_groups=st.integers(1, 99),
        featurizer_sharing=st.booleans(),
        feature_sharing=st.booleans(),
    ),
    seed=st.integers(0, 2**63 - 1),
    mutation_rate=st.floats(0, 1),
    seed_baselines=st.booleans(),
    data=st.builds(DataSettings, source=st.lists(st.text(min_size=1), max_size=3).map(tuple)),
    workers=st.none() | st.integers(1, 64),
    engine=st.sampled_from(["local", "ray"]),
)


@given(some_settings)
def test_json_round_trip(settings: SearchSettings) -> None:
    assert SearchSettings.from_json(json.loads(json.dumps(settings.to_json()))) == settings


@given(some_settings, st.none() | st.integers(1, 9))
def test_identity_is_all_but_the_execution(settings: SearchSettings, workers: int | None) -> None:
    assert replace(settings, workers=workers, engine="local").identity() == settings.identity()
    assert set(settings.to_json()) - set(settings.identity()) == set(EXECUTION)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"population": 1}, "population is 1, takes an integer from 2"),
        ({"population": True}, "population is True"),
        ({"population": 3, "tournament": 4}, "tournament is 4, takes an integer from 1 to 3"),
        ({"generations": 0}, "generations is 0"),
        ({"depth": 2.0}, "depth is 2.0"),
        ({"mutation_rate": 1.5}, "mutation_rate is 1.5, takes a number from 0 to 1"),
        ({"mutation_rate": float("nan")}, "mutation_rate is nan"),
        ({"objectives": ()}, "objectives is empty"),
        ({"objectives": ("speed",)}, "objectives has 'speed', takes one or more of quality"),
        ({"objectives": ("size", "size")}, "objectives has 'size' twice"),
        ({"workers": 0}, "workers is 0"),
        ({"engine": "dask"}, "engine is 'dask', takes local or ray"),
        ({"references": 1}, "references is 1, takes true or false"),
        ({"speed": 1}, "setting 'speed' is unknown"),
    ],
)
def test_wrong_values_are_refused_in_one_line(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
        preset("demo", **changes)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "value",
    [
        [],
        {"population": "8"},
        {"population": None},
        {"model": {"width": 63}},
        {"model": {}},
        {"model": 3},
        {"proxy": {"steps": 0}},
        {"proxy": {"color": 1}},
        {"proxy": None},
        {"pool": {"classes": [99]}},
        {"pool": {}},
        {"pool": []},
        {"data": {"source": [3]}},
        {"data": {"sauce": []}},
        {"data": 1},
        {"objectives": 5},
        {"objectives": [["quality"]]},
        {"nonsense": 1},
    ],
)
def test_wrong_json_is_refused_in_one_line(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        SearchSettings.from_json(value)


def test_unknown_preset() -> None:
    with pytest.raises(ValueError, match="preset is 'huge', takes demo, laptop, paper"):
        preset("huge")


def test_presets() -> None:
    assert PRESETS["demo"].planned >= 40
    assert (PRESETS["laptop"].population, PRESETS["laptop"].generations) == (16, 18)
    paper = PRESETS["paper"]
    assert (paper.population, paper.generations, paper.depth, paper.model.width) == (16, 18, 24, 768)
    assert paper.proxy.length == 4096
    assert 1.2e9 < paper.proxy.tokens < 1.4e9
    assert all(settings.depth == 24 and settings.mutation_rate == 0.1 for settings in PRESETS.values())


def test_reading_a_record_imports_neither_torch_nor_pymoo() -> None:
    code = (
        "import sys, star.search; star.search.preset('demo'); star.search.RunStore; "
        "import star.search.front, star.search.events; "
        "assert not {'torch', 'pymoo'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
