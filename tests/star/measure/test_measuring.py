"""Measuring itself, with a clock that gives known times."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import known_tables
import pytest
import torch
from known_tables import SETTINGS

from star import baselines, pools
from star.config import ModelConfig
from star.genome import Genome
from star.measure.device import PeakMemory, device_name
from star.measure.errors import MeasurementError, OtherDevice
from star.measure.process import measure_in_process
from star.measure.settings import MeasureSettings
from star.measure.whole import fill, first_token, measure_genome, repeated
from star.model import StarModel, build_model
from star.profile.livs import measure_table
from star.profile.predict import Predictor
from star.profile.table import ProfileTable, Steadiness

SMALL = replace(SETTINGS, contexts=(16, 40), chunk=16, width=16, head_dim=4)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


class Clock:
    """Calls what it is given, and says that it took as many seconds as its tokens and calls say."""

    def __init__(self, seconds: float = 0.5) -> None:
        self.seconds = seconds
        self.calls = 0

    def __call__(self, call: Callable[[], object]) -> float:
        call()
        self.calls += 1
        return self.seconds


def model(text: str = "11111-91111-71111-51111") -> StarModel:
    return build_model(Genome.parse(text), SMALL.config(), seed=0)


class TestWhole:
    def test_all_quantities_at_all_contexts(self) -> None:
        clock = Clock()
        values = measure_genome(baselines.lfm2(4), SMALL.config(), SMALL, timer=clock)
        assert {name.partition("@")[0] for name in values} >= {"ttft", "prefill", "decode_p50", "decode_p95"}
        for context in SMALL.contexts:
            assert values[f"ttft@{context}"] == 500.0
            assert values[f"prefill@{context}"] == 2.0 * context
            assert values[f"decode_p95@{context}"] == 500.0
        # For each context: one prompt cold, three more, and four tokens.
        assert clock.calls == 2 * (1 + SMALL.repetitions + SMALL.decode_steps)

    def test_a_long_prompt_is_read_once(self) -> None:
        clock = Clock(seconds=30.0)
        measure_genome(baselines.lfm2(4), SMALL.config(), SMALL, timer=clock)
        assert clock.calls == 2 * (1 + SMALL.decode_steps)

    def test_memory_holds_the_weights_at_least(self) -> None:
        if not PeakMemory(torch.device("cpu")).supported:
            pytest.skip("this system does not let one reset a process's peak")
        settings = replace(SMALL, width=512, head_dim=64, contexts=(8,))
        values = measure_genome(baselines.transformer_pp(8), settings.config(), settings, timer=Clock())
        weights = 4 * 4 * (4 + 8) * 512 * 512
        assert 0.9 * weights < values["peak_memory@8"] < 4 * weights

    def test_no_more_samples_than_there_is_time(self) -> None:
        assert repeated(lambda: 2.0, most=5, seconds=100.0) == [2.0] * 5
        assert repeated(lambda: 2.0, most=5, seconds=5.0) == [2.0] * 3
        assert repeated(lambda: 2.0, most=5, seconds=0.0) == [2.0]

    def test_a_prompt_in_chunks_is_the_same_prompt(self) -> None:
        made = model()
        ids = torch.randint(256, (1, 40), generator=torch.Generator().manual_seed(3))
        cache = made.allocate_cache(1, 48)
        with torch.no_grad():
            in_chunks = first_token(made, ids, cache, chunk=16)
            at_once = first_token(made, ids, cache, chunk=40)
            expected = made(ids)[:, -1:].argmax(-1)
        assert torch.equal(in_chunks, expected)
        assert torch.equal(at_once, expected)

    def test_a_filled_cache_goes_on_behind_its_context(self) -> None:
        made = model()
        cache = made.allocate_cache(1, 40)
        for layer in cache.layers:
            fill(layer, 30)
        assert cache.position == 30
        with torch.no_grad():
            logits = made(torch.zeros(1, 1, dtype=torch.long), cache)
        assert torch.isfinite(logits).all()
        assert cache.position == 31

    def test_a_follower_does_not_fill_what_is_another_s(self) -> None:
        cache = model("11114-11114").allocate_cache(1, 8)
        fill(cache.layers[0], 4)
        kept = cache.layers[0].tensors["key"].clone()
        fill(cache.layers[1], 4)
        assert torch.equal(cache.layers[0].tensors["key"], kept)


class TestTable:
    CLASSES = (1, 5, 8, 9, 10)

    @pytest.fixture(scope="class")
    @classmethod
    def measured(cls) -> ProfileTable:
        return measure_table(SMALL, classes=cls.CLASSES, timer=Clock(), whole=cls.whole)

    @staticmethod
    def whole(genome: Genome, config: ModelConfig, settings: MeasureSettings) -> Mapping[str, float]:
        """Every LIV 600 ms, where each alone takes 500, and unsteady."""
        return {
            f"{name}@{context}": value
            for context in settings.contexts
            for name, value in (
                ("ttft", 600.0 * genome.depth),
                ("decode_p50", 550.0 * genome.depth),
                ("decode_p95", 1100.0 * genome.depth),
                ("peak_memory", 1e9),
            )
        }

    def test_every_way_to_share_at_every_context(self, measured: ProfileTable) -> None:
        keys = {row.key for row in measured.rows}
        expected = {
            (entry.id, tuple(name for name in entry.groups if name not in shared), context)
            for entry in map(pools.get, self.CLASSES)
            for shared in entry.feature_strategies
            for context in SMALL.contexts
        }
        assert keys == expected
        assert len(measured.rows) == len(expected)
        assert measured.device_name == device_name(torch.device("cpu"))
        assert measured.settings == SMALL

    def test_times_are_the_clock_s(self, measured: ProfileTable) -> None:
        assert {row.prefill for row in measured.rows} == {500.0}
        assert {row.decode_p50 for row in measured.rows} == {500.0}

    def test_the_calibration_makes_up_for_the_whole(self, measured: ProfileTable) -> None:
        genome = Genome.parse("-".join(f"{number}.1.1.1.1" for number in self.CLASSES))
        values = Predictor(measured).predict(genome)
        for context in SMALL.contexts:
            assert values[f"ttft@{context}"] == pytest.approx(600.0 * 5)
            assert values[f"decode_p50@{context}"] == pytest.approx(550.0 * 5)
            assert values[f"decode_p95@{context}"] == pytest.approx(1100.0 * 5)

    def test_features_and_held_kernels_are_counted(self, measured: ProfileTable) -> None:
        rows = {row.key: row for row in measured.rows}
        assert rows[9, ("gate", "up"), 16].features == 4 * 16 * 2 * SMALL.config().swiglu_width
        assert rows[8, ("B", "C", "value"), 40].held > rows[8, ("B", "C", "value"), 16].held > 0
        assert rows[1, ("query", "key", "value"), 16].held < 64

    def test_a_disturbed_whole_model_is_measured_again(self) -> None:
        asked = 0

        def disturbed(*arguments: Any) -> Mapping[str, float]:
            nonlocal asked
            asked += 1
            slower = 60.0 if asked == 1 else 2.0
            return {name: slower * value for name, value in self.whole(*arguments).items()}

        found = measure_table(SMALL, classes=[1, 9], timer=Clock(), whole=disturbed)
        assert asked == 3
        values = Predictor(found).predict(Genome.parse("11111-91111"))
        assert values["ttft@16"] == pytest.approx(2 * 600.0 * 2)
        assert values["decode_p50@40"] == pytest.approx(2 * 550.0 * 2)
        assert found.steadiness[0] == Steadiness(16, wholes=3, prefill=0.0, decode=0.0, livs=0)
        assert found.warning() is None
        steady = measure_table(SMALL, classes=[1, 9], timer=Clock(), whole=self.whole)
        assert steady.steadiness[1] == Steadiness(40, wholes=2, prefill=0.0, decode=0.0, livs=0)

    def test_whole_models_that_never_agree_are_told_of(self) -> None:
        asked = 0

        def restless(*arguments: Any) -> Mapping[str, float]:
            nonlocal asked
            asked += 1
            return {name: 1.3**asked * value for name, value in self.whole(*arguments).items()}

        found = measure_table(SMALL, classes=[1, 9], timer=Clock(), whole=restless)
        assert asked == 4
        assert found.doubts()[0] == "prompts of 4 whole models differ by 30% at 16 tokens"
        assert "close other programs" in (found.warning() or "")

    def test_a_whole_model_that_takes_much_more_than_its_parts_is_told_of(self) -> None:
        def slow(*arguments: Any) -> Mapping[str, float]:
            return {name: 30 * value for name, value in self.whole(*arguments).items()}

        found = measure_table(SMALL, classes=[1, 9], timer=Clock(), whole=slow)
        assert [item.wholes for item in found.steadiness] == [2, 2]
        assert len(found.doubts()) == 4
        assert found.doubts()[0].startswith(
            "a prompt of a whole model takes 3.6e+04 ms and its parts 2.5e+03"
        )

    def test_livs_whose_repetitions_disagree_are_repeated_and_counted(self) -> None:
        class Restless(Clock):
            def __call__(self, call: Callable[[], object]) -> float:
                return super().__call__(call) * (1.0 if self.calls % 3 else 0.1)

        settings = replace(SMALL, contexts=(8,))
        clock = Restless()
        found = measure_table(settings, classes=[9], timer=clock, whole=self.whole)
        assert found.steadiness[0].livs > 0
        assert any("LIVs disagree at 8 tokens" in doubt for doubt in found.doubts())
        quiet = Clock()
        measure_table(settings, classes=[9], timer=quiet, whole=self.whole)
        assert quiet.calls < clock.calls <= 2 * quiet.calls

    def test_some_classes_only(self) -> None:
        settings = replace(SMALL, contexts=(8,), repetitions=1, decode_steps=1)
        found = measure_table(settings, classes=[9, 1], timer=Clock(), whole=self.whole)
        assert found.classes == {1, 9}

    def test_nothing_more_is_begun_when_the_time_is_over(self) -> None:
        settings = replace(SMALL, contexts=(8,), repetitions=9, decode_steps=9, seconds=0.0)
        clock = Clock()
        measure_table(settings, classes=[9], timer=clock, whole=self.whole)
        ends = 2 * settings.repetitions + 2 * settings.decode_steps
        assert clock.calls == 2 * len(pools.get(9).feature_strategies) + ends


class TestProcess:
    def test_another_machine_s_table_is_not_compared(self) -> None:
        with pytest.raises(OtherDevice, match="the table is of abacus, and this machine has"):
            measure_in_process(baselines.lfm2(2), known_tables.table())
        gpu = known_tables.table(replace(SETTINGS, device="cuda:99"))
        with pytest.raises(OtherDevice, match="this machine has no cuda:99"):
            measure_in_process(baselines.lfm2(2), gpu)

    def test_measures_in_a_process_of_its_own(self) -> None:
        here = device_name(torch.device("cpu"))
        small = replace(SETTINGS, width=16, head_dim=4, contexts=(8,), repetitions=1, decode_steps=2)
        table = replace(known_tables.table(small), device_name=here)
        values = measure_in_process(baselines.lfm2(2), table)
        assert values["ttft@8"] > 0
        assert values["prefill@8"] == pytest.approx(8e3 / values["ttft@8"])

    def test_a_crash_there_is_one_line_here(self) -> None:
        here = device_name(torch.device("cpu"))
        table = replace(known_tables.table(classes=[9]), device_name=here)
        broken = replace(table, settings=replace(table.settings, device="cpu", dtype="float32"))
        object.__setattr__(broken.settings, "contexts", (1 << 60,))
        with pytest.raises(MeasurementError, match=r"^[^\n]*$"):
            measure_in_process(baselines.lfm2(2), broken)
