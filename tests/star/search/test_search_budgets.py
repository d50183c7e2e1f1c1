"""Budgets: how they are written, what they keep off the front, and how a search comes within them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from star.genome import Genome
from star.measure.settings import MeasureSettings
from star.pools import Pool
from star.proxy import Outcome
from star.search.budgets import (
    FAILED,
    is_over_budget,
    judged,
    loose_budgets,
    parse_budgets,
    require_budgets,
    violation,
    width_of,
)
from star.search.front import front
from star.search.measures import Candidate, cache, flops, size
from star.search.settings import SearchSettings, preset
from star.search.store import Evaluation


def evaluation(id: int, objectives: dict[str, float], **changes: Any) -> Evaluation:
    genome = "-".join(["11111"] * (id + 1))
    row = Evaluation(id, genome, genome, 0, "random", "ok", None, objectives)
    return replace(row, **changes)


class TestWriting:
    @pytest.mark.parametrize(
        ("text", "name", "limit"),
        [
            ("ttft=200ms", "ttft", 200.0),
            ("ttft=1.5s", "ttft", 1500.0),
            ("decode_p95@32768=900us", "decode_p95@32768", 0.9),
            ("decode_p50 = 2 ms", "decode_p50", 2.0),
            ("cache=40MB", "cache", 40e6),
            ("peak_memory=2GiB", "peak_memory", 2.0 * 2**30),
            ("size=1.5M", "size", 1.5e6),
            ("flops=3e9", "flops", 3e9),
            ("recall=5%", "recall", 0.05),
            ("recall=1", "recall", 1.0),
            ("quality=2.5", "quality", 2.5),
        ],
    )
    def test_units(self, text: str, name: str, limit: float) -> None:
        assert parse_budgets([text]) == {name: pytest.approx(limit)}

    def test_the_least_of_what_should_be_much(self) -> None:
        assert parse_budgets(["ttft=1s"], ["prefill=2ktokens/s"]) == {"ttft": 1000.0, "prefill": 2000.0}
        assert parse_budgets([], ["prefill=500"]) == {"prefill": 500.0}

    @pytest.mark.parametrize(
        ("most", "least", "says"),
        [
            (["ttft=40MB"], [], "--max ttft=40MB: unit 'MB' does not fit ttft, takes us, µs, ms, s"),
            (["cache=200ms"], [], "unit 'ms' does not fit cache, takes B, kB"),
            (["ttft=200"], [], "--max ttft=200: the value 200 has no unit, takes us"),
            (["recall=20"], [], "--max recall=20: 20 is more than all, takes a share up to 1, or up to 100%"),
            (["cache=40"], [], "--max cache=40: the value 40 has no unit, takes B, kB, MB"),
            (["quality=1e400"], [], "--max quality=1e400: 1e400 is not finite"),
            (["cache=1e300TB"], [], "--max cache=1e300TB: 1e300TB is not finite"),
            (["size=3kB"], [], "unit 'kB' does not fit size, takes a plain number or k, M, G, T"),
            (["cache=forty MB"], [], "'forty MB' is no amount"),
            (["cache=-1MB"], [], "'-1MB' is no amount"),
            (["cache=0MB"], [], "a limit must be more than 0"),
            (["cache"], [], "takes NAME=LIMIT"),
            (["speed=3ms"], [], "--max has 'speed', takes one of quality, size"),
            (["ttft@4k=3ms"], [], "--max has 'ttft@4k'"),
            (["cache@4096=3MB"], [], "--max has 'cache@4096'"),
            (["cache=1MB", "cache=2MB"], [], "--max has cache twice"),
            (["prefill=9"], [], "more prefill is better, so its budget is a --min"),
            ([], ["ttft=9ms"], "less ttft is better, so its budget is a --max"),
        ],
    )
    def test_what_is_wrong_is_one_line(self, most: list[str], least: list[str], says: str) -> None:
        with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
            parse_budgets(most, least)
        assert says in str(error.value)

    @pytest.mark.parametrize("budgets", [{"speed": 1.0}, {"cache": 0}, {"cache": True}, {"cache": "4"}, [1]])
    def test_settings_refuse_others(self, budgets: object) -> None:
        with pytest.raises(ValueError, match="budget"):
            require_budgets(budgets)

    def test_settings_survive_json(self) -> None:
        settings = SearchSettings(budgets={"cache": 40e6, "ttft@4096": 200.0}, survival="hv")
        assert SearchSettings.from_json(settings.to_json()) == settings
        assert settings.of_device() == ["ttft@4096"]


class TestLoose:
    """Budgets that no genome of a search can exceed."""

    def settings(self, **changes: Any) -> SearchSettings:
        return preset("demo", depth=3, **{"pool": Pool(classes=(1, 3, 9)), **changes})

    def test_the_bound_is_that_of_the_largest_class(self) -> None:
        # SA-1 keeps keys and values of 64 channels, 4096 tokens, bfloat16; SA-3 a quarter, GMemless none.
        most = 3 * 2 * 64 * 4096 * 2
        assert loose_budgets(self.settings(budgets={"cache": most})) == {"cache": most}
        assert loose_budgets(self.settings(budgets={"cache": most - 1.0})) == {}
        swiglu = 3 * 3 * 64 * self.settings().model.swiglu_width
        assert loose_budgets(self.settings(budgets={"size": 1e9, "flops": 1.0})) == {"size": swiglu}

    def test_no_genome_exceeds_it(self) -> None:
        wide = preset("demo", budgets={"size": 1e12, "cache": 1e12, "flops": 1e15})
        bounds = loose_budgets(wide)
        assert set(bounds) == {"size", "cache", "flops"}
        rng = np.random.default_rng(0)
        for _ in range(40):
            candidate = Candidate(Genome.random(wide.depth, rng), wide, Outcome("ok"))
            assert size(candidate) <= bounds["size"]
            assert cache(candidate) <= bounds["cache"]
            assert flops(candidate) <= bounds["flops"]

    def test_layouts_that_the_search_begins_with_count(self) -> None:
        own = self.settings(pool=Pool(classes=(9,)), budgets={"cache": 1e12})
        assert loose_budgets(own) == {"cache": 0.0}
        assert loose_budgets(replace(own, seed_baselines=True))["cache"] > 0.0

    def test_what_a_training_or_a_device_decides_is_not_known(self) -> None:
        assert loose_budgets(self.settings(budgets={"quality": 1e9, "ttft": 1e9})) == {}
        assert loose_budgets(self.settings()) == {}

    def test_every_budget_has_the_width_of_its_model(self) -> None:
        known = self.settings(measure=MeasureSettings(width=512))
        widths = {name: width_of(name, known) for name in ("cache", "size", "ttft@4096", "quality", "recall")}
        assert widths == {"cache": 64, "size": 64, "ttft@4096": 512, "quality": None, "recall": None}


class TestJudging:
    def test_violation_grows_with_the_excess(self) -> None:
        budgets = {"cache": 100.0, "prefill": 50.0}
        assert violation({"cache": 100.0, "prefill": 50.0}, budgets) == 0.0
        little = violation({"cache": 101.0, "prefill": 50.0}, budgets)
        much = violation({"cache": 900.0, "prefill": 50.0}, budgets)
        both = violation({"cache": 900.0, "prefill": 10.0}, budgets)
        assert 0 < little < much < 1 < both + much < FAILED
        assert violation({"prefill": 99.0}, budgets) == 1.0  # unknown
        assert violation({"cache": 1.0, "prefill": 49.0}, budgets) == pytest.approx(0.02 / 1.02)

    def test_keeps_off_the_front(self) -> None:
        rows = [evaluation(id, {"quality": float(id), "cache": 90.0 - 10 * id}) for id in range(5)]
        names = ("quality", "cache")
        assert [item.id for item in front(judged(rows, {}), names)] == [0, 1, 2, 3, 4]
        within = judged(rows, {"cache": 70.0})
        assert [item.id for item in front(within, names)] == [2, 3, 4]
        assert [is_over_budget(item) for item in within] == [True, True, False, False, False]
        assert within[0].reason == "over budget: cache"
        assert within[0].objectives == rows[0].objectives

    def test_a_failure_stays_a_failure(self) -> None:
        row = evaluation(1, {}, status="failed", reason="diverged")
        assert judged([row], {"cache": 1.0}) == [row]
        assert not is_over_budget(row)
        assert not is_over_budget(replace(row, status="ok", reason=None))
