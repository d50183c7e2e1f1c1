"""The table of a device: its file, its predictions, and where it is kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import known_tables
import pytest
import torch
from known_tables import CONTEXTS, SETTINGS, row, table

from star import baselines, cost, pools, sharing
from star.genome import Genome
from star.measure.settings import MeasureSettings
from star.profile.cached import agrees, cached_path, find_or_measure
from star.profile.predict import Predictor, predictor
from star.profile.table import LivRow, ProfileDamaged, ProfileTable, Steadiness, read_table
from star.sharing import resolve


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "table.json"
    table().write(path)
    return path


class TestFile:
    def test_is_read_as_it_was_written(self, file: Path) -> None:
        assert read_table(file) == table()
        assert read_table(file).checksum == table().checksum

    def test_numbers_survive_to_the_last_digit(self) -> None:
        odd = replace(row(1, ("query",), 64), prefill=0.1 + 0.2, transient=None)
        assert LivRow.parse(odd.line()) == odd
        empty = row(7, (), 64)
        assert LivRow.parse(empty.line()) == empty

    @pytest.mark.parametrize("place", range(0, 1000, 37))
    def test_no_changed_byte_is_believed(self, file: Path, place: int) -> None:
        raw = bytearray(file.read_bytes())
        position = place * len(raw) // 1000
        old = chr(raw[position])
        raw[position] = ord("7" if old != "7" else "3")
        file.write_bytes(bytes(raw))
        if old.isspace():  # between two values it may mean the same
            return
        with pytest.raises(ProfileDamaged, match=r"^profile table [^\n]*$"):
            read_table(file)

    @pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": 1}', '{"format": 2}', "[" * 100_000])
    def test_other_files_are_refused(self, file: Path, text: str) -> None:
        file.write_text(text)
        with pytest.raises(ProfileDamaged, match=r"^profile table [^\n]*$"):
            read_table(file)

    def test_a_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(ProfileDamaged, match="can not be read: No such file"):
            read_table(tmp_path / "none.json")

    @pytest.mark.parametrize("value", [float("nan"), True, "3"])
    def test_what_is_no_number_is_refused(self, value: object) -> None:
        plain = table().to_json()
        plain["ends"][0]["decode"] = value
        with pytest.raises(ProfileDamaged, match="damaged"):
            ProfileTable.from_json(plain)

    def test_a_table_from_before_steadiness_was_measured(self, file: Path) -> None:
        assert "steadiness" not in json.loads(file.read_text())
        assert read_table(file).steadiness == ()
        assert read_table(file).warning() is None

    def test_steadiness_is_kept_and_checked(self, file: Path) -> None:
        steady = replace(table(), steadiness=(Steadiness(64, 2, 0.01, 0.02, 0), Steadiness(256, 2, 0, 0, 0)))
        steady.write(file)
        assert read_table(file) == steady
        assert steady.checksum != table().checksum
        plain = steady.to_json()
        plain["steadiness"][0]["prefill"] = 0.5
        with pytest.raises(ProfileDamaged, match="checksum"):
            ProfileTable.from_json(plain)

    def test_names_missing_classes(self) -> None:
        with pytest.raises(ValueError, match="profile table has no LIV class 3, 9"):
            table(classes=[1, 2]).require_classes([1, 3, 9])


class TestPrediction:
    def test_adds_up(self) -> None:
        genome = baselines.transformer_pp(2)  # SA-1 and GMemless
        values = Predictor(table()).predict(genome)
        livs = (10 + 3) + (90 + 2)
        assert values["ttft@64"] == pytest.approx(livs + 3.0 + 2 * (0.25 + 0.75))
        assert values["ttft@256"] == pytest.approx(4 * livs + 3.0 + 2 * (0.25 + 0.75))
        assert values["decode_p50@64"] == pytest.approx(livs / 10 + 0.5 + 2 * (0.125 + 0.125))
        assert values["decode_p95@64"] == pytest.approx(1.5 * values["decode_p50@64"])
        assert values["prefill@64"] == pytest.approx(64e3 / values["ttft@64"])

    def test_a_follower_takes_less(self) -> None:
        alone = Predictor(table()).predict(Genome.parse("11111-11111"))
        following = Predictor(table()).predict(Genome.parse("11114-11114"))  # keys and values
        assert alone["ttft@64"] - following["ttft@64"] == pytest.approx(2.0)

    def test_shared_weights_take_as_long_and_less_memory(self) -> None:
        alone = Predictor(table()).predict(Genome.parse("11111-11111"))
        shared = Predictor(table()).predict(Genome.parse("11211-11211"))
        assert shared["ttft@64"] == alone["ttft@64"]
        assert alone["peak_memory@64"] - shared["peak_memory@64"] == 4 * 3 * 64 * 64

    def test_memory_is_weights_caches_and_the_largest_transient(self) -> None:
        genome = Genome.parse("11114-11114-91111")
        config = SETTINGS.config()
        weights = 4 * (cost.parameters(genome, config) + 256 * 64 + 4 * 64)
        streams = 4 * 2 * 128 * 64  # a chunk of the 256 tokens
        cache = cost.cache_bytes(genome, config, length=256 + 4 + 8, dtype=torch.float32)
        held, lent, transient = 8 * (1 + 1 + 9), 50, 9000
        expected = weights + streams + cache + held + lent + transient + 100 * 3 // 17
        assert Predictor(table()).predict(genome)["peak_memory@256"] == expected

    def test_memory_that_was_not_measured_is_not_predicted(self) -> None:
        known = table()
        unknown = replace(known, rows=tuple(replace(item, transient=None) for item in known.rows))
        assert "peak_memory@64" not in Predictor(unknown).predict(baselines.lfm2(4))

    def test_what_is_remembered_changes_no_prediction(self) -> None:
        import numpy as np

        rng = np.random.default_rng(2)
        known = Predictor(table())
        other = Predictor(table(replace(SETTINGS, width=128)))
        genomes = [Genome.random(12, rng) for _ in range(20)]
        remembered = [(known.predict(genome), other.predict(genome)) for genome in genomes]
        for genome, values in zip(genomes, remembered, strict=True):
            cost._known_costs.cache_clear()
            sharing._resolved.cache_clear()
            assert (known.predict(genome), other.predict(genome)) == values

    def test_every_genome_is_predicted(self) -> None:
        import numpy as np

        rng = np.random.default_rng(0)
        known = Predictor(table())
        for _ in range(50):
            genome = Genome.random(12, rng)
            values = known.predict(genome)
            assert len(values) == 5 * len(CONTEXTS)
            expected = sum(10 * plan.entry.id + len(plan.computed) for plan in resolve(genome))
            assert values["ttft@64"] == pytest.approx(expected + 3.0 + 12 * 1.0)

    def test_a_class_that_was_not_measured(self) -> None:
        with pytest.raises(ValueError, match="has no LIV of class SA-1 that computes query, key, value"):
            Predictor(table(classes=[9])).predict(baselines.transformer_pp(2))

    def test_one_predictor_a_table(self) -> None:
        first, second = table(), table()
        assert predictor(first) is predictor(first)
        assert predictor(second).table is second

    def test_no_sum_is_negative(self) -> None:
        known = table()
        low = replace(
            known, calibrations=tuple(replace(c, prefill=-1e6, decode=-1e6) for c in known.calibrations)
        )
        values = Predictor(low).predict(baselines.transformer_pp(2))
        assert values["ttft@64"] == 92.0
        assert values["decode_p50@64"] == 9.2


class TestKept:
    @pytest.fixture(autouse=True)
    def own_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("STAR_CACHE", str(tmp_path / "cache"))

    def measure(self, settings: MeasureSettings, **options: Any) -> ProfileTable:
        self.measured = getattr(self, "measured", 0) + 1
        return table(settings, classes=options["classes"])

    def test_measured_once(self) -> None:
        every = [entry.id for entry in pools.all_classes()]
        first = find_or_measure(SETTINGS, every, measure=self.measure)
        assert find_or_measure(SETTINGS, [1, 9], measure=self.measure) == first
        assert find_or_measure(replace(SETTINGS, every=3), [1], measure=self.measure) == first
        assert self.measured == 1
        find_or_measure(SETTINGS, [1], measure=self.measure, anew=True)
        assert self.measured == 2

    def test_measured_again_for_other_sizes_and_classes(self) -> None:
        find_or_measure(SETTINGS, [1], measure=self.measure)
        find_or_measure(replace(SETTINGS, threads=2), [1], measure=self.measure)
        find_or_measure(SETTINGS, [1, 2], measure=self.measure)
        assert self.measured == 3

    @pytest.mark.parametrize("change", [{"decode": 1e4}, {"prefill": 1e4}, {"prefill": -80.0}])
    def test_an_unsteady_one_is_not_kept(self, change: dict[str, Any]) -> None:
        def measure(settings: MeasureSettings, **options: Any) -> ProfileTable:
            found = self.measure(settings, **options)
            return replace(found, calibrations=tuple(replace(c, **change) for c in found.calibrations))

        every = [entry.id for entry in pools.all_classes()]
        assert find_or_measure(SETTINGS, every, measure=measure).warning() is not None
        assert not cached_path(SETTINGS).exists()
        find_or_measure(SETTINGS, every, measure=self.measure)
        assert self.measured == 2
        kept = read_table(cached_path(SETTINGS))
        find_or_measure(SETTINGS, every, measure=measure, anew=True)
        assert read_table(cached_path(SETTINGS)) == kept

    def test_an_unsteady_one_that_is_kept_is_measured_again(self) -> None:
        every = [entry.id for entry in pools.all_classes()]
        good = find_or_measure(SETTINGS, every, measure=self.measure)
        bad = replace(good, calibrations=tuple(replace(c, decode=1e4) for c in good.calibrations))
        bad.write(cached_path(SETTINGS))
        said: list[str] = []
        assert find_or_measure(SETTINGS, every, measure=self.measure, tell=said.append) == good
        assert self.measured == 2
        assert said[0].startswith("again, since the kept profile table is unsteady: a token of a whole model")

    def test_a_damaged_one_is_measured_again(self) -> None:
        said: list[str] = []
        find_or_measure(SETTINGS, [1], measure=self.measure)
        cached_path(SETTINGS).write_text(cached_path(SETTINGS).read_text().replace("abacus", "slide"))
        found = find_or_measure(SETTINGS, [1], measure=self.measure, tell=said.append)
        assert found.device_name == "abacus"
        assert self.measured == 2
        assert "checksum" in said[0]


class TestAgreement:
    def test_takes_over_what_is_left_open(self) -> None:
        asked = MeasureSettings(width=64, chunk=128, every=5)
        assert agrees(table(), asked) == replace(SETTINGS, every=5)

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"width": 128}, "was measured with width 64, not 128"),
            ({"contexts": (64, 128)}, "was measured with contexts 64, 256, not 64, 128"),
            ({"dtype": "bfloat16"}, "was measured with dtype float32, not bfloat16"),
            ({"device": "cuda"}, "was measured with device cpu, not cuda:0"),
        ],
    )
    def test_refuses_others(self, change: dict[str, Any], says: str) -> None:
        with pytest.raises(ProfileDamaged, match=says):
            agrees(table(), replace(MeasureSettings(width=64, chunk=128), **change))

    def test_the_gpu_is_the_first_one(self) -> None:
        of_gpu = replace(table(), settings=replace(SETTINGS, device="cuda:0"))
        asked = MeasureSettings(width=64, chunk=128, device="cuda")
        assert agrees(of_gpu, asked).device == "cuda:0"
        with pytest.raises(ProfileDamaged, match="device cuda:0, not cuda:1"):
            agrees(of_gpu, replace(asked, device="cuda:1"))


def test_known_tables_name_every_way_to_share() -> None:
    ways = sum(len(entry.feature_strategies) for entry in pools.all_classes())
    assert len(known_tables.table().rows) == ways * len(CONTEXTS)
