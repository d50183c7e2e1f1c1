"""Sharing plans: what each LIV computes, whose weights and whose features it uses."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from star.genome import Gene, Genome, GenomeError
from star.pools import get
from star.sharing import LivPlan, resolve


def meaning(genome: Genome) -> tuple[object, ...]:
    """The model that a valid genome describes, read from the genes by brute force, without plans.

    Of every LIV: its class; of every feature group and constant, either the LIV it is taken from, or the
    first LIV that makes it with the same weights.
    """
    genes = genome.genes
    taken: list[dict[str, int]] = []
    for index, gene in enumerate(genes):
        group = [
            other
            for other in range(index)
            if genes[other].feature_strategy > 1 and genes[other].feature_group == gene.feature_group
        ]
        source = group[0] if gene.feature_strategy > 1 and group else None
        names = get(gene.liv_class).shared_groups(gene.feature_strategy)
        taken.append({} if source is None else dict.fromkeys(names, source))
    described = []
    for index, gene in enumerate(genes):
        features = []
        for name in get(gene.liv_class).groups + get(gene.liv_class).constants:
            if name in taken[index]:
                features.append((name, "features", taken[index][name]))
            else:
                users = [
                    other
                    for other in range(index + 1)
                    if other == index
                    or (
                        gene.featurizer_strategy == genes[other].featurizer_strategy == 2
                        and gene.featurizer_group == genes[other].featurizer_group
                        and name not in taken[other]
                    )
                ]
                features.append((name, "weights", users[0]))
        described.append((gene.liv_class, *features))
    return tuple(described)


def _valid(genes: list[Gene], seed: int) -> Genome:
    return Genome(genes).repair(np.random.default_rng(seed))


# Classes whose LIVs may compute nothing, or disjoint feature groups; two labels, all strategies.
crowded = st.builds(
    _valid,
    st.lists(
        st.builds(
            Gene,
            st.sampled_from([7, 7, 7, 8, 9]),
            st.integers(1, 2),
            st.sampled_from([1, 2, 2]),
            st.integers(1, 2),
            st.integers(1, 8),
        ),
        min_size=1,
        max_size=6,
    ),
    st.integers(0, 2**32 - 1),
)
any_class = st.builds(
    _valid,
    st.lists(
        st.builds(
            Gene,
            st.integers(1, 17),
            st.integers(1, 3),
            st.integers(1, 2),
            st.integers(1, 3),
            st.integers(1, 8),
        ),
        min_size=1,
        max_size=12,
    ),
    st.integers(0, 2**32 - 1),
)


class TestExamples:
    def test_nothing_shared(self):
        attention, memoryless = resolve(Genome.parse("11111-91111"))
        assert attention == LivPlan(
            index=0,
            entry=get(1),
            featurizer_owner=0,
            featurizer_groups=("query", "key", "value"),
            computed=("query", "key", "value"),
            source=None,
            shared=(),
        )
        assert memoryless.entry is get(9)
        assert memoryless.featurizer_owner == 1

    def test_the_papers_example(self):
        plans = resolve(Genome.parse("21211-31112-21221-32112"))
        assert [plan.featurizer_owner for plan in plans] == [0, 1, 0, 3]
        assert [plan.source for plan in plans] == [None, None, None, 1]
        assert plans[3].shared == ("key",)
        assert plans[3].computed == ("query", "value")

    def test_key_value_sharing_across_classes(self):
        plans = resolve(Genome.parse("11114-91111-21114-11114"))
        assert [plan.source for plan in plans] == [None, None, 0, 0]
        assert plans[2].shared == ("key", "value")
        assert plans[2].computed == ("query",) == plans[2].featurizer_groups
        assert plans[0].computed == ("query", "key", "value")

    def test_a_featurizer_makes_what_any_of_its_users_computes(self):
        # LIV 2 takes the keys of LIV 1, LIV 4 the values of LIV 3; LIVs 2 and 4 share a featurizer.
        plans = resolve(Genome.parse("11112-11212-11123-11223"))
        assert [plan.featurizer_owner for plan in plans] == [0, 1, 2, 1]
        assert plans[1].computed == ("query", "value")
        assert plans[3].computed == ("query", "key")
        assert plans[1].featurizer_groups == plans[3].featurizer_groups == ("query", "key", "value")

    def test_a_follower_that_computes_nothing_owns_nothing(self):
        # LIV 2 takes gate and up: the featurizer it names is first needed by LIV 3.
        plans = resolve(Genome.parse("91114-91214-91211-91211"))
        assert [plan.featurizer_owner for plan in plans] == [0, 1, 2, 2]
        assert plans[1].computed == plans[1].featurizer_groups == ()

    def test_users_that_need_different_groups_stay_apart(self):
        plans = resolve(Genome.parse("91112-91123-91212-91223"))
        assert [plan.featurizer_owner for plan in plans] == [0, 1, 2, 3]
        assert plans[2].featurizer_groups == ("up",)
        assert plans[3].featurizer_groups == ("gate",)

    def test_a_constant_is_shared_where_no_group_is(self):
        plans = resolve(Genome.parse("71118-71218-71218"))
        assert [plan.featurizer_owner for plan in plans] == [0, 1, 1]
        assert plans[1].featurizer_groups == plans[2].featurizer_groups == ()

    def test_not_valid(self):
        with pytest.raises(GenomeError, match="gene 2 '21211'"):
            resolve(Genome.parse("11211-21211"))


class TestPlans:
    @given(any_class)
    def test_every_plan_is_whole(self, genome):
        plans = resolve(genome)
        for plan in plans:
            entry, owner = plan.entry, plans[plan.featurizer_owner]
            assert tuple(name for name in entry.groups if name in plan.computed + plan.shared) == entry.groups
            assert not set(plan.computed) & set(plan.shared)
            assert set(plan.shared) <= set(entry.shareable)
            assert (plan.source is None) == (not plan.shared)
            assert owner.entry is entry
            assert owner.featurizer_owner == owner.index <= plan.index
            assert owner.featurizer_groups == plan.featurizer_groups
            users = [other for other in plans if other.featurizer_owner == owner.index]
            made = {name for user in users for name in user.computed}
            assert plan.featurizer_groups == tuple(name for name in entry.groups if name in made)
            if plan.source is not None:
                source = plans[plan.source]
                assert source.index < plan.index
                assert set(plan.shared) <= set(source.computed)
                shapes = {group.name: group.shape for group in source.entry.featurizer}
                assert all(
                    shapes[group.name] == group.shape
                    for group in entry.featurizer
                    if group.name in plan.shared
                )


class TestCanonicalMeansSameModel:
    """Equal plans, equal canonical form and equal meaning are one and the same."""

    @given(any_class)
    def test_canonical_keeps_the_meaning(self, genome):
        assert meaning(genome.canonical()) == meaning(genome)

    @given(crowded, crowded)
    @settings(max_examples=300)
    def test_pairs(self, one, two):
        same = meaning(one) == meaning(two)
        assert (resolve(one) == resolve(two)) == same
        assert (one.canonical() == two.canonical()) == same

    @given(any_class, st.data())
    @settings(max_examples=300)
    def test_one_gene_changed(self, genome, data):
        index = data.draw(st.integers(0, genome.depth - 1))
        position = data.draw(st.integers(0, 4))
        values = list(genome[index])
        values[position] = data.draw(st.integers(1, (17, 3, 2, 3, 8)[position]))
        changed = Genome([*genome.genes[:index], values, *genome.genes[index + 1 :]])
        if changed.is_valid():
            same = meaning(genome) == meaning(changed)
            assert (resolve(genome) == resolve(changed)) == same
            assert (genome.canonical() == changed.canonical()) == same

    def test_all_pairs_of_gated_convolutions_and_memoryless_units(self):
        genes = [
            Gene(*values)
            for liv_class, strategies in ((7, 8), (9, 4))
            for values in itertools.product([liv_class], [1, 2], [1, 2], [1, 2], range(1, strategies + 1))
        ]
        by_meaning: dict[object, set[str]] = {}
        for pair in itertools.product(genes, repeat=2):
            genome = Genome(pair)
            if genome.is_valid():
                by_meaning.setdefault(meaning(genome), set()).add(genome.key)
        keys = [key for found in by_meaning.values() for key in found]
        assert all(len(found) == 1 for found in by_meaning.values())
        assert len(keys) == len(set(keys))
        # 2 pairs of equal classes and 2 of different ones that share nothing, and for equal classes: shared
        # weights, and every feature strategy, alone and with shared weights where there are any (7 and 7 of
        # the convolution with its kernel, 3 and 2 of the unit).
        assert len(keys) == 4 + (1 + 7 + 7) + (1 + 3 + 2)
