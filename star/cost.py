"""What a genome costs, without building its model: parameters, cache bytes, floating-point operations.

Every LIV class has one function here, named by its entry in `star.pools`, that writes its costs down as a
`LivCost`; the three public functions add them up along the sharing plans. What is shared counts once: weights
of a shared featurizer, keys and values of a shared feature group, the products that make shared features.

Counted are, for a model of width d:

- `parameters`: all weights but the embedding (which is also the head), norms and biases.
- `cache_bytes`: what `StarModel.allocate_cache` allocates for one sequence, to the byte.
- `flops`: the LIVs' forward pass over one sequence, a multiply-add as 2. Matrix products count exactly. Each
  operator adds its own sums as its equation writes them (the functions below say which); causal attention
  counts the pairs on and below the diagonal. Activations, softmax, rotary positions, norms, residual sums,
  embedding and head are left out: they are small, or the same for all genomes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import torch

from star.config import ModelConfig
from star.genome import Genome
from star.pools import LivClass
from star.sharing import LivPlan, resolve
from star_kernels.layers.kernel import BANDS, HIDDEN

ALWAYS = ""
"""Key of what a featurizer has whichever groups it makes."""


@dataclass(frozen=True)
class CachePiece:
    """Numbers that a LIV keeps for one sequence.

    Args:
        name: of the cache's tensor.
        kind: "position", "tail" or "state", as in `star_kernels.cache`.
        numbers: how many; of "position" a token.
        groups: what it is made of. A "position" piece is the source's where all of them are shared; a "tail"
            of a group is there if the LIV computes the group.
    """

    name: str
    kind: str
    numbers: int
    groups: tuple[str, ...] = ()


@dataclass(frozen=True)
class LivCost:
    """Costs of one LIV class at one width.

    Args:
        featurizer: parameters of the featurizer, by the feature group they make, or `ALWAYS`.
        own: parameters of the LIV beside its featurizer.
        cache: what it remembers.
        feature_flops: operations a token, by the feature group that they make.
        operator_flops: sequence length -> operations of operator and output projection.
    """

    featurizer: Mapping[str, int]
    own: int
    cache: tuple[CachePiece, ...]
    feature_flops: Mapping[str, int]
    operator_flops: Callable[[int], int] = field(repr=False)


def parameters(genome: Genome, config: ModelConfig) -> int:
    """Parameters without embedding, norms and biases.

    Raises:
        GenomeError: the genome is not valid.
    """
    total = 0
    for plan, cost in _costs(genome, config):
        total += cost.own
        if plan.featurizer_owner == plan.index:
            made = (ALWAYS, *plan.featurizer_groups)
            total += sum(cost.featurizer.get(name, 0) for name in made)
    return total


def cache_bytes(
    genome: Genome, config: ModelConfig, length: int = 4096, dtype: torch.dtype = torch.bfloat16
) -> int:
    """Bytes of one sequence's cache with room for `length` tokens.

    Args:
        length: at least 1.
        dtype: of the cache; states of recurrences are in float32 at least.

    Raises:
        GenomeError: the genome is not valid.
        ValueError: length below 1.
    """
    _require_length("cache_bytes", length)
    size, size_of_state = dtype.itemsize, torch.promote_types(dtype, torch.float32).itemsize
    costs = list(_costs(genome, config))
    total = 0
    for plan, cost in costs:
        lent = set() if plan.source is None else {piece.name for piece in costs[plan.source][1].cache}
        for piece in cost.cache:
            is_shared = bool(piece.groups) and set(piece.groups) <= set(plan.shared)
            if piece.kind == "position" and not (is_shared and piece.name in lent):
                total += length * piece.numbers * size
            elif piece.kind == "tail" and not is_shared:
                total += piece.numbers * size
            elif piece.kind == "state":
                total += piece.numbers * size_of_state
    return total


def flops(genome: Genome, config: ModelConfig, length: int) -> int:
    """Floating-point operations of one forward pass over one sequence of `length` tokens.

    Raises:
        GenomeError: the genome is not valid.
        ValueError: length below 1.
    """
    _require_length("flops", length)
    total = 0
    for plan, cost in _costs(genome, config):
        total += length * sum(cost.feature_flops.get(name, 0) for name in plan.computed)
        total += cost.operator_flops(length)
    return total


def _costs(genome: Genome, config: ModelConfig) -> Iterator[tuple[LivPlan, LivCost]]:
    known = _known_costs(config)
    for plan in resolve(genome):
        entry = plan.entry
        found = known.get(id(entry))
        if found is None:
            found = known[id(entry)] = (entry, entry.load_cost()(entry, config))
        yield plan, found[1]


@lru_cache(maxsize=16)
def _known_costs(config: ModelConfig) -> dict[int, tuple[LivClass, LivCost]]:
    """Costs of the entries that were asked for at these sizes, by the entry's id. The entry is held beside
    them, so that its id means no other one; its hash would take longer than its costs."""
    return {}


def _require_length(function: str, length: int) -> None:
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise ValueError(f"{function}: length is {length!r}; it takes an integer of at least 1")


# --------------------------------------------------------------------------------------------------------
# One function a family: (entry, config) -> LivCost. d is the width, h the halves of a differential class.


def attention_cost(entry: LivClass, config: ModelConfig) -> LivCost:
    """Attention: a pair of tokens costs 2d for the scores and 2d for the sum over the values.

    A differential class has two scores of half the width, and one sum with the difference of the weights.
    """
    d, repeat = config.width, entry.layer_arguments["kv_repeat"]
    taps = config.short_conv_kernel if entry.layer_arguments["short_conv"] else 0
    widths = {"query": d, "key": d // repeat, "value": d // repeat}
    cache = [CachePiece(name, "position", widths[name], (name,)) for name in ("key", "value")]
    if taps:
        cache += [CachePiece("tail", "tail", (taps - 1) * width, (name,)) for name, width in widths.items()]

    def operator_flops(length: int) -> int:
        return 4 * d * (length * (length + 1) // 2) + length * 2 * d * d

    return LivCost(
        featurizer={name: (d + taps) * width for name, width in widths.items()},
        own=d * d + (config.heads if entry.differential else 0),
        cache=tuple(cache),
        feature_flops={name: 2 * (d + taps) * width for name, width in widths.items()},
        operator_flops=operator_flops,
    )


def recurrence_cost(entry: LivClass, config: ModelConfig) -> LivCost:
    """Selective scan: for every channel and each of its N states 7 operations a token.

    They are Δ·A and its exponential (2), decay times state plus input (2), B times Δ·v (1), C times state,
    summed (2). A channel adds Δ·v (1), the skip (2) and the gate (1); a difference (2).
    """
    d, n, rank, taps = (
        config.width,
        entry.layer_arguments["state_size"],
        config.dt_rank,
        config.mamba_conv_kernel,
    )
    h = 2 if entry.differential else 1
    names = ("state_a", "state_b") if entry.differential else ("state",)

    def operator_flops(length: int) -> int:
        scan = h * d * (7 * n + 1) + 3 * d + 2 * (h - 1) * d
        return length * (scan + 2 * d * d)

    return LivCost(
        featurizer={
            ALWAYS: taps * d + h * d * n,
            "value": 2 * d * d,
            "delta": 2 * h * d * rank,
            "B": h * d * n,
            "C": h * d * n,
        },
        own=d * d + d + (1 if entry.differential else 0),
        cache=(
            CachePiece("tail", "tail", (taps - 1) * d),
            *(CachePiece(name, "state", d * n) for name in names),
        ),
        feature_flops={
            "value": 4 * d * d + 2 * taps * d,
            "delta": 4 * h * d * rank,
            "B": 2 * h * d * n,
            "C": 2 * h * d * n,
        },
        operator_flops=operator_flops,
    )


def short_convolution_cost(entry: LivClass, config: ModelConfig) -> LivCost:
    """Gated short convolution: a channel costs 2 a tap and 2 for the gates; a difference 2."""
    d, taps = config.width, config.short_conv_kernel
    h = 2 if entry.differential else 1
    names = ("tail_a", "tail_b") if entry.differential else ("tail",)

    def operator_flops(length: int) -> int:
        convolution = h * d * (2 * taps + 2) + 2 * (h - 1) * d
        return length * (convolution + 2 * d * d)

    return LivCost(
        featurizer={ALWAYS: h * d * taps, "B": h * d * d, "C": h * d * d, "value": d * d},
        own=d * d + (1 if entry.differential else 0),
        cache=tuple(CachePiece(name, "tail", (taps - 1) * d) for name in names),
        feature_flops={"B": 2 * h * d * d, "C": 2 * h * d * d, "value": 2 * d * d},
        operator_flops=operator_flops,
    )


def long_convolution_cost(entry: LivClass, config: ModelConfig) -> LivCost:
    """Gated long convolution, by transforms of N, the power of two from twice the length on.

    A channel costs three real transforms of 5/2 N log2 N (kernel, values, back) and N/2 + 1 complex products
    of 6; a token of a channel 2 for the gates, 2 for the skip, and 2 for a difference. The kernel's network
    adds its matrix products over all positions.
    """
    d = config.width
    h = 2 if entry.differential else 1
    names = ("history_a", "history_b") if entry.differential else ("history",)
    inputs = 1 + 2 * BANDS
    network = inputs * HIDDEN + HIDDEN * HIDDEN + HIDDEN * h * d

    def operator_flops(length: int) -> int:
        log_size = (2 * length - 1).bit_length()
        half = 1 << (log_size - 1)
        transforms = 3 * 5 * half * log_size + 6 * (half + 1)
        token = 2 * network + 4 * h * d + 2 * (h - 1) * d + 2 * d * d
        return h * d * transforms + length * token

    return LivCost(
        featurizer={ALWAYS: network + h * d, "B": h * d * d, "C": h * d * d, "value": d * d},
        own=d * d + h * d + (1 if entry.differential else 0),
        cache=tuple(CachePiece(name, "position", d, ("B", "value")) for name in names),
        feature_flops={"B": 2 * h * d * d, "C": 2 * h * d * d, "value": 2 * d * d},
        operator_flops=operator_flops,
    )


def memoryless_cost(entry: LivClass, config: ModelConfig) -> LivCost:
    """SwiGLU: the product of gate and up, 1 a hidden channel."""
    d, hidden = config.width, config.swiglu_width

    def operator_flops(length: int) -> int:
        return length * (hidden + 2 * d * hidden)

    return LivCost(
        featurizer={"gate": d * hidden, "up": d * hidden},
        own=d * hidden,
        cache=(),
        feature_flops={"gate": 2 * d * hidden, "up": 2 * d * hidden},
        operator_flops=operator_flops,
    )
