"""Layouts that people designed: their order and their counts."""

from __future__ import annotations

from collections import Counter

import pytest

from star import baselines


def mixers(genome):
    """Classes of the token mixers; every other LIV must be a GMemless that shares nothing."""
    assert all(gene == (9, 1, 1, 1, 1) for gene in genome.genes[1::2])
    assert all(gene[1:] == (1, 1, 1, 1) for gene in genome)
    return [gene.liv_class for gene in genome.genes[::2]]


def test_transformer_pp():
    assert str(baselines.transformer_pp(5)) == "11111-91111-11111-91111-11111"
    assert mixers(baselines.transformer_pp(24)) == [1] * 12


def test_striped_mamba():
    assert mixers(baselines.striped_mamba(24)) == [5, 5, 5, 1, 5, 5] * 2
    assert Counter(mixers(baselines.striped_mamba(48))) == {5: 20, 1: 4}


def test_lfm2():
    published = [7, 7, 3, 7, 7, 3, 7, 7, 3, 7, 3, 7, 3, 7, 3, 7]
    assert mixers(baselines.lfm2(32)) == published
    assert Counter(mixers(baselines.lfm2(24))) == {7: 7, 3: 5}
    assert Counter(mixers(baselines.lfm2(48))) == {7: 15, 3: 9}


@pytest.mark.parametrize("layout", [baselines.transformer_pp, baselines.striped_mamba, baselines.lfm2])
@pytest.mark.parametrize("depth", [1, 2, 3, 7, 24, 33])
def test_every_depth(layout, depth):
    genome = layout(depth)
    assert genome.depth == depth
    assert genome.canonical() == genome
    mixers(genome)


@pytest.mark.parametrize("layout", [baselines.transformer_pp, baselines.striped_mamba, baselines.lfm2])
@pytest.mark.parametrize("depth", [0, -2, 2.0, True, 10_001])
def test_depth_refused(layout, depth):
    with pytest.raises(ValueError, match=f"{layout.__name__}: depth is {depth!r}, takes an integer from 1"):
        layout(depth)
