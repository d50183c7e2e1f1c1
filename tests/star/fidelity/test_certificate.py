"""What longer trainings say, on qualities that are made up, and the file that holds it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recorded_runs import evaluation, genomes, small_settings
from retrainings import trainings

from star.fidelity.certificate import Certificate, certify
from star.fidelity.checksum import with_checksum
from star.fidelity.document import from_json, read_certificate, to_json, write_certificate
from star.fidelity.sample import stratified_sample
from star.fidelity.settings import FidelitySettings
from star.fidelity.statistics import kendall_tau
from star.report.fidelity import front_rows, judged
from star.search.errors import RunDamaged
from star.search.store import Evaluation

COUNT = 12
SEEDS = 3
ROUNDS = 100
GENOMES = genomes(COUNT + 8)


def candidates(proxies: list[float], sizes: list[float]) -> list[Evaluation]:
    return [
        evaluation(id, GENOMES[id], 0, objectives={"quality": quality, "size": size, "cache": 1, "flops": 1})
        for id, (quality, size) in enumerate(zip(proxies, sizes, strict=True))
    ]


PROXIES = [3.0 + 0.1 * place for place in range(COUNT)]
SIZES = [float(100 + (7 * place) % COUNT) for place in range(COUNT)]


def certificate(
    means: list[float],
    *,
    noise: float = 0.0,
    sizes: list[float] | None = None,
    missing: dict[int, tuple[int, ...]] | None = None,
    more: list[Evaluation] | None = None,
    seeds: int = SEEDS,
    **changes: Any,
) -> Certificate:
    """Of candidates with proxies in ascending order and these qualities after longer training."""
    run = candidates(PROXIES, sizes or SIZES)
    settings = FidelitySettings(sample=COUNT, seeds=seeds)
    search = small_settings(**changes)
    drawn = np.random.default_rng(0).normal(0.0, noise, (COUNT, seeds)) + np.array(means)[:, None]
    rows: list[list[float | None]] = [
        [None if seed in (missing or {}).get(id, ()) else float(drawn[id, seed]) for seed in range(seeds)]
        for id in range(COUNT)
    ]
    sample = stratified_sample(run, search, COUNT)
    return certify(sample, trainings(sample, settings, rows), [*run, *(more or [])], settings, search, ROUNDS)


def test_the_same_order_is_a_tau_of_one() -> None:
    made = certificate([quality - 1.0 for quality in PROXIES])
    assert made.tau == (1.0, 1.0, 1.0)
    assert made.tau_better_half.value == 1.0
    assert made.noise.deviation == pytest.approx(0.0, abs=1e-12)
    assert made.noise.flips == 0.0
    assert made.noise.tau == 1.0
    assert made.steps == small_settings().proxy.steps
    assert made.seconds == 3.0 * COUNT * SEEDS


def test_the_opposite_order_is_minus_one() -> None:
    assert certificate([-quality + 9.0 for quality in PROXIES]).tau.value == -1.0


def test_the_parameter_count_is_right_where_larger_is_better() -> None:
    made = certificate([5.0 - size / 1000 for size in SIZES])
    assert made.parameter_count.value == 1.0
    assert made.tau.value == pytest.approx(kendall_tau(PROXIES, [-size for size in SIZES]))
    assert made.gain.value == pytest.approx(made.tau.value - 1.0)
    assert made.gain.high <= 0.0


def test_models_of_one_size_have_no_baseline() -> None:
    made = certificate(PROXIES, sizes=[100.0] * COUNT)
    assert not made.parameter_count.defined
    assert not made.gain.defined


def test_noise_of_seeds_is_the_pooled_deviation() -> None:
    made = certificate(PROXIES, noise=0.2)
    qualities = np.array([item.qualities for item in made.candidates], dtype=np.float64)
    assert made.noise.deviation == pytest.approx(math.sqrt(qualities.var(axis=1, ddof=1).mean()))
    assert 0.0 < made.noise.flips < 0.5
    assert made.noise.flips == pytest.approx((1 - made.noise.tau) / 2, abs=0.15)
    error = made.standard_error[made.ranked[0].id]
    assert error == pytest.approx(made.noise.deviation / math.sqrt(SEEDS))


def test_flips_are_pairs_that_two_seeds_put_in_opposite_orders() -> None:
    run = candidates(PROXIES[:3], SIZES[:3])
    settings = FidelitySettings(sample=3, seeds=2)
    sample = stratified_sample(run, small_settings(), 3)
    rows = [[1.0, 1.0], [2.0, 3.5], [3.0, 3.0]]  # the second pair of the three is turned around
    made = certify(sample, trainings(sample, settings, rows), run, settings, small_settings(), ROUNDS)
    assert made.noise.flips == pytest.approx(1 / 3)
    assert made.noise.deviation == pytest.approx(math.sqrt((0.0 + 1.125 + 0.0) / 3))


def test_one_seed_says_nothing_of_noise() -> None:
    made = certificate(PROXIES, seeds=1)
    assert made.tau.value == 1.0
    assert all(math.isnan(number) for number in made.noise)
    assert made.front == ()


def test_failures_are_counted_and_named() -> None:
    made = certificate(PROXIES, missing={0: (0, 1, 2), 4: (1,)})
    assert [(item.id, reason) for item, reason in made.failures] == [
        *((0, f"seed {seed}: diverged: loss is nan") for seed in (1, 2, 3)),
        (4, "seed 2: diverged: loss is nan"),
    ]
    assert len(made.ranked) == COUNT - 1
    assert made.tau.value == 1.0
    assert 0 not in made.standard_error


def test_nothing_that_succeeded_is_no_order() -> None:
    made = certificate(PROXIES, missing={id: (0, 1, 2) for id in range(COUNT)})
    assert not made.tau.defined
    assert made.front == ()
    assert from_json(json.loads(json.dumps(to_json(made)))).ranked == []


class TestFront:
    def test_probabilities_are_those_of_the_means(self) -> None:
        made = certificate(PROXIES, noise=0.01, objectives=("quality", "size"))
        assert {member.id for member in made.front} == {item.id for item in made.candidates if item.on_front}
        assert all(member.among_retrained > 0.99 for member in made.front)

    def test_a_member_that_longer_training_sends_back_is_found_out(self) -> None:
        means = [*PROXIES]
        means[0] = 9.0  # the best under the proxy, and not the smallest
        sizes = [101.0, *[100.0] * (COUNT - 1)]
        made = certificate(means, noise=0.01, sizes=sizes, objectives=("quality", "size"))
        chances = {member.id: member.among_retrained for member in made.front}
        assert chances[0] == 0.0
        assert chances[1] == 1.0

    def test_members_of_equal_quality_share_the_chance(self) -> None:
        means = [3.0, 3.0, *[5.0] * (COUNT - 2)]
        made = certificate(means, noise=0.05, objectives=("quality",))
        assert len(made.front) == 1
        assert 0.0 < made.front[0].among_retrained < 1.0

    def test_candidates_that_were_not_retrained_are_rivals_by_prediction(self) -> None:
        # Nearly as good as the best under the proxy: noise about the line may put it in front.
        rivals = [
            evaluation(
                COUNT + place,
                GENOMES[COUNT + place],
                1,
                objectives={"quality": 3.001, "size": 1, "cache": 1, "flops": 1},
            )
            for place in range(8)
        ]
        alone = certificate(PROXIES, noise=0.1, objectives=("quality",))
        made = certificate(PROXIES, noise=0.1, more=rivals, objectives=("quality",))
        assert made.front[0].id == 0
        assert made.front[0].among_retrained == alone.front[0].among_retrained
        assert made.front[0].among_all < alone.front[0].among_all

    def test_a_member_whose_longer_trainings_all_failed_has_no_chance(self) -> None:
        made = certificate(PROXIES, noise=0.1, objectives=("quality", "size"), missing={0: (0, 1, 2)})
        assert made.candidates[0].on_front
        assert 0 not in {member.id for member in made.front}
        assert len(made.front) == sum(item.on_front for item in made.candidates) - 1

    def test_predictions_are_drawn_with_their_error(self) -> None:
        """Beside the best of all stands one that is faster by a hair, as far as predictions go."""
        objectives = [{"quality": proxy, "size": 1.0, "ttft": 100.0} for proxy in PROXIES]
        objectives[1]["ttft"] = 99.0
        run = [evaluation(id, GENOMES[id], 0, objectives=row) for id, row in enumerate(objectives)]
        settings, search = FidelitySettings(sample=COUNT), small_settings(objectives=("quality", "ttft"))
        sample = stratified_sample(run, search, COUNT)
        rows = [[proxy, proxy + 1e-6, proxy - 1e-6] for proxy in PROXIES]
        done = trainings(sample, settings, rows)
        taken = certify(sample, done, run, settings, search, 400)
        assert (taken.prediction_errors, taken.taken_as_exact) == ({}, ("ttft",))
        assert [(member.id, member.among_retrained) for member in taken.front] == [(0, 1.0), (1, 1.0)]
        errors = {"ttft": 0.1, "decode_p50": 0.5}
        drawn = certify(sample, done, run, settings, search, 400, errors)
        assert (drawn.prediction_errors, drawn.taken_as_exact) == ({"ttft": 0.1}, ())
        # The second is on the front where it is faster than the first: little more than every other time.
        assert drawn.front[0].among_retrained == 1.0
        assert drawn.front[1].among_retrained == pytest.approx(0.52, abs=0.08)
        assert drawn.front[1].among_all == drawn.front[1].among_retrained
        assert from_json(json.loads(json.dumps(to_json(drawn)))).prediction_errors == {"ttft": 0.1}

    def test_what_is_taken_as_exact_is_said(self) -> None:
        def say(**known: Any) -> list[str]:
            made = certificate(PROXIES, noise=0.1, objectives=("quality", "size"))
            return [text for text, _ in judged(replace(made, **known)) if "The probabilities" in text]

        assert say() == []
        assert say(taken_as_exact=("recall", "ttft@64")) == [
            "The probabilities take recall as exact, which one short training from one seed has measured.",
            "The probabilities take time to first token at 64 as exact, a prediction whose error this run "
            "has not measured.",
        ]
        assert say(prediction_errors={"decode_p50": 0.093}) == [
            "The probabilities draw predictions with their error, too: decode p50 (off by 9.3 % in the "
            "median)."
        ]
        assert say(front=(), taken_as_exact=("recall",)) == []

    def test_recall_is_taken_as_exact(self) -> None:
        found = certificate(PROXIES, noise=0.1, objectives=("quality", "size", "cache"))
        assert found.taken_as_exact == ()
        run = [
            replace(item, objectives={**item.objectives, "recall": 0.5})
            for item in candidates(PROXIES, SIZES)
        ]
        search, settings = small_settings(objectives=("quality", "recall")), FidelitySettings(sample=COUNT)
        sample = stratified_sample(run, search, COUNT)
        done = trainings(sample, settings, [[proxy] * SEEDS for proxy in PROXIES])
        made = certify(sample, done, run, settings, search, 10)
        assert made.taken_as_exact == ("recall",)
        assert to_json(made)["taken_as_exact"] == ["recall"]

    def test_members_that_were_not_retrained_have_their_proxy(self) -> None:
        """More are on the front than the sample takes."""
        run = candidates(PROXIES, [200.0 - place for place in range(COUNT)])
        search, settings = small_settings(objectives=("quality", "size")), FidelitySettings(sample=6)
        sample = stratified_sample(run, search, 6)
        done = trainings(sample, settings, [[i.evaluation.objectives["quality"]] * SEEDS for i in sample])
        made = certify(sample, done, run, settings, search, 10)
        sampled = {item.id for item in made.candidates}
        assert [member.proxy for member in made.front] == PROXIES
        rows = {int(row[0]): row[1:3] for row in front_rows(made)}
        left_out = sorted(set(rows) - sampled)
        assert left_out
        for id in left_out:
            assert rows[id] == (f"{PROXIES[id]:.4f}", "not retrained")

    def test_where_quality_is_not_searched_for_there_is_nothing_to_doubt(self) -> None:
        assert certificate(PROXIES, noise=0.1, objectives=("size", "cache")).front == ()


class TestFile:
    def test_comes_back_as_it_was(self, tmp_path: Path) -> None:
        made = certificate(PROXIES, noise=0.1, missing={0: (0, 1, 2), 4: (1,)})
        write_certificate(made, tmp_path)
        read = read_certificate(tmp_path)
        assert read is not None
        assert to_json(read) == to_json(made)
        assert (read.candidates, read.settings) == (made.candidates, made.settings)
        assert {path.name for path in tmp_path.iterdir()} == {"fidelity.json"}

    def test_is_valid_json_where_nothing_is_defined(self, tmp_path: Path) -> None:
        write_certificate(certificate(PROXIES, seeds=1), tmp_path)
        text = (tmp_path / "fidelity.json").read_text()
        assert json.loads(text)["seed_noise"]["standard_deviation"] is None
        assert "NaN" not in text

    def test_is_none_where_there_is_none(self, tmp_path: Path) -> None:
        assert read_certificate(tmp_path) is None

    @pytest.mark.parametrize(
        ("path", "value"),
        [
            (("format",), 1),
            (("settings",), {"sample": 24}),
            (("settings", "seeds"), 0),
            (("kendall_tau", "value"), 1.5),
            (("kendall_tau",), None),
            (("seconds",), -1),
            (("evaluations",), 10**400),
            (("seed_noise", "flipped_pairs"), "many"),
            (("front",), {"id": 1}),
            (("front", 0, "among_all"), 2),
            (("front", 0, "proxy"), None),
            (("prediction_errors",), [0.1]),
            (("prediction_errors",), {"ttft": -1}),
            (("taken_as_exact",), "recall"),
            (("taken_as_exact",), [7]),
            (("candidates", 0, "qualities"), [1.0]),
            (("candidates", 0, "qualities", 0), None),
            (("candidates", 0, "proxy"), None),
            (("candidates", 0, "genome"), 7),
            (("candidates", 0, "id"), 1),
            (("candidates", 0, "id"), -1),
            (("candidates", 0, "on_front"), 1),
            (("candidates", 0), []),
        ],
    )
    def test_of_anything_else_is_refused(self, tmp_path: Path, path: tuple[Any, ...], value: object) -> None:
        whole = to_json(certificate(PROXIES, noise=0.1, objectives=("quality", "size")))
        part: Any = whole
        for step in path[:-1]:
            part = part[step]
        part[path[-1]] = value
        # Signed again, so that it is the value that is refused.
        whole = with_checksum(whole)
        (tmp_path / "fidelity.json").write_text(json.dumps(whole))
        with pytest.raises(RunDamaged, match=r"fidelity\.json is damaged: (?!its checksum)") as caught:
            read_certificate(tmp_path)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("path", "value"),
        [
            (("kendall_tau", "value"), 0.99),
            (("kendall_tau", "low"), 0.98),
            (("front", 0, "among_retrained"), 0.5),
            (("front", 0, "among_all"), 0.5),
            (("candidates", 3, "qualities", 0), 2.0),
            (("candidates", 3, "mean"), 2.0),
            (("seed_noise", "standard_deviation"), 0.001),
            (("a note",), "believe me"),
            (("checksum",), "0" * 64),
            (("checksum",), None),
        ],
    )
    def test_that_was_edited_is_refused(self, tmp_path: Path, path: tuple[Any, ...], value: object) -> None:
        write_certificate(certificate(PROXIES, noise=0.1, objectives=("quality", "size")), tmp_path)
        whole = json.loads((tmp_path / "fidelity.json").read_text())
        part: Any = whole
        for step in path[:-1]:
            part = part[step]
        assert part.get(path[-1]) != value if isinstance(part, dict) else part[path[-1]] != value
        part[path[-1]] = value
        (tmp_path / "fidelity.json").write_text(json.dumps(whole))
        with pytest.raises(RunDamaged, match=r"fidelity\.json is damaged: its checksum is not that of its"):
            read_certificate(tmp_path)

    @pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[]", b'{"format": NaN}'])
    def test_that_is_no_json_object_is_refused(self, tmp_path: Path, data: bytes) -> None:
        (tmp_path / "fidelity.json").write_bytes(data)
        with pytest.raises(RunDamaged, match=r"fidelity\.json is damaged: "):
            read_certificate(tmp_path)

    def test_that_is_a_link_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "fidelity.json").symlink_to("/etc/hostname")
        with pytest.raises(RunDamaged, match="must be a plain file"):
            read_certificate(tmp_path)
