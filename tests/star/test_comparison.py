"""The table of genomes, the surrogate, and algorithms replayed over both."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from recorded_runs import evaluation, finished_run, genomes, measured, record, small_settings

from star import baselines, cost
from star.comparison import replay
from star.comparison import surrogate as surrogate_module
from star.comparison.again import plan, train_again
from star.comparison.seeds import agreement
from star.comparison.surrogate import Surrogate, cross_validate, feature_matrix, features, fidelity
from star.comparison.table import (
    Row,
    TableDamaged,
    checksum_of,
    conditions_name,
    conditions_of,
    extend,
    read,
    rows_of_run,
    write,
)
from star.config import ModelConfig
from star.fidelity.run import RetrainingFinished
from star.genome import Genome
from star.search.algorithms import ALGORITHMS
from star.search.corpus import CorpusRecord
from star.search.errors import RunError

CONFIG = ModelConfig(width=16, head_dim=4)


@pytest.fixture(scope="module", autouse=True)
def few_trees() -> Iterator[None]:
    """A tenth of the trees: what is tested does not depend on how many there are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(surrogate_module, "TREES", 20)
        yield


formats = pytest.mark.parametrize("suffix", [".csv", ".parquet"])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve candidates, one of which has failed, and three references."""
    return finished_run(tmp_path_factory.mktemp("run") / "run")


@pytest.fixture(scope="module")
def rows(run: Path) -> list[Row]:
    return rows_of_run(run)


def many(count: int, depth: int = 6) -> list[Row]:
    """Rows of one run of many genomes, without a run."""
    settings = small_settings()
    conditions = conditions_of(settings, "cd" * 32)
    return [
        Row(
            genome.key,
            conditions_name(conditions),
            0,
            "random",
            "ok",
            "",
            1.5,
            measured(genome),
            (),
            conditions,
        )
        for genome in genomes(count, depth)
    ]


# ---- the table -----------------------------------------------------------------------------------------


def test_rows_are_the_evaluations_of_a_run(rows: list[Row]) -> None:
    assert len(rows) == 15
    assert sum(not row.ok for row in rows) == 1
    assert {row.origin for row in rows} >= {"random", "offspring", "reference:LFM2"}
    assert len({row.conditions for row in rows}) == 1
    first = next(row for row in rows if row.ok)
    assert first.objectives == measured(Genome.parse(first.genome))
    assert len(first.curve) == 20


def test_conditions_are_all_but_the_seed_and_the_machine() -> None:
    settings = small_settings()

    def of(**changes: object) -> dict[str, object]:
        proxy = dataclasses.replace(settings.proxy, **changes)  # type: ignore[arg-type]
        return conditions_of(dataclasses.replace(settings, proxy=proxy), "key")

    assert of() == of(seed=3) == of(threads=2) == of(device="cpu")
    assert of() != of(steps=7)
    assert of() != conditions_of(settings, "another text")
    other = dataclasses.replace(settings, population=3, algorithm="random", objectives=("cache",))
    assert conditions_of(other, "key") == of()


@formats
def test_write_and_read(rows: list[Row], tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"genomes{suffix}"
    write(path, rows)
    assert read(path) == rows
    data = path.read_bytes()
    write(path, rows)
    assert path.read_bytes() == data
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


@formats
def test_a_table_grows_and_repeats_nothing(rows: list[Row], tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"genomes{suffix}"
    assert extend(path, rows[:5]) == (rows[:5], 5)
    assert extend(path, rows) == (rows, 10)
    data = path.read_bytes()
    assert extend(path, rows) == (rows, 0)
    assert path.read_bytes() == data
    # Another seed is another row; a further objective joins the row there is.
    other = [dataclasses.replace(row, seed=1) for row in rows]
    assert extend(path, other)[1] == 15
    scored = dataclasses.replace(rows[0], objectives={**rows[0].objectives, "recall": 0.25})
    every, new = extend(path, [scored])
    assert (new, every[0].objectives["recall"]) == (0, 0.25)
    assert read(path) == every
    assert "recall" not in read(path)[1].objectives


def test_a_success_takes_the_place_of_a_failure(rows: list[Row], tmp_path: Path) -> None:
    path = tmp_path / "genomes.csv"
    failed = next(row for row in rows if not row.ok)
    extend(path, [failed])
    repaired = dataclasses.replace(failed, status="ok", reason="", objectives={"quality": 3.0})
    assert extend(path, [repaired]) == ([repaired], 0)
    assert extend(path, [failed]) == ([repaired], 0)


def damages() -> dict[str, tuple[str, str, str]]:
    """What is replaced in a CSV table, by what, and what the refusal says."""
    return {
        "column": ("genome,depth", "backbone,depth", "the column genome is missing"),
        "strange column": ("settings,checksum", "settings,checksum,Curve", "'Curve'"),
        "number": ("1.5,", "fast,", "row 1: could not convert"),
        "infinite": ("1.5,", "inf,", "row 1: 'inf' is no finite number"),
        "status": (",ok,", ",fine,", "row 1: its status 'fine'"),
        "depth": (",6,", ",7,", "row 1: its genome is not in canonical form, or of another depth"),
        "curve": ('"[[1,', '"[(1,', "row 1:"),
        "quote": ('"[[1,', "[[1,", "row 1 has not as many fields"),
        "origin": (",random,", ",offspring,", "row 4: its checksum is"),
        "point of a curve": ('"[[1,', '"[[2,', "row 1: its checksum is"),
        "seed": (",0,", ",1,", "row 1: its checksum is"),
        "setting": ('""width"":16', '""width"":17', "row 1: its conditions"),
    }


@pytest.mark.parametrize("name", damages())
def test_damage_is_refused_in_one_line(rows: list[Row], tmp_path: Path, name: str) -> None:
    before, after, words = damages()[name]
    path = tmp_path / "genomes.csv"
    write(path, [row for row in rows if row.ok])
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))
    with pytest.raises(TableDamaged) as error:
        read(path)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@formats
def test_a_flipped_bit_is_refused_or_changes_nothing(rows: list[Row], tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"genomes{suffix}"
    write(path, rows[:6])
    whole, draws, refusals = path.read_bytes(), random.Random(0), []
    for _ in range(60):
        flipped, place = bytearray(whole), draws.randrange(8 * len(whole))
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            found = read(path)
        except TableDamaged as error:
            refusals.append(str(error))
        else:
            assert found == rows[:6], place
    assert all(str(path) in line and "\n" not in line for line in refusals)
    # Parquet has statistics and names that nobody reads.
    assert len(refusals) >= (55 if suffix == ".csv" else 15)


def test_checksums_are_of_the_values_alone(rows: list[Row], tmp_path: Path) -> None:
    first = next(row for row in rows if row.ok)
    as_floats = {name: float(value) for name, value in first.objectives.items()}
    assert checksum_of(dataclasses.replace(first, objectives=as_floats)) == checksum_of(first)
    scored = dataclasses.replace(rows[1], objectives={**rows[1].objectives, "recall": 0.25})
    assert len({checksum_of(row) for row in (*rows, scored)}) == len(rows) + 1
    for suffix in (".csv", ".parquet"):
        write(tmp_path / f"genomes{suffix}", [first, scored])
        assert [checksum_of(row) for row in read(tmp_path / f"genomes{suffix}")] == [
            checksum_of(first),
            checksum_of(scored),
        ]


def without_checksums(path: Path) -> None:
    """The CSV table as it was written before rows had a checksum."""
    records = list(csv.DictReader(io.StringIO(path.read_text(), newline="")))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [name for name in records[0] if name != "checksum"], extrasaction="ignore")
    writer.writeheader()
    writer.writerows(records)
    path.write_text(text.getvalue())


def test_tables_without_checksums_are_read_and_get_them(rows: list[Row], tmp_path: Path) -> None:
    path = tmp_path / "genomes.csv"
    write(path, rows)
    whole = path.read_bytes()
    without_checksums(path)
    assert b"checksum" not in path.read_bytes()
    assert extend(path, []) == (rows, 0)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("value", ["1e300", "100.5", "-0.5"])
def test_no_text_takes_so_many_bits(rows: list[Row], tmp_path: Path, value: str) -> None:
    path = tmp_path / "genomes.csv"
    row = next(row for row in rows if row.ok)
    write(path, [row])
    without_checksums(path)
    path.write_text(path.read_text().replace(f",{row.objectives['quality']},", f",{value},"))
    with pytest.raises(TableDamaged, match=r"row 1: quality is .*, takes 0 to 100"):
        read(path)
    absurd = dataclasses.replace(row, objectives={**row.objectives, "quality": float(value)})
    before = path.read_bytes()
    with pytest.raises(ValueError, match="takes 0 to 100"):
        write(path, [absurd])
    assert path.read_bytes() == before


def test_an_absurd_training_of_a_run_counts_as_failed(tmp_path: Path) -> None:
    good, bad = (evaluation(id, genome, 0) for id, genome in enumerate(genomes(2)))
    bad = dataclasses.replace(bad, objectives={**bad.objectives, "quality": 1e30})
    rows = rows_of_run(record(tmp_path / "run", [good, bad]))
    assert [row.status for row in rows] == ["ok", "failed"]
    assert rows[1].reason == "quality is 1e+30, takes 0 to 100"
    assert extend(tmp_path / "genomes.csv", rows) == (rows, 2)


@formats
def test_files_that_are_no_tables(rows: list[Row], tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"genomes{suffix}"
    with pytest.raises(ValueError, match="does not exist"):
        read(path)
    for data in (b"", b"\x00\xff\xfe nonsense", b"PAR1" + bytes(100) + b"PAR1"):
        path.write_bytes(data)
        with pytest.raises(TableDamaged):
            read(path)
        with pytest.raises(TableDamaged):
            extend(path, rows)
        assert path.read_bytes() == data
    write(path, rows)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TableDamaged):
        read(path)
    write(path, [rows[0]])
    plain = path.read_bytes()
    if suffix == ".csv":
        path.write_bytes(plain + plain.splitlines(keepends=True)[1])
        with pytest.raises(TableDamaged, match="row 2 repeats another one"):
            read(path)


def test_names_and_empty_runs_are_refused(rows: list[Row], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ends in \.parquet or \.csv"):
        write(tmp_path / "genomes.txt", rows)
    empty = record(tmp_path / "empty", [])
    with pytest.raises(RunError, match="has evaluated no candidate yet"):
        rows_of_run(empty)


# ---- the surrogate ---------------------------------------------------------------------------------------


def test_features_tell_classes_places_sharing_and_costs() -> None:
    plain = features(baselines.transformer_pp(6), CONFIG)
    assert plain[:17].tolist() == [3, *[0] * 7, 3, *[0] * 8]
    assert plain[-2] == cost.parameters(baselines.transformer_pp(6), CONFIG)
    assert plain[-1] == cost.cache_bytes(baselines.transformer_pp(6), CONFIG)
    assert plain[-4:-2].tolist() == [0, 0]
    shared = features(Genome.parse("11212-91111-11212-91111"), CONFIG)
    assert shared[-4:-2].tolist() == [1, 1]
    order = [features(Genome.parse(text), CONFIG) for text in ("11111-71111-71111", "71111-71111-11111")]
    assert not np.array_equal(*order)
    assert np.array_equal(order[0][:17], order[1][:17])


def test_it_ranks_what_follows_from_the_genome_and_not_what_is_chance() -> None:
    inputs = feature_matrix(genomes(60), CONFIG)
    attentions = inputs[:, :4].sum(axis=1)
    rng = np.random.default_rng(0)
    learned = cross_validate(inputs, attentions + 0.1 * rng.random(60))
    assert learned.tau > 0.5
    assert learned.rho > learned.tau
    assert learned.rows == 60
    assert abs(cross_validate(inputs, rng.random(60)).tau) < 0.3
    surrogate = Surrogate(inputs, attentions)
    assert np.array_equal(surrogate.predict(inputs), Surrogate(inputs, attentions).predict(inputs))
    assert surrogate.predict(inputs).min() >= attentions.min()
    with pytest.raises(ValueError, match="9 genomes to fit a surrogate to, takes 10"):
        cross_validate(inputs[:9], attentions[:9])


def test_rank_correlations() -> None:
    values = np.array([1.0, 2.0, 3.0, 4.0])
    assert fidelity(values, 10 * values).tau == pytest.approx(1)
    assert fidelity(values, -values).rho == pytest.approx(-1)
    assert fidelity(np.array([1.0, 3.0, 2.0, 4.0]), values).tau == pytest.approx(4 / 6)
    assert fidelity(np.ones(4), values).tau == 0


# ---- replay ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def landscape() -> replay.Landscape:
    return replay.Landscape(many(40), ("quality", "size"))


def test_known_genomes_have_their_values_and_others_their_true_costs(landscape: replay.Landscape) -> None:
    known, unknown = genomes(40)[3], genomes(60)[50]
    (mine, foretold) = landscape.values([known, unknown])
    assert mine == {name: measured(known)[name] for name in ("quality", "size")}
    assert foretold is not None
    assert foretold["size"] == cost.parameters(unknown, landscape.settings.model)
    qualities = [values["quality"] for values in landscape.known.values()]
    assert min(qualities) <= foretold["quality"] <= max(qualities)
    assert set(landscape.fidelity) == {"quality"}


def test_seeds_are_averaged_failures_stay_failures_and_conditions_are_kept_apart() -> None:
    rows = many(15)
    better = dataclasses.replace(rows[0], seed=1, objectives={**rows[0].objectives, "quality": 1.0})
    failed = dataclasses.replace(rows[1], status="failed", reason="diverged", objectives={})
    others = [dataclasses.replace(row, conditions="d" * 12) for row in rows[:3]]
    landscape = replay.Landscape([rows[0], better, failed, *rows[2:], *others], ("quality",))
    assert landscape.left_out == 3
    first = Genome.parse(rows[0].genome)
    mean = (1.0 + measured(first)["quality"]) / 2
    assert landscape.values([first, Genome.parse(rows[1].genome)]) == [{"quality": pytest.approx(mean)}, None]


def test_latencies_of_two_devices_are_not_mixed() -> None:
    rows = [
        dataclasses.replace(
            row, objectives={**row.objectives, "ttft": value, "prefill": 1 / value}, device=device
        )
        for device, value, count in (("cpu abc", 50.0, 14), ("gpu def", 2.0, 11))
        for row in many(count)
    ]
    landscape = replay.Landscape(rows, ("ttft", "prefill"))
    assert len(landscape.known) == 14
    assert {values["ttft"] for values in landscape.known.values()} == {50.0}
    assert np.unique(landscape.points, axis=0).tolist() == [[50.0, -0.02]]  # more prefill is better
    (foretold,) = landscape.values([genomes(60)[50]])
    assert foretold == {"ttft": pytest.approx(50.0), "prefill": pytest.approx(0.02)}
    result = replay.compare(landscape, population=4, generations=2, seeds=1, processes=1)
    assert len(result.results) == len(ALGORITHMS)


@pytest.mark.parametrize(
    ("rows", "objectives", "words"),
    [
        ([], ("quality",), "the table is empty"),
        (many(12), ("recall",), "the table has no values of recall"),
        (many(12), ("speed",), "'speed'"),
        (many(9), ("quality",), "9 genomes to fit a surrogate to"),
        ([*many(6), *many(6, depth=4)], ("quality",), "depths 4, 6, takes one depth"),
    ],
)
def test_tables_that_can_not_be_compared_on(rows: list[Row], objectives: tuple[str, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replay.Landscape(rows, objectives)


def test_all_algorithms_are_replayed_under_one_budget(landscape: replay.Landscape) -> None:
    result = replay.compare(landscape, population=4, generations=3, seeds=3, processes=1)
    assert {item.algorithm for item in result.results} == set(ALGORITHMS)
    finals = [item.final.mean for item in result.results]
    assert finals == sorted(finals, reverse=True)
    for item in result.results:
        assert item.volumes.shape == (3, 3)
        assert np.all(np.diff(item.volumes, axis=1) >= 0)
        assert np.all((item.volumes >= 0) & (item.volumes <= 1.5))
        assert item.final.low <= item.final.mean <= item.final.high
        assert item.final.mean == pytest.approx(item.volumes[:, -1].mean())
        assert item.half.mean == pytest.approx(item.volumes[:, 1].mean())
    plain = result.to_json()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["algorithms"]["random"]["above_random"] == 0.5
    # The number of processes changes nothing.
    again = replay.compare(landscape, population=4, generations=3, seeds=3, processes=2)
    assert {**again.to_json(), "seconds": 0} == {**plain, "seconds": 0}


def test_hypervolume_is_in_the_tables_units() -> None:
    """One genome a generation: the volume is that of boxes to the reference point, by hand."""
    units = replay._Units(np.array([[1.0, 100.0], [3.0, 300.0]]))
    assert units.volume([(1.0, 100.0)]) == pytest.approx(1.21)
    assert units.volume([(2.0, 200.0)]) == pytest.approx(0.36)
    assert units.volume([(1.0, 200.0), (2.0, 100.0)]) == pytest.approx(2 * 1.1 * 0.6 - 0.36)
    assert units.volume([(0.0, 100.0)]) == pytest.approx(1.6 * 1.1)
    assert units.volume([]) == 0


def test_intervals_are_those_of_the_mean() -> None:
    values = np.random.default_rng(1).normal(5, 2, 400)
    interval = replay.bootstrap(values)
    half = 1.96 * values.std() / 20
    assert interval.low == pytest.approx(values.mean() - half, abs=0.03)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.03)
    alone = replay.bootstrap(np.array([3.0]))
    assert (alone.low, alone.mean, alone.high) == (3.0, 3.0, 3.0)


def test_wrong_numbers_are_refused(landscape: replay.Landscape) -> None:
    for changes, words in (
        ({"algorithms": ["nsga3"]}, "algorithm is 'nsga3'"),
        ({"algorithms": []}, "algorithms is empty"),
        ({"seeds": 0}, "seeds is 0"),
        ({"population": 1}, "population is 1"),
    ):
        with pytest.raises(ValueError, match=words):
            replay.compare(landscape, **changes)  # type: ignore[arg-type]


def test_a_run_with_one_more_evaluation_changes_the_table(tmp_path: Path) -> None:
    """From a run to the table and on to the landscape, as the commands do it."""
    members = genomes(12)
    run = record(tmp_path / "run", [evaluation(id, genome, 0) for id, genome in enumerate(members)])
    rows, new = extend(tmp_path / "genomes.parquet", rows_of_run(run))
    assert new == 12
    landscape = replay.Landscape(rows, ("quality", "cache"))
    assert set(landscape.known) == {genome.key for genome in members}


# ---- several seeds -----------------------------------------------------------------------------------------


def with_noise(row: Row, seed: int, amount: float) -> Row:
    """The row of another seed, whose quality is another by so much."""
    quality = row.objectives["quality"] + amount
    return dataclasses.replace(row, seed=seed, objectives={**row.objectives, "quality": quality})


def test_agreement_of_seeds() -> None:
    rows = many(12)
    assert agreement(rows, "quality") is None
    shifted = [with_noise(row, 1, 0.5) for row in rows[:6]]
    same = agreement([*rows, *shifted], "quality", rounds=50)
    assert same is not None
    assert (same.genomes, same.seeds, same.tau) == (6, 2, 1.0)
    assert same.interval == (1.0, 1.0)
    assert same.deviation == pytest.approx(0.5 / np.sqrt(2))
    best = max(row.objectives["quality"] for row in rows)
    turned = [with_noise(row, 1, 2 * (best - row.objectives["quality"])) for row in rows]
    opposite = agreement([*rows, *turned], "quality")
    assert opposite is not None
    assert opposite.tau == -1.0
    # A failed training has no value, and a device makes no second one.
    failed = dataclasses.replace(rows[0], seed=1, status="failed", objectives={})
    assert agreement([*rows, failed, dataclasses.replace(rows[1], device="cpu abc")], "quality") is None


def test_replay_takes_means_over_seeds_and_says_what_seeds_do() -> None:
    rows = many(15)
    again = [with_noise(row, 1, 0.5) for row in rows[:5]]
    devices = [dataclasses.replace(row, device="cpu abc") for row in again]
    landscape = replay.Landscape([*rows, *again, *devices], ("quality", "size"))
    for place, row in enumerate(rows):
        gain = 0.25 if place < 5 else 0.0
        expected = {**row.objectives, "quality": row.objectives["quality"] + gain}
        assert landscape.known[row.genome] == pytest.approx(
            {name: expected[name] for name in ("quality", "size")}
        )
    assert (landscape.seeds["quality"].genomes, landscape.seeds["quality"].tau) == (5, 1.0)
    assert set(landscape.seeds) == {"quality"}
    assert landscape.rows == 25
    # The targets of the surrogate are the means.
    inputs = feature_matrix([Genome.parse(row.genome) for row in rows], landscape.settings.model)
    means = np.array([landscape.known[row.genome]["quality"] for row in rows])
    assert landscape.fidelity["quality"] == cross_validate(inputs, means)
    assert not replay.Landscape(rows, ("quality", "size")).seeds


def test_what_is_trained_again_is_spread_over_the_ranks_and_the_same_after_a_part_of_it() -> None:
    rows = [dataclasses.replace(row, objectives={**row.objectives, "recall": 0.5}) for row in many(16)]
    whole = plan(rows, 4, 2, workers=1)
    ranks = {
        row.genome: place for place, row in enumerate(sorted(rows, key=lambda row: row.objectives["quality"]))
    }
    assert sorted(ranks[genome] for genome in whole.genomes) == [0, 4, 8, 12]
    assert [job.seed for job in whole.jobs] == [1] * 4 + [2] * 4
    assert whole.missing == whole.jobs
    assert set(whole.settings.objectives) == {"quality", "size", "cache", "flops", "recall"}
    assert conditions_of(whole.settings, whole.corpus_key) == rows[0].settings
    # The best one was bad with the next seed, and one has failed: neither changes who is chosen.
    bad = with_noise(whole.jobs[0].source, 1, 50.0)
    failed = dataclasses.replace(whole.jobs[1].source, seed=1, status="failed", objectives={})
    rest = plan([*rows, bad, failed], 4, 2, workers=1)
    assert rest.jobs == whole.jobs
    assert rest.missing == whole.jobs[2:]
    assert whole.genomes < plan(rows, 8, 1).genomes
    for count in (1, 17):
        with pytest.raises(ValueError, match="takes 2 to 16"):
            plan(rows, count, 1)


def stand_in_text(settings: object) -> CorpusRecord:
    return CorpusRecord("some text", "ab" * 32, "cd" * 32, 256)


def test_every_training_is_in_the_table_when_it_is_finished(tmp_path: Path) -> None:
    path = tmp_path / "genomes.parquet"
    first = [
        dataclasses.replace(row, device="cpu abc", objectives={**row.objectives, "ttft": 5.0})
        for row in many(12)
    ]
    rows, _ = extend(path, first)
    whole = plan(rows, 3, 2, workers=1)

    def stop(event: object) -> None:
        if isinstance(event, RetrainingFinished) and event.finished == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_again(path, whole, rows, evaluator="further:measure", open_corpus=stand_in_text, on_event=stop)
    kept = [row for row in read(path) if row.seed > 0]
    assert len(kept) == 2
    rest = plan(read(path), 3, 2, workers=1)
    assert rest.jobs == whole.jobs
    assert rest.missing == whole.jobs[2:]
    every = train_again(path, rest, read(path), evaluator="further:measure", open_corpus=stand_in_text)
    assert every == read(path)
    further = [row for row in every if row.seed > 0]
    assert [(row.genome, row.seed) for row in further] == [
        (job.source.genome, job.seed) for job in whole.jobs
    ]
    for row in further:
        mine = measured(Genome.parse(row.genome))
        # What is predicted for a device follows from the genome.
        assert (row.device, row.objectives["ttft"], row.curve) == ("cpu abc", 5.0, ([1, 8.0, None],))
        assert row.objectives["quality"] == pytest.approx(mine["quality"] + 0.01 * row.seed)
    assert further[:2] == kept
    done = plan(every, 3, 2, workers=1)
    assert not done.missing
    assert train_again(path, done, every, evaluator="further:measure") == every
    other = CorpusRecord("other text", "ab" * 32, "ef" * 32, 256)
    with pytest.raises(RunError, match="'other text' is not the one"):
        train_again(path, whole, rows, evaluator="further:measure", open_corpus=lambda settings: other)
