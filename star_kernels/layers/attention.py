"""Softmax attention: multi-head, grouped-query, with short convolutions, differential.

y_i = Σ_j softmax_j(q_i·k_j / √Dh) v_j over j <= i, rotary positions on queries and keys. Classes SA-1 to SA-4
of STAR (arXiv 2411.17800) and their differential variants.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from star_kernels.attention import attention, attention_decode, diff_attention
from star_kernels.cache import CacheTensor, LayerCache
from star_kernels.layers import stateful
from star_kernels.layers.base import Features, LivLayer, made_groups, require_positive
from star_kernels.layers.initial import normal_
from star_kernels.layers.projection import GroupProjection, OutputProjection
from star_kernels.layers.rotary import rotary_tables
from star_kernels.norm import rope

GROUPS = ("key", "query", "value")
"""In this order every choice with the queries lies side by side, and keys and queries turn at once."""


class AttentionFeaturizer(nn.Module):
    """Makes queries (B, L, H, Dh) and keys and values (B, L, Hkv, Dh) from x.

    State dict: ``projection.weight``, rows in the order keys, queries, values; with short convolutions
    ``taps`` (rows, kernel_size), one depthwise filter for each of these rows.
    """

    def __init__(
        self,
        dim: int,
        widths: Mapping[str, int],
        head_dim: int,
        *,
        rotary_dim: int,
        rope_theta: float,
        kernel_size: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.rotary_dim = rotary_dim
        self.rope_theta = rope_theta
        self.projection = GroupProjection(dim, widths, device=device, dtype=dtype)
        self.taps: nn.Parameter | None = None
        if kernel_size:
            taps = torch.empty(self.projection.out_features, kernel_size, device=device, dtype=dtype)
            self.taps = nn.Parameter(normal_(taps, kernel_size**-0.5))

    def forward(self, x: Tensor, names: Sequence[str], cache: LayerCache | None = None) -> Features:
        """The named groups, in the order of ``GROUPS``; the queries must be among them."""
        fused = self.projection.fused(x, names)
        if self.taps is not None:
            fused = stateful.short_conv(fused, self.taps[self.projection.rows(names)], cache=cache)
        heads = fused.unflatten(-1, (-1, self.head_dim))
        counts = [self.projection.widths[name] // self.head_dim for name in names]
        features: Features = {}
        if names[-1] == "value":
            heads, features["value"] = heads.split([sum(counts[:-1]), counts[-1]], dim=2)
        turned = self._turn(heads, cache)
        if names[0] == "key":
            features["key"], features["query"] = turned.split(counts[:2], dim=2)
        else:
            features["query"] = turned
        return features

    def _turn(self, heads: Tensor, cache: LayerCache | None) -> Tensor:
        """Rotary positions on heads (B, L, H, Dh), on each half of a head where there are two."""
        length, count = heads.shape[1], heads.shape[2]
        by_row = cache is not None and cache.goes_by_row(heads)
        if by_row:
            assert cache is not None
            tables = rotary_tables(0, cache.max_length, self.rotary_dim, self.rope_theta, heads.device)
            # Kept with the cache, since a captured graph reads these very tensors.
            cos = cache.derive("cos", lambda: tables[0])[cache.lengths]
            sin = cache.derive("sin", lambda: tables[1])[cache.lengths]
            heads = heads.transpose(0, 1)  # one token a row: rows with their places, as rope takes tokens
        else:
            start = 0 if cache is None else cache.position
            cos, sin = rotary_tables(start, length, self.rotary_dim, self.rope_theta, heads.device)
        if self.rotary_dim == self.head_dim:
            turned = rope(heads, cos, sin)
        else:
            halves = heads.unflatten(-1, (-1, self.rotary_dim)).flatten(2, 3)
            turned = rope(halves, cos, sin).unflatten(2, (count, -1)).flatten(3)
        return turned.transpose(0, 1) if by_row else turned


class Attention(LivLayer):
    """Causal softmax attention with rotary positions.

    Args:
        dim: width D of input and output.
        heads: query heads H; D / H is the head width Dh, even.
        kv_repeat: query heads that one key/value head serves; a divisor of H (1: multi-head).
        short_conv: put a depthwise causal convolution on queries, keys and values after their projection.
        kernel_size: its taps.
        rope_theta: base of the rotary frequencies.
        residual_layers: layers that add to the same residual stream; scales the output's initial weights.
        groups: feature groups the featurizer makes; by default all of "key", "query", "value".
        featurizer: another such layer's, to be used instead of an own one.
        device, dtype: of the weights.

    Raises:
        ValueError: sizes that do not divide as said, or an unknown group.

    State dict: ``featurizer.projection.weight`` ((H + 2 Hkv) Dh, D), rows in the order keys, queries, values;
    ``featurizer.taps`` with short convolutions; ``output.weight`` (D, D).

    Initialisation: projections N(0, 1/D); taps N(0, 1/K), so that heads look at neighbours from the first
    step on (near the identity they train more slowly); output N(0, 1/16 / (D · residual_layers)).

    Cache: ``key`` and ``value`` (B, max_length, Hkv, Dh), after convolution and rotary; with short
    convolutions ``tail``, the last kernel_size - 1 projections of the groups that the layer makes itself.
    """

    featurizer: AttentionFeaturizer
    groups = GROUPS
    halves = 1

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_repeat: int = 1,
        *,
        short_conv: bool = False,
        kernel_size: int = 3,
        rope_theta: float = 10000.0,
        residual_layers: int = 1,
        groups: Sequence[str] | None = None,
        featurizer: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        owner = type(self).__name__
        require_positive(owner, heads=heads, kv_repeat=kv_repeat, kernel_size=kernel_size)
        if dim % heads or (dim // heads) % (2 * self.halves):
            raise ValueError(
                f"{owner}: heads is {heads}; it takes a divisor of dim = {dim} that leaves heads "
                f"of a multiple of {2 * self.halves} channels"
            )
        if heads % kv_repeat:
            raise ValueError(f"{owner}: kv_repeat is {kv_repeat}; it takes a divisor of heads = {heads}")
        self.heads = heads
        self.head_dim = dim // heads
        self.kv_heads = heads // kv_repeat
        self.tail = kernel_size - 1 if short_conv else 0
        self.widths = {"key": dim // kv_repeat, "query": dim, "value": dim // kv_repeat}
        own = None
        if featurizer is None:
            made = made_groups(owner, GROUPS, groups)
            own = AttentionFeaturizer(
                dim,
                {name: self.widths[name] for name in made},
                self.head_dim,
                rotary_dim=self.head_dim // self.halves,
                rope_theta=rope_theta,
                kernel_size=kernel_size if short_conv else 0,
                device=device,
                dtype=dtype,
            )
        self._set_featurizer(own, featurizer)
        self.output = OutputProjection(dim, dim, residual_layers=residual_layers, device=device, dtype=dtype)

    def operate(self, features: Features, cache: LayerCache | None = None) -> Tensor:
        """Attention over this call's tokens and those of the cache, heads side by side, (B, L, D)."""
        query, key, value = features["query"], features["key"], features["value"]
        if cache is None:
            return self._attend(query, key, value).flatten(2)
        if query.shape[1] == 1 and (cache.lengths is not None or cache.tensors["key"].dtype == query.dtype):
            cache.write("key", key)
            cache.write("value", value)
            return self._decode(query, cache).flatten(2)
        return self._attend(query, cache.extend("key", key), cache.extend("value", value)).flatten(2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention(query, key, value)

    def _decode(self, query: Tensor, cache: LayerCache) -> Tensor:
        """One token over the cache, which holds it already."""
        key, value = (cache.tensors[name].to(query.dtype) for name in ("key", "value"))
        counts = cache.counts(query.shape[0], query.device)
        return attention_decode(query[:, 0], key, value, counts).unsqueeze(1)

    def cache_tensors(self, max_length: int, shared: Sequence[str] = ()) -> list[CacheTensor]:
        """Keys, values, and the tail of the short convolutions."""
        shape = (max_length, self.kv_heads, self.head_dim)
        wanted = [CacheTensor(name, shape, "position", (name,)) for name in ("key", "value")]
        if self.tail:
            made = sum(width for name, width in self.widths.items() if name not in shared)
            wanted.append(CacheTensor("tail", (self.tail, made), "tail"))
        return wanted

    def materialize(self, x: Tensor, given: Mapping[str, Tensor] | None = None) -> Tensor:
        """T (B, H, L, L), lower triangular: softmax rows of a matrix of rank Dh at most (see the base)."""
        features = self.featurize(x, given=given)
        return _weights(features["query"], features["key"])


class DiffAttention(Attention):
    """Differential attention: (softmax(q1·k1) - λ softmax(q2·k2)) v (Diff Transformer, arXiv 2410.05258).

    Every head's queries and keys are two halves of Dh / 2 channels, over one common value of Dh channels, so
    that it has the weights of :class:`Attention`; rotary positions turn each half. λ is learned for every
    head and starts at ``lambda_init``; Diff Transformer's norm of the heads is left out: the difference alone
    is the operator.

    Args, cache and initialisation: as :class:`Attention`, with Dh a multiple of 4. State dict: also ``lam``
    (H,).
    """

    halves = 2

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_repeat: int = 1,
        *,
        lambda_init: float = 0.8,
        short_conv: bool = False,
        kernel_size: int = 3,
        rope_theta: float = 10000.0,
        residual_layers: int = 1,
        groups: Sequence[str] | None = None,
        featurizer: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim,
            heads,
            kv_repeat,
            short_conv=short_conv,
            kernel_size=kernel_size,
            rope_theta=rope_theta,
            residual_layers=residual_layers,
            groups=groups,
            featurizer=featurizer,
            device=device,
            dtype=dtype,
        )
        self.lam = nn.Parameter(torch.full((heads,), lambda_init, device=device, dtype=dtype))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q1, q2 = query.chunk(2, dim=-1)
        k1, k2 = key.chunk(2, dim=-1)
        return diff_attention(q1, k1, q2, k2, value, self.lam)

    def _decode(self, query: Tensor, cache: LayerCache) -> Tensor:
        if cache.lengths is None:
            end = cache.position + 1
            return self._attend(query, cache.tensors["key"][:, :end], cache.tensors["value"][:, :end])
        key, value = (cache.tensors[name].to(query.dtype) for name in ("key", "value"))
        counts = cache.counts(query.shape[0], query.device)
        first, second = (
            attention_decode(half_query[:, 0], half_key, value, counts)
            for half_query, half_key in zip(query.chunk(2, dim=-1), key.chunk(2, dim=-1), strict=True)
        )
        return (first - self.lam.to(first.dtype)[:, None] * second).unsqueeze(1)

    def materialize(self, x: Tensor, given: Mapping[str, Tensor] | None = None) -> Tensor:
        """T (B, H, L, L): the difference of two causal softmax matrices, of rank Dh / 2 before it."""
        features = self.featurize(x, given=given)
        q1, q2 = features["query"].chunk(2, dim=-1)
        k1, k2 = features["key"].chunk(2, dim=-1)
        return _weights(q1, k1) - self.lam[:, None, None] * _weights(q2, k2)


def _weights(query: Tensor, key: Tensor) -> Tensor:
    """softmax_j(q_i·k_j / √Dh) over j <= i, (B, H, L, L)."""
    key = key.repeat_interleave(query.shape[2] // key.shape[2], dim=2)
    scores = torch.einsum("bihd,bjhd->bhij", query, key) * query.shape[-1] ** -0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).triu(1)
    return scores.masked_fill(future, float("-inf")).softmax(dim=-1)
