"""Softmax attention: multi-head, grouped-query, with short convolutions, differential.

y_i = Σ_j softmax_j(q_i·k_j / √Dh) v_j over j <= i, rotary positions on queries and keys. Classes SA-1 to SA-4
of STAR (arXiv 2411.17800) and their differential variants.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from star_kernels.attention import attention, attention_decode, diff_attention
from star_kernels.cache import CacheTensor, LayerCache
from star_kernels.layers import stateful
from star_kernels.layers.base import Features, LivLayer, made_groups, require_positive
from star_kernels.layers.initial import normal_
from star_kernels.layers.norm import RMSNorm
from star_kernels.layers.projection import DepthwiseConv, OutputProjection, Projection, not_made
from star_kernels.layers.rotary import Rotary, rotary_tables
from star_kernels.norm import rms_norm, rope

GROUPS = ("key", "query", "value")
PROJECTIONS = {"key": "k_proj", "query": "q_proj", "value": "v_proj"}
CONVOLUTIONS = {"key": "k_conv1d", "query": "q_conv1d", "value": "v_conv1d"}
NORMS = {"key": "k_norm", "query": "q_norm"}


class Attention(LivLayer):
    """Causal softmax attention with rotary positions.

    Args:
        dim: width D of input and output.
        heads: query heads H.
        kv_repeat: query heads that one key/value head serves; a divisor of H (1: multi-head). There are
            Hkv = H / kv_repeat key/value heads.
        head_dim: channels Dh of a head, even; by default D / H.
        bias: give all four projections biases.
        qk_norm: normalise every query and key to root mean square 1, with learned weights, before they turn.
        norm_eps: added to the mean squares.
        short_conv: put a depthwise causal convolution on queries, keys and values after their projection.
        kernel_size: its taps K.
        rope_theta: base of the rotary frequencies.
        rotary: all settings of the rotary positions; goes before ``rope_theta``.
        residual_layers: layers that add to the same residual stream; scales the output's initial weights.
        groups: feature groups that the layer makes itself; by default all of "key", "query", "value".
        featurizer: another such layer, whose weights make the features.
        device, dtype: of the weights.

    Raises:
        ValueError: sizes that do not divide as said, or an unknown group.

    State dict, as Llama's: ``q_proj.weight`` (H Dh, D), ``k_proj.weight`` and ``v_proj.weight`` (Hkv Dh, D),
    ``o_proj.weight`` (D, H Dh), and their ``bias``; with short convolutions ``q_conv1d.weight`` (H Dh, 1, K),
    ``k_conv1d.weight``, ``v_conv1d.weight``; with norms ``q_norm.weight``, ``k_norm.weight`` (Dh,).

    Initialisation: projections N(0, 1/D); taps N(0, 1/K), so that heads look at neighbours from the first
    step on (near the identity they train more slowly); output N(0, 1/16 / (H Dh · residual_layers)); biases
    zeros, norms ones.

    Cache: ``key`` and ``value`` (B, max_length, Hkv, Dh), after convolution, norm and rotary; with short
    convolutions ``tail``, the last K - 1 projections of the groups that the layer makes itself.
    """

    groups = GROUPS
    output_name = "o_proj"
    decodes_by_row = True
    halves = 1

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_repeat: int = 1,
        *,
        head_dim: int | None = None,
        bias: bool = False,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        short_conv: bool = False,
        kernel_size: int = 3,
        rope_theta: float = 10000.0,
        rotary: Rotary | None = None,
        residual_layers: int = 1,
        groups: Sequence[str] | None = None,
        featurizer: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, featurizer)
        self.heads, self.kv_repeat = heads, kv_repeat
        self.head_dim = self._checked_head_dim(head_dim, kernel_size)
        self.kv_heads = heads // kv_repeat
        self.bias, self.qk_norm, self.norm_eps = bias, qk_norm, norm_eps
        self.short_conv, self.kernel_size = short_conv, kernel_size
        self.rotary = Rotary(rope_theta) if rotary is None else rotary
        self.rotary.of_width(self.head_dim // self.halves)
        inner, shared = heads * self.head_dim, self.kv_heads * self.head_dim
        self.widths = {"key": shared, "query": inner, "value": shared}
        if self.owns_featurizer:
            self._build(made_groups(type(self).__name__, GROUPS, groups), device, dtype)
        self.o_proj = OutputProjection(
            inner, dim, bias=bias, residual_layers=residual_layers, device=device, dtype=dtype
        )

    def _checked_head_dim(self, head_dim: int | None, kernel_size: int) -> int:
        """Channels of a head; raises ValueError for sizes that do not fit together."""
        owner, dim, heads, kv_repeat = type(self).__name__, self.dim, self.heads, self.kv_repeat
        require_positive(owner, heads=heads, kv_repeat=kv_repeat, kernel_size=kernel_size)
        multiple = 2 * self.halves
        if head_dim is None:
            if dim % heads or (dim // heads) % multiple:
                raise ValueError(
                    f"{owner}: heads is {heads}; it takes a divisor of dim = {dim} that leaves heads "
                    f"of a multiple of {multiple} channels"
                )
            head_dim = dim // heads
        require_positive(owner, head_dim=head_dim)
        if head_dim % multiple:
            raise ValueError(f"{owner}: head_dim is {head_dim}; it takes a multiple of {multiple}")
        if heads % kv_repeat:
            raise ValueError(f"{owner}: kv_repeat is {kv_repeat}; it takes a divisor of heads = {heads}")
        return head_dim

    def _build(
        self, made: Sequence[str], device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        """The modules that make the groups of ``made``."""
        for name in made:
            width = self.widths[name]
            projection = Projection(self.dim, width, bias=self.bias, device=device, dtype=dtype)
            self.add_module(PROJECTIONS[name], projection)
        for name in made if self.short_conv else ():
            taps = DepthwiseConv(self.widths[name], self.kernel_size, device=device, dtype=dtype)
            self.add_module(CONVOLUTIONS[name], taps)
        for name in made if self.qk_norm else ():
            if name in NORMS:
                self.add_module(
                    NORMS[name], RMSNorm(self.head_dim, self.norm_eps, device=device, dtype=dtype)
                )

    def make_features(self, x: Tensor, names: Sequence[str], cache: LayerCache | None = None) -> Features:
        """The named groups: queries (B, L, H, Dh), keys and values (B, L, Hkv, Dh)."""
        flat = []
        for name in names:
            projection = self._modules.get(PROJECTIONS[name])
            if projection is None:
                raise not_made(name, [n for n in GROUPS if PROJECTIONS[n] in self._modules])
            flat.append(projection(x))
        if self.short_conv:
            flat = self._convolved(flat, names, cache)
        features: Features = {}
        for name, channels in zip(names, flat, strict=True):
            heads = channels.unflatten(-1, (-1, self.head_dim))
            if name != "value":
                heads = self._turn(self._modules[NORMS[name]](heads) if self.qk_norm else heads, cache)  # type: ignore[misc]
            features[name] = heads
        return features

    def _convolved(self, flat: list[Tensor], names: Sequence[str], cache: LayerCache | None) -> list[Tensor]:
        """The groups after their short convolutions, all in one call."""

        def joined_taps() -> Tensor:
            convolutions = (cast(DepthwiseConv, self._modules[CONVOLUTIONS[name]]) for name in names)
            return torch.cat([convolution.taps for convolution in convolutions])

        taps = joined_taps() if cache is None else cache.derive("taps", joined_taps)
        joined = stateful.short_conv(torch.cat(flat, dim=-1), taps, cache=cache)
        return list(joined.split([part.shape[-1] for part in flat], dim=-1))

    def _turn(self, heads: Tensor, cache: LayerCache | None) -> Tensor:
        """Rotary positions on heads (B, L, H, Dh), on each half of a head where there are two."""
        length, count, width = heads.shape[1], heads.shape[2], self.head_dim // self.halves
        by_row = cache is not None and cache.goes_by_row(heads)
        if by_row:
            assert cache is not None
            tables = rotary_tables(0, cache.max_length, self.rotary, width, heads.device)
            # Kept with the cache, since a captured graph reads these very tensors.
            cos = cache.derive("cos", lambda: tables[0])[cache.lengths]
            sin = cache.derive("sin", lambda: tables[1])[cache.lengths]
            heads = heads.transpose(0, 1)  # one token a row: rows with their places, as rope takes tokens
        else:
            start, room = (0, 0) if cache is None else (cache.position, cache.max_length)
            cos, sin = rotary_tables(start, length, self.rotary, width, heads.device, room=room)
        if self.halves == 1:
            turned = rope(heads, cos, sin)
        else:
            halves = heads.unflatten(-1, (-1, width)).flatten(2, 3)
            turned = rope(halves, cos, sin).unflatten(2, (count, -1)).flatten(3)
        return turned.transpose(0, 1) if by_row else turned

    def operate(self, features: Features, cache: LayerCache | None = None) -> Tensor:
        """Attention over this call's tokens and those of the cache, heads side by side, (B, L, H Dh)."""
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
        if self.short_conv:
            made = sum(width for name, width in self.widths.items() if name not in shared)
            wanted.append(CacheTensor("tail", (self.kernel_size - 1, made), "tail"))
        return wanted

    def materialize(self, x: Tensor, given: Mapping[str, Tensor] | None = None) -> Tensor:
        """T (B, H, L, L), lower triangular: softmax rows of a matrix of rank Dh at most (see the base)."""
        features = self.featurize(x, given=given)
        return _weights(features["query"], features["key"])


class DiffAttention(Attention):
    """Differential attention: (softmax(q1·k1) - λ softmax(q2·k2)) v (Diff Transformer, arXiv 2410.05258).

    Every head's queries and keys are two halves of Dh / 2 channels, over one common value of Dh channels, so
    that it has the weights of :class:`Attention`; rotary positions turn each half. Every head is then
    normalised and scaled by 1 - ``lambda_init``, and λ = exp(λq1·λk1) - exp(λq2·λk2) + ``lambda_init``.

    Args: as :class:`Attention`, with Dh a multiple of 4, and
        lambda_init: where λ starts: 0.8 - 0.6 exp(-0.3 · index of the layer) in Diff Transformer.
        bare: leave the difference alone: one learned λ a head, which starts at ``lambda_init``, no norm and
            no scale after it (STAR's differential variants).

    State dict: also ``lambda_q1``, ``lambda_k1``, ``lambda_q2``, ``lambda_k2`` (Dh / 2,) and
    ``subln.weight`` (Dh,); bare ``lam`` (H,).

    Initialisation: as :class:`Attention`; the λ vectors N(0, 0.01), the norm ones. Cache: as there.
    """

    halves = 2

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_repeat: int = 1,
        *,
        lambda_init: float = 0.8,
        bare: bool = False,
        head_dim: int | None = None,
        bias: bool = False,
        qk_norm: bool = False,
        norm_eps: float = 1e-5,
        short_conv: bool = False,
        kernel_size: int = 3,
        rope_theta: float = 10000.0,
        rotary: Rotary | None = None,
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
            head_dim=head_dim,
            bias=bias,
            qk_norm=qk_norm,
            norm_eps=norm_eps,
            short_conv=short_conv,
            kernel_size=kernel_size,
            rope_theta=rope_theta,
            rotary=rotary,
            residual_layers=residual_layers,
            groups=groups,
            featurizer=featurizer,
            device=device,
            dtype=dtype,
        )
        self.lambda_init, self.bare = lambda_init, bare
        if bare:
            self.lam = nn.Parameter(torch.full((heads,), lambda_init, device=device, dtype=dtype))
            return

        def vector() -> nn.Parameter:
            return nn.Parameter(normal_(torch.empty(self.head_dim // 2, device=device, dtype=dtype), 0.1))

        self.lambda_q1, self.lambda_k1 = vector(), vector()
        self.lambda_q2, self.lambda_k2 = vector(), vector()
        self.subln = RMSNorm(self.head_dim, norm_eps, device=device, dtype=dtype)

    @property
    def difference(self) -> Tensor:
        """λ, float32 at least: one for every head (H,), or one number ()."""
        if self.bare:
            return self.lam

        def product(query: Tensor, key: Tensor) -> Tensor:
            wide = torch.promote_types(query.dtype, torch.float32)
            return torch.exp((query.to(wide) * key.to(wide)).sum())

        first = product(self.lambda_q1, self.lambda_k1)
        return first - product(self.lambda_q2, self.lambda_k2) + self.lambda_init

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q1, q2 = query.chunk(2, dim=-1)
        k1, k2 = key.chunk(2, dim=-1)
        return diff_attention(q1, k1, q2, k2, value, self.difference)

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
        return (first - self.difference.to(first.dtype)[..., None] * second).unsqueeze(1)

    def finish(self, y: Tensor, features: Features) -> Tensor:
        """Norm of every head, times 1 - λ_init."""
        if self.bare:
            return y
        weight = self.subln.weight * (1 - self.lambda_init)
        heads = y.unflatten(-1, (self.heads, self.head_dim))
        return cast(Tensor, rms_norm(heads, weight, self.norm_eps)).flatten(2)

    def materialize(self, x: Tensor, given: Mapping[str, Tensor] | None = None) -> Tensor:
        """T (B, H, L, L): the difference of two causal softmax matrices, of rank Dh / 2 before it."""
        features = self.featurize(x, given=given)
        q1, q2 = features["query"].chunk(2, dim=-1)
        k1, k2 = features["key"].chunk(2, dim=-1)
        return _weights(q1, k1) - self.difference.to(x.dtype)[..., None, None] * _weights(q2, k2)


def _weights(query: Tensor, key: Tensor) -> Tensor:
    """softmax_j(q_i·k_j / √Dh) over j <= i, (B, H, L, L)."""
    key = key.repeat_interleave(query.shape[2] // key.shape[2], dim=2)
    scores = torch.einsum("bihd,bjhd->bhij", query, key) * query.shape[-1] ** -0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).triu(1)
    return scores.masked_fill(future, float("-inf")).softmax(dim=-1)
