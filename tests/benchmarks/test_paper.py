"""The paper's experiment: who is trained longer, what drift leaves, the whole path in parts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import paper, paper_retrain
from benchmarks.paper_drift import adjusted, compare, drift, statistics_of, two_sided
from benchmarks.paper_plan import SEARCHES, Folder, Plan, append_line, read_lines
from benchmarks.paper_retrain import Longer, best, layouts, read_retrained
from star.genome import Genome
from star.pools import load_object
from star.search import Evaluation, run
from star.search.results import evaluate_safely
from star.search.workers import Task

SMALL = replace(Plan().search, population=8, generations=4, depth=6)


# ---- drift ---------------------------------------------------------------------------------------------


def test_statistics_of_a_known_population() -> None:
    # Two differential short convolutions with one featurizer; a convolution that takes an earlier one's B.
    genome = Genome.parse("16.1.2.1.1-16.1.2.1.1-71112-71112-91111-11111")
    found = statistics_of([genome])
    assert found["LIVs of class GConv-1-Diff"] == pytest.approx(2 / 6)
    assert found["LIVs of class SA-2"] == 0
    assert found["convolution with an earlier featurizer"] == pytest.approx(1 / 4)
    assert found["convolution with earlier features"] == pytest.approx(1 / 4)
    assert found["GConv-1-Diff pairs with one featurizer"] == 1
    assert found["recurrence with earlier features"] is None


def test_a_drift_is_an_evolution_of_valid_genomes_and_repeats() -> None:
    population = drift(SMALL, 3)
    assert len(population) == SMALL.population
    assert all(genome.is_valid() and genome.depth == SMALL.depth for genome in population)
    assert population == drift(SMALL, 3)
    assert population != drift(SMALL, 4)


def test_no_class_is_favoured_by_drift() -> None:
    shares = [statistics_of(drift(SMALL, number)) for number in range(40)]
    for name in ("LIVs of class GConv-1", "LIVs of class SA-3-Diff"):
        values = np.array([share[name] for share in shares], dtype=float)
        assert abs(values.mean() - 1 / 17) < 4 * values.std() / np.sqrt(len(values))


def test_what_is_in_every_genome_of_a_search_is_found() -> None:
    drifts = [statistics_of(drift(SMALL, number)) for number in range(60)]
    selected = [Genome.parse("-".join(["71111"] * 6))] * 8
    tests = {test.statistic: test for test in compare({"quality": selected}, drifts)}
    favoured = tests["LIVs of class GConv-1"]
    assert favoured.observed == 1
    assert favoured.p == pytest.approx(2 / 61)
    assert "attention with earlier features" not in tests
    neutral = {test.statistic: test for test in compare({"quality": drift(SMALL, 99)}, drifts)}
    assert min(test.adjusted for test in neutral.values()) > 0.05


@pytest.mark.parametrize(
    ("observed", "p"),
    [(10.0, 2 / 11), (-1.0, 2 / 11), (8.5, 4 / 11), (4.5, 1.0)],
)
def test_two_sided_p_values(observed: float, p: float) -> None:
    assert two_sided(observed, [float(value) for value in range(10)]) == pytest.approx(p)


def test_equal_values_are_no_evidence() -> None:
    assert two_sided(0.0, [0.0] * 10) == 1.0


def test_adjusted_p_values_of_benjamini_and_hochberg() -> None:
    # By hand: 0.01 * 4 / 1, 0.02 * 4 / 2, min(0.03 * 4 / 3, 0.5), 0.5 * 4 / 4.
    assert adjusted([0.5, 0.01, 0.03, 0.02]) == pytest.approx([0.5, 0.04, 0.04, 0.04])


# ---- who is trained longer -----------------------------------------------------------------------------


def evaluation(id: int, quality: float, size: float, generation: int | None = 0) -> Evaluation:
    objectives = {"quality": quality, "size": size}
    return Evaluation(id, f"k{id}", f"k{id}", generation, "random", "ok", None, objectives)


def test_the_best_keep_to_what_the_reference_costs() -> None:
    reference = evaluation(0, 3.0, 100.0, None)
    field = [
        evaluation(1, 1.0, 200.0),  # the best quality, but larger than the reference
        evaluation(2, 2.0, 90.0),
        evaluation(3, 2.5, 80.0),
        evaluation(4, 2.1, 95.0),  # dominated by 2
    ]
    chosen = best([reference, *field], ("quality", "size"), 4, reference)
    assert [item.id for item in chosen] == [2, 3, 4, 1]
    assert [item.id for item in best(field, ("quality",), 2, reference)] == [1, 2]
    assert best([reference], ("quality",), 2, reference) == []


def test_better_and_clearly_better() -> None:
    base = Longer("a", (2.0, 2.2, 2.1), (), 0)
    near, far = Longer("b", (2.0, 2.1, 2.15), (), 0), Longer("c", (1.0, 1.1, 1.2), (), 0)
    assert near.better_than(base)
    assert not near.clearly_better_than(base)
    assert far.clearly_better_than(base)
    assert not base.better_than(far)
    assert not Longer("d", (1.0,), (), 2).clearly_better_than(base)
    assert not Longer("e", (), (), 3).better_than(base)


# ---- files ---------------------------------------------------------------------------------------------


def test_half_a_line_of_a_killed_process_is_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    append_line(path, {"a": 1})
    path.write_bytes(path.read_bytes() + b'{"a": 2')
    assert read_lines(path) == [{"a": 1}]
    append_line(path, {"a": 3})
    assert read_lines(path) == [{"a": 1}, {"a": 3}]


@pytest.mark.parametrize("line", ['{"genome": 1}', "[1]", '{"genome": "a", "seed": 0, "result": {}}'])
def test_a_damaged_record_is_named(tmp_path: Path, line: str) -> None:
    folder = Folder(tmp_path)
    folder.retrained_file.write_text(line + "\n")
    with pytest.raises(ValueError, match=r"retrained.jsonl is damaged: line 1"):
        read_retrained(folder)


def test_a_plan_is_recorded_and_no_other_goes_on(tmp_path: Path) -> None:
    plan = Plan(search=SMALL)
    folder = Folder(tmp_path)
    folder.begin(plan)
    assert folder.plan().to_json() == plan.to_json()
    folder.begin(plan)
    with pytest.raises(ValueError, match=r"search.proxy.steps is 50 there, 60 here"):
        folder.begin(replace(plan, search=replace(SMALL, proxy=replace(SMALL.proxy, steps=60))))


# ---- the command ---------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for the end of the process."""


def inline(lives: list[int]) -> Callable[..., Any]:
    """A maker of engines that evaluate in this process; all of them together answer `lives[0]` times."""

    class Inline:
        def __init__(self, evaluator: str, settings: Mapping[str, Any], **_: object) -> None:
            self.evaluate_one, self.settings = load_object(evaluator), settings

        def evaluate(self, tasks: Sequence[Task]) -> Iterator[tuple[int, dict[str, Any]]]:
            for task in tasks:
                if lives[0] == 0:
                    raise Killed
                lives[0] -= 1
                yield (
                    task.id,
                    evaluate_safely(self.evaluate_one, task.genome, dict(self.settings), task.id, None),
                )

        def close(self) -> None:
            """Nothing runs."""

    return Inline


def without_seconds(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: without_seconds(value) for key, value in data.items() if key != "seconds"}
    return [without_seconds(item) for item in data] if isinstance(data, list) else data


def test_the_whole_path_stopped_and_gone_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lives = [0]
    for module in (run, paper_retrain):
        monkeypatch.setattr(module, "LocalEngine", inline(lives))

    def go(name: str, answers: int, *more: str) -> int:
        lives[0] = answers
        out = ["--out", str(tmp_path / name), "--result", str(tmp_path / f"{name}.md")]
        return paper.main([*out, "--data", str(tmp_path / f"{name}.json"), *more])

    quick = ("--quick", "--workers", "1")
    assert go("whole", 10**6, *quick) == 0
    page = (tmp_path / "whole.md").read_text()
    assert "**All of it**: 4 of 4 searches, 22 of 22 longer trainings" in page
    assert page.count("| quality + size, ") == 2
    data = json.loads((tmp_path / "whole.json").read_text())
    assert list(data["searches"]) == list(SEARCHES)
    assert all(len(item["quality"]) == 2 for item in data["layouts"].values())

    # The same device for both, since two measurements differ.
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "device.json").write_bytes((tmp_path / "whole" / "device.json").read_bytes())
    for answers in (5, 9, 17):
        with pytest.raises(Killed):
            go("parts", answers, *quick)
    assert go("parts", 0, "--report-only") == 0
    assert "**Not finished**: 1 of 4 searches, 10 of 10" in (tmp_path / "parts.md").read_text()
    assert go("parts", 10**6, *quick) == 0
    parts = json.loads((tmp_path / "parts.json").read_text())
    assert without_seconds(parts) == without_seconds(data)

    capsys.readouterr()
    assert go("parts", 0, *quick, "--steps", "3") == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert go("none", 0, "--report-only") == 2
    assert "holds no experiment" in capsys.readouterr().err


def test_the_plan_that_options_describe() -> None:
    parse = paper._parser().parse_args
    plan = paper.plan_of(parse(["--out", "x"]))
    assert (plan.search.population, plan.search.generations, plan.search.depth) == (16, 18, 24)
    assert (plan.best, plan.longer, plan.seeds) == (8, 5, 3)
    wide = paper.plan_of(parse(["--out", "x", "--width", "128", "--steps", "80"]))
    assert wide.search.proxy.learning_rate == pytest.approx(plan.search.proxy.learning_rate / 2)
    assert (wide.search.proxy.steps, wide.search.proxy.warmup_steps) == (80, 8)
    seeds = [plan.settings_of(name).seed for name in SEARCHES]
    assert len(set(seeds)) == len(seeds)
    with pytest.raises(ValueError, match="processor seconds"):
        paper.plan_of(parse(["--out", "x", "--cpu-time", "--device", "cuda"]))


def test_layouts_are_canonical() -> None:
    assert all(Genome.parse(key).key == key for key in layouts(24).values())
