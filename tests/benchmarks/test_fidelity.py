"""The benchmark of proxies: what it draws, reads, derives from one training, and reports."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import fidelity
from benchmarks.fidelity_plan import TRUTH, Plan, draw_genomes, full_plan, quick_plan
from benchmarks.fidelity_records import Key, Record, RecordError, from_line, read, to_line, write_csv
from benchmarks.fidelity_report import (
    Rating,
    _conclusion,
    costs,
    is_default,
    on_front,
    proxy_quality,
    rate,
    true_quality,
)
from star.extrapolation import extrapolate
from star.proxy import CurvePoint, Outcome

PLAN = quick_plan()


def line_of(plan: Plan, name: str, index: int, curve: dict[int, float], seed: int | None = None) -> str:
    """A training's line, with a curve that is known."""
    training = plan.trainings[name]
    settings = replace(training.settings, seed=training.seeds[0] if seed is None else seed)
    points = tuple(CurvePoint(step, value, value) for step, value in curve.items())
    last = points[-1].validation if points else None
    outcome = Outcome("ok" if points else "failed", "" if points else "diverged: up", last, points, 1.0, 10)
    clock = {"build_seconds": 0.5, "step_seconds": 0.1, "evaluation_seconds": 0.2} if points else {}
    return to_line(training, str(training.genomes[index]), settings, "text", outcome, clock)


def records_of(lines: list[str]) -> dict[Key, Record]:
    return {record.key: record for record in (from_line(line, PLAN) for line in lines)}


# What is trained


def test_the_plan_of_the_committed_table() -> None:
    plan = full_plan()
    assert len(plan.truth.genomes) == len(set(plan.truth.genomes)) == 48
    assert all(genome.is_valid() and genome.depth == 12 for genome in plan.truth.genomes)
    assert all(genome.canonical() == genome for genome in plan.truth.genomes)
    assert plan.truth.settings.steps == 10 * plan.trainings["cosine 80"].settings.steps
    assert len(plan.truth.seeds) == 3
    for name, training in plan.trainings.items():
        assert name == TRUTH or not set(training.seeds) & set(plan.truth.seeds)


def test_genomes_are_a_function_of_the_seed() -> None:
    assert draw_genomes(6, 10) == draw_genomes(6, 10)
    assert draw_genomes(6, 10)[:3] == draw_genomes(6, 10, seed=1)[:3]  # the layouts
    assert draw_genomes(6, 10) != draw_genomes(6, 10, seed=1)


def test_every_choice_is_read_from_a_training_that_evaluates_where_it_must() -> None:
    for plan in (full_plan(), PLAN):
        for choice in plan.choices:
            trained = plan.trainings[choice.training].settings
            same = {"steps", "average_evaluations", "extrapolate_to", "evaluate_every"}
            ours, theirs = choice.settings.to_json(), trained.to_json()
            assert all(ours[name] == theirs[name] for name in theirs.keys() - same)
            assert choice.settings.steps == trained.steps or trained.schedule == "constant"


# Records


def test_records_there_and_back(tmp_path: Path) -> None:
    lines = [
        line_of(PLAN, "constant", 0, {2: 6.0, 4: 5.0, 6: 4.5, 8: 4.25}),
        line_of(PLAN, TRUTH, 1, {8: 0.375}, seed=1),
        line_of(PLAN, TRUTH, 2, {}),
    ]
    path = tmp_path / "records.jsonl"
    path.write_text("".join(lines) + lines[0][:40])  # half a line of a run that was killed
    records = read([path, tmp_path / "missing.jsonl"], PLAN)
    assert len(records) == 3
    write_csv(records.values(), tmp_path / "records.csv")
    again = read([tmp_path / "records.csv"], PLAN)
    assert repr(sorted(again.items())) == repr(sorted(records.items()))  # repr: a clock may be NaN


def damaged(text: str) -> str:
    value = json.loads(line_of(PLAN, "constant", 0, {8: 4.0}))
    path, _, new = text.partition("=")
    place = value
    *parents, last = path.split(".")
    for parent in parents:
        place = place[parent]
    place[last] = json.loads(new)
    return json.dumps(value) + "\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense\n", "no record"),
        ("[1]\n", "no record"),
        ("{}\n", "no record"),
        (damaged('choice="other"'), "training 'other' is not in the plan"),
        (damaged("settings.steps=9"), "'constant' was trained with other settings"),
        (damaged("settings.speed=9"), "no record"),
        (damaged("model.width=32"), "'constant' was trained with another model configuration"),
        (damaged("seed=7"), "other settings"),
        (damaged('genome="11111"'), "genome 11111 with seed 2 is not in the plan"),
        (damaged('corpus="other"'), "records are of 2 texts"),
        (damaged("outcome=7"), "no record"),
    ],
)
def test_damaged_and_foreign_records_are_one_line(
    line: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(line_of(PLAN, "constant", 1, {8: 4.0}) + line)
    assert fidelity.main(["--quick", "--report-only", "--records", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("benchmarks.fidelity: ")
    assert message in error
    assert len(error.splitlines()) == 1


def test_a_report_of_nothing_is_not_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fidelity.main(["--quick", "--report-only", "--records", str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl does not exist" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_damaged_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "records.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(RecordError, match="columns are"):
        read([path], PLAN)
    write_csv(records_of([line_of(PLAN, "constant", 0, {8: 4.0})]).values(), path)
    path.write_text(path.read_text().replace("8:4:4.0", "8:four:4.0"))
    with pytest.raises(RecordError, match=r"records.csv:2: no record"):
        read([path], PLAN)


# What is derived


def constant_curves() -> dict[Key, Record]:
    """Six genomes: the later, the better; the first falls fastest at the end."""
    curves = [{2: 6.0 - i, 4: 5.5 - i, 6: 5.2 - i, 8: 5.0 - i} for i in range(5)]
    curves.append({2: 7.0, 4: 6.0, 6: 4.0, 8: 0.5})
    return records_of([line_of(PLAN, "constant", i, curve) for i, curve in enumerate(curves)])


def choice(name: str) -> object:
    return next(item for item in PLAN.choices if item.name == name)


def test_a_prefix_of_a_constant_training_is_a_choice() -> None:
    values = list(proxy_quality(choice("constant, 4 steps"), PLAN, constant_curves()).values())  # type: ignore[arg-type]
    assert values == [5.5, 4.5, 3.5, 2.5, 1.5, 6.0]
    spent = costs(choice("constant, 4 steps"), PLAN, constant_curves())  # type: ignore[arg-type]
    assert list(spent.values()) == pytest.approx([0.5 + 4 * 0.1 + 0.2] * 6)


def test_means_and_extrapolations_are_read_from_the_curve() -> None:
    records = constant_curves()
    values = proxy_quality(choice("constant, 8 steps, extrapolated to 16"), PLAN, records)  # type: ignore[arg-type]
    first = str(PLAN.truth.genomes[0])
    assert values[first] == extrapolate([2, 4, 6, 8], [6.0, 5.5, 5.2, 5.0], 16)
    spent = costs(choice("constant, 8 steps, extrapolated to 16"), PLAN, records)  # type: ignore[arg-type]
    assert spent[first] == pytest.approx(0.5 + 8 * 0.1 + 4 * 0.2)


def test_halving_stops_the_worse_half_and_orders_the_rest_above_it() -> None:
    item = choice("constant, halving at 2, 4, 6, 8 steps")
    values = list(proxy_quality(item, PLAN, constant_curves()).values())  # type: ignore[arg-type]
    order = sorted(range(6), key=lambda index: values[index])
    # Rungs at 2, 4 and 8 steps: 3, then 1 go on. The last genome would win, but is stopped at the first.
    assert order == [4, 3, 2, 1, 0, 5]
    assert len(set(values)) == 6
    spent = costs(item, PLAN, constant_curves())  # type: ignore[arg-type]
    expected = 0.5 + 0.1 * (2 + 2 / 2 + 4 / 4) + 0.2 * (1 + 1 / 2 + 1 / 4)
    assert list(spent.values()) == pytest.approx([expected] * 6)


def test_a_failed_proxy_is_worse_than_all_others() -> None:
    records = constant_curves() | records_of([line_of(PLAN, "constant", 5, {})])
    values = proxy_quality(choice("constant, 8 steps"), PLAN, records)  # type: ignore[arg-type]
    assert max(values, key=lambda genome: values[genome]) == str(PLAN.truth.genomes[5])


def test_the_truth_is_the_mean_of_the_seeds_that_did_not_fail() -> None:
    lines = [
        line_of(PLAN, TRUTH, 0, {16: 2.0}, seed=0),
        line_of(PLAN, TRUTH, 0, {16: 3.0}, seed=1),
        line_of(PLAN, TRUTH, 1, {16: 4.0}, seed=0),
        line_of(PLAN, TRUTH, 1, {}, seed=1),
        line_of(PLAN, TRUTH, 2, {}, seed=0),
    ]
    genomes = [str(genome) for genome in PLAN.truth.genomes]
    assert true_quality(PLAN, records_of(lines)) == {genomes[0]: 2.5, genomes[1]: 4.0}


def test_rank_correlations_of_known_orders() -> None:
    lines = [line_of(PLAN, TRUTH, i, {16: 3.0 - 0.1 * i}) for i in range(6)]
    lines += [line_of(PLAN, "cosine 6", i, {6: 5.0 + 0.1 * i}) for i in range(6)]
    records = constant_curves() | records_of(lines)
    ratings = {item.name: item for item in rate(PLAN, records, true_quality(PLAN, records), 50)}
    assert ratings["cosine, 6 steps"].tau == -1
    assert ratings["cosine, 6 steps"].mutants == -1
    # Five of the six in order, the last genome first: 10 pairs agree, 5 do not.
    assert ratings["constant, 2 steps"].tau == pytest.approx((10 - 5) / 15)
    best = [item for item in ratings.values() if item.best]
    assert best == [ratings["constant, 8 steps"]]
    assert ratings["constant, 2 steps"].behind == pytest.approx(1 - 1 / 3)
    assert ratings["cosine, 6 steps"].behind == 2
    assert ratings["constant, 8 steps"].tau == 1
    assert ratings["constant, 8 steps"].interval == (1, 1)
    assert ratings["constant, 2 steps"].per_second == pytest.approx(1 / 3 / 0.9)
    assert math.isnan(ratings["parameter count alone (more is better)"].per_second)


def rating(name: str, seconds: float, tau: float, **changes: object) -> Rating:
    return replace(Rating(name, 6, seconds, tau, (0, 1), 0.0, 0.0, (0, 0)), **changes)


def test_the_winner_is_the_cheapest_within_a_standard_error() -> None:
    found = [
        rating("size", 0, 0.9, behind_interval=(-1, 1)),
        rating("few", 0.5, 0.95, behind_interval=(-1, 1), genomes=5),
        rating("short", 1, 0.3, behind_interval=(0.1, 0.5), default=True),
        rating("middle", 2, 0.5, behind_interval=(-0.1, 0.2)),
        rating("middle too", 2, 0.55, behind_interval=(-0.1, 0.2)),
        rating("long", 4, 0.6, best=True, interval=(0.4, 0.8)),  # standard error 0.102
        rating("longest", 5, 0.59, behind_interval=(-0.1, 0.2)),
    ]
    text = "\n".join(_conclusion(found))
    assert "most tau a second, short (0.300)" in text
    assert "do not tell from the best with 95 % confidence, middle (0.500)" in text
    assert "Highest tau: long (0.600). **Winner: middle too** (0.550)." in text
    assert "The default is another: short (0.300)." in text
    found[4], found[2] = replace(found[4], default=True), replace(found[2], default=False)
    assert "The default is another" not in "\n".join(_conclusion(found))


def test_the_default_of_a_search_is_a_choice() -> None:
    assert [choice.name for choice in full_plan().choices if is_default(choice)] == ["constant, 80 steps"]


def test_the_front_of_time_and_tau() -> None:
    found = [rating("a", 1, 0.5), rating("b", 2, 0.4), rating("c", 3, 0.9), rating("d", 3, 0.9)]
    assert on_front(found) == {"a", "c", "d"}


# The whole of it


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(
        "\n".join(f"line {number} says that {number * 7919 % 100} follows" for number in range(3000))
    )
    return path


def test_it_trains_goes_on_and_reports(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STAR_CACHE", str(tmp_path / "cache"))
    records, table, page = tmp_path / "records.jsonl", tmp_path / "records.csv", tmp_path / "fidelity.md"
    arguments = ["--quick", "--data", str(text), "--records", str(records), "--table", str(table)]
    assert fidelity.main([*arguments, "--minutes", "0"]) == 0  # no proxy has any time, the truth is trained
    assert {json.loads(line)["choice"] for line in records.read_text().splitlines()} == {TRUTH}
    assert "12 of 12 of the truth's trainings" in page.read_text()
    with open(records, "a") as file:
        file.write('{"genome": "1')
    assert fidelity.main([*arguments, "--workers", "2"]) == 0
    choices = [json.loads(line)["choice"] for line in records.read_text().splitlines()]
    assert len(choices) == sum(len(list(item.jobs())) for item in PLAN.trainings.values())
    assert len(choices) == len(read([records], PLAN))
    written = page.read_text()
    assert "Not trained" not in written
    assert all(f"| {item.name}" in written.replace("**", "") for item in PLAN.choices)
    assert "| both | 16 |" in written or "| both | 32 |" in written
    capsys.readouterr()
    before = records.read_text()
    assert fidelity.main([*arguments, "--report-only", "--records", str(table)]) == 0
    assert fidelity.main([*arguments]) == 0  # nothing is left to do
    assert records.read_text() == before
    assert page.read_text() == written  # the table says the same as the lines, up to its digits


def test_records_of_another_text_are_not_continued(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STAR_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "records.jsonl"
    path.write_text(line_of(PLAN, "constant", 0, {8: 4.0}))
    assert fidelity.main(["--quick", "--data", str(text), "--records", str(path)]) == 2
    assert capsys.readouterr().err == "benchmarks.fidelity: the records are of another text\n"
