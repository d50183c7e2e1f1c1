"""The option pools: every LIV class with its operator genome, its featurizer genome and its layer.

Three levels describe an architecture (STAR, arXiv 2411.17800, section 3):

- the **backbone genome** (`star.genome`) names an LIV class for every layer, and what layers share;
- the **operator genome** of a class says how its featurizer, token mixing, structured sparsity, nonlinearity
  and channel mixing are made: five integers, "12123" for softmax attention;
- the **featurizer genome** says the same of every feature group (queries, keys, B, C, ...), with its width.

The numbers of the operator genomes are the paper's. The featurizer genomes are written down from what the
layers compute; the paper names their fields and prints few of their values.

A new class is one layer, one `LivClass` given to `register` (or named by an entry point of the group
"star.liv"), and its test. Nothing else in the package asks for a class by its number.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from star.genome import Gene

ENTRY_POINT_GROUP = "star.liv"

TOKEN_MIXINGS = {1: "diagonal", 2: "low rank", 3: "scaled Toeplitz", 4: "sequentially semi-separable"}
SPARSITIES = {1: "none", 2: "banded"}
NONLINEARITIES = {1: "none", 2: "softmax", 3: "ReLU", 4: "SiLU"}
CHANNEL_MIXINGS = {1: "diagonal", 2: "dense", 3: "grouped"}
FEATURIZER_STRATEGIES = {1: "none", 2: "all weights"}


@dataclass(frozen=True)
class FeatureGroup:
    """Featurizer genome of one feature group: how the group is made from the LIV's input.

    Args:
        name: "query", "key", "value", "delta", "B", "C", "gate" or "up" in the built-in classes.
        token_mixing: number of `TOKEN_MIXINGS`.
        sparsity: number of `SPARSITIES`.
        nonlinearity: number of `NONLINEARITIES`.
        channel_mixing: number of `CHANNEL_MIXINGS`.
        expansion: width of the features over width of the input. For B and C of a recurrence it is the state
            expansion: numbers a channel's state holds, the same features serving all channels.
        repeat: how often the operator repeats every channel (grouped-query attention: heads a key serves).
        halves: featurizers that make the group: 2 where a differential class has one for either half.
    """

    name: str
    token_mixing: int
    sparsity: int
    nonlinearity: int
    channel_mixing: int
    expansion: Fraction
    repeat: int = 1
    halves: int = 1

    def __post_init__(self) -> None:
        _require_code(self.name, "token_mixing", self.token_mixing, TOKEN_MIXINGS)
        _require_code(self.name, "sparsity", self.sparsity, SPARSITIES)
        _require_code(self.name, "nonlinearity", self.nonlinearity, NONLINEARITIES)
        _require_code(self.name, "channel_mixing", self.channel_mixing, CHANNEL_MIXINGS)

    def __str__(self) -> str:
        """The six values: `1112 1/4 4` is token mixing 1, ..., expansion 1/4, repeated 4 times."""
        codes = f"{self.token_mixing}{self.sparsity}{self.nonlinearity}{self.channel_mixing}"
        return f"{codes} {self.expansion} {self.repeat}"

    @property
    def shape(self) -> tuple[str, Fraction, int, int]:
        """What must agree for two classes to use each other's features: name, expansion, repeat, halves."""
        return (self.name, self.expansion, self.repeat, self.halves)


@dataclass(frozen=True)
class OperatorGenome:
    """Five integers that describe an operator; printed as in the paper, "12123".

    Args:
        featurizer: featurizer class, 1-9 in the built-in classes.
        token_mixing: number of `TOKEN_MIXINGS`.
        sparsity: number of `SPARSITIES`.
        nonlinearity: number of `NONLINEARITIES`.
        channel_mixing: number of `CHANNEL_MIXINGS`.
    """

    featurizer: int
    token_mixing: int
    sparsity: int
    nonlinearity: int
    channel_mixing: int

    def __post_init__(self) -> None:
        _require_code("operator", "token_mixing", self.token_mixing, TOKEN_MIXINGS)
        _require_code("operator", "sparsity", self.sparsity, SPARSITIES)
        _require_code("operator", "nonlinearity", self.nonlinearity, NONLINEARITIES)
        _require_code("operator", "channel_mixing", self.channel_mixing, CHANNEL_MIXINGS)

    def __str__(self) -> str:
        values = (
            self.featurizer,
            self.token_mixing,
            self.sparsity,
            self.nonlinearity,
            self.channel_mixing,
        )
        return ("" if max(values) < 10 else ".").join(str(value) for value in values)

    def describe(self) -> str:
        """The four codes in words, "low rank, softmax, grouped channels"."""
        words = [TOKEN_MIXINGS[self.token_mixing]]
        if self.sparsity > 1:
            words.append(SPARSITIES[self.sparsity])
        if self.nonlinearity > 1:
            words.append(NONLINEARITIES[self.nonlinearity])
        words.append(f"{CHANNEL_MIXINGS[self.channel_mixing]} channels")
        return ", ".join(words)


@dataclass(frozen=True)
class LivClass:
    """One LIV class: an option of the backbone genome's first position.

    Args:
        id: number in the backbone genome, 1-99.
        name: short name, "SA-1".
        family: "attention", "recurrence", "convolution", "memoryless", or a family of one's own.
        operator: the operator genome.
        featurizer: the featurizer genome, one entry a feature group, in the order the layer makes them.
        shareable: names of the groups that another LIV may reuse (feature-group sharing).
        differential: whether it is the difference of two operators with a featurizer each.
        layer: "module:class" of the layer, imported when a model is built.
        layer_arguments: what the layer's constructor takes beside the sizes of the `ModelConfig`.
        cost: "module:function" of the analytic costs.
        summary: one line for people.
        constants: features that the featurizer makes from its weights alone, whatever the input (the kernel
            of a convolution). LIVs that share a featurizer share them; they are no part of feature sharing.

    Raises:
        ValueError: a number out of range, a group named twice, a shareable group that is none.
    """

    id: int
    name: str
    family: str
    operator: OperatorGenome
    featurizer: tuple[FeatureGroup, ...]
    shareable: tuple[str, ...]
    differential: bool
    layer: str
    layer_arguments: Mapping[str, Any] = field(hash=False)
    cost: str
    summary: str
    constants: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.id, bool) or not isinstance(self.id, int) or not 1 <= self.id <= 99:
            raise ValueError(f"LivClass: id is {self.id!r}, takes an integer from 1 to 99")
        if not self.name or not self.family:
            raise ValueError(f"LivClass {self.id}: name and family must not be empty")
        names = self.groups + self.constants
        if not self.featurizer or len(set(names)) != len(names):
            raise ValueError(f"LivClass {self.name}: featurizer takes one or more groups of different names")
        foreign = [name for name in self.shareable if name not in self.groups]
        if foreign or len(set(self.shareable)) != len(self.shareable):
            raise ValueError(
                f"LivClass {self.name}: shareable is {self.shareable!r}, takes different names "
                f"out of {', '.join(self.groups)}"
            )

    @cached_property
    def groups(self) -> tuple[str, ...]:
        """Names of all feature groups, in the featurizer's order."""
        return tuple(group.name for group in self.featurizer)

    @cached_property
    def feature_strategies(self) -> tuple[tuple[str, ...], ...]:
        """Groups shared by each feature-sharing strategy; entry 0 is strategy 1, which shares nothing.

        After it come all non-empty subsets of `shareable`, small ones first, those of one size in the order
        of their members: for (B, C, value) strategies 2-8 are B; C; value; B, C; B, value; C, value; all.
        """
        return tuple(
            subset
            for size in range(len(self.shareable) + 1)
            for subset in itertools.combinations(self.shareable, size)
        )

    def shared_groups(self, strategy: int) -> tuple[str, ...]:
        """Names of the groups that feature-sharing strategy `strategy` (from 1) shares."""
        strategies = self.feature_strategies
        if not 1 <= strategy <= len(strategies):
            raise ValueError(
                f"feature-sharing strategy is {strategy}, takes 1-{len(strategies)} for {self.name}"
            )
        return strategies[strategy - 1]

    def exchange(self, strategy: int) -> tuple[object, ...]:
        """What two LIVs must have in common to share features under `strategy`.

        The family (one tensor layout each), the strategy, and names and shapes of the groups it shares: so
        SA-1 and SA-2 exchange keys and values, SA-1 and SA-1-Diff only values, SA-1 and SA-3 nothing.
        """
        shapes = {group.name: group.shape for group in self.featurizer}
        return (self.family, strategy, *(shapes[name] for name in self.shared_groups(strategy)))

    def load_layer(self) -> Callable[..., Any]:
        """The layer's class; imports its module, and with it torch."""
        return load_object(self.layer)

    def load_cost(self) -> Callable[..., Any]:
        """The function of the analytic costs."""
        return load_object(self.cost)


def load_object(reference: str) -> Any:
    """Import what "package.module:name" refers to.

    Raises:
        ValueError: no such form.
        ImportError: the module is missing, or has no such name.
    """
    module_name, separator, attribute = reference.partition(":")
    if not (module_name and separator and attribute):
        raise ValueError(f"reference is {reference!r}, takes 'package.module:name'")
    module = import_module(module_name)
    if not hasattr(module, attribute):
        raise ImportError(f"module {module_name!r} has no {attribute!r} (reference {reference!r})")
    return getattr(module, attribute)


def _require_code(owner: str, name: str, value: int, codes: Mapping[int, str]) -> None:
    if value not in codes:
        known = ", ".join(f"{code} {meaning}" for code, meaning in codes.items())
        raise ValueError(f"{owner}: {name} is {value!r}, takes one of {known}")


# --------------------------------------------------------------------------------------------------------
# The registry


_registry: dict[int, LivClass] = {}
_plugins_loaded = False


def register(entry: LivClass) -> LivClass:
    """Add an LIV class to the pools and return it.

    Raises:
        ValueError: the number or the name is taken by another class.
    """
    for known in _registry.values():
        if known == entry:
            return known
        if known.id == entry.id or known.name == entry.name:
            raise ValueError(
                f"LIV class {entry.id} ({entry.name}) clashes with class {known.id} ({known.name})"
            )
    _registry[entry.id] = entry
    return entry


def get(liv_class: int) -> LivClass:
    """The class with this number.

    Raises:
        KeyError: there is none.
    """
    _load_plugins()
    if liv_class not in _registry:
        raise KeyError(f"no LIV class {liv_class}, known are {known_classes()}")
    return _registry[liv_class]


def find(liv_class: int) -> LivClass | None:
    """The class with this number, or None."""
    _load_plugins()
    return _registry.get(liv_class)


def all_classes() -> tuple[LivClass, ...]:
    """All classes, built-in and registered, by number."""
    _load_plugins()
    return tuple(_registry[number] for number in sorted(_registry))


def known_classes() -> str:
    """The numbers of all classes, for messages: "1-17, 20"."""
    numbers = [entry.id for entry in all_classes()]
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _load_plugins() -> None:
    """Register what the entry points of "star.liv" name: an LivClass, or several in a list or tuple."""
    global _plugins_loaded
    if _plugins_loaded:
        return
    from importlib.metadata import entry_points  # slow to import, and only classes need it

    _plugins_loaded = True  # first, so that a plugin may itself ask for classes while it loads
    for point in entry_points(group=ENTRY_POINT_GROUP):
        loaded = point.load()
        for entry in [loaded] if isinstance(loaded, LivClass) else loaded:
            if not isinstance(entry, LivClass):
                raise TypeError(
                    f"entry point {point.name!r} of {ENTRY_POINT_GROUP!r} gives {type(entry).__name__}, "
                    f"takes LivClass"
                )
            register(entry)


# --------------------------------------------------------------------------------------------------------
# What random genomes and mutations draw from


@dataclass(frozen=True)
class Pool:
    """The values that each of a gene's five positions may take in a search.

    Args:
        classes: numbers of the LIV classes; all that are registered by default.
        max_groups: labels of sharing groups go from 1 to it. 12 serve every sharing of 24 LIVs, because a
            group takes two members to have an effect.
        featurizer_sharing: whether LIVs may share featurizers.
        feature_sharing: whether LIVs may share features.

    Raises:
        ValueError: no class, an unknown class, a label limit outside 1-99.
    """

    classes: tuple[int, ...] = field(default_factory=lambda: tuple(entry.id for entry in all_classes()))
    max_groups: int = 12
    featurizer_sharing: bool = True
    feature_sharing: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(sorted(set(self.classes))))
        unknown = [number for number in self.classes if find(number) is None]
        if unknown or not self.classes:
            problem = f"has no class {unknown[0]!r}" if unknown else "is empty"
            raise ValueError(f"Pool: classes {problem}, takes one or more of {known_classes()}")
        if not 1 <= self.max_groups <= 99:
            raise ValueError(f"Pool: max_groups is {self.max_groups!r}, takes 1-99")

    def options(self, position: int | str, gene: Gene) -> tuple[int, ...]:
        """The values that a mutation of one position of `gene` may draw, the present one among them.

        Args:
            position: 0-4, or the field's name, "liv_class" ... "feature_strategy".
            gene: the gene to be changed; the feature-sharing strategies depend on its class.
        """
        name = position
        if isinstance(position, int) and 0 <= position < len(gene):
            name = gene._fields[position]
        labels = tuple(range(1, self.max_groups + 1))
        if name == "liv_class":
            return self.classes
        if name == "featurizer_group":
            return labels if self.featurizer_sharing else (1,)
        if name == "featurizer_strategy":
            return tuple(FEATURIZER_STRATEGIES) if self.featurizer_sharing else (1,)
        if name == "feature_group":
            return labels if self.feature_sharing else (1,)
        if name == "feature_strategy":
            entry = find(gene.liv_class)
            count = len(entry.feature_strategies) if entry and self.feature_sharing else 1
            return tuple(range(1, count + 1))
        raise ValueError(f"Pool.options: position is {position!r}, takes 0-4 or one of {gene._fields}")

    def to_json(self) -> dict[str, Any]:
        """A plain dict; `from_json` turns it back."""
        return {
            "classes": list(self.classes),
            "max_groups": self.max_groups,
            "featurizer_sharing": self.featurizer_sharing,
            "feature_sharing": self.feature_sharing,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Pool:
        """The pool that `to_json` wrote."""
        return cls(**{**data, "classes": tuple(data["classes"])})


# --------------------------------------------------------------------------------------------------------
# The 17 classes of the paper


def _feature(
    name: str, codes: str = "1112", *, expansion: Fraction | int = 1, repeat: int = 1, halves: int = 1
) -> FeatureGroup:
    """A feature group from its four codes: `1112` is a dense projection of each token."""
    token_mixing, sparsity, nonlinearity, channel_mixing = (int(code) for code in codes)
    return FeatureGroup(
        name, token_mixing, sparsity, nonlinearity, channel_mixing, Fraction(expansion), repeat, halves
    )


def _operator(genome: str) -> OperatorGenome:
    return OperatorGenome(*(int(value) for value in genome))


def _attention(number: int, repeat: int, *, short_conv: bool, differential: bool) -> LivClass:
    """SA-1 to SA-4 and their differential variants: heads of softmax attention, rotary positions."""
    # A depthwise convolution of a few taps: Toeplitz, banded.
    codes = "3212" if short_conv else "1112"
    # A differential head is two half-wide heads over one common value.
    halves = 2 if differential else 1
    half = Fraction(1, halves)
    summary = "softmax attention" if repeat == 1 else f"grouped-query attention, keys and values x{repeat}"
    if short_conv:
        summary += ", short convolution on queries, keys, values"
    return LivClass(
        id=number + (9 if differential else 0),
        name=f"SA-{number}" + ("-Diff" if differential else ""),
        family="attention",
        operator=_operator(f"{number}2123"),
        featurizer=(
            _feature("query", codes, expansion=half, halves=halves),
            _feature("key", codes, expansion=half / repeat, repeat=repeat, halves=halves),
            _feature("value", codes, expansion=Fraction(1, repeat), repeat=repeat),
        ),
        shareable=("key", "value"),
        differential=differential,
        layer="star_kernels.layers.attention:" + ("DiffAttention" if differential else "Attention"),
        layer_arguments={"kv_repeat": repeat, "short_conv": short_conv}
        | ({"bare": True} if differential else {}),
        cost="star.cost:attention_cost",
        summary=("differential " if differential else "") + summary,
    )


def _recurrence(number: int, state_size: int, *, differential: bool) -> LivClass:
    """Rec-1 and Rec-2 and their differential variants: selective state-space recurrences (Mamba)."""
    halves = 2 if differential else 1
    # Everything but the gate is made from the input after a short convolution and a SiLU.
    codes = "3242"
    return LivClass(
        id=number + 4 + (9 if differential else 0),
        name=f"Rec-{number}" + ("-Diff" if differential else ""),
        family="recurrence",
        operator=_operator(f"{number + 4}4111"),
        featurizer=(
            _feature("value", codes, expansion=2),  # x and its gate z, side by side
            _feature("delta", codes, halves=halves),
            _feature("B", codes, expansion=state_size, halves=halves),
            _feature("C", codes, expansion=state_size, halves=halves),
        ),
        shareable=("B", "C"),
        differential=differential,
        layer="star_kernels.layers.recurrence:" + ("DiffSelectiveSSM" if differential else "SelectiveSSM"),
        layer_arguments={"state_size": state_size},
        cost="star.cost:recurrence_cost",
        summary=("differential " if differential else "")
        + f"gated input-varying recurrence, {state_size} states a channel",
        constants=("A",),
    )


def _convolution(number: int, *, differential: bool) -> LivClass:
    """GConv-1 and GConv-2 and their differential variants: convolutions gated before and after."""
    halves = 2 if differential else 1
    kind, kernel = (
        ("Short", "explicit kernel of 3 taps")
        if number == 1
        else ("Long", "implicit kernel as long as the sequence")
    )
    return LivClass(
        id=number + 6 + (9 if differential else 0),
        name=f"GConv-{number}" + ("-Diff" if differential else ""),
        family="convolution",
        operator=_operator(f"{number + 6}3111"),
        featurizer=(_feature("B", halves=halves), _feature("C", halves=halves), _feature("value")),
        shareable=("B", "C", "value"),
        differential=differential,
        layer="star_kernels.layers.convolution:"
        + (f"DiffGated{kind}Conv" if differential else f"Gated{kind}Conv"),
        layer_arguments={},
        cost=f"star.cost:{kind.lower()}_convolution_cost",
        summary=("differential " if differential else "") + f"gated convolution, {kernel}",
        constants=("kernel",),
    )


def _memoryless() -> LivClass:
    """GMemless: the SwiGLU of Transformers, seen as an operator that mixes no tokens."""
    wide = Fraction(8, 3)
    return LivClass(
        id=9,
        name="GMemless",
        family="memoryless",
        operator=_operator("91142"),
        featurizer=(_feature("gate", expansion=wide), _feature("up", expansion=wide)),
        shareable=("gate", "up"),
        differential=False,
        layer="star_kernels.layers.memoryless:SwiGLU",
        layer_arguments={},
        cost="star.cost:memoryless_cost",
        summary="gated memoryless unit, SwiGLU",
    )


def _built_in() -> Iterable[LivClass]:
    for differential in (False, True):
        yield _attention(1, 1, short_conv=False, differential=differential)
        yield _attention(2, 1, short_conv=True, differential=differential)
        yield _attention(3, 4, short_conv=False, differential=differential)
        yield _attention(4, 2, short_conv=False, differential=differential)
        yield _recurrence(1, 16, differential=differential)
        yield _recurrence(2, 2, differential=differential)
        yield _convolution(1, differential=differential)
        yield _convolution(2, differential=differential)
    yield _memoryless()


for _entry in _built_in():
    register(_entry)
