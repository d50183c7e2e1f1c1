"""Models built from genomes: decoding, sharing, generation, initial weights."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from star import Genome, ModelConfig, baselines, build_model, cost, pools
from star.genome import Gene, GenomeError
from star.model import StarModel, lambda_init, parameter_count
from star.optimizer import AdamW
from star.sampling import sample
from star.sharing import resolve
from star_kernels import linear_cross_entropy
from star_kernels.cache import CacheTensor, LayerCache
from star_kernels.layers import LivLayer
from star_kernels.layers.projection import GroupProjection, OutputProjection

CONFIG = ModelConfig(width=64, head_dim=16, vocab_size=50)
CLASSES = [entry.id for entry in pools.all_classes()]
EVERY_CLASS = Genome([Gene(number) for number in CLASSES])


def token_ids(length: int, batch: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, CONFIG.vocab_size, (batch, length), generator=generator)


def random_genome(seed: int, depth: int) -> Genome:
    return Genome.random(depth, np.random.default_rng(seed))


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    error = (actual - expected).norm() / (expected.norm() + 1e-30)
    assert error <= tolerance, f"relative error {error:.2e}"


# -------------------------------------------------------------------------------- decoding


@st.composite
def genomes(draw: st.DrawFn) -> Genome:
    """Genomes with much sharing: few classes, many links."""
    depth = draw(st.integers(1, 10))
    count = draw(st.integers(1, 3))
    classes = draw(st.lists(st.sampled_from(CLASSES), min_size=count, max_size=count))
    genes = [
        Gene(
            draw(st.sampled_from(classes)),
            draw(st.integers(1, 2)),
            draw(st.integers(1, 2)),
            draw(st.integers(1, 2)),
            draw(st.integers(1, 8)),
        )
        for _ in range(depth)
    ]
    return Genome(genes).repair(np.random.default_rng(draw(st.integers(0, 1 << 32))))


@given(genome=genomes(), cuts=st.sets(st.integers(1, 10)), seed=st.integers(0, 1 << 16))
@example(genome=EVERY_CLASS, cuts=set(range(1, 11)), seed=0)
@settings(max_examples=80)
def test_chunks_and_steps_equal_the_parallel_form(genome: Genome, cuts: set[int], seed: int) -> None:
    model = build_model(genome, CONFIG, seed=seed, dtype=torch.float64)
    ids = token_ids(11, seed=seed)
    expected = model.hidden(ids)
    ends = [0, *sorted(cuts), 11]
    for bounds in (ends, list(range(12))):
        cache = model.allocate_cache(2, 11)
        pieces = [model.hidden(ids[:, a:b], cache) for a, b in itertools.pairwise(bounds)]
        assert cache.position == 11
        assert_close(torch.cat(pieces, dim=1), expected, 1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_the_kernels_dtypes(seed: int) -> None:
    genome = random_genome(seed, 24)
    model = build_model(genome, CONFIG, seed=seed)
    ids = token_ids(21)
    expected = copy.deepcopy(model).double().hidden(ids)
    assert_close(model.hidden(ids).double(), expected, 1e-4)
    cache = model.allocate_cache(2, 21)
    pieces = [model.hidden(piece, cache) for piece in ids.split([8, 1, 1, 1, 9, 1], dim=1)]
    assert_close(torch.cat(pieces, dim=1).double(), expected, 1e-4)


def test_causal() -> None:
    model = build_model(EVERY_CLASS, CONFIG, seed=0, dtype=torch.float64)
    ids = token_ids(9)
    changed = ids.clone()
    changed[:, 6] = (changed[:, 6] + 1) % CONFIG.vocab_size
    a, b = model(ids), model(changed)
    assert torch.allclose(a[:, :6], b[:, :6], atol=1e-12)
    assert not torch.allclose(a[:, 6:], b[:, 6:], atol=1e-3)


def test_logits_are_the_head_on_hidden() -> None:
    model = build_model(EVERY_CLASS, CONFIG, seed=0)
    ids = token_ids(5)
    assert model(ids).shape == (2, 5, CONFIG.vocab_size)
    assert torch.equal(model(ids), model.hidden(ids) @ model.head_weight.T)
    assert model.head_weight is model.embedding.weight


# -------------------------------------------------------------------------------- sharing


def layer(model: StarModel, index: int) -> LivLayer:
    found = model.layers[index]
    assert isinstance(found, LivLayer)
    return found


def test_a_shared_featurizer_is_one_module_on_two_inputs() -> None:
    apart = build_model(Genome.parse("71111-71111"), CONFIG, seed=0)
    together = build_model(Genome.parse("71211-71211"), CONFIG, seed=0)
    assert layer(together, 0).featurizer is layer(together, 1).featurizer
    saved = sum(p.numel() for p in apart.parameters()) - sum(p.numel() for p in together.parameters())
    assert saved == 3 * 64 * 64 + 64 * 3
    own = [name for name in together.state_dict() if name.startswith("layers.1.")]
    assert own == ["layers.1.out_proj.weight"]
    seen: list[Tensor] = []
    together.layers[0].in_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    together(token_ids(4))
    assert len(seen) == 2
    assert not torch.equal(seen[0], seen[1])


def test_copies_of_data_parallel_borrow_from_their_own_layers() -> None:
    """As `torch.nn.parallel.replicate` copies a model to a second GPU: module by module."""
    model = build_model(Genome.parse("21211-91111-21221"), CONFIG, seed=0)
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, copied in copies.items():
        for name, child in module.named_children():
            copied._modules[name] = copies[child]
            setattr(copied, name, copies[child])
        for name, weight in module._parameters.items():
            setattr(copied, name, None if weight is None else weight.detach().clone())
    replica = copies[model]
    ids = torch.arange(6)[None]
    assert torch.equal(replica(ids), model(ids))
    assert replica.layers[2].featurizer is replica.layers[0]
    assert model.layers[2].featurizer is model.layers[0]


def test_shared_features_are_the_very_tensors() -> None:
    model = build_model(Genome.parse("11114-11114-21114"), CONFIG, seed=0)
    features: list[dict[str, Tensor]] = []
    for index in range(3):
        plain = layer(model, index).mix
        layer(model, index).mix = lambda f, cache=None, plain=plain: (features.append(f), plain(f, cache))[1]  # type: ignore[method-assign]
    model(token_ids(4))
    for name in ("key", "value"):
        assert features[1][name] is features[0][name]
        assert features[2][name] is features[0][name]
    assert features[1]["query"] is not features[0]["query"]


@pytest.mark.parametrize(("strategy", "shared"), [(2, ("key",)), (3, ("value",)), (4, ("key", "value"))])
def test_a_shared_key_value_group_has_one_cache(strategy: int, shared: tuple[str, ...]) -> None:
    model = build_model(Genome([Gene(1, 1, 1, 1, strategy)] * 3), CONFIG, seed=0)
    cache = model.allocate_cache(2, 16, torch.bfloat16)
    for name in ("key", "value"):
        is_one = cache.layers[0].tensors[name] is cache.layers[2].tensors[name]
        assert is_one == (name in shared)
    assert cache.nbytes == (6 - 2 * len(shared)) * 2 * 16 * 64 * 2


def test_gradients_flow_through_shared_features() -> None:
    model = build_model(Genome.parse("11114-11114"), CONFIG, seed=0)
    model(token_ids(6)).square().mean().backward()
    alone = layer(model, 0).v_proj.weight.grad.clone()  # type: ignore[union-attr]
    for parameter in model.parameters():
        parameter.grad = None
    torch.nn.init.zeros_(layer(model, 1).output.weight)
    model(token_ids(6)).square().mean().backward()
    assert not torch.allclose(alone, layer(model, 0).v_proj.weight.grad)  # type: ignore[union-attr]


@given(seed=st.integers(0, 1 << 32), depth=st.integers(1, 24))
@settings(max_examples=60)
def test_weights_are_tied_exactly_as_planned(seed: int, depth: int) -> None:
    genome = random_genome(seed, depth)
    model = build_model(genome, CONFIG, device="meta")
    for plan in resolve(genome):
        mine = layer(model, plan.index)
        assert type(mine) is plan.entry.load_layer()
        assert mine.featurizer is layer(model, plan.featurizer_owner).featurizer
        is_owner = plan.featurizer_owner == plan.index
        assert mine.owns_featurizer == is_owner
    pointers = [id(tensor) for tensor in model.state_dict(keep_vars=True).values()]
    assert len(pointers) == len(set(pointers))


@given(seed=st.integers(0, 1 << 32))
@settings(max_examples=15)
def test_one_model_for_all_genomes_of_a_canonical_form(seed: int) -> None:
    genome = random_genome(seed, 8)
    renamed = Genome(
        [
            Gene(
                g.liv_class,
                g.featurizer_group + 3,
                g.featurizer_strategy,
                g.feature_group + 5,
                g.feature_strategy,
            )
            for g in genome
        ]
    )
    ids = token_ids(5)
    models = [build_model(g, CONFIG, seed=1) for g in (genome, renamed, genome.canonical())]
    first, *others = (model(ids) for model in models)
    assert all(torch.equal(first, other) for other in others)


# -------------------------------------------------------------------------------- generation


def test_generation_continues_the_prompt() -> None:
    model = build_model(EVERY_CLASS, CONFIG, seed=0)
    ids = token_ids(5)
    out = model.generate(ids, 7, temperature=0)
    assert out.shape == (2, 12)
    assert torch.equal(out[:, :5], ids)
    assert torch.equal(model(out)[:, 4:-1].argmax(-1), out[:, 5:])


def test_generation_is_a_function_of_the_seed() -> None:
    model = build_model(random_genome(0, 6), CONFIG, seed=0)
    first, again, other = (model.generate(token_ids(3), 12, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    generator = torch.Generator().manual_seed(1)
    assert torch.equal(model.generate(token_ids(3), 12, generator=generator), first)


def test_generation_without_new_tokens() -> None:
    model = build_model(random_genome(0, 2), CONFIG, seed=0)
    assert torch.equal(model.generate(token_ids(3), 0), token_ids(3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens is -1; it takes 0 or more"),
        ({"temperature": -1.0}, "temperature is -1.0; it takes 0 or more"),
        ({"top_k": 0}, "top_k is 0; it takes 1 or more"),
        ({"top_p": 1.5}, "top_p is 1.5; it takes a number above 0, at most 1"),
        ({"seed": 1, "generator": torch.Generator()}, "seed and generator are both given"),
        ({"ids": torch.zeros(3, dtype=torch.long)}, r"ids has shape \(3,\); it takes \(B, L\)"),
        ({"ids": torch.zeros(1, 0, dtype=torch.long)}, r"ids has shape \(1, 0\)"),
    ],
)
def test_generation_refuses(arguments: dict, message: str) -> None:
    model = build_model(random_genome(0, 2), CONFIG, seed=0)
    with pytest.raises(ValueError, match=message):
        model.generate(**{"ids": token_ids(3), "max_new_tokens": 2, **arguments})


def test_sampling_keeps_to_the_likeliest() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(2000, 4)
    generator = torch.Generator().manual_seed(0)
    assert set(sample(logits, top_k=2, generator=generator).tolist()) == {0, 1}
    assert set(sample(logits, top_p=0.5, generator=generator).tolist()) == {0}
    assert set(sample(logits, top_p=0.51, generator=generator).tolist()) == {0, 1}
    assert set(sample(logits, generator=generator).tolist()) == {0, 1, 2, 3}
    share = (sample(logits, temperature=0.5, generator=generator) == 0).float().mean()
    assert math.isclose(share, 0.25 / 0.365, abs_tol=0.05)
    assert sample(logits[:1], temperature=0).tolist() == [0]


# -------------------------------------------------------------------------------- caches


def test_cache_is_kept_while_decoding_and_can_be_reset() -> None:
    model = build_model(EVERY_CLASS, CONFIG, seed=0)
    cache = model.allocate_cache(2, 8)
    ids = token_ids(8)
    first = model(ids[:, :3], cache)
    before = [tensor.data_ptr() for tensor in cache.tensors()]
    for t in range(3, 8):
        model(ids[:, t : t + 1], cache)
    assert before == [tensor.data_ptr() for tensor in cache.tensors()]
    with pytest.raises(ValueError, match="room for 8 tokens and holds 8"):
        model(ids[:, :1], cache)
    cache.reset()
    assert cache.position == 0
    assert torch.equal(model(ids[:, :3], cache), first)


def test_cache_rows_can_be_reordered() -> None:
    model = build_model(EVERY_CLASS, CONFIG, seed=0, dtype=torch.float64)
    ids = token_ids(6, batch=3)
    cache = model.allocate_cache(3, 6)
    model(ids[:, :5], cache)
    rows = torch.tensor([2, 0, 0])
    cache.reorder(rows)
    assert_close(model.hidden(ids[rows, 5:], cache), model.hidden(ids[rows])[:, 5:], 1e-9)


# -------------------------------------------------------------------------------- initial weights


def test_seed_decides_the_weights_and_leaves_the_global_generator() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = (build_model(EVERY_CLASS, CONFIG, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.embedding.weight, other.embedding.weight)


def test_first_loss_is_near_that_of_a_uniform_guess() -> None:
    for seed in range(5):
        model = build_model(random_genome(seed, 24), CONFIG, seed=seed)
        loss = torch.nn.functional.cross_entropy(
            model(token_ids(32)).flatten(0, 1), token_ids(32, seed=1).flatten()
        )
        # Above, because a head tied to the embedding expects the same token again.
        assert math.log(CONFIG.vocab_size) - 0.1 < loss.item() < math.log(CONFIG.vocab_size) + 2


def test_lambda_starts_as_in_diff_transformer() -> None:
    assert lambda_init(0) == pytest.approx(0.2)
    assert lambda_init(100) == pytest.approx(0.8)
    model = build_model(Genome([Gene(10), Gene(16)]), CONFIG, seed=0)
    assert torch.allclose(layer(model, 1).lam, torch.tensor(lambda_init(1)))  # type: ignore[arg-type]


def train(genome: Genome, seed: int, steps: int = 20) -> list[float]:
    """Losses of a few steps on text with structure: runs of counting up, mod the vocabulary."""
    model = build_model(genome, CONFIG, seed=seed)
    optimizer = AdamW(model.named_parameters(), weight_decay=0.1)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        starts = torch.randint(0, 50, (8, 1), generator=generator)
        ids = (starts + torch.arange(33)) % CONFIG.vocab_size
        loss = linear_cross_entropy(
            model.hidden(ids[:, :-1]).flatten(0, 1), model.head_weight, ids[:, 1:].flatten()
        )
        loss.backward()
        optimizer.step(2e-3, optimizer.gradient_norm().clamp(min=1.0))
        optimizer.zero_gradients()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("seed", range(6))
def test_random_genomes_train(seed: int) -> None:
    """A sample of what benchmarks/initialisation.py shows for 500 genomes."""
    losses = train(random_genome(seed, 24), seed)
    assert all(math.isfinite(loss) for loss in losses)
    assert np.mean(losses[-5:]) < losses[0]


@pytest.mark.parametrize("name", ["transformer_pp", "striped_mamba", "lfm2"])
def test_baselines_train(name: str) -> None:
    losses = train(getattr(baselines, name)(12), seed=0)
    assert np.mean(losses[-5:]) < 0.9 * losses[0]


def test_compiles_in_one_graph() -> None:
    genome = Genome.parse("11114-71111-51111-11114-91111-17.1.1.1.1")
    model, ids = build_model(genome, CONFIG, seed=0), token_ids(9)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    logits = compiled(ids)
    logits.sum().backward()
    assert torch.equal(logits, model(ids))


def test_autocast() -> None:
    model, ids = build_model(EVERY_CLASS, CONFIG, seed=0), token_ids(9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(ids)
    assert logits.dtype == torch.bfloat16
    assert_close(logits.float(), model(ids), 5e-2)


# -------------------------------------------------------------------------------- mistakes and extensions


class Average(LivLayer):
    """A class of one's own: the mean of all tokens so far."""

    groups = ("value",)

    def __init__(
        self,
        dim: int,
        decay: float,
        *,
        groups: tuple[str, ...],
        featurizer: nn.Module | None,
        device: torch.device | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(dim, featurizer)
        self.decay = decay
        if self.owns_featurizer:
            self.in_proj = GroupProjection(dim, dict.fromkeys(groups, dim), device=device, dtype=dtype)
        self.out_proj = OutputProjection(dim, dim, device=device, dtype=dtype)

    def make_features(
        self, x: Tensor, names: Sequence[str], cache: LayerCache | None = None
    ) -> dict[str, Tensor]:
        return self.in_proj(x, names)

    def operate(self, features: dict[str, Tensor], cache: LayerCache | None = None) -> Tensor:
        value = features["value"]
        total = value.new_zeros(value.shape[0], value.shape[2]) if cache is None else cache.tensors["state"]
        sums = []
        for token in value.unbind(1):
            total = self.decay * total + token
            sums.append(total)
        if cache is not None:
            cache.tensors["state"].copy_(total)
        return torch.stack(sums, dim=1)

    def cache_tensors(self, max_length: int, shared: tuple[str, ...] = ()) -> list[CacheTensor]:
        return [CacheTensor("state", (self.dim,), "state")]


def average_cost(entry: pools.LivClass, config: ModelConfig) -> cost.LivCost:
    d = config.width
    return cost.LivCost(
        featurizer={"value": d * d},
        own=d * d,
        cache=(cost.CachePiece("state", "state", d),),
        feature_flops={"value": 2 * d * d},
        operator_flops=lambda length: length * (2 * d * d + 2 * d),
    )


def test_a_class_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer, one entry: it is built, shared, decoded and counted like the others."""
    monkeypatch.setattr(pools, "_registry", dict(pools._registry))
    pools.register(
        pools.LivClass(
            id=90,
            name="Average",
            family="average",
            operator=pools.OperatorGenome(9, 4, 1, 1, 1),
            featurizer=(pools.FeatureGroup("value", 1, 1, 1, 2, Fraction(1)),),
            shareable=("value",),
            differential=False,
            layer=f"{__name__}:Average",
            layer_arguments={"decay": 0.9},
            cost=f"{__name__}:average_cost",
            summary="mean of all tokens so far",
        )
    )
    genome = Genome.parse("90.1.2.1.1-90.1.2.1.2-11111-90.1.1.1.2")
    model = build_model(genome, CONFIG, seed=0, dtype=torch.float64)
    assert cost.parameters(genome, CONFIG) == parameter_count(model)
    cache = model.allocate_cache(2, 6, torch.float32)
    assert cost.cache_bytes(genome, CONFIG, 6, torch.float32) * 2 == cache.nbytes
    ids = token_ids(6)
    pieces = [model.hidden(piece, cache) for piece in ids.split([2, 1, 1, 2], dim=1)]
    assert_close(torch.cat(pieces, dim=1), model.hidden(ids), 1e-5)


def test_an_invalid_genome_is_refused() -> None:
    with pytest.raises(GenomeError, match="gene 2"):
        build_model(Genome.parse("11211-21211"), CONFIG)


def test_ids_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"ids has shape \(3,\); it takes \(B, L\)"):
        build_model(random_genome(0, 2), CONFIG)(torch.zeros(3, dtype=torch.long))


def test_a_state_dict_makes_the_model_again() -> None:
    genome = random_genome(3, 24)
    model = build_model(genome, CONFIG, seed=0)
    other = build_model(genome, CONFIG, seed=1)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(token_ids(4)), model(token_ids(4)))
    assert torch.equal(copy.deepcopy(model)(token_ids(4)), model(token_ids(4)))
