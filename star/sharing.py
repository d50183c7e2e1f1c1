"""What the LIVs of a genome share: from labels and strategies to a plan for every LIV.

Two ways to connect LIVs (STAR, section 3.3):

- **featurizer sharing**: the LIVs of one featurizer group, all of one class, use the same featurizer weights,
  each on its own input;
- **feature-group sharing**: the first LIV of a feature group computes the shared feature groups, the later
  ones reuse these very features.

`resolve` turns a valid genome into one `LivPlan` a LIV; models, costs and pictures are built from the plans
alone. Two genomes describe the same model exactly if their plans are equal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

from star import pools

if TYPE_CHECKING:
    from star.genome import Gene, Genome


@dataclass(frozen=True)
class LivPlan:
    """One LIV of a backbone with everything that it shares.

    Args:
        index: position in the backbone, from 0.
        entry: its LIV class.
        featurizer_owner: index of the LIV whose featurizer module it uses; its own where nothing is shared.
        featurizer_groups: feature groups that this featurizer module must be able to make: all that the LIVs
            which use it compute. Equal for all of them; empty where none computes any, though the featurizer
            still makes the constants of its class.
        computed: feature groups that the LIV computes from its own input.
        source: index of the earlier LIV whose features it reuses, or None.
        shared: feature groups taken from the source; with `computed` all groups of the class.
    """

    index: int
    entry: pools.LivClass
    featurizer_owner: int
    featurizer_groups: tuple[str, ...]
    computed: tuple[str, ...]
    source: int | None
    shared: tuple[str, ...]


def resolve(genome: Genome) -> tuple[LivPlan, ...]:
    """One plan a LIV.

    Raises:
        GenomeError: the genome is not valid; the message names the gene.
    """
    # Whoever asks for one cost of a genome asks for the others too. Which entries the classes have is part of
    # the key, since classes can be registered at any time.
    return _resolved(genome, tuple(id(pools.find(gene.liv_class)) for gene in genome.genes))


@lru_cache(maxsize=1024)
def _resolved(genome: Genome, entry_ids: tuple[int, ...]) -> tuple[LivPlan, ...]:
    """`resolve`; the plans hold the entries, so that no id means another one while its plans are kept."""
    genes = genome.require_valid().genes
    entries = [pools.get(gene.liv_class) for gene in genes]
    sources = _feature_sources(genes)
    shared: list[tuple[str, ...]] = []
    computed: list[tuple[str, ...]] = []
    for gene, entry, source in zip(genes, entries, sources, strict=True):
        taken = () if source is None else entry.shared_groups(gene.feature_strategy)
        shared.append(taken)
        computed.append(tuple(name for name in entry.groups if name not in taken))
    owners = _featurizer_owners(
        genes, [{*names, *entry.constants} for names, entry in zip(computed, entries, strict=True)]
    )
    made: dict[int, set[str]] = {}
    for owner, names in zip(owners, computed, strict=True):
        made.setdefault(owner, set()).update(names)
    return tuple(
        LivPlan(
            index=index,
            entry=entry,
            featurizer_owner=owners[index],
            featurizer_groups=tuple(name for name in entry.groups if name in made[owners[index]]),
            computed=computed[index],
            source=sources[index],
            shared=shared[index],
        )
        for index, entry in enumerate(entries)
    )


def _feature_sources(genes: Iterable[Gene]) -> list[int | None]:
    """For each LIV the first one of its feature group, or None where it is itself the first, or alone."""
    first: dict[int, int] = {}
    sources: list[int | None] = []
    for index, gene in enumerate(genes):
        if gene.feature_strategy == 1:
            sources.append(None)
        else:
            source = first.setdefault(gene.feature_group, index)
            sources.append(None if source == index else source)
    return sources


def _featurizer_owners(genes: Iterable[Gene], needed: list[set[str]]) -> list[int]:
    """For each LIV the index of the one whose featurizer it uses.

    LIVs of a featurizer group have weights in common only where they need the same of the featurizer:
    feature groups that both compute, or a constant such as a kernel. One that needs nothing (it takes all its
    features from another LIV, and its class has no constants) uses no featurizer; LIVs with the same label
    that need different things (one only the gate, one only the other factor) have nothing in common and stay
    apart. What remains are the connected parts of each label's LIVs, joined by what they need.

    Args:
        genes: of all LIVs.
        needed: names of what each LIV's featurizer must make for it.
    """
    parts: dict[int, list[tuple[list[int], set[str]]]] = {}
    for index, gene in enumerate(genes):
        if gene.featurizer_strategy == 1 or not needed[index]:
            continue
        members, names = [index], needed[index]
        apart = []
        for part in parts.get(gene.featurizer_group, []):
            if part[1] & needed[index]:
                members, names = part[0] + members, part[1] | names
            else:
                apart.append(part)
        parts[gene.featurizer_group] = [*apart, (members, names)]
    owners = list(range(len(needed)))
    for label_parts in parts.values():
        for members, _ in label_parts:
            for index in members:
                owners[index] = min(members)
    return owners


def canonical_genes(genome: Genome) -> list[tuple[int, int, int, int, int]]:
    """Values of the genome's canonical form: one for all genomes that describe the same model.

    A label and strategy without effect become 1; the groups that have one are numbered 1, 2, ... in the order
    of their first LIV, featurizer groups and feature groups apart.
    """
    plans = resolve(genome)
    users = Counter(plan.featurizer_owner for plan in plans)
    sources = {plan.source for plan in plans if plan.source is not None}
    featurizer_labels: dict[int, int] = {}
    feature_labels: dict[int, int] = {}
    values = []
    for plan, gene in zip(plans, genome.genes, strict=True):
        featurizer = feature = (1, 1)
        if users[plan.featurizer_owner] > 1:
            label = featurizer_labels.setdefault(plan.featurizer_owner, len(featurizer_labels) + 1)
            featurizer = (label, 2)
        source = plan.index if plan.source is None else plan.source
        if source in sources:
            label = feature_labels.setdefault(source, len(feature_labels) + 1)
            feature = (label, gene.feature_strategy)
        values.append((gene.liv_class, *featurizer, *feature))
    return values


# --------------------------------------------------------------------------------------------------------
# Validity


@dataclass
class Groups:
    """The sharing groups that the genes read so far have opened; tells whether one more gene fits.

    Args:
        featurizers: label -> (LIV class, index of its first LIV).
        features: label -> (what its LIVs exchange, strategy, index of its first LIV).
    """

    featurizers: dict[int, tuple[int, int]] = field(default_factory=dict)
    features: dict[int, tuple[tuple[object, ...], int, int]] = field(default_factory=dict)

    def add(self, index: int, gene: Gene) -> None:
        """Note the groups that the gene, which must fit, belongs to."""
        if gene.featurizer_strategy > 1:
            self.featurizers.setdefault(gene.featurizer_group, (gene.liv_class, index))
        if gene.feature_strategy > 1:
            exchange = pools.get(gene.liv_class).exchange(gene.feature_strategy)
            self.features.setdefault(gene.feature_group, (exchange, gene.feature_strategy, index))

    def featurizer_conflict(self, gene: Gene) -> str | None:
        """Why the gene cannot be in its featurizer group, or None."""
        known = self.featurizers.get(gene.featurizer_group)
        if gene.featurizer_strategy == 1 or known is None or known[0] == gene.liv_class:
            return None
        return (
            f"featurizer group {gene.featurizer_group} holds class {_class_name(known[0])} "
            f"(gene {known[1] + 1}), takes no {_class_name(gene.liv_class)}"
        )

    def feature_conflict(self, gene: Gene) -> str | None:
        """Why the gene cannot be in its feature group, or None."""
        known = self.features.get(gene.feature_group)
        if gene.feature_strategy == 1 or known is None:
            return None
        exchange, strategy, first = known
        entry = pools.get(gene.liv_class)
        if strategy != gene.feature_strategy:
            return (
                f"feature group {gene.feature_group} has strategy {strategy} (gene {first + 1}), "
                f"not {gene.feature_strategy}"
            )
        if exchange != entry.exchange(strategy):
            names = ", ".join(entry.shared_groups(strategy))
            return (
                f"feature group {gene.feature_group} (gene {first + 1}) has no {names} "
                f"of the shape that {_class_name(gene.liv_class)} takes"
            )
        return None


def range_problem(gene: Gene) -> str | None:
    """Why a gene's class or strategies do not exist, or None."""
    entry = pools.find(gene.liv_class)
    if entry is None:
        return f"LIV class is {gene.liv_class}, takes {pools.known_classes()}"
    if gene.featurizer_strategy not in pools.FEATURIZER_STRATEGIES:
        known = " or ".join(f"{code} ({words})" for code, words in pools.FEATURIZER_STRATEGIES.items())
        return f"featurizer-sharing strategy is {gene.featurizer_strategy}, takes {known}"
    count = len(entry.feature_strategies)
    if gene.feature_strategy > count:
        return f"feature-sharing strategy is {gene.feature_strategy}, takes 1-{count} for {entry.name}"
    return None


def find_problem(genes: Iterable[Gene]) -> tuple[int, str] | None:
    """Index of the first gene that is not valid after those before it, and why; None if all are valid."""
    groups = Groups()
    for index, gene in enumerate(genes):
        problem = range_problem(gene) or groups.featurizer_conflict(gene) or groups.feature_conflict(gene)
        if problem:
            return index, problem
        groups.add(index, gene)
    return None


def _class_name(liv_class: int) -> str:
    return f"{liv_class} ({pools.get(liv_class).name})"
