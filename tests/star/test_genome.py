"""Backbone genomes: text, validity, repair, canonical form, distance, chance."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from star.genome import MAX_DEPTH, Gene, Genome, GenomeError
from star.pools import Pool
from star.sharing import resolve

# Few labels and few classes, so that groups meet and clash; class 18 and strategy 3 do not exist.
genes = st.builds(
    Gene,
    st.sampled_from([1, 1, 2, 3, 5, 7, 7, 8, 9, 9, 10, 16, 18]),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 9),
)
genomes = st.lists(genes, min_size=1, max_size=10).map(Genome)
seeds = st.integers(0, 2**32 - 1)
valid_genomes = st.builds(lambda genome, seed: genome.repair(np.random.default_rng(seed)), genomes, seeds)
# Genomes of 24 LIVs as a search draws them.
random_genomes = st.builds(lambda seed: Genome.random(24, np.random.default_rng(seed)), seeds)


class TestText:
    def test_the_papers_example(self):
        genome = Genome.parse("21211-31112-21221-32112")
        assert genome.depth == 4
        assert genome[0] == Gene(2, 1, 2, 1, 1)
        assert genome[3] == (3, 2, 1, 1, 2)

    def test_values_from_ten_on_have_dots(self):
        genome = Genome.parse("12.1.2.1.1-9.1.1.1.1-91111")
        assert [gene.liv_class for gene in genome] == [12, 9, 9]
        assert str(genome) == "12.1.2.1.1-91111-91111"

    @given(genomes)
    def test_print_and_parse(self, genome):
        assert Genome.parse(str(genome)) == genome
        assert eval(repr(genome), {"Genome": Genome}) == genome

    def test_space_around_the_text_is_dropped(self):
        assert Genome.parse(" 91111\n") == Genome([(9, 1, 1, 1, 1)])

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "genome is empty"),
            (" \n", "genome is empty"),
            ("abc", "gene 1 'abc': takes five digits"),
            ("21211-20111", "gene 2 '20111': values start at 1, got 0"),
            ("1.0.1.1.1", "gene 1 '1.0.1.1.1': values start at 1, got 0"),
            ("1.01.1.1.1", "gene 1 '1.01.1.1.1': takes five digits"),
            ("²1111", "gene 1 '²1111': takes five digits"),
            ("١١١١١", "gene 1 '١١١١١': takes five digits"),
            ("１１１１１", "gene 1 '１１１１１': takes five digits"),
            ("2121131112", "gene 1 '2121131112': has 10 digits, takes 5"),
            ("91111-91111-2x1", "gene 3 '2x1': takes five digits"),
            ("91111-", "gene 2 '': has 0 digits, takes 5"),
            ("-91111", "gene 1 '': has 0 digits, takes 5"),
            ("21211 31112", "gene 1 '21211 31112': takes five digits"),
            ("21211–31112", "gene 1 '21211–31112': takes five digits"),
            ("1.2.3", "gene 1 '1.2.3': has 3 integers, takes 5"),
            ("1.1.1.1.1.1", "gene 1 '1.1.1.1.1.1': has 6 integers, takes 5"),
            ("1.10000.1.1.1", "gene 1 '1.10000.1.1.1': values are at most 9999"),
            ("+1.1.1.1.1", "gene 1 '+1.1.1.1.1': takes five digits"),
            ("1..1.1.1", "gene 1 '1..1.1.1': takes five digits"),
        ],
    )
    def test_what_is_no_genome(self, text, message):
        with pytest.raises(GenomeError) as error:
            Genome.parse(text)
        assert str(error.value).startswith(message)
        assert "\n" not in str(error.value)

    @given(st.text(alphabet="0123456789.-x²١ ", max_size=30) | st.text(max_size=30))
    def test_any_text_is_a_genome_or_one_line(self, text):
        try:
            genome = Genome.parse(text)
        except GenomeError as error:
            message = str(error)
        else:
            message = ""
            assert Genome.parse(str(genome)) == genome
        assert len(message) < 200

    @pytest.mark.parametrize("text", ["1" * 1_000_000, "1." * 500_000, "x" * 1_000_000])
    def test_long_nonsense_has_a_short_message(self, text):
        with pytest.raises(GenomeError) as error:
            Genome.parse(text)
        assert len(str(error.value)) < 200

    def test_ten_thousand_genes(self):
        genome = Genome.parse("-".join(["21211"] * MAX_DEPTH))
        assert genome.depth == MAX_DEPTH
        assert genome.canonical() == genome
        with pytest.raises(GenomeError, match="genome has 10001 genes, takes at most 10000"):
            Genome.parse("-".join(["21211"] * (MAX_DEPTH + 1)))
        with pytest.raises(GenomeError, match="more than 10000 genes"):
            Genome([Gene(2)] * (MAX_DEPTH + 1))

    def test_text_that_is_no_str(self):
        with pytest.raises(TypeError, match=r"Genome\.parse: text is int, takes str"):
            Genome.parse(21211)  # type: ignore[arg-type]


class TestValue:
    def test_genes_from_arrays(self):
        array = np.array([[2, 1, 2, 1, 1], [3, 1, 1, 1, 2]])
        genome = Genome(array)
        assert str(genome) == "21211-31112"
        assert all(type(value) is int for gene in genome for value in gene)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ([], "genome has no gene"),
            ([(1, 1, 1, 1)], "gene 1 '1.1.1.1': has 4 values, takes 5"),
            ([(1, 1, 1, 1, 1), (1, 0, 1, 1, 1)], "gene 2 '1.0.1.1.1': values go from 1 to 9999"),
            ([(1, 1, 1, 1, -1)], "gene 1 '1.1.1.1.-1': values go from 1 to 9999"),
        ],
    )
    def test_what_is_no_gene(self, values, message):
        with pytest.raises(GenomeError, match=message):
            Genome(values)

    def test_no_fractions(self):
        with pytest.raises(TypeError):
            Genome([(1.5, 1, 1, 1, 1)])  # type: ignore[list-item]

    def test_immutable_hashable_picklable(self):
        genome = Genome.parse("21211-31112")
        with pytest.raises(AttributeError):
            genome.genes = ()  # type: ignore[misc]
        assert genome.key == "21111-31111"
        assert pickle.loads(pickle.dumps(genome)) == genome
        assert len({genome, Genome.parse("21211-31112")}) == 1


class TestValidity:
    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("91111-18.1.1.1.1", "gene 2 '18.1.1.1.1': LIV class is 18, takes 1-17"),
            (
                "91111-91111-99911",
                "gene 3 '99911': featurizer-sharing strategy is 9, takes 1 (none) or 2 (all weights)",
            ),
            ("11115", "gene 1 '11115': feature-sharing strategy is 5, takes 1-4 for SA-1"),
            (
                "11211-91111-21211",
                "gene 3 '21211': featurizer group 1 holds class 1 (SA-1) (gene 1), takes no 2 (SA-2)",
            ),
            ("11112-11113", "gene 2 '11113': feature group 1 has strategy 2 (gene 1), not 3"),
            (
                "11112-31112",
                "gene 2 '31112': feature group 1 (gene 1) has no key of the shape that 3 (SA-3) takes",
            ),
        ],
    )
    def test_problems_name_the_gene(self, text, problem):
        genome = Genome.parse(text)
        assert genome.problem() == problem
        assert not genome.is_valid()
        for call in (genome.require_valid, genome.canonical, lambda: genome.key, lambda: resolve(genome)):
            with pytest.raises(GenomeError) as error:
                call()
            assert str(error.value) == problem

    @pytest.mark.parametrize(
        "text",
        [
            "21211-31112-21221-32112",
            "11114-21114",  # SA-1 and SA-2 exchange keys and values
            "11113-10.1.1.1.3",  # SA-1 and its differential variant exchange values
            "71118-81118",  # both gated convolutions exchange everything
            "11211-22211",  # other labels: no clash
            "11211-21111",  # the label counts only under strategy 2
        ],
    )
    def test_valid(self, text):
        genome = Genome.parse(text)
        assert genome.problem() is None
        assert genome.require_valid() is genome

    @pytest.mark.parametrize(
        "text", ["11112-10.1.1.1.2", "51112-61112", "51112-14.1.1.1.2", "71112-16.1.1.1.2"]
    )
    def test_groups_of_other_shapes_are_not_exchanged(self, text):
        assert not Genome.parse(text).is_valid()


class TestRepair:
    @given(genomes, seeds)
    def test_gives_a_valid_genome_and_repeats(self, genome, seed):
        repaired = genome.repair(np.random.default_rng(seed))
        assert repaired.is_valid()
        assert repaired.depth == genome.depth
        assert genome.repair(np.random.default_rng(seed)) == repaired

    @given(valid_genomes, seeds)
    def test_leaves_valid_genomes_and_chance_alone(self, genome, seed):
        rng = np.random.default_rng(seed)
        before = rng.bit_generator.state
        assert genome.repair(rng) == genome
        assert rng.bit_generator.state == before

    @given(genomes, seeds)
    def test_changes_only_what_is_at_fault(self, genome, seed):
        repaired = genome.repair(np.random.default_rng(seed))
        known = [gene.liv_class != 18 for gene in genome]
        for old, new, exists in zip(genome, repaired, known, strict=True):
            if exists:
                assert new.liv_class == old.liv_class
                # LIVs that shared nothing share nothing.
                assert old.featurizer_strategy > 1 or new[1:3] == old[1:3]
                assert old.feature_strategy > 1 or new[3:] == old[3:]
        first = next((i for i in range(genome.depth) if not Genome(genome.genes[: i + 1]).is_valid()), None)
        assert repaired.genes[:first] == genome.genes[:first]

    def test_all_ways_out_are_drawn(self):
        genome = Genome.parse("11211-12211-21211-22211")
        drawn = {str(genome.repair(np.random.default_rng(seed))) for seed in range(60)}
        # LIV 3 goes without sharing or opens group 3; LIV 4 joins group 3 or opens one.
        assert "11211-12211-21111-22111" in drawn
        assert "11211-12211-23211-23211" in drawn
        assert "11211-12211-23211-24211" in drawn

    def test_draws_from_the_pool(self):
        pool = Pool(classes=(9,), featurizer_sharing=False, feature_sharing=False)
        genome = Genome.parse("99.1.2.1.9-98.1.3.1.9-11211-11114-31114")
        repaired = genome.repair(np.random.default_rng(0), pool)
        assert [gene.liv_class for gene in repaired] == [9, 9, 1, 1, 3]
        assert repaired[1] == (9, 1, 1, 1, 1)

    def test_no_label_left(self):
        genome = Genome.parse("11211-21211")
        drawn = {str(genome.repair(np.random.default_rng(seed), Pool(max_groups=1))) for seed in range(20)}
        assert drawn == {"11211-21111"}


class TestCanonical:
    @pytest.mark.parametrize(
        ("text", "canonical"),
        [
            ("25211-91111-25211-91111", "21211-91111-21211-91111"),  # labels renamed
            ("11221-22211-11221-22211", "11211-22211-11211-22211"),
            ("97111-91191", "91111-91111"),  # labels without strategy
            ("11211-22213-11111", "11111-21111-11111"),  # groups of one
            ("91214-91214", "91114-91114"),  # the second takes gate and up, and uses no featurizer
            ("91214-91214-91211", "91214-91114-91211"),  # the first and the third still do
            ("91114-91214-91211", "91114-91114-91111"),  # the second uses none: the third is alone
            ("71118-71218-71211", "71118-71218-71211"),  # the second takes all, and shares the kernel
            ("11214-11214", "11214-11214"),  # the second takes key and value, and shares its query's weights
        ],
    )
    def test_examples(self, text, canonical):
        assert Genome.parse(text).key == canonical

    def test_a_group_without_common_weights_falls_apart(self):
        # LIV 3 takes the gate and computes the other factor, LIV 4 the reverse: the same label, and no weight
        # in common.
        assert Genome.parse("91112-91123-91212-91223").key == "91112-91123-91112-91123"
        # LIV 5 computes both, and joins the two.
        assert Genome.parse("91112-91123-91212-91223-91211").key == "91112-91123-91212-91223-91211"
        # Gated convolutions have their kernel in common all the same.
        assert Genome.parse("71115-71124-71215-71224").key == "71115-71124-71215-71224"

    @given(valid_genomes)
    def test_idempotent_valid_and_the_same_model(self, genome):
        canonical = genome.canonical()
        assert canonical.is_valid()
        assert canonical.canonical() == canonical
        assert resolve(canonical) == resolve(genome)
        assert genome.key == str(canonical)

    @given(random_genomes, seeds)
    def test_renamed_labels_and_idle_genes_do_not_matter(self, genome, seed):
        rng = np.random.default_rng(seed)
        names = {kind: rng.permutation(99) + 1 for kind in ("featurizer", "feature")}

        def rename(gene: Gene) -> Gene:
            idle = int(rng.integers(1, 99))
            featurizer, feature = gene.featurizer_group, gene.feature_group
            return gene._replace(
                featurizer_group=names["featurizer"][featurizer] if gene.featurizer_strategy > 1 else idle,
                feature_group=names["feature"][feature] if gene.feature_strategy > 1 else idle,
            )

        renamed = Genome(rename(gene) for gene in genome)
        assert renamed.key == genome.key
        assert renamed.distance(genome) == 0


class TestDistance:
    @given(valid_genomes, valid_genomes, valid_genomes)
    @settings(max_examples=200)
    def test_metric_on_canonical_forms(self, a, b, c):
        assert a.distance(b) == b.distance(a) >= 0
        assert (a.distance(b) == 0) == (a.canonical() == b.canonical())
        assert a.distance(c) <= a.distance(b) + b.distance(c)
        assert a.distance(a) == 0

    @pytest.mark.parametrize(
        ("left", "right", "distance"),
        [
            ("91111-91111", "91111-91111", 0),
            ("91111-91111", "91111-71111", 1),
            ("91111-91111", "91211-91211", 1),
            ("91111-91111", "91112-91112", 1),
            ("91113-91113", "91112-91112", 1),
            ("91111-91111", "91111", 3),
            ("11211-91111-11211", "11111-91111-21111", 2),
        ],
    )
    def test_examples(self, left, right, distance):
        assert Genome.parse(left).distance(Genome.parse(right)) == distance


class TestRandom:
    @given(st.integers(1, 40), seeds, st.integers(1, 99))
    def test_valid_and_inside_the_pool(self, depth, seed, max_groups):
        pool = Pool(max_groups=max_groups)
        genome = Genome.random(depth, np.random.default_rng(seed), pool)
        assert genome.depth == depth
        assert genome.is_valid()
        for gene in genome:
            assert all(gene[position] in pool.options(position, gene) for position in range(5))

    def test_repeats_from_the_seed(self):
        assert Genome.random(24, np.random.default_rng(7)) == Genome.random(24, np.random.default_rng(7))
        assert Genome.random(24, np.random.default_rng(7)) != Genome.random(24, np.random.default_rng(8))

    def test_a_pool_without_sharing(self):
        pool = Pool(classes=(1, 9), featurizer_sharing=False, feature_sharing=False)
        genome = Genome.random(40, np.random.default_rng(0), pool)
        assert {gene.liv_class for gene in genome} == {1, 9}
        assert all(gene[1:] == (1, 1, 1, 1) for gene in genome)

    def test_the_documented_amount_of_sharing(self):
        rng = np.random.default_rng(0)
        plans = [resolve(Genome.random(24, rng)) for _ in range(200)]
        weights = np.mean([sum(plan.featurizer_owner != plan.index for plan in one) for one in plans])
        features = np.mean([sum(plan.source is not None for plan in one) for one in plans])
        assert 2.3 < weights < 3.3
        assert 3.4 < features < 4.6
        assert {plan.entry.id for one in plans for plan in one} == set(range(1, 18))

    @pytest.mark.parametrize("depth", [0, -1, MAX_DEPTH + 1])
    def test_depth_out_of_range(self, depth):
        with pytest.raises(ValueError, match=r"Genome\.random: depth is"):
            Genome.random(depth, np.random.default_rng(0))
