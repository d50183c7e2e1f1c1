"""What may be measured: sizes, devices, contexts; and the names of what is measured."""

from __future__ import annotations

import json
from typing import Any

import pytest

from star.measure.quantities import percentile, relative_errors, split, value_of, values_of_context
from star.measure.settings import CONTEXTS, MeasureSettings


class TestSettings:
    def test_survive_json(self) -> None:
        settings = MeasureSettings(width=256, contexts=(512, 64), dtype="bfloat16", threads=2)
        assert settings.contexts == (64, 512)
        assert MeasureSettings.from_json(json.loads(json.dumps(settings.to_json()))) == settings

    def test_nothing_stays_open(self) -> None:
        settings = MeasureSettings(device="cpu").resolved(vocab_size=1000)
        assert (settings.dtype, settings.head_dim, settings.vocab_size) == ("float32", 64, 1000)
        assert settings.contexts == CONTEXTS["cpu"]
        assert (settings.threads or 0) >= 1
        assert settings.resolved(vocab_size=5) == settings

    def test_heads_fit_the_width(self) -> None:
        assert MeasureSettings(width=128).config().head_dim == 32

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"width": 30}, "width is 30"),
            ({"width": 64, "head_dim": 48}, "width is 64"),
            ({"dtype": "int8"}, "dtype is 'int8', takes auto, float32"),
            ({"device": "tpu"}, "device is 'tpu', takes auto, cpu"),
            ({"device": "cpu:0"}, "device is 'cpu:0'"),
            ({"device": "cuda:"}, "device is 'cuda:'"),
            ({"contexts": (0,)}, "context is 0, takes an integer from 1"),
            ({"contexts": (8, 8)}, "take each number of tokens once"),
            ({"contexts": "4096"}, "contexts are '4096'"),
            ({"chunk": 0}, "chunk is 0"),
            ({"seconds": -1}, "seconds is -1"),
            ({"seconds": float("inf")}, "seconds is inf"),
            ({"seconds": float("nan")}, "seconds is nan"),
            ({"threads": 0}, "threads is 0"),
            ({"every": -1}, "every is -1"),
        ],
    )
    def test_refuse_what_can_not_be_measured(self, changes: dict[str, Any], says: str) -> None:
        with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
            MeasureSettings(**changes)
        assert says in str(error.value)

    def test_refuse_a_device_that_is_not_there(self) -> None:
        with pytest.raises(ValueError, match="device is 'cuda:99', and this machine has"):
            MeasureSettings(device="cuda:99").resolved(256)

    def test_refuse_unknown_names(self) -> None:
        with pytest.raises(ValueError, match="measure has 'speed'"):
            MeasureSettings.from_json({"speed": 3})


class TestNames:
    def test_split(self) -> None:
        assert split("ttft@4096") == ("ttft", 4096)
        assert split("ttft") == ("ttft", None)
        for name in ("ttft@", "ttft@4k", "ttft@0", "ttft@-1"):
            with pytest.raises(ValueError, match="names no context"):
                split(name)

    def test_no_context_means_the_smallest(self) -> None:
        values = {"ttft@256": 2.0, "ttft@64": 1.0, "prefill@8": 3.0}
        assert value_of(values, "ttft") == 1.0
        assert value_of(values, "ttft@256") == 2.0
        assert value_of(values, "ttft@8") is None
        assert value_of(values, "decode_p50") is None

    def test_percentiles_are_values_that_were_seen(self) -> None:
        values = [float(number) for number in range(1, 101)]
        assert percentile(values, 95) == 95.0
        assert percentile([7.0], 95) == 7.0
        assert percentile([1.0, 9.0], 95) == 9.0

    def test_quantities_from_times(self) -> None:
        values = values_of_context(1000, 500.0, [1.0, 2.0, 9.0], 77)
        assert values == {
            "ttft@1000": 500.0,
            "prefill@1000": 2000.0,
            "decode_p50@1000": 2.0,
            "decode_p95@1000": 9.0,
            "peak_memory@1000": 77.0,
        }
        assert "peak_memory@1000" not in values_of_context(1000, 500.0, [1.0], None)

    def test_errors_are_relative_to_what_was_measured(self) -> None:
        pairs = [({"ttft@8": 9.0}, {"ttft@8": 10.0}), ({"ttft@8": 30.0}, {"ttft@8": 20.0, "prefill@8": 1.0})]
        assert relative_errors(pairs) == {"ttft@8": [pytest.approx(0.1), pytest.approx(0.5)]}
