"""Gated input-varying recurrences: Mamba's selective state space (arXiv 2312.00752), plain and differential.

h_t = exp(Δ_t A) ⊙ h_{t-1} + Δ_t v_t B_t, y_t = C_t·h_t: a sequentially semi-separable operator. Classes Rec-1
and Rec-2 of STAR, at expansion 1: there the recurrence is as wide as the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from star_kernels.cache import CacheTensor, LayerCache
from star_kernels.layers import stateful
from star_kernels.layers.base import Features, LivLayer, made_groups, require_positive
from star_kernels.layers.projection import (
    DepthwiseConv,
    GroupProjection,
    OutputProjection,
    StepProjection,
)

GROUPS = ("delta", "value", "B", "C")


class SelectiveSSM(LivLayer):
    """Mamba-1's mixer.

    Args:
        dim: width D of input and output.
        state_size: numbers N that each channel's state holds.
        inner: width E of the recurrence; by default D (Mamba's own is 2D).
        conv_kernel: taps K of the convolution before the recurrence.
        conv_bias: whether the convolution has a bias.
        bias: give ``in_proj`` and ``out_proj`` biases.
        dt_rank: rank R of the projection to step sizes; by default D / 16, rounded up.
        residual_layers: layers that add to the same residual stream; scales the output's initial weights.
        groups: feature groups that the layer makes itself; by default all of "delta", "value", "B", "C". Only
            B and C can be left out.
        featurizer: another such layer, whose weights make the features; A is among them.
        device, dtype: of the weights.

    The value is silu(conv(first half of ``in_proj``)), the gate its second half; Δ, B and C are made of the
    value.

    State dict, as Mamba's: ``in_proj.weight`` (2E, D), rows value, gate; ``conv1d.weight`` (E, 1, K) and
    ``conv1d.bias`` (E,); ``x_proj.weight`` (R + 2N, E), rows Δ, B, C; ``dt_proj.weight`` (E, R) and
    ``dt_proj.bias`` (E,); ``A_log`` (E, N), A = -exp(A_log); ``D`` (E,), the skip; ``out_proj.weight``
    (D, E).

    Initialisation: Mamba's: A = -(1, ..., N) in every channel, step sizes log-uniform in 0.001 to 0.1, skip
    ones; ``in_proj`` N(0, 1/D), ``x_proj`` N(0, 1/E), taps ±K^-1/2, ``dt_proj`` ±R^-1/2; output
    N(0, 1/16 / (E · residual_layers)).

    Cache: ``tail`` (B, K - 1, E), ``state`` (B, E, N) float32.
    """

    groups = GROUPS
    own_groups = ("value", "delta")
    halves = 1

    def __init__(
        self,
        dim: int,
        state_size: int = 16,
        *,
        inner: int | None = None,
        conv_kernel: int = 4,
        conv_bias: bool = True,
        bias: bool = False,
        dt_rank: int | None = None,
        residual_layers: int = 1,
        groups: Sequence[str] | None = None,
        featurizer: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, featurizer)
        self.inner = dim if inner is None else inner
        self.dt_rank = max(1, math.ceil(dim / 16)) if dt_rank is None else dt_rank
        self.state_size, self.conv_kernel = state_size, conv_kernel
        self.conv_bias, self.bias = conv_bias, bias
        owner = type(self).__name__
        require_positive(owner, state_size=state_size, inner=self.inner)
        require_positive(owner, conv_kernel=conv_kernel, dt_rank=self.dt_rank)
        if self.owns_featurizer:
            self._build(made_groups(owner, GROUPS, groups), device, dtype)
        self.D = nn.Parameter(torch.ones(self.inner, device=device, dtype=dtype))
        self.out_proj = OutputProjection(
            self.inner, dim, bias=bias, residual_layers=residual_layers, device=device, dtype=dtype
        )

    def _build(
        self, made: Sequence[str], device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        """The modules that make the features; a differential layer has all but value and gate twice."""
        h, inner, place = self.halves, self.inner, {"device": device, "dtype": dtype}
        every = {"delta": h * self.dt_rank, "B": h * self.state_size, "C": h * self.state_size}
        widths = {name: width for name, width in every.items() if name in made or name == "delta"}
        self.in_proj = GroupProjection(
            self.dim, {"value": inner, "gate": inner}, bias=self.bias, device=device, dtype=dtype
        )
        self.conv1d = DepthwiseConv(
            inner, self.conv_kernel, bias=self.conv_bias, uniform=True, device=device, dtype=dtype
        )
        self.x_proj = GroupProjection(inner, widths, device=device, dtype=dtype)
        self.dt_proj = StepProjection(self.dt_rank, h * inner, device=device, dtype=dtype)
        rates = torch.arange(1, self.state_size + 1, device=device, dtype=torch.float32)
        A_log = torch.empty(h * inner, self.state_size, **place)  # type: ignore[arg-type]
        self.A_log = nn.Parameter(A_log.copy_(rates.log().expand_as(A_log)))
        # Decay would pull all states of a channel to one rate; optimizers read this mark, as in Mamba.
        self.A_log.no_weight_decay = True  # type: ignore[attr-defined]

    def make_features(self, x: Tensor, names: Sequence[str], cache: LayerCache | None = None) -> Features:
        """The named groups, which include value and delta, and the gate.

        Value, gate and Δ are (B, L, E), B and C (B, L, N); of a differential layer B and C are (B, L, 2N),
        the step sizes "delta" and "delta_b".
        """
        value, gate = self.in_proj.fused(x, ("value", "gate")).chunk(2, dim=-1)
        conv = self.conv1d
        value = stateful.short_conv(value, conv.taps, conv.bias, activation="silu", cache=cache)
        features = self.x_proj(value, [name for name in names if name != "value"])
        features |= {"value": value, "gate": gate}
        weight = self.dt_proj.weight
        if self.halves == 1:
            features["delta"] = F.linear(features["delta"], weight)
        else:
            ranks, weights = features["delta"].chunk(2, dim=-1), weight.chunk(2)
            features["delta"] = F.linear(ranks[0], weights[0])
            features["delta_b"] = F.linear(ranks[1], weights[1])
        return features

    def operate(self, features: Features, cache: LayerCache | None = None) -> Tensor:
        """The scan, gated by silu(gate), (B, L, E)."""
        return stateful.selective_scan(
            features["value"],
            features["delta"],
            _rates(self.featurizer.A_log, cache),
            features["B"],
            features["C"],
            self.D,
            features["gate"],
            self.featurizer.dt_proj.bias,
            cache=cache,
        )

    def cache_tensors(self, max_length: int, shared: Sequence[str] = ()) -> list[CacheTensor]:
        """The convolution's tail and the recurrence's state."""
        return [
            CacheTensor("tail", (self.conv_kernel - 1, self.inner), "tail"),
            CacheTensor("state", (self.inner, self.state_size), "state"),
        ]

    def materialize(self, x: Tensor, given: Mapping[str, Tensor] | None = None) -> Tensor:
        """T (B, D, L, L): silu(gate_i) (C_i·exp(A (Δ_{j+1} + ... + Δ_i)) B_j Δ_j + skip at i = j), j <= i.

        Without the diagonal, a block below it has rank N at most.
        """
        features = self.featurize(x, given=given)
        gate = F.silu(features["gate"]).mT[..., None]
        skip = torch.diag_embed(self.D[:, None].expand(-1, x.shape[1]))
        matrix = _semi_separable(
            features["delta"],
            features["B"],
            features["C"],
            self.featurizer.A_log,
            self.featurizer.dt_proj.bias,
        )
        return gate * (matrix + skip)


class DiffSelectiveSSM(SelectiveSSM):
    """The difference of two selective scans over one common value, scan_a(v) - λ scan_b(v), then the gate.

    Args and initialisation: as :class:`SelectiveSSM`; λ is one learned number, at first ``lambda_init``. The
    skip belongs to the first half. State dict: ``x_proj.weight`` (2R + 4N, E), ``dt_proj.*`` and ``A_log`` of
    2E rows, first half first; also ``lam`` (). Cache: ``tail``, ``state_a``, ``state_b``.
    """

    halves = 2

    def __init__(
        self,
        dim: int,
        state_size: int = 16,
        *,
        lambda_init: float = 0.8,
        conv_kernel: int = 4,
        dt_rank: int | None = None,
        residual_layers: int = 1,
        groups: Sequence[str] | None = None,
        featurizer: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim,
            state_size,
            conv_kernel=conv_kernel,
            dt_rank=dt_rank,
            residual_layers=residual_layers,
            groups=groups,
            featurizer=featurizer,
            device=device,
            dtype=dtype,
        )
        self.lam = nn.Parameter(torch.full((), lambda_init, device=device, dtype=dtype))

    def operate(self, features: Features, cache: LayerCache | None = None) -> Tensor:
        """The difference of the two scans, gated by silu(gate), (B, L, D)."""
        value, gate = features["value"], features["gate"]
        rates = _rates(self.featurizer.A_log, cache)
        first, second = (
            stateful.selective_scan(value, delta, A, B, C, skip, gate, bias, cache=cache, name=name)
            for delta, A, B, C, skip, bias, name in zip(
                (features["delta"], features["delta_b"]),
                rates.chunk(2),
                features["B"].chunk(2, dim=-1),
                features["C"].chunk(2, dim=-1),
                (self.D, None),
                self.featurizer.dt_proj.bias.chunk(2),
                ("state_a", "state_b"),
                strict=True,
            )
        )
        return first - self.lam.to(first.dtype) * second

    def cache_tensors(self, max_length: int, shared: Sequence[str] = ()) -> list[CacheTensor]:
        """The convolution's tail and both recurrences' states."""
        states = [
            CacheTensor(name, (self.inner, self.state_size), "state") for name in ("state_a", "state_b")
        ]
        return [CacheTensor("tail", (self.conv_kernel - 1, self.inner), "tail"), *states]

    def materialize(self, x: Tensor, given: Mapping[str, Tensor] | None = None) -> Tensor:
        """T (B, D, L, L), the first half's matrix with the skip minus λ times the second's, gated."""
        features = self.featurize(x, given=given)
        gate = F.silu(features["gate"]).mT[..., None]
        skip = torch.diag_embed(self.D[:, None].expand(-1, x.shape[1]))
        first, second = (
            _semi_separable(*half)
            for half in zip(
                (features["delta"], features["delta_b"]),
                features["B"].chunk(2, dim=-1),
                features["C"].chunk(2, dim=-1),
                self.featurizer.A_log.chunk(2),
                self.featurizer.dt_proj.bias.chunk(2),
                strict=True,
            )
        )
        return gate * (first + skip - self.lam * second)


def _rates(A_log: Tensor, cache: LayerCache | None) -> Tensor:
    """A = -exp(A_log), in float32 at least: half precision would blur the slow states."""
    if cache is not None:
        return cache.derive("A", lambda: _rates(A_log, None))
    return -torch.exp(A_log.to(torch.promote_types(A_log.dtype, torch.float32)))


def _semi_separable(delta: Tensor, B: Tensor, C: Tensor, A_log: Tensor, dt_bias: Tensor) -> Tensor:
    """C_i·exp(A (Δ_{j+1} + ... + Δ_i)) B_j Δ_j for j <= i, (B, D, L, L)."""
    step = F.softplus(delta + dt_bias)
    elapsed = step.cumsum(1).mT
    since = elapsed[..., :, None] - elapsed[..., None, :]
    causal = torch.ones(since.shape[-2:], dtype=torch.bool, device=since.device).tril()
    since = since.masked_fill(~causal, 0)
    decay = torch.exp(-torch.exp(A_log)[:, None, None, :] * since[..., None])
    matrix = torch.einsum("bin,bdijn,bjn,bjd->bdij", C, decay, B, step)
    return matrix * causal
