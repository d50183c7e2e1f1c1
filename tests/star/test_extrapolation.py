"""From curves to a number: where a proxy is evaluated, averages, power laws; constant schedules' prefixes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from stand_in import CONFIG, SETTINGS, StandIn

from star.data import Corpus
from star.extrapolation import evaluation_steps, extrapolate, quality_of
from star.genome import Genome
from star.optimizer import learning_rate
from star.proxy import CurvePoint, Outcome, ProxySettings, train_candidate

GENOME = Genome.parse("11111-91111")


def varied(**changes: Any) -> ProxySettings:
    return dataclasses.replace(SETTINGS, **changes)


def train(corpus: Corpus, **changes: Any) -> Outcome:
    return train_candidate(
        GENOME, CONFIG, varied(**changes), corpus, build=lambda genome, config, seed: StandIn(config, seed)
    )


# Where a proxy is evaluated


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"steps": 80}, {80}),
        ({"steps": 80, "average_evaluations": 4}, {65, 70, 75, 80}),
        ({"steps": 160, "average_evaluations": 2}, {140, 160}),
        ({"steps": 8, "average_evaluations": 9}, {6, 7, 8}),
        ({"steps": 1, "average_evaluations": 3}, {1}),
        ({"steps": 80, "extrapolate_to": 80}, {80}),
        ({"steps": 80, "evaluate_every": 10, "extrapolate_to": 800}, {80}),
    ],
)
def test_evaluation_steps(changes: dict[str, int], expected: set[int]) -> None:
    assert evaluation_steps(varied(**changes)) == expected


@hypothesis_settings(max_examples=30, deadline=None)
@given(st.integers(1, 500), st.integers(0, 600), st.integers(1, 20), st.integers(0, 1000))
def test_evaluations_are_within_the_training(steps: int, warmup: int, count: int, to: int) -> None:
    found = evaluation_steps(
        varied(steps=steps, warmup_steps=warmup, average_evaluations=count, extrapolate_to=to)
    )
    assert steps in found
    assert all(1 <= step <= steps for step in found)


def test_extrapolation_is_evaluated_eight_times_after_the_warm_up() -> None:
    found = sorted(evaluation_steps(varied(steps=160, warmup_steps=20, extrapolate_to=1600)))
    assert len(found) == 8
    assert (found[0], found[-1]) == (20, 160)


# Quality


def test_quality_is_the_mean_of_the_last_evaluations(corpus: Corpus) -> None:
    outcome = train(corpus, average_evaluations=3)
    points = {point.step: point.validation for point in outcome.curve if point.validation is not None}
    assert list(points) == [10, 11, 12]
    assert outcome.quality == pytest.approx(sum(points.values()) / 3)
    alone = train(corpus)
    assert points[12] == alone.quality  # looking on the way changes nothing
    assert [point.train for point in outcome.curve] == [point.train for point in alone.curve]


def test_other_evaluations_are_not_averaged(corpus: Corpus) -> None:
    outcome = train(corpus, average_evaluations=2, evaluate_every=4)
    points = {point.step: point.validation for point in outcome.curve if point.validation is not None}
    assert list(points) == [4, 8, 10, 12]
    assert outcome.quality == pytest.approx((points[10] + points[12]) / 2)


def test_quality_is_extrapolated(corpus: Corpus) -> None:
    outcome = train(corpus, steps=40, extrapolate_to=400, learning_rate=1e-2)
    points = {point.step: point.validation for point in outcome.curve if point.validation is not None}
    assert outcome.quality is not None
    assert outcome.quality == extrapolate(list(points), list(points.values()), 400)
    assert 0 < outcome.quality < points[40]
    assert outcome.reason == ""


@pytest.mark.parametrize("to", [0, 12, 11])
def test_nothing_is_extrapolated_to_earlier_steps(corpus: Corpus, to: int) -> None:
    outcome = train(corpus, extrapolate_to=to)
    assert (outcome.quality, outcome.reason) == (outcome.curve[-1].validation, "")


def test_too_few_evaluations_are_said(corpus: Corpus) -> None:
    outcome = train(corpus, evaluate_every=5, extrapolate_to=100)
    assert outcome.ok
    assert outcome.quality == outcome.curve[-1].validation
    assert outcome.reason == "not extrapolated: 3 evaluations after the warm-up, takes 4"


def test_evaluations_in_the_warm_up_do_not_count() -> None:
    curve = [CurvePoint(step, 5.0, 6.0 - step / 100) for step in (10, 20, 30, 40, 50)]
    settings = varied(steps=50, warmup_steps=25, evaluate_every=10, extrapolate_to=100)
    assert quality_of(curve, settings)[1].startswith("not extrapolated: 3 evaluations")


def test_a_loss_that_does_not_fall_is_said() -> None:
    curve = [CurvePoint(step, 5.0, 4.0 + step / 100) for step in (10, 20, 30, 40)]
    settings = varied(steps=40, evaluate_every=10, extrapolate_to=100)
    assert quality_of(curve, settings) == (4.4, "not extrapolated: the held-out loss does not fall")


# The power law


@hypothesis_settings(max_examples=30, deadline=None)
@given(st.floats(0.5, 4), st.floats(0.5, 20), st.floats(0.1, 1.5))
def test_a_power_law_is_found_again(offset: float, gain: float, exponent: float) -> None:
    steps = [10, 20, 40, 60, 80, 120, 160]
    losses = [offset + gain * step**-exponent for step in steps]
    expected = offset + gain * 800**-exponent
    assert extrapolate(steps, losses, 800) == pytest.approx(expected, rel=0.02)


def test_one_wild_evaluation_does_not_bend_it() -> None:
    steps = [10, 20, 40, 60, 80, 100, 120, 160]
    losses = [2 + 8 * step**-0.5 for step in steps]
    losses[4] += 0.5
    assert extrapolate(steps, losses, 800) == pytest.approx(2 + 8 * 800**-0.5, rel=0.02)
    mean = np.polynomial.polynomial.polyfit(np.power(steps, -0.5), losses, 1) @ [1, 800**-0.5]
    assert abs(mean - (2 + 8 * 800**-0.5)) > 0.02  # least squares is bent


# Constant schedules


def test_a_constant_training_begins_as_a_shorter_one(corpus: Corpus) -> None:
    options = {"schedule": "constant", "warmup_steps": 6}
    long = train(corpus, steps=12, evaluate_every=4, **options)
    for steps in (4, 8):  # the first within the warm-up
        short = train(corpus, steps=steps, evaluate_every=4, **options)
        assert short.curve == long.curve[: steps // 4]
    assert train(corpus, steps=8).quality != train(corpus, steps=8, schedule="constant").quality


def test_the_constant_rate_is_the_peak_after_the_warm_up() -> None:
    rates = [
        learning_rate(step, steps=9, warmup_steps=3, peak=3.0, final_rate=0.1, schedule="constant")
        for step in range(9)
    ]
    assert rates == [1.0, 2.0] + [3.0] * 7


# Records of before


def test_added_settings_are_written_only_where_they_say_something() -> None:
    """So that identities of runs, checkpoints and tables that were recorded before are the same."""
    plain = varied().to_json()
    assert not plain.keys() & {"schedule", "parametrization", "base_width", "average_evaluations"}
    changed = varied(schedule="constant", base_width=128, average_evaluations=3)
    assert changed.to_json() == plain | {"schedule": "constant", "base_width": 128, "average_evaluations": 3}
    assert ProxySettings.from_json(changed.to_json()) == changed
    assert ProxySettings.from_json(plain) == varied()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("schedule", "linear"),
        ("parametrization", "ntk"),
        ("base_width", 0),
        ("average_evaluations", 0),
        ("average_evaluations", 1.5),
        ("extrapolate_to", -1),
    ],
)
def test_settings_out_of_range_are_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"ProxySettings: {name} is "):
        varied(**{name: value})


def test_a_checkpoint_of_another_schedule_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    from star.training import train_model

    path = tmp_path / "checkpoint.safetensors"
    train_model(StandIn(CONFIG, 0), varied(schedule="constant"), corpus, checkpoint=path)
    with pytest.raises(ValueError, match="has schedule 'constant', the settings 'cosine'"):
        train_model(StandIn(CONFIG, 0), SETTINGS, corpus, checkpoint=path)
