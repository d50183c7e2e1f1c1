"""How new genomes come about: sampling, 2-point crossover, mutation, repair, tournament.

First plain functions from genomes to genomes, then the thin classes by which pymoo calls them. The paper's:
crossover at two points between genes, every position of every gene redrawn inside its own pool with a
probability of 10 %, repair of invalid sharing. Ours: the number of contenders in a tournament, that a
proposal which was evaluated before is varied anew, and how often.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.random import Generator
from pymoo.core.crossover import Crossover
from pymoo.core.duplicate import DuplicateElimination
from pymoo.core.mating import Mating
from pymoo.core.mutation import Mutation
from pymoo.core.population import Population
from pymoo.core.repair import Repair
from pymoo.core.sampling import Sampling

from star.genome import Gene, Genome
from star.pools import Pool

__all__ = [
    "KnownModels",
    "PoolMutation",
    "RandomGenomes",
    "SharingRepair",
    "TwoPointCrossover",
    "Variation",
    "decode",
    "different_genomes",
    "encode",
    "mutate",
    "recombine",
    "tournament",
]

POSITIONS = len(Gene._fields)
# Draws of a random genome for each place in the first generation before the space counts as too small.
_DRAWS_A_PLACE = 200

Genes = npt.NDArray[np.int64]


def encode(genome: Genome) -> Genes:
    """A genome as pymoo's vector of variables: (depth * 5,)."""
    return np.array(genome.genes, dtype=np.int64).reshape(-1)


def decode(variables: Genes) -> Genome:
    """The genome of pymoo's vector of variables."""
    return Genome(variables.reshape(-1, POSITIONS).tolist())


# ---- genomes to genomes ------------------------------------------------------------------------------


def different_genomes(
    count: int,
    depth: int,
    rng: Generator,
    pool: Pool,
    *,
    first: Iterable[Genome] = (),
    unwanted: Collection[str] = (),
) -> list[Genome]:
    """`count` genomes of different models: `first`, then random ones whose keys are not `unwanted`.

    Fewer if there are not so many (or they do not turn up in many draws).
    """
    found: dict[str, Genome] = {}
    for genome in first:
        found.setdefault(genome.key, genome)
    for _ in range(_DRAWS_A_PLACE * count):
        if len(found) >= count:
            break
        genome = Genome.random(depth, rng, pool)
        if genome.key not in unwanted:
            found.setdefault(genome.key, genome)
    return list(found.values())[:count]


def recombine(left: Genome, right: Genome, rng: Generator) -> tuple[Genome, Genome]:
    """Exchange the genes between two cuts: two children, each with every gene of its place in one parent."""
    first, last = sorted(rng.choice(left.depth + 1, size=2, replace=False).tolist())

    def exchange(outer: Genome, inner: Genome) -> Genome:
        return Genome(outer.genes[:first] + inner.genes[first:last] + outer.genes[last:])

    return exchange(left, right), exchange(right, left)


def mutate(genome: Genome, rate: float, rng: Generator, pool: Pool) -> Genome:
    """Redraw each position of each gene with probability `rate`, to another option of the position's pool."""
    genes = []
    for gene, redrawn in zip(genome.genes, rng.random((genome.depth, POSITIONS)) < rate, strict=True):
        for position in np.flatnonzero(redrawn).tolist():
            # The strategies' options are those of the class that the gene has by now.
            options = [value for value in pool.options(position, gene) if value != gene[position]]
            if options:
                value = options[int(rng.integers(len(options)))]
                gene = gene._replace(**{Gene._fields[position]: value})
        genes.append(gene)
    return Genome(genes)


# ---- as pymoo calls them -----------------------------------------------------------------------------


class RandomGenomes(Sampling):
    """The first generation: given genomes, then random ones."""

    def __init__(self, depth: int, pool: Pool, first: Sequence[Genome] = ()) -> None:
        super().__init__()
        self.depth, self.pool, self.first = depth, pool, tuple(first)

    def _do(self, problem: Any, n_samples: int, *args: Any, random_state: Generator, **kwargs: Any) -> Genes:
        genomes = different_genomes(n_samples, self.depth, random_state, self.pool, first=self.first)
        return np.array([encode(genome) for genome in genomes])


class TwoPointCrossover(Crossover):
    """`recombine` for each pair of parents."""

    def __init__(self, rate: float) -> None:
        super().__init__(n_parents=2, n_offsprings=2, prob=rate)

    def _do(self, problem: Any, X: Genes, *args: Any, random_state: Generator, **kwargs: Any) -> Genes:
        children = np.empty_like(X)  # (2 children, pairs, variables)
        for pair in range(X.shape[1]):
            genomes = recombine(decode(X[0, pair]), decode(X[1, pair]), random_state)
            for child, genome in enumerate(genomes):
                children[child, pair] = encode(genome)
        return children


class PoolMutation(Mutation):
    """`mutate` for each child."""

    def __init__(self, rate: float, pool: Pool) -> None:
        super().__init__(prob=1.0)  # every child is treated; `rate` is that of each position
        self.rate, self.pool = rate, pool

    def _do(self, problem: Any, X: Genes, *args: Any, random_state: Generator, **kwargs: Any) -> Genes:
        return np.array([encode(mutate(decode(row), self.rate, random_state, self.pool)) for row in X])


class SharingRepair(Repair):
    """`Genome.repair` for each child: what no model can have is redrawn."""

    def __init__(self, pool: Pool) -> None:
        super().__init__()
        self.pool = pool

    def _do(self, problem: Any, X: Genes, *args: Any, random_state: Generator, **kwargs: Any) -> Genes:
        return np.array([encode(decode(row).repair(random_state, self.pool)) for row in X])


class KnownModels(DuplicateElimination):
    """Drops proposals of models that are in `keys` (all that were asked for so far), or twice in one go."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: set[str] = set()

    def do(self, pop: Population, *others: Population, **kwargs: Any) -> Population:
        return _first_of_each(pop, self.keys.union(*(map(key_of, other) for other in others)))


class Variation(Mating):
    """Select parents, recombine, mutate, repair, and drop known models, until there are enough new ones.

    After `n_max_iterations` rounds the rest is filled with models that were evaluated before but are not in
    the population, so that their stored evaluations compete again. If all this gives nothing, which happens
    in tiny spaces, new models are drawn at random; where there are none, the result is empty.
    """

    def __init__(self, *args: Any, known: KnownModels, depth: int, pool: Pool, **kwargs: Any) -> None:
        super().__init__(*args, eliminate_duplicates=known, **kwargs)
        self.known, self.depth, self.pool = known, depth, pool

    def do(self, problem: Any, pop: Population, n_offsprings: int, **kwargs: Any) -> Population:
        new = super().do(problem, pop, n_offsprings, **kwargs)
        missing = n_offsprings - len(new)
        if missing == 0:
            return new
        known = self.repair(problem, self._do(problem, pop, missing, **kwargs), **kwargs)
        known = _first_of_each(known, {key_of(individual) for individual in (*pop, *new)})
        offspring = Population.merge(new, known[:missing])
        if len(offspring) > 0:
            return offspring
        rng = kwargs["random_state"]
        drawn = different_genomes(n_offsprings, self.depth, rng, self.pool, unwanted=self.known.keys)
        return Population.new("X", [encode(genome) for genome in drawn])


def tournament(
    pop: Population, contenders: npt.NDArray[np.int64], *, random_state: Generator, **kwargs: Any
) -> npt.NDArray[np.int64]:
    """NSGA-II's comparison among any number of contenders.

    The better front wins, then the less crowded place; candidates over a budget lose to those within, and
    failed ones to all others; what remains equal is decided by chance.

    Args:
        contenders: (tournaments, k), indices into the population.

    Returns:
        (tournaments, 1), the winners' indices.
    """
    standings = [_standing(individual) for individual in pop]
    winners = []
    for row in contenders.tolist():
        best = min(standings[index] for index in row)
        equal = [index for index in row if standings[index] == best]
        winners.append(equal[int(random_state.integers(len(equal)))] if len(equal) > 1 else equal[0])
    return np.array(winners, dtype=np.int64)[:, None]


def _standing(individual: Any) -> tuple[int, int, float]:
    if individual.CV[0] > 0.0:  # the closer to its budgets the better; failures are all equal
        return (1, 0, float(individual.CV[0]))
    return (0, int(individual.get("rank")), -float(individual.get("crowding")))


def key_of(individual: Any) -> str:
    """The canonical genome of one of pymoo's individuals."""
    return decode(individual.X).key


def _first_of_each(pop: Population, unwanted: set[str]) -> Population:
    """The individuals of different models that are not in `unwanted`, in their order."""
    seen = set(unwanted)
    kept = []
    for index, individual in enumerate(pop):
        key = key_of(individual)
        if key not in seen:
            seen.add(key)
            kept.append(index)
    return pop[kept]
