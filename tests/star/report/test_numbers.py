"""Numbers in words."""

from __future__ import annotations

import pytest

from star.report.numbers import change, count, difference, duration, value


@pytest.mark.parametrize(
    ("objective", "number", "text"),
    [
        ("quality", 3.21449, "3.2145"),
        ("size", 84_934_656, "84.9 M"),
        ("size", 999, "999"),
        ("size", 999_600, "1.00 M"),
        ("cache", 150_994_944, "151 MB"),
        ("cache", 512, "512 B"),
        ("flops", 1.5e9, "1.50 G"),
        ("flops", 2e20, "2e+08 T"),
        ("recall", 0.125, "12.5 % wrong"),
        ("quality", None, "–"),
    ],
)
def test_value(objective: str, number: float | None, text: str) -> None:
    assert value(objective, number) == text


@pytest.mark.parametrize(
    ("new", "old", "long", "short"),
    [
        (87, 100, "13.0 % less", "−13.0 %"),
        (113, 100, "13.0 % more", "+13.0 %"),
        (100.01, 100, "equal", "±0 %"),
        (500, 100, "400 % more", "+400 %"),
        (0, 0, "equal", "±0 %"),
        (1, 0, "more", "more"),
    ],
)
def test_difference(new: float, old: float, long: str, short: str) -> None:
    assert difference(new, old) == long
    assert change(new, old) == short


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (12.4, "12 s"),
        (59.7, "1 min 00 s"),
        (200, "3 min 20 s"),
        (1126, "18 min"),
        (7500, "2 h 05 min"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_count() -> None:
    assert count(1, "candidate") == "1 candidate"
    assert count(1200, "candidate") == "1,200 candidates"
