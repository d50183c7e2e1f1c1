"""Backbone genomes: five integers a LIV that name its class and what it shares with other LIVs.

Text form: genes joined by "-", `21211-31112-21221-32112`; a gene with a value of 10 or more has dots between
its values, `12.1.2.1.1`. The five values of a gene, in order (STAR, section 3.3):

1. LIV class, a number of the pools;
2. featurizer-sharing group, a label: LIVs with the same label use the same featurizer weights;
3. featurizer-sharing strategy: 1 none, 2 all weights;
4. feature-sharing group, a label: LIVs with the same label use the same features;
5. feature-sharing strategy: 1 none, from 2 on the subsets of the class's shareable feature groups
   (`star.pools.LivClass.feature_strategies`).

A label counts only where the strategy after it is above 1. A genome is a plain value: every text that has the
form is a genome, and `problem` says whether it describes a model.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import islice, zip_longest
from typing import TYPE_CHECKING, NamedTuple, SupportsIndex, TypeVar

from star import pools, sharing

if TYPE_CHECKING:
    from numpy.random import Generator

T = TypeVar("T")

MAX_DEPTH = 10_000
MAX_VALUE = 9_999  # of any of a gene's integers; canonical labels of MAX_DEPTH LIVs stay below it

# Random genomes: how likely a LIV is to share with an earlier one, if there is one it can share with.
FEATURIZER_LINK_PROBABILITY = 0.25
FEATURE_LINK_PROBABILITY = 0.25

_EXAMPLE = "21211-31112"
# ASCII digits only: \d would also take the digits of every other script.
_SHORT_GENE = re.compile(r"[1-9]{5}")
_VALUE = re.compile(r"[1-9][0-9]*")


class GenomeError(ValueError):
    """A text that is no genome, or a genome that describes no model; one line that names the gene."""


class Gene(NamedTuple):
    """The five integers of one LIV, each from 1."""

    liv_class: int
    featurizer_group: int = 1
    featurizer_strategy: int = 1
    feature_group: int = 1
    feature_strategy: int = 1

    def __str__(self) -> str:
        return ("%d%d%d%d%d" if max(self) < 10 else "%d.%d.%d.%d.%d") % self


@dataclass(frozen=True, repr=False)
class Genome:
    """A backbone: one gene a LIV, first LIV first. Immutable and hashable.

    Equality is that of the text; two genomes describe the same model if their `key` is equal.

    Args:
        genes: five integers a LIV, as `Gene`s or any sequences of integers.

    Raises:
        GenomeError: no gene or too many, not five values, or values out of 1-9999.
    """

    genes: tuple[Gene, ...]

    def __init__(self, genes: Iterable[Iterable[SupportsIndex]]) -> None:
        object.__setattr__(self, "genes", _checked_genes(genes))

    # ---------------------------------------------------------------------------------------- text

    @classmethod
    def parse(cls, text: str) -> Genome:
        """The genome that `text` spells. Whether it describes a model is another question: `problem`.

        Raises:
            GenomeError: not the text of a genome; names the gene.
        """
        if not isinstance(text, str):
            raise TypeError(f"Genome.parse: text is {type(text).__name__}, takes str")
        stripped = text.strip()
        if not stripped:
            raise GenomeError(f"genome is empty, takes genes of five integers joined by '-', like {_EXAMPLE}")
        pieces = stripped.split("-")
        if len(pieces) > MAX_DEPTH:
            raise GenomeError(f"genome has {len(pieces)} genes, takes at most {MAX_DEPTH}")
        return cls(_parse_gene(number, piece) for number, piece in enumerate(pieces, start=1))

    def __str__(self) -> str:
        return "-".join(str(gene) for gene in self.genes)

    def __repr__(self) -> str:
        return f"Genome.parse({str(self)!r})"

    # ---------------------------------------------------------------------------------------- sequence

    @property
    def depth(self) -> int:
        """Number of LIVs."""
        return len(self.genes)

    def __len__(self) -> int:
        return len(self.genes)

    def __iter__(self) -> Iterator[Gene]:
        return iter(self.genes)

    def __getitem__(self, index: int) -> Gene:
        return self.genes[index]

    # ---------------------------------------------------------------------------------------- validity

    def problem(self) -> str | None:
        """Why no model can be built from the genome, naming the first gene at fault; None if one can."""
        found = sharing.find_problem(self.genes)
        if found is None:
            return None
        index, reason = found
        return f"gene {index + 1} '{self.genes[index]}': {reason}"

    def is_valid(self) -> bool:
        """Whether the genome describes a model."""
        return sharing.find_problem(self.genes) is None

    def require_valid(self) -> Genome:
        """The genome itself.

        Raises:
            GenomeError: it describes no model; the message is `problem()`.
        """
        problem = self.problem()
        if problem:
            raise GenomeError(problem)
        return self

    def repair(self, rng: Generator, pool: pools.Pool | None = None) -> Genome:
        """A valid genome that differs only where this one is not valid.

        Genes are read from the first to the last, and those before decide: what does not exist (a class, a
        strategy) is drawn anew from the pool; a LIV that does not fit into its sharing group is drawn one of
        the groups of earlier LIVs that it fits into, a new group, or no sharing, all equally likely.

        Args:
            rng: the only source of chance; untouched where the genome is valid.
            pool: what to draw from; by default everything.
        """
        if self.is_valid():
            return self
        pool = pool or pools.Pool()
        groups = sharing.Groups()
        used_featurizers = {gene.featurizer_group for gene in self.genes if gene.featurizer_strategy > 1}
        used_features = {gene.feature_group for gene in self.genes if gene.feature_strategy > 1}
        repaired = []
        for index, old in enumerate(self.genes):
            gene = _repair_range(old, rng, pool)
            if groups.featurizer_conflict(gene):
                gene = _repair_featurizer(gene, groups, used_featurizers, rng, pool)
            if groups.feature_conflict(gene):
                gene = _repair_features(gene, groups, used_features, rng, pool)
            groups.add(index, gene)
            used_featurizers |= {gene.featurizer_group} if gene.featurizer_strategy > 1 else set()
            used_features |= {gene.feature_group} if gene.feature_strategy > 1 else set()
            repaired.append(gene)
        return Genome(repaired)

    # ---------------------------------------------------------------------------------------- identity

    def canonical(self) -> Genome:
        """The one genome for all that describe the same model: `a.canonical() == b.canonical()` exactly then.

        Raises:
            GenomeError: the genome is not valid.
        """
        return Genome(sharing.canonical_genes(self))

    @cached_property
    def key(self) -> str:
        """Text of the canonical form: the name of the model.

        Raises:
            GenomeError: the genome is not valid.
        """
        return str(self.canonical())

    def distance(self, other: Genome) -> int:
        """How many things differ between two models: 0 exactly if they are the same.

        Of every LIV three things are compared: its class, the LIV whose featurizer weights it uses, and the
        LIV whose features it takes together with which ones. LIVs that only one of the two has count 3 each.
        A metric on canonical forms; labels do not matter.

        Raises:
            GenomeError: one of the genomes is not valid.
        """
        nothing = (None, None, None)
        return sum(
            mine != theirs
            for left, right in zip_longest(_links(self), _links(other), fillvalue=nothing)
            for mine, theirs in zip(left, right, strict=True)
        )

    # ---------------------------------------------------------------------------------------- chance

    @classmethod
    def random(cls, depth: int, rng: Generator, pool: pools.Pool | None = None) -> Genome:
        """A valid genome drawn from the pool.

        Classes are uniform and independent. Then every LIV, first to last, joins with probability 1/4 the
        featurizer of an earlier LIV of its class, and with probability 1/4 reuses features of an earlier LIV
        that exchanges features with it, where there is such a LIV (partner first, then strategy, uniform). Of
        24 LIVs of 17 classes about 3 use another's weights and about 4 another's features. Drawing
        labels and strategies uniformly would leave nearly all groups invalid or of one LIV.

        Args:
            depth: number of LIVs, from 1.
            rng: the only source of chance: equal generators give equal genomes.
            pool: what to draw from; by default everything.

        Raises:
            ValueError: depth out of 1-10000.
        """
        if not 1 <= depth <= MAX_DEPTH:
            raise ValueError(f"Genome.random: depth is {depth!r}, takes 1-{MAX_DEPTH}")
        pool = pool or pools.Pool()
        genes = [Gene(_choose(pool.classes, rng)) for _ in range(depth)]
        for index in range(1, depth):
            if pool.featurizer_sharing and rng.random() < FEATURIZER_LINK_PROBABILITY:
                _link_featurizer(genes, index, rng, pool)
            if pool.feature_sharing and rng.random() < FEATURE_LINK_PROBABILITY:
                _link_features(genes, index, rng, pool)
        return cls(genes)


# --------------------------------------------------------------------------------------------------------
# Construction


def _parse_gene(number: int, piece: str) -> Gene:
    """The gene that `piece` spells: five digits, or five integers with dots between them."""
    where = f"gene {number} '{piece if len(piece) <= 24 else piece[:21] + '...'}'"
    if _SHORT_GENE.fullmatch(piece):
        return Gene(*(int(digit) for digit in piece))
    values = piece.split(".") if "." in piece else list(piece)
    if any(value and value.strip("0") == "" for value in values):
        raise GenomeError(f"{where}: values start at 1, got 0")
    if not all(_VALUE.fullmatch(value) for value in values):
        raise GenomeError(
            f"{where}: takes five digits like 21211, or five integers like 12.1.2.1.1 "
            f"(genes are joined by '-')"
        )
    if len(values) != 5:
        unit = "integers" if "." in piece else "digits"
        raise GenomeError(f"{where}: has {len(values)} {unit}, takes 5 (genes are joined by '-')")
    if any(len(value) > len(str(MAX_VALUE)) for value in values):
        raise GenomeError(f"{where}: values are at most {MAX_VALUE}")
    return Gene(*(int(value) for value in values))


def _checked_genes(genes: Iterable[Iterable[SupportsIndex]]) -> tuple[Gene, ...]:
    checked = []
    for number, gene in enumerate(genes, start=1):
        values = list(map(operator.index, gene))
        if len(values) != 5:
            raise GenomeError(f"gene {number} '{_shown(values)}': has {len(values)} values, takes 5")
        if min(values) < 1 or max(values) > MAX_VALUE:
            raise GenomeError(f"gene {number} '{_shown(values)}': values go from 1 to {MAX_VALUE}")
        if number > MAX_DEPTH:
            raise GenomeError(f"genome has more than {MAX_DEPTH} genes, takes at most {MAX_DEPTH}")
        checked.append(Gene(*values))
    if not checked:
        raise GenomeError("genome has no gene, takes at least one")
    return tuple(checked)


def _shown(values: Iterable[int]) -> str:
    return ".".join(str(value) for value in islice(values, 6))


def _links(genome: Genome) -> list[tuple[object, object, object]]:
    """What `distance` compares of every LIV; equal exactly for genomes of one model."""
    return [
        (plan.entry.id, plan.featurizer_owner, (plan.source, plan.shared)) for plan in sharing.resolve(genome)
    ]


# --------------------------------------------------------------------------------------------------------
# Chance


def _choose(options: Sequence[T], rng: Generator) -> T:
    return options[int(rng.integers(len(options)))]


def _free_labels(used: Iterable[int], pool: pools.Pool) -> list[int]:
    """The smallest label that no group has yet, as a list; empty if the pool has no more."""
    taken = set(used)
    return [label for label in range(1, pool.max_groups + 1) if label not in taken][:1]


def _repair_range(gene: Gene, rng: Generator, pool: pools.Pool) -> Gene:
    """Draw anew what does not exist: the class, the strategies."""
    if pools.find(gene.liv_class) is None:
        gene = gene._replace(liv_class=_choose(pool.classes, rng))
    if gene.featurizer_strategy not in pools.FEATURIZER_STRATEGIES:
        options = pool.options("featurizer_strategy", gene)
        gene = gene._replace(featurizer_strategy=_choose(options, rng))
    if gene.feature_strategy > len(pools.get(gene.liv_class).feature_strategies):
        gene = gene._replace(feature_strategy=_choose(pool.options("feature_strategy", gene), rng))
    return gene


def _repair_featurizer(
    gene: Gene, groups: sharing.Groups, used: set[int], rng: Generator, pool: pools.Pool
) -> Gene:
    """Draw one of: no featurizer sharing, an earlier group of the gene's class, a new group."""
    options = [(gene.featurizer_group, 1)]
    if pool.featurizer_sharing:
        options += [(label, 2) for label, (held, _) in groups.featurizers.items() if held == gene.liv_class]
        options += [(label, 2) for label in _free_labels(used, pool)]
    label, strategy = _choose(options, rng)
    return gene._replace(featurizer_group=label, featurizer_strategy=strategy)


def _repair_features(
    gene: Gene, groups: sharing.Groups, used: set[int], rng: Generator, pool: pools.Pool
) -> Gene:
    """Draw one of: no feature sharing, an earlier group that the gene's class fits into, a new group."""
    options = [(gene.feature_group, 1)]
    if pool.feature_sharing:
        entry = pools.get(gene.liv_class)
        for label, (exchange, strategy, _) in groups.features.items():
            if strategy <= len(entry.feature_strategies) and entry.exchange(strategy) == exchange:
                options.append((label, strategy))
        options += [(label, gene.feature_strategy) for label in _free_labels(used, pool)]
    label, strategy = _choose(options, rng)
    return gene._replace(feature_group=label, feature_strategy=strategy)


def _link_featurizer(genes: list[Gene], index: int, rng: Generator, pool: pools.Pool) -> None:
    """Give LIV `index` the featurizer of an earlier LIV of its class, if there is one, in place."""
    partners = [earlier for earlier in range(index) if genes[earlier].liv_class == genes[index].liv_class]
    if not partners:
        return
    partner = _choose(partners, rng)
    if genes[partner].featurizer_strategy == 1:
        labels = _free_labels((gene.featurizer_group for gene in genes if gene.featurizer_strategy > 1), pool)
        if not labels:
            return
        genes[partner] = genes[partner]._replace(featurizer_group=labels[0], featurizer_strategy=2)
    genes[index] = genes[index]._replace(
        featurizer_group=genes[partner].featurizer_group, featurizer_strategy=2
    )


def _link_features(genes: list[Gene], index: int, rng: Generator, pool: pools.Pool) -> None:
    """Give LIV `index` features of an earlier LIV that exchanges some with it, if there is one, in place."""
    partners = []
    for earlier in range(index):
        strategies = _common_strategies(genes[earlier].liv_class, genes[index].liv_class)
        if genes[earlier].feature_strategy > 1:  # in a group already: its strategy is settled
            strategies = tuple(value for value in strategies if value == genes[earlier].feature_strategy)
        if strategies:
            partners.append((earlier, strategies))
    if not partners:
        return
    partner, strategies = _choose(partners, rng)
    strategy = _choose(strategies, rng)
    if genes[partner].feature_strategy == 1:
        labels = _free_labels((gene.feature_group for gene in genes if gene.feature_strategy > 1), pool)
        if not labels:
            return
        genes[partner] = genes[partner]._replace(feature_group=labels[0], feature_strategy=strategy)
    genes[index] = genes[index]._replace(
        feature_group=genes[partner].feature_group, feature_strategy=strategy
    )


@cache
def _common_strategies(left: int, right: int) -> tuple[int, ...]:
    """Feature-sharing strategies under which two classes exchange features."""
    first, second = pools.get(left), pools.get(right)
    count = min(len(first.feature_strategies), len(second.feature_strategies))
    return tuple(
        strategy for strategy in range(2, count + 1) if first.exchange(strategy) == second.exchange(strategy)
    )
