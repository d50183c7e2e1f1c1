"""The null of the paper's experiment: evolution for inherited fitness without preferences, and its test."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.paper_drift import (
    Landscapes,
    class_identity,
    compare,
    drift,
    many_drifts,
    statistics_of,
)
from benchmarks.paper_plan import Plan
from star.genome import Genome

SMALL = replace(Plan().search, population=8, generations=4, depth=6)


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


def test_class_identity_is_the_mean_share_of_equal_places() -> None:
    one, other = Genome.parse("71111-71111-11111-91111"), Genome.parse("71111-91111-11111-91111")
    assert class_identity([one, other]) == pytest.approx(3 / 4)
    assert class_identity([one, other, one]) == pytest.approx((3 / 4 + 1 + 3 / 4) / 3)
    assert class_identity([one]) == 1


@pytest.mark.parametrize("objectives", [1, 2, 4])
def test_a_drift_is_an_evolution_of_valid_genomes_and_repeats(objectives: int) -> None:
    population = drift(SMALL, objectives, 3)
    assert len(population) == SMALL.population
    assert all(genome.is_valid() and genome.depth == SMALL.depth for genome in population)
    assert population == drift(SMALL, objectives, 3)
    assert population != drift(SMALL, objectives, 4)


def test_effects_belong_to_a_gene_at_a_place_and_add_up() -> None:
    landscapes = Landscapes(3, np.random.default_rng(0))
    first, second = Genome.parse("71111-11111"), Genome.parse("11111-71111")
    mixed = [Genome.parse("71111-71111"), Genome.parse("11111-11111")]
    total = landscapes.fitness(first) + landscapes.fitness(second)
    assert total == pytest.approx(sum(landscapes.fitness(genome) for genome in mixed))
    assert landscapes.fitness(first) == pytest.approx(landscapes.fitness(first))
    assert landscapes.fitness(first) != pytest.approx(landscapes.fitness(second))
    assert len(landscapes.fitness(first)) == 3


def test_fitness_is_inherited_so_that_a_lineage_takes_over() -> None:
    settings = replace(SMALL, generations=12)
    alike = np.array([class_identity(drift(settings, 1, number)) for number in range(6)])
    first = np.array([class_identity(drift(replace(SMALL, generations=1), 1, number)) for number in range(6)])
    assert first.mean() < 0.15  # unrelated genomes of 17 classes
    assert alike.mean() > first.mean() + 0.15


def test_no_class_is_favoured_by_drift() -> None:
    shares = [found.statistics for found in many_drifts(SMALL, 1, range(40), 1)]
    for name in ("LIVs of class GConv-1", "LIVs of class SA-3-Diff"):
        values = np.array([share[name] for share in shares], dtype=float)
        assert abs(values.mean() - 1 / 17) < 4 * values.std() / np.sqrt(len(values))


def test_what_is_in_every_genome_of_a_search_is_found() -> None:
    drifts = [found.statistics for found in many_drifts(SMALL, 1, range(60), 1)]
    selected = [Genome.parse("-".join(["71111"] * 6))] * 8
    tests = {test.statistic: test for test in compare("quality", selected, drifts)}
    favoured = tests["LIVs of class GConv-1"]
    assert favoured.observed == 1
    assert favoured.p <= 3 / 61
    assert favoured.deviations > 3
    assert "attention with earlier features" not in tests
    neutral = compare("quality", drift(SMALL, 1, 99), drifts)
    assert min(test.p for test in neutral) > 0.05


def test_p_values_are_those_of_the_furthest_statistic() -> None:
    population = [Genome.parse("71111-11111")]  # half of each of the two classes
    a, b = "LIVs of class GConv-1", "LIVs of class SA-1"
    drifts = [{**statistics_of(population), b: value} for value in (0.0, 0.1, 0.0, 1.0)]
    tests = {test.statistic: test for test in compare("quality", population, drifts)}
    values = np.array([0.5, 0.0, 0.1, 0.0, 1.0])
    assert tests[b].deviations == pytest.approx((0.5 - values.mean()) / values.std())  # 0.47
    assert tests[b].expected == pytest.approx(0.275)
    assert tests[b].p == 1  # every drift is further from the mean, 0.32
    drifts = [{**statistics_of(population), b: value} for value in (0.1, 0.2, 0.1, 0.0)]
    assert {test.statistic: test.p for test in compare("quality", population, drifts)}[b] == 1 / 5
    drifts[1][a] = 0.0  # far out in another statistic: two of five populations are now as far as it is
    assert {test.statistic: test.p for test in compare("quality", population, drifts)}[b] == 2 / 5


def test_statistics_that_no_drift_varies() -> None:
    population = [Genome.parse("71111-11111")]
    statistics = statistics_of(population)
    same = [dict(statistics) for _ in range(9)]
    assert all(test.p == 1 and test.deviations == 0 for test in compare("quality", population, same))
    other = [{**item, "LIVs of class GConv-1": 0.25} for item in same]
    found = {test.statistic: test for test in compare("quality", population, other)}
    assert found["LIVs of class GConv-1"].p == pytest.approx(1 / 10)
    assert found["LIVs of class GConv-1"].deviations == pytest.approx(3)  # √9
    assert found["LIVs of class SA-1"].p == 1
    # Each drift is the only one with something of its own, so that this one's is nothing special.
    names = list(statistics)
    for item, name in zip(other, names[-9:], strict=True):
        item[name] = 0.123
    assert {test.statistic: test.p for test in compare("quality", population, other)}[names[-1]] == 1


def test_what_some_drifts_have_no_share_of() -> None:
    name = "attention with earlier features"
    population = [Genome.parse("71111-11111")]
    statistics = statistics_of(population)
    drifts = [{**statistics, name: value} for value in (None, 0.25, 0.5, None)]
    found = {test.statistic: test for test in compare("quality", population, drifts)}
    assert found[name].expected == 0.375
    assert found[name].p == pytest.approx(2 / 5)  # observed 0: as far from the mean, 0.25, as one drift
    nowhere = [{**statistics, name: None} for _ in range(4)]
    assert name not in {test.statistic for test in compare("quality", population, nowhere)}


def test_populations_like_the_drifts_are_rarely_significant() -> None:
    everyone = list(many_drifts(SMALL, 2, range(80), 1))
    drifts = [found.statistics for found in everyone[:60]]
    least = [
        min(test.p for test in compare("x", drift(SMALL, 2, item.number), drifts)) for item in everyone[60:]
    ]
    assert sum(p <= 0.05 for p in least) <= 4  # of 20; more than 4 has a probability of 0.3 %
