"""From a genome to a model: a table from class to layer, the sharing plans, a stack.

The backbone is a pre-norm residual stack of LIVs at one width: x <- x + LIV(norm(x)), then a final norm; the
embedding is also the head. `star.pools` names the layer of every class and `star.sharing` who shares what, so
nothing here knows a class by its number.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from star.config import ModelConfig
from star.genome import Genome
from star.sampling import sample
from star.sharing import LivPlan, resolve
from star_kernels.cache import ModelCache
from star_kernels.layers import LivLayer, RMSNorm
from star_kernels.layers.initial import normal_


class StarModel(nn.Module):
    """The language model that a genome describes; `build_model` makes it.

    Args:
        genome: a valid genome.
        config: sizes and constants.
        device, dtype: of the weights.

    Raises:
        GenomeError: the genome is not valid.

    State dict: `embedding.weight` (V, D); `norms.I.weight` (D,) and `layers.I.*` for LIV I, as its layer's
    class says; `norm.weight` (D,). Weights of a shared featurizer appear once, under
    the first LIV that uses them.

    Initialisation: embeddings N(0, 1/D), norms ones, layers as their classes say; their output projections
    make up for the depth, so that all LIVs together add a variance of 1/16 to the embedding's 1/D.
    """

    def __init__(
        self,
        genome: Genome,
        config: ModelConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.genome = genome
        self.config = config
        self.plans = resolve(genome)
        self.embedding = _Embedding(config.vocab_size, config.width, device=device, dtype=dtype)
        self.norms = nn.ModuleList()
        self.layers = nn.ModuleList()
        for plan in self.plans:
            owner = None if plan.featurizer_owner == plan.index else self.layers[plan.featurizer_owner]
            self.norms.append(RMSNorm(config.width, config.norm_eps, device=device, dtype=dtype))
            self.layers.append(build_layer(plan, config, len(self.plans), owner, device, dtype))
        self.norm = RMSNorm(config.width, config.norm_eps, device=device, dtype=dtype)
        self._lent = frozenset(plan.source for plan in self.plans if plan.source is not None)

    @property
    def head_weight(self) -> Tensor:
        """Weight of the head, (V, D): the embedding's. For `linear_cross_entropy` on `hidden`."""
        return self.embedding.weight

    def forward(self, ids: Tensor, cache: ModelCache | None = None) -> Tensor:
        """Logits of the next token at every position.

        Args:
            ids: (B, L) integer tokens.
            cache: from `allocate_cache`; the tokens then follow those it has read. A prompt, a further chunk
                and a single token are the same call. No gradients are recorded with a cache.

        Returns:
            (B, L, V).

        Raises:
            ValueError: ids of another shape, or no room left in the cache.
        """
        return F.linear(self.hidden(ids, cache), self.head_weight)

    def hidden(
        self,
        ids: Tensor,
        cache: ModelCache | None = None,
        *,
        checkpoint: Callable[..., Any] | None = None,
    ) -> Tensor:
        """What the head is applied to, (B, L, D): the stack's output after the final norm.

        checkpoint: calls a layer with its arguments, for training that computes layers twice to save memory
            (`torch.utils.checkpoint.checkpoint`, not reentrant).
        """
        if ids.dim() != 2:
            raise ValueError(f"StarModel: ids has shape {tuple(ids.shape)}; it takes (B, L)")
        if cache is not None and torch.is_grad_enabled():
            with torch.no_grad():
                return self.hidden(ids, cache)
        if cache is not None and cache.ragged and ids.shape[1] > 1:
            # Rows of different lengths go on side by side only token by token.
            return torch.cat([self.hidden(token, cache) for token in ids.split(1, dim=1)], dim=1)
        if getattr(self, "_is_replica", False):
            self._lend_again()
        stream = self.embedding(ids)
        lent: dict[int, dict[str, Tensor]] = {}
        y = self.norms[0](stream)
        after = [*self.norms, self.norm][1:]
        for plan, layer, norm in zip(self.plans, self.layers, after, strict=True):
            given = None
            if plan.source is not None:
                given = {name: lent[plan.source][name] for name in plan.shared}
            memory = None if cache is None else cache.layers[plan.index]
            call = partial(layer, return_features=True) if plan.index in self._lent else layer
            y = call(y, memory, given) if checkpoint is None else checkpoint(call, y, memory, given)
            if plan.index in self._lent:
                y, lent[plan.index] = y
            y, stream = norm(y, residual=stream)
        if cache is not None and cache.lengths is not None:
            cache.lengths.add_(ids.shape[1])
        return cast(Tensor, y)

    def _lend_again(self) -> None:
        """`nn.DataParallel` copies layers one by one: each still borrows from a layer on the first device."""
        for plan, layer in zip(self.plans, self.layers, strict=True):
            if plan.featurizer_owner != plan.index:
                layer.__dict__["_lender"] = self.layers[plan.featurizer_owner]

    def allocate_cache(
        self,
        batch: int,
        max_length: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> ModelCache:
        """An empty cache for `batch` sequences of up to `max_length` tokens.

        `star.cost.cache_bytes` says its size. Tensors are in `dtype`, by default the weights', but states of
        recurrences, which are float32; LIVs that share keys or values have one tensor in common.
        """
        layers: list[Any] = []
        for plan, layer in zip(self.plans, self.layers, strict=True):
            source = None if plan.source is None else layers[plan.source]
            layers.append(
                cast(LivLayer, layer).allocate_cache(
                    batch, max_length, dtype, device, source=source, shared=plan.shared
                )
            )
        return ModelCache(layers)

    @torch.no_grad()
    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        cache_dtype: torch.dtype | None = None,
        cuda_graph: bool = False,
    ) -> Tensor:
        """Continues every row of `ids` by `max_new_tokens` tokens.

        Args:
            ids: (B, L) prompts, L at least 1.
            max_new_tokens: at least 0.
            temperature: divides the logits; 0 takes the likeliest token.
            top_k: draw from the k likeliest tokens only.
            top_p: draw from the likeliest tokens that together have at least this probability.
            seed: of the draws; or `generator`, on the model's device. Neither: torch's global generator.
            cache_dtype: by default the weights'.
            cuda_graph: replay one captured CUDA graph for every token after the prompt, which spares small
                models most of their time (`star.decoding`). The graph is kept for calls of the same batch.

        Returns:
            (B, L + max_new_tokens): the prompts and what follows them.

        Raises:
            ValueError: an argument out of its range, or no graph can be captured.
        """
        if ids.dim() != 2 or ids.shape[1] < 1:
            raise ValueError(f"generate: ids has shape {tuple(ids.shape)}; it takes (B, L) with L at least 1")
        if max_new_tokens < 0:
            raise ValueError(f"generate: max_new_tokens is {max_new_tokens!r}; it takes 0 or more")
        if seed is not None and generator is not None:
            raise ValueError("generate: seed and generator are both given; it takes one of them")
        if seed is not None:
            generator = torch.Generator(ids.device).manual_seed(seed)
        start = ids.shape[1]
        tokens = torch.cat([ids, ids.new_zeros(ids.shape[0], max_new_tokens)], dim=1)
        if max_new_tokens == 0:
            return tokens
        with self._decoding(len(ids), start + max_new_tokens, cache_dtype, cuda_graph) as (memory, step):
            hidden = self.hidden(ids, memory)
            for place in range(start, start + max_new_tokens):
                logits = F.linear(hidden[:, -1], self.head_weight)
                tokens[:, place] = sample(
                    logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator
                )
                if place + 1 < start + max_new_tokens:
                    hidden = step(tokens[:, place : place + 1])
        return tokens

    @contextlib.contextmanager
    def _decoding(
        self, batch: int, max_length: int, dtype: torch.dtype | None, cuda_graph: bool
    ) -> Iterator[tuple[ModelCache, Callable[[Tensor], Tensor]]]:
        """An empty cache, and what reads one more token of every row into it."""
        if not cuda_graph:
            memory = self.allocate_cache(batch, max_length, dtype)
            yield memory, lambda token: self.hidden(token, memory)
            return
        from star.decoding import graph_step

        with graph_step(self, batch, max_length, dtype) as step:
            yield step.cache, lambda token: step(self, token)


def build_model(
    genome: Genome,
    config: ModelConfig,
    *,
    seed: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> StarModel:
    """The model that `genome` describes, with its initial weights.

    Args:
        genome: a valid genome; `genome.repair(rng)` makes one.
        config: sizes and constants that the genome leaves open.
        seed: of the initial weights; torch's global generator is left as it was. None: the global generator.
        device, dtype: of the weights; on "meta" nothing is allocated.

    Raises:
        GenomeError: the genome is not valid; the message names the gene.
    """
    with contextlib.nullcontext() if seed is None else _seeded(seed, device):
        return StarModel(genome, config, device=device, dtype=dtype)


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device | str | None) -> Iterator[None]:
    """Draws from `seed` inside, on the CPU and on `device`; the global generators are put back after."""
    place = torch.device("cpu" if device is None else device)
    with torch.random.fork_rng([place] if place.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class _Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        normal_(self.weight, self.embedding_dim**-0.5)


# --------------------------------------------------------------------------------------------------------
# The table from class to layer


def build_layer(
    plan: LivPlan,
    config: ModelConfig,
    depth: int,
    owner: nn.Module | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> nn.Module:
    """The layer of one LIV: what its constructor names of what a model has to offer, and the entry's own."""
    offered = {
        **config_arguments(config),
        "residual_layers": depth,
        "lambda_init": lambda_init(plan.index),
        "groups": plan.featurizer_groups,
        "featurizer": owner,
        "device": device,
        "dtype": dtype,
    }
    layer = plan.entry.load_layer()
    taken = {name: value for name, value in offered.items() if name in _parameters(layer)}
    return cast(nn.Module, layer(**(taken | dict(plan.entry.layer_arguments))))


def config_arguments(config: ModelConfig) -> dict[str, Any]:
    """What a configuration offers to the layers, by the names that their constructors use."""
    return {
        "dim": config.width,
        "heads": config.heads,
        "hidden": config.swiglu_width,
        "kernel_size": config.short_conv_kernel,
        "conv_kernel": config.mamba_conv_kernel,
        "dt_rank": config.dt_rank,
        "rope_theta": config.rope_theta,
    }


def lambda_init(index: int) -> float:
    """Where λ of a differential LIV starts: 0.2 in the first, towards 0.8 in late ones (Diff Transformer)."""
    return 0.8 - 0.6 * math.exp(-0.3 * index)


@cache
def _parameters(layer: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(layer).parameters)


def is_counted(name: str) -> bool:
    """Whether the parameter of this name counts as size: not the embedding, norms and biases (as in STAR)."""
    return not name.endswith("bias") and not name.startswith(("embedding.", "norm.", "norms."))


def parameter_count(model: StarModel) -> int:
    """Parameters of a built model, counted as `star.cost.parameters` does."""
    return sum(p.numel() for name, p in model.named_parameters() if is_counted(name))
