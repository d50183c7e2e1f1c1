"""Option pools: the 17 classes of the paper, their genomes, registration, what mutations may draw."""

from __future__ import annotations

import dataclasses
import pickle
import subprocess
import sys
from fractions import Fraction

import pytest

from star import pools
from star.genome import Gene, Genome
from star.pools import FeatureGroup, OperatorGenome, Pool

# The paper's table: number, name, operator genome.
PAPER = [
    (1, "SA-1", "12123"),
    (2, "SA-2", "22123"),
    (3, "SA-3", "32123"),
    (4, "SA-4", "42123"),
    (5, "Rec-1", "54111"),
    (6, "Rec-2", "64111"),
    (7, "GConv-1", "73111"),
    (8, "GConv-2", "83111"),
    (9, "GMemless", "91142"),
    (10, "SA-1-Diff", "12123"),
    (11, "SA-2-Diff", "22123"),
    (12, "SA-3-Diff", "32123"),
    (13, "SA-4-Diff", "42123"),
    (14, "Rec-1-Diff", "54111"),
    (15, "Rec-2-Diff", "64111"),
    (16, "GConv-1-Diff", "73111"),
    (17, "GConv-2-Diff", "83111"),
]


@pytest.fixture
def registry(monkeypatch):
    """The registry, put back as it was after the test."""
    monkeypatch.setattr(pools, "_registry", dict(pools._registry))
    monkeypatch.setattr(pools, "_plugins_loaded", True)
    return pools._registry


def new_class(**changes) -> pools.LivClass:
    """A class that is not in the pools."""
    return dataclasses.replace(pools.get(9), **{"id": 20, "name": "New", **changes})


class TestClasses:
    def test_the_papers_table(self):
        assert [(entry.id, entry.name, str(entry.operator)) for entry in pools.all_classes()] == PAPER

    @pytest.mark.parametrize("entry", pools.all_classes(), ids=lambda entry: entry.name)
    def test_entries_are_whole(self, entry):
        assert entry.family in {"attention", "recurrence", "convolution", "memoryless"}
        assert entry.differential == entry.name.endswith("-Diff") == ("differential" in entry.summary)
        assert entry.layer.startswith(f"star_kernels.layers.{entry.family}:")
        assert set(entry.shareable) <= set(entry.groups)
        # Only the operator's features have halves; the values of a differential class are common.
        halves = {group.name: group.halves for group in entry.featurizer}
        expected = 2 if entry.differential else 1
        assert all(count == (1 if name == "value" else expected) for name, count in halves.items())

    @pytest.mark.parametrize("entry", pools.all_classes()[9:], ids=lambda entry: entry.name)
    def test_differential_classes_follow_their_plain_ones(self, entry):
        plain = pools.get(entry.id - 9)
        assert (entry.name, entry.operator, entry.shareable, entry.groups, entry.layer_arguments) == (
            plain.name + "-Diff",
            plain.operator,
            plain.shareable,
            plain.groups,
            plain.layer_arguments | ({"bare": True} if plain.family == "attention" else {}),
        )

    @pytest.mark.parametrize("entry", pools.all_classes(), ids=lambda entry: entry.name)
    def test_layers_make_the_groups_of_their_entry(self, entry):
        layer = entry.load_layer()
        assert set(layer.groups) == set(entry.groups)
        assert callable(entry.load_cost())

    def test_widths(self):
        def widths(number):
            return {group.name: (group.expansion, group.repeat) for group in pools.get(number).featurizer}

        quarter = Fraction(1, 4)
        assert widths(1) == {"query": (1, 1), "key": (1, 1), "value": (1, 1)}
        assert widths(3) == {"query": (1, 1), "key": (quarter, 4), "value": (quarter, 4)}
        assert widths(4) == {"query": (1, 1), "key": (quarter * 2, 2), "value": (quarter * 2, 2)}
        assert widths(12)["key"] == (quarter / 2, 4)
        assert widths(5)["B"] == widths(5)["C"] == (16, 1)
        assert widths(6)["B"] == widths(6)["C"] == (2, 1)
        assert widths(9) == {"gate": (Fraction(8, 3), 1), "up": (Fraction(8, 3), 1)}

    def test_feature_strategies(self):
        assert pools.get(1).feature_strategies == ((), ("key",), ("value",), ("key", "value"))
        assert pools.get(5).feature_strategies == ((), ("B",), ("C",), ("B", "C"))
        assert pools.get(7).feature_strategies == (
            (),
            ("B",),
            ("C",),
            ("value",),
            ("B", "C"),
            ("B", "value"),
            ("C", "value"),
            ("B", "C", "value"),
        )
        assert pools.get(9).feature_strategies == ((), ("gate",), ("up",), ("gate", "up"))
        with pytest.raises(ValueError, match="feature-sharing strategy is 5, takes 1-4 for SA-1"):
            pools.get(1).shared_groups(5)

    def test_which_classes_exchange_features(self):
        def partners(number, strategy):
            exchange = pools.get(number).exchange(strategy)
            return [
                entry.id
                for entry in pools.all_classes()
                if strategy <= len(entry.feature_strategies) and entry.exchange(strategy) == exchange
            ]

        assert partners(1, 4) == [1, 2]
        assert partners(1, 3) == [1, 2, 10, 11]
        assert partners(3, 2) == [3]
        assert partners(3, 3) == [3, 12]
        assert partners(10, 2) == [10, 11]
        assert partners(5, 2) == [5]
        assert partners(14, 4) == [14]
        assert partners(7, 8) == [7, 8]
        assert partners(7, 4) == [7, 8, 16, 17]
        assert partners(16, 5) == [16, 17]
        assert partners(9, 4) == [9]

    def test_picklable_and_hashable(self):
        for entry in pools.all_classes():
            assert pickle.loads(pickle.dumps(entry)) == entry
            assert hash(entry) == hash(pools.get(entry.id))


class TestGenomesOfOperatorsAndFeaturizers:
    def test_operator_genome(self):
        genome = OperatorGenome(7, 3, 1, 1, 1)
        assert str(genome) == "73111"
        assert genome.describe() == "scaled Toeplitz, diagonal channels"
        assert str(OperatorGenome(12, 2, 2, 2, 3)) == "12.2.2.2.3"
        assert OperatorGenome(12, 2, 2, 2, 3).describe() == "low rank, banded, softmax, grouped channels"
        with pytest.raises(ValueError, match="operator: token_mixing is 5, takes one of 1 diagonal, 2 low"):
            OperatorGenome(7, 5, 1, 1, 1)

    def test_featurizer_genome(self):
        assert [str(group) for group in pools.get(3).featurizer] == ["1112 1 1", "1112 1/4 4", "1112 1/4 4"]
        with pytest.raises(ValueError, match="key: channel_mixing is 0, takes one of 1 diagonal, 2 dense"):
            FeatureGroup("key", 1, 1, 1, 0, Fraction(1))


class TestRegister:
    def test_a_new_class_joins_genomes_and_pools(self, registry):
        entry = pools.register(new_class())
        assert pools.get(20) is entry
        assert pools.known_classes() == "1-17, 20"
        assert 20 in Pool().classes
        assert Genome.parse("20.1.1.1.2-91112").is_valid()

    def test_twice_the_same(self, registry):
        assert pools.register(pools.get(3)) is pools.get(3)
        assert len(registry) == 17

    @pytest.mark.parametrize("changes", [{"id": 3}, {"name": "SA-3"}])
    def test_clashes(self, registry, changes):
        with pytest.raises(ValueError, match=r"clashes with class 3 \(SA-3\)"):
            pools.register(new_class(**changes))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"id": 0}, "id is 0, takes an integer from 1 to 99"),
            ({"id": True}, "id is True"),
            ({"name": ""}, "name and family must not be empty"),
            ({"shareable": ("key",)}, r"shareable is \('key',\), takes different names out of gate, up"),
            ({"shareable": ("up", "up")}, "takes different names"),
            ({"featurizer": ()}, "featurizer takes one or more groups"),
        ],
    )
    def test_what_is_no_class(self, changes, message):
        with pytest.raises(ValueError, match=message):
            new_class(**changes)

    def test_entry_points(self, registry, monkeypatch):
        class Point:
            name = "mine"

            def __init__(self, value):
                self.value = value

            def load(self):
                return self.value

        one, two, three = new_class(), new_class(id=21, name="Two"), new_class(id=22, name="Three")
        monkeypatch.setattr(pools, "_plugins_loaded", False)
        monkeypatch.setattr(
            "importlib.metadata.entry_points", lambda group: [Point(one), Point([two, three])]
        )
        assert [entry.id for entry in pools.all_classes()][-3:] == [20, 21, 22]
        monkeypatch.setattr(pools, "_plugins_loaded", False)
        monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [Point(["text"])])
        with pytest.raises(TypeError, match=r"entry point 'mine' of 'star.liv' gives str, takes LivClass"):
            pools.all_classes()

    def test_unknown(self):
        with pytest.raises(KeyError, match="no LIV class 18, known are 1-17"):
            pools.get(18)
        assert pools.find(18) is None

    def test_load_object(self):
        assert pools.load_object("fractions:Fraction") is Fraction
        with pytest.raises(ValueError, match="reference is 'fractions', takes"):
            pools.load_object("fractions")
        with pytest.raises(ImportError, match="module 'fractions' has no 'Nothing'"):
            pools.load_object("fractions:Nothing")


class TestPool:
    def test_options(self):
        pool, gene = Pool(), Gene(7)
        assert pool.options(0, gene) == tuple(range(1, 18))
        assert pool.options(1, gene) == pool.options("feature_group", gene) == tuple(range(1, 13))
        assert pool.options("featurizer_strategy", gene) == (1, 2)
        assert pool.options(4, gene) == tuple(range(1, 9))
        assert pool.options(4, Gene(1)) == (1, 2, 3, 4)
        assert pool.options(4, Gene(99)) == (1,)
        with pytest.raises(ValueError, match="position is 'width', takes 0-4 or one of"):
            pool.options("width", gene)

    @pytest.mark.parametrize("position", [5, -1])
    def test_position_out_of_range(self, position):
        with pytest.raises(ValueError, match=f"position is {position}, takes 0-4"):
            Pool().options(position, Gene(1))

    def test_without_sharing(self):
        pool = Pool(classes=(9, 1, 9), featurizer_sharing=False, feature_sharing=False)
        assert pool.classes == (1, 9)
        assert [pool.options(position, Gene(1)) for position in range(5)] == [(1, 9), (1,), (1,), (1,), (1,)]

    def test_json(self):
        pool = Pool(classes=(1, 9), max_groups=3, feature_sharing=False)
        assert Pool.from_json(pool.to_json()) == pool

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"classes": ()}, "classes is empty, takes one or more of 1-17"),
            ({"classes": (1, 18)}, "classes has no class 18, takes one or more of 1-17"),
            ({"max_groups": 0}, "max_groups is 0, takes 1-99"),
            ({"max_groups": 100}, "max_groups is 100, takes 1-99"),
        ],
    )
    def test_what_is_no_pool(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            Pool(**arguments)


def test_no_torch_and_no_numpy_for_genomes():
    code = (
        "import sys, star, star.baselines, star.config, star.genome, star.pools, star.sharing;"
        "star.Genome; star.ModelConfig; star.pools; star.baselines;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'matplotlib', 'rich')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
