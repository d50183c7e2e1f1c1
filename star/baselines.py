"""Layouts that people designed, as genomes: what a search is compared with.

All three alternate a token mixer with a SwiGLU (GMemless), mixer first, and share nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from star.genome import MAX_DEPTH, Gene, Genome

SA_1, SA_3, REC_1, GCONV_1, GMEMLESS = 1, 3, 5, 7, 9

STRIPED_MAMBA_PERIOD = 6  # one attention and five recurrences, as in the paper's baseline

# Blocks of LFM2 with grouped-query attention, of 16 (arXiv 2511.23404); the others are short convolutions.
LFM2_BLOCKS = 16
LFM2_ATTENTION = (2, 5, 8, 10, 12, 14)


def transformer_pp(depth: int) -> Genome:
    """Transformer++: multi-head attention (SA-1) as every mixer.

    Args:
        depth: LIVs, mixers and GMemless together.
    """
    return _alternate(depth, [SA_1] * _mixers("transformer_pp", depth))


def striped_mamba(depth: int) -> Genome:
    """StripedMamba: one attention (SA-1) to five Mamba recurrences (Rec-1), each in the middle of its six.

    24 LIVs have 2 attentions and 10 recurrences among their 12 mixers. Under six mixers there is no attention
    before the fourth.

    Args:
        depth: LIVs, mixers and GMemless together.
    """
    middle = STRIPED_MAMBA_PERIOD // 2
    mixers = _mixers("striped_mamba", depth)
    return _alternate(
        depth, [SA_1 if index % STRIPED_MAMBA_PERIOD == middle else REC_1 for index in range(mixers)]
    )


def lfm2(depth: int) -> Genome:
    """LFM2: gated short convolutions (GConv-1), with grouped-query attention (SA-3) at 6 of 16 mixers.

    32 LIVs have exactly the published order of the 16 blocks; other depths have the same share of attentions,
    evenly spaced.

    Args:
        depth: LIVs, mixers and GMemless together.
    """
    mixers = _mixers("lfm2", depth)
    # Rounded to the nearest integer, in integers: halves go up.
    count = (2 * mixers * len(LFM2_ATTENTION) + LFM2_BLOCKS) // (2 * LFM2_BLOCKS)
    spread = {(2 * index + 1) * mixers // (2 * count) for index in range(count)}
    attention = set(LFM2_ATTENTION) if mixers == LFM2_BLOCKS else spread
    return _alternate(depth, [SA_3 if index in attention else GCONV_1 for index in range(mixers)])


def _mixers(name: str, depth: int) -> int:
    """Number of token mixers: every other LIV, the first among them."""
    if isinstance(depth, bool) or not isinstance(depth, int) or not 1 <= depth <= MAX_DEPTH:
        raise ValueError(f"{name}: depth is {depth!r}, takes an integer from 1 to {MAX_DEPTH}")
    return (depth + 1) // 2


def _alternate(depth: int, mixers: Sequence[int]) -> Genome:
    """Mixers in order, a GMemless after each, `depth` LIVs in all."""
    return Genome(Gene(mixers[index // 2] if index % 2 == 0 else GMEMLESS) for index in range(depth))
