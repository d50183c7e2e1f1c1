"""Model configurations: derived sizes, what is refused, JSON."""

from __future__ import annotations

import json
import math

import pytest

import star
from star import ModelConfig


@pytest.mark.parametrize(
    ("width", "heads", "swiglu_width", "dt_rank"),
    [(256, 4, 704, 16), (768, 12, 2048, 48), (2048, 32, 5440, 128)],
)
def test_derived_sizes(width, heads, swiglu_width, dt_rank):
    config = ModelConfig(width=width)
    assert (config.heads, config.swiglu_width, config.dt_rank) == (heads, swiglu_width, dt_rank)


def test_swiglu_width_is_the_nearest_multiple():
    for width in range(16, 1025, 16):
        for multiple in (1, 3, 64, 128):
            got = ModelConfig(width=width, head_dim=4, swiglu_multiple=multiple).swiglu_width
            assert got % multiple == 0
            assert got >= multiple
            assert got == multiple or abs(got - 8 * width / 3) <= multiple / 2 + 1e-9


def test_small_widths():
    config = ModelConfig(width=16, head_dim=4)
    assert (config.heads, config.swiglu_width, config.dt_rank) == (4, 64, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 0}, "width is 0, takes a positive integer"),
        ({"width": 256.0}, "width is 256.0, takes a positive integer"),
        ({"width": True}, "width is True, takes a positive integer"),
        ({"width": 250}, r"width is 250, takes a multiple of head_dim \(64\)"),
        ({"width": 128}, "gives 2 heads, takes a multiple of 4"),
        ({"width": 24, "head_dim": 6}, "head_dim is 6, takes a multiple of 4"),
        ({"width": 256, "vocab_size": -1}, "vocab_size is -1, takes a positive integer"),
        ({"width": 256, "norm_eps": 0.0}, "norm_eps is 0.0, takes a positive number"),
        ({"width": 256, "rope_theta": math.nan}, "rope_theta is nan, takes a positive number"),
        ({"width": 256, "rope_theta": "big"}, "rope_theta is 'big', takes a positive number"),
    ],
)
def test_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**arguments)


def test_json():
    config = ModelConfig(width=512, vocab_size=1000, rope_theta=5e5)
    assert ModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    with pytest.raises(ValueError, match="unknown field 'depth', takes width, vocab_size"):
        ModelConfig.from_json({"width": 256, "depth": 3})
    with pytest.raises(ValueError, match="field 'width' is missing"):
        ModelConfig.from_json({})


def test_public_names_of_the_package():
    assert set(star.__all__) <= set(dir(star))
    with pytest.raises(AttributeError, match="module 'star' has no attribute 'genomes'"):
        _ = star.genomes
