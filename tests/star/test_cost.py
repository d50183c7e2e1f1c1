"""The analytic costs equal what is built, allocated and counted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from star import Genome, ModelConfig, baselines, build_model, cost, pools
from star.genome import Gene
from star.model import parameter_count

CONFIGS = (
    ModelConfig(width=64, head_dim=16),
    ModelConfig(width=96, head_dim=8, short_conv_kernel=5, mamba_conv_kernel=3, swiglu_multiple=32),
)


def single(liv_class: int) -> Genome:
    return Genome([Gene(liv_class)])


def test_papers_figures() -> None:
    small = ModelConfig(width=768)
    assert cost.parameters(baselines.transformer_pp(24), small) == 84_934_656
    assert cost.cache_bytes(baselines.transformer_pp(24), small) == 150_994_944
    large = ModelConfig(width=2048)
    assert cost.cache_bytes(baselines.transformer_pp(48), large) == 805_306_368
    assert 1.15e9 < cost.parameters(baselines.transformer_pp(48), large) < 1.25e9


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"width{config.width}")
def test_equal_what_is_built_and_allocated(config: ModelConfig) -> None:
    rng = np.random.default_rng(config.width)
    for _ in range(500):
        genome = Genome.random(int(rng.integers(1, 25)), rng)
        model = build_model(genome, config, device="meta")
        length = int(rng.integers(1, 100))
        dtype = (torch.bfloat16, torch.float32, torch.float64)[int(rng.integers(3))]
        assert cost.parameters(genome, config) == parameter_count(model), genome
        cache = model.allocate_cache(1, length, dtype)
        assert cost.cache_bytes(genome, config, length, dtype) == cache.nbytes, genome


@pytest.mark.parametrize("entry", pools.all_classes(), ids=lambda entry: entry.name)
def test_flops_of_the_matrix_products(entry: pools.LivClass) -> None:
    """What torch's counter sees of featurizer and output is what the costs say of them."""
    config, length = CONFIGS[0], 24
    layer = build_model(single(entry.id), config, seed=0).layers[0]
    with FlopCounterMode(display=False) as counter:
        features = layer.make_features(torch.randn(1, length, config.width), layer.groups)
        layer.output(torch.randn(1, length, layer.output.in_features))
    analytic = entry.load_cost()(entry, config)
    made = length * sum(analytic.feature_flops.values())
    out = length * 2 * config.width * layer.output.in_features
    # The counter does not see the depthwise convolutions of SA-2 and of the recurrences.
    convolved = 0
    if entry.family == "attention" and entry.layer_arguments["short_conv"]:
        convolved = length * 2 * config.short_conv_kernel * sum(features[n].shape[2] for n in features) * 16
    if entry.family == "recurrence":
        convolved = length * 2 * config.mamba_conv_kernel * config.width
    assert counter.get_total_flops() == made - convolved + out


def test_flops_of_shared_features_count_once() -> None:
    config, length, d = CONFIGS[0], 10, 64
    apart = cost.flops(Genome.parse("11111-11111"), config, length)
    together = cost.flops(Genome.parse("11114-11114"), config, length)  # keys and values shared
    assert apart - together == length * 2 * 2 * d * d
    assert cost.flops(Genome.parse("11211-11211"), config, length) == apart  # weights shared: no work saved


def test_operator_terms_by_hand() -> None:
    config, d = CONFIGS[0], 64
    per_token = 2 * 4 * d * d
    assert cost.flops(single(1), config, 3) == 3 * per_token + 6 * 4 * d
    assert cost.flops(single(7), config, 3) == 3 * (per_token + d * (2 * 3 + 2))
    hidden = config.swiglu_width
    assert cost.flops(single(9), config, 3) == 3 * (6 * d * hidden + hidden)
    rank, n = config.dt_rank, 16
    projections = 2 * (2 * d * d + 4 * d + 2 * d * rank + 2 * d * n + d * d)
    assert cost.flops(single(5), config, 3) == 3 * (projections + d * (7 * n + 1) + 3 * d)


def test_attention_flops_grow_with_the_square() -> None:
    config = CONFIGS[0]
    growth = [
        cost.flops(single(1), config, 2 * n) / cost.flops(single(1), config, n) for n in (1 << 10, 1 << 16)
    ]
    assert growth[0] < growth[1] < 4
    linear = cost.flops(single(5), config, 2048) / cost.flops(single(5), config, 1024)
    assert linear == 2


def test_refuses_bad_lengths_and_genomes() -> None:
    with pytest.raises(ValueError, match=r"cache_bytes: length is 0"):
        cost.cache_bytes(single(1), CONFIGS[0], 0)
    with pytest.raises(ValueError, match=r"flops: length is 'x'"):
        cost.flops(single(1), CONFIGS[0], "x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gene 1"):
        cost.parameters(Genome([Gene(77)]), CONFIGS[0])
