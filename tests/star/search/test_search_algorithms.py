"""The algorithms beside NSGA-II: the same rules for all, what sets each apart, and resuming any of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from synthetic import InlineEngine, Killed, measure
from synthetic import settings as small_settings
from test_search_loop import Run

from star import baselines, cost
from star.genome import Genome
from star.search.algorithms import ALGORITHMS, begin, require_algorithm
from star.search.genetic_algorithm import ELITE
from star.search.parameter_count import DRAWS
from star.search.ranking import best, crowding, fronts
from star.search.regularised_evolution import QUEUE
from star.search.settings import SearchSettings, preset
from star.search.store import Evaluation

every = pytest.mark.parametrize("name", ALGORITHMS)
Failing = Callable[[Genome], bool]


def small(name: str, **changes: object) -> SearchSettings:
    return replace(small_settings(), algorithm=name, **changes)  # type: ignore[arg-type]


def play(
    settings: SearchSettings,
    failing: Failing = lambda genome: False,
    values: Callable[[Genome], dict[str, float]] = measure,
) -> tuple[list[list[Genome]], list[list[Genome]]]:
    """Proposals and survivors of each generation."""
    algorithm, known = begin(settings), dict[str, Evaluation]()
    proposals, survivors = [], []
    for _ in range(settings.generations):
        proposals.append(algorithm.propose())
        for genome in proposals[-1]:
            failed = failing(genome)
            known[genome.key] = Evaluation(
                id=len(known),
                key=genome.key,
                genome=str(genome),
                generation=0,
                origin="random",
                status="failed" if failed else "ok",
                reason="diverged" if failed else None,
                objectives={} if failed else values(genome),
            )
        survivors.append(algorithm.select(known))
    return proposals, survivors


# ---- all of them ---------------------------------------------------------------------------------------


@every
def test_equal_seeds_are_equal_and_no_model_comes_twice(name: str) -> None:
    settings = small(name, generations=5)
    proposals, survivors = play(settings)
    assert (proposals, survivors) == play(settings)
    assert proposals != play(small(name, generations=5, seed=1))[0]
    everything = [genome for generation in proposals for genome in generation]
    assert [len(generation) for generation in proposals] == [6] * 5
    assert len({genome.key for genome in everything}) == 30
    assert all(genome.is_valid() and genome.depth == settings.depth for genome in everything)
    proposed = {genome.key for genome in everything}
    assert all(genome.key in proposed for generation in survivors for genome in generation)


@every
def test_failures_do_not_stop_it(name: str) -> None:
    proposals, _ = play(small(name), lambda genome: True)
    assert [len(generation) for generation in proposals] == [6] * 4
    _, survivors = play(small(name, generations=6), lambda genome: genome.genes[0].liv_class % 2 == 0)
    assert survivors[-1]


@every
def test_the_known_layouts_come_first_when_asked_for(name: str) -> None:
    proposals, _ = play(small(name, seed_baselines=True, depth=24, generations=2))
    expected = [baselines.transformer_pp(24), baselines.striped_mamba(24), baselines.lfm2(24)]
    assert proposals[0][:3] == expected
    assert not set(expected) & set(proposals[1])


@every
def test_tiny_spaces_end_or_repeat_nothing(name: str) -> None:
    from star.pools import Pool

    pool = Pool(classes=(1, 9), max_groups=1, featurizer_sharing=False, feature_sharing=False)
    algorithm = begin(small(name, depth=2, pool=pool, population=3))
    known: dict[str, Evaluation] = {}
    for _ in range(4):
        proposed = algorithm.propose()
        if not proposed:
            break
        for genome in proposed:
            known.setdefault(
                genome.key,
                Evaluation(len(known), genome.key, str(genome), 0, "random", "ok", None, measure(genome)),
            )
        algorithm.select(known)
    assert 3 <= len(known) <= 4


@every
def test_a_killed_run_of_it_ends_with_the_same_archive(name: str, tmp_path: Path) -> None:
    """Killed after some number of answers, the run is begun again until it is whole."""
    settings = small(name, population=3, generations=3, references=True)
    whole = Run(tmp_path / "whole", settings)
    whole.go(InlineEngine())
    answers = len(whole.evaluations())
    assert answers == 12
    for lives in range(0, answers, 2):
        run = Run(tmp_path / str(lives), settings)
        with pytest.raises(Killed):
            run.go(InlineEngine(lives=lives))
        run.go(InlineEngine())
        assert run.archive() == whole.archive()


def test_what_later_candidates_are_called(tmp_path: Path) -> None:
    for name in ALGORITHMS:
        run = Run(tmp_path / name, small(name, generations=2, references=False))
        run.go(InlineEngine())
        later = {item.origin for item in run.evaluations() if item.generation == 1}
        assert later == {"random" if name in ("random", "parameters") else "offspring"}


def test_unknown_names_are_refused_in_one_line() -> None:
    for check in (lambda: require_algorithm("nsga3"), lambda: preset("demo", algorithm="nsga3")):
        with pytest.raises(
            ValueError, match="algorithm is 'nsga3', takes nsga2, ga, regularised, random"
        ) as error:
            check()
        assert "\n" not in str(error.value)


# ---- one by one ----------------------------------------------------------------------------------------


def opposite(genome: Genome) -> dict[str, float]:
    return {name: -value for name, value in measure(genome).items()}


@pytest.mark.parametrize("name", ["random", "parameters"])
def test_they_look_at_no_evaluation(name: str) -> None:
    assert play(small(name))[0] == play(small(name), values=opposite)[0]


@pytest.mark.parametrize("name", ["nsga2", "ga", "regularised"])
def test_the_others_do(name: str) -> None:
    assert play(small(name))[0] != play(small(name), values=opposite)[0]


@pytest.mark.parametrize("name", ["nsga2", "ga", "regularised"])
def test_selection_beats_random_search(name: str) -> None:
    """On an objective that is a count, over the same seeds and budget."""

    def attentions(genome: Genome) -> dict[str, float]:
        return {"quality": -float(sum(gene.liv_class <= 4 for gene in genome))}

    def reached(name: str) -> float:
        found = [
            play(
                small(name, objectives=("quality",), depth=12, generations=12, population=8, seed=seed),
                values=attentions,
            )
            for seed in range(3)
        ]
        return float(
            np.mean(
                [
                    min(attentions(genome)["quality"] for generation in proposals for genome in generation)
                    for proposals, _ in found
                ]
            )
        )

    assert reached(name) < reached("random")


def test_regularised_evolution_mutates_members_of_a_queue_that_ages() -> None:
    settings = small("regularised", generations=6, mutation_rate=0.02, depth=24)
    proposals, survivors = play(settings)
    for generation in range(1, 6):
        queue = [genome for earlier in proposals[:generation] for genome in earlier][-QUEUE * 6 :]
        assert survivors[generation - 1] == queue  # the oldest leave, however good they are
        for child in proposals[generation]:
            # A mutation changes few genes; a recombination of such parents would change many.
            changes = [sum(a != b for a, b in zip(child, parent, strict=True)) for parent in queue]
            assert min(changes) <= 8


def test_genetic_algorithm_keeps_two_and_adds_one_number() -> None:
    settings = small("ga", generations=6, objectives=("quality", "size"))
    proposals, survivors = play(settings)
    first = np.array([[measure(genome)[name] for name in settings.objectives] for genome in proposals[0]])
    low, extent = first.min(axis=0), np.ptp(first, axis=0)

    def number(genome: Genome) -> float:
        values = np.array([measure(genome)[name] for name in settings.objectives])
        return float(np.mean((values - low) / np.where(extent > 0, extent, 1)))

    for generation in range(1, 6):
        elite = sorted(survivors[generation - 1], key=number)[:ELITE]
        assert survivors[generation][:ELITE] == elite
        assert len(survivors[generation]) == 6
        children = survivors[generation][ELITE:]
        assert children == sorted(proposals[generation], key=number)[: 6 - ELITE]


def test_a_genetic_algorithm_of_two_takes_a_child_in() -> None:
    proposals, survivors = play(small("ga", generations=4, population=2))
    for proposed, kept in zip(proposals, survivors, strict=True):
        assert len(kept) == 2
        assert set(kept) & set(proposed)


def test_parameter_count_takes_the_largest_for_quality_alone() -> None:
    settings = small("parameters", objectives=("quality",), generations=1, depth=12)
    (chosen,), _ = play(settings)
    drawn = RandomDraws(settings).genomes
    sizes = sorted((cost.parameters(genome, settings.model) for genome in drawn), reverse=True)
    assert [cost.parameters(genome, settings.model) for genome in chosen] == sizes[:6]


class RandomDraws:
    """What parameter count has to choose from in its first generation."""

    def __init__(self, settings: SearchSettings) -> None:
        from star.search.variation import different_genomes

        rng = np.random.default_rng(settings.seed)
        self.genomes = different_genomes(DRAWS * settings.population, settings.depth, rng, settings.pool)


def test_parameter_count_spreads_over_sizes_where_size_counts_too() -> None:
    """Every size is on the front of (more parameters, fewer parameters): both ends are among the chosen."""
    settings = small("parameters", objectives=("quality", "size"), generations=1, depth=12)
    (chosen,), _ = play(settings)
    sizes = [cost.parameters(genome, settings.model) for genome in RandomDraws(settings).genomes]
    picked = [cost.parameters(genome, settings.model) for genome in chosen]
    assert {min(sizes), max(sizes)} <= set(picked)


# ---- the order of vectors --------------------------------------------------------------------------------


def test_fronts_and_crowding_are_nsga_ii_s() -> None:
    from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

    rng = np.random.default_rng(0)
    for objectives in (1, 2, 3):
        points = rng.integers(0, 6, (40, objectives)).astype(float)
        expected = np.empty(40, dtype=int)
        for level, members in enumerate(NonDominatedSorting().do(points)):
            expected[members] = level
        assert fronts(points).tolist() == expected.tolist()
    line = np.array([[0.0, 10.0], [1.0, 6.0], [4.0, 4.0], [10.0, 0.0]])
    assert crowding(line).tolist() == pytest.approx([np.inf, 0.4 + 0.6, 0.9 + 0.6, np.inf])
    assert best(line, 3) == [0, 3, 2]
    assert best(np.empty((0, 2)), 3) == []
    assert best(np.array([[2.0], [1.0], [3.0]]), 2) == [1, 0]
