"""Variation operators and NSGA-II: what they keep, what they change, and that they repeat themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pymoo.core.individual import Individual
from pymoo.core.population import Population
from synthetic import measure
from synthetic import settings as small_settings

from star import baselines
from star.genome import Genome
from star.pools import Pool
from star.search.evolution import Evolution
from star.search.front import dominates
from star.search.objectives import objective_vector
from star.search.settings import SearchSettings
from star.search.store import Evaluation
from star.search.variation import decode, different_genomes, encode, mutate, recombine, tournament

seeds = st.integers(0, 2**32 - 1)
depths = st.integers(1, 24)


def random_genome(depth: int, seed: int) -> Genome:
    return Genome.random(depth, np.random.default_rng(seed))


@given(depths, seeds)
def test_encoding_round_trip(depth: int, seed: int) -> None:
    genome = random_genome(depth, seed)
    assert encode(genome).shape == (depth * 5,)
    assert decode(encode(genome)) == genome


@given(depths, seeds, seeds, seeds)
def test_crossover_exchanges_one_run_of_whole_genes(depth: int, a: int, b: int, seed: int) -> None:
    left, right = random_genome(depth, a), random_genome(depth, b)
    first, second = recombine(left, right, np.random.default_rng(seed))
    from_right = []
    for mine, theirs, one, other in zip(left, right, first, second, strict=True):
        assert (one, other) in ((mine, theirs), (theirs, mine))
        from_right.append(one == theirs and other == mine)
    if len({*left, *right}) == 2 * depth:  # all genes differ: the exchanged run can be seen
        runs = "".join("x" if exchanged else "." for exchanged in from_right).split(".")
        assert sum(bool(run) for run in runs) == 1


@given(depths, seeds, seeds)
def test_mutation_rates(depth: int, a: int, seed: int) -> None:
    genome, pool = random_genome(depth, a), Pool()
    assert mutate(genome, 0.0, np.random.default_rng(seed), pool) == genome
    changed = mutate(genome, 1.0, np.random.default_rng(seed), pool)
    for old, new in zip(genome, changed, strict=True):
        assert all(before != after for before, after in zip(old[:4], new[:4], strict=True))
        assert new.feature_strategy in pool.options("feature_strategy", new)


@given(seeds)
@hypothesis_settings(max_examples=20)
def test_mutation_changes_a_tenth_of_the_positions(seed: int) -> None:
    genome = random_genome(200, seed)
    changed = mutate(genome, 0.1, np.random.default_rng(seed), Pool())
    count = int(np.sum(encode(genome) != encode(changed)))
    assert 55 < count < 150  # 1000 positions, rate 0.1: mean 100, five standard deviations are 47


def test_mutation_stays_in_the_pool() -> None:
    pool = Pool(classes=(1, 7), max_groups=3, featurizer_sharing=False)
    genome = Genome.random(24, np.random.default_rng(0), pool)
    for seed in range(50):
        genome = mutate(genome, 0.3, np.random.default_rng(seed), pool)
        for gene in genome:
            assert gene.liv_class in (1, 7)
            assert (gene.featurizer_group, gene.featurizer_strategy) == (1, 1)
            assert gene.feature_group <= 3


def test_different_genomes() -> None:
    rng = np.random.default_rng(0)
    first = [Genome.parse("11111-91111"), Genome.parse("13111-95111")]  # the same model twice
    found = different_genomes(10, 2, rng, Pool(), first=first)
    assert found[0] == first[0]
    assert len({genome.key for genome in found}) == len(found) == 10
    tiny = Pool(classes=(1, 9), feature_sharing=False, featurizer_sharing=False)
    assert len(different_genomes(10, 2, rng, tiny)) == 4
    assert len(different_genomes(10, 2, rng, tiny, unwanted={"11111-11111"})) == 3


def individual(rank: int | None, crowding: float | None, failed: bool = False) -> Individual:
    made = Individual(F=np.zeros(2), G=np.array([1.0 if failed else 0.0]))
    made.set("rank", rank)
    made.set("crowding", crowding)
    return made


def test_tournament_order() -> None:
    population = Population.create(
        individual(1, 9.0),
        individual(0, 0.5),
        individual(0, np.inf),
        individual(None, None, failed=True),
        individual(0, np.inf),
    )
    rng = np.random.default_rng(0)
    rows = np.array([[0, 1, 3], [1, 2, 0], [3, 0, 0], [3, 3, 3]])
    assert tournament(population, rows, random_state=rng).tolist() == [[1], [2], [0], [3]]
    ties = tournament(population, np.array([[2, 4]] * 200), random_state=rng)
    assert 60 < int(np.sum(ties == 2)) < 140


def evaluate(genomes: list[Genome], known: dict[str, Evaluation], failing: Any = None) -> None:
    for genome in genomes:
        if genome.key not in known:
            failed = failing is not None and failing(genome)
            known[genome.key] = Evaluation(
                id=len(known),
                key=genome.key,
                genome=str(genome),
                generation=0,
                origin="random",
                status="failed" if failed else "ok",
                reason="diverged" if failed else None,
                objectives={} if failed else measure(genome),
            )


def play(settings: SearchSettings, failing: Any = None) -> tuple[list[list[Genome]], list[list[Genome]]]:
    """Proposals and survivors of each generation."""
    evolution, known = Evolution(settings), dict[str, Evaluation]()
    proposals, survivors = [], []
    for _ in range(settings.generations):
        proposals.append(evolution.propose())
        if not proposals[-1]:
            break
        evaluate(proposals[-1], known, failing)
        survivors.append(evolution.select(known))
    return proposals, survivors


@pytest.mark.parametrize(
    "objectives", [("quality",), ("quality", "size"), ("quality", "size", "cache", "flops")]
)
def test_the_same_evaluations_lead_to_the_same_search(objectives: tuple[str, ...]) -> None:
    settings = small_settings(objectives=objectives, tournament=3)
    assert play(settings) == play(settings)
    assert play(settings) != play(small_settings(objectives=objectives, tournament=3, seed=1))


def test_no_model_is_proposed_twice_and_all_are_valid() -> None:
    proposals, _ = play(small_settings(generations=8))
    everything = [genome for generation in proposals for genome in generation]
    assert all(genome.is_valid() for genome in everything)
    assert len({genome.key for genome in everything}) == len(everything) == 48


def test_the_best_is_never_lost() -> None:
    settings = small_settings(objectives=("quality", "size"), generations=8)
    _, survivors = play(settings)
    best: dict[str, float] = {}
    for generation in survivors:
        for position, name in enumerate(settings.objectives):
            value = min(
                objective_vector(measure(genome), settings.objectives)[position] for genome in generation
            )
            assert value <= best.get(name, np.inf)
            best[name] = value


def test_a_single_objective_gets_better() -> None:
    settings = small_settings(objectives=("quality",), generations=10, depth=24)
    proposals, survivors = play(settings)
    first = [measure(genome)["quality"] for genome in proposals[0]]
    last = [measure(genome)["quality"] for genome in survivors[-1]]
    assert max(last) <= min(first)
    assert min(last) < min(first)


def test_failures_leave_only_where_there_is_room() -> None:
    def failing(genome: Genome) -> bool:
        return genome.genes[0].liv_class % 2 == 0

    _, survivors = play(small_settings(generations=6), failing)
    assert not any(failing(genome) for genome in survivors[-1])
    # Even when everything fails the search goes on.
    proposals, survivors = play(small_settings(), lambda genome: True)
    assert [len(generation) for generation in proposals] == [6] * 4
    assert len(survivors[-1]) == 6


def test_baselines_come_first_when_asked_for() -> None:
    proposals, _ = play(small_settings(seed_baselines=True, depth=24, generations=1))
    expected = [baselines.transformer_pp(24), baselines.striped_mamba(24), baselines.lfm2(24)]
    assert proposals[0][:3] == expected
    assert len(proposals[0]) == 6


def test_a_used_up_space_proposes_old_models_then_none() -> None:
    pool = Pool(classes=(1, 5, 9), featurizer_sharing=False, feature_sharing=False)
    settings = small_settings(depth=2, pool=pool, population=4, generations=30, objectives=("quality",))
    proposals, survivors = play(settings)
    seen: set[str] = set()
    for generation in proposals:
        keys = [genome.key for genome in generation]
        assert len(set(keys)) == len(keys)
        seen |= set(keys)
    assert len(seen) == 9
    for generation in survivors:
        assert len({genome.key for genome in generation}) == 4
    whole = Pool(classes=(1,), featurizer_sharing=False, feature_sharing=False)
    proposals, _ = play(small_settings(depth=1, pool=whole, population=2, tournament=1))
    assert [len(generation) for generation in proposals] == [1, 0]


def test_survivors_are_never_dominated_by_one_that_was_dropped() -> None:
    settings = small_settings(generations=5)
    evolution, known = Evolution(settings), dict[str, Evaluation]()
    before: list[Genome] = []
    for _ in range(settings.generations):
        proposals = evolution.propose()
        evaluate(proposals, known)
        after = evolution.select(known)
        dropped = [genome for genome in [*before, *proposals] if genome not in after]
        for kept in after:
            vector = objective_vector(measure(kept), settings.objectives)
            assert not any(
                dominates(objective_vector(measure(genome), settings.objectives), vector)
                for genome in dropped
            )
        before = after
