"""Gated input-varying recurrences: Mamba's selective state space (arXiv 2312.00752), plain and differential.

h_t = exp(Δ_t A) ⊙ h_{t-1} + Δ_t v_t B_t, y_t = C_t·h_t: a sequentially semi-separable operator. Classes Rec-1
and Rec-2 of STAR; expansion 1, so the recurrence is as wide as the model.
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
from star_kernels.layers.initial import uniform_
from star_kernels.layers.projection import GroupProjection, OutputProjection

GROUPS = ("B", "delta", "value", "C")

SHORTEST_STEP, LONGEST_STEP = 1e-3, 1e-1


class SelectiveFeaturizer(nn.Module):
    """Makes value, gate and step sizes Δ (B, L, D), and B and C (B, L, N), from x, and holds A.

    The value is silu(conv(first projection)); B, C and Δ are made of the value, as in Mamba. A differential
    operator has all but value and gate twice: B and C are (B, L, 2N), the step sizes "delta" and "delta_b".

    State dict, with h halves and R = dt_rank: ``projection.weight`` (2D, D), rows value, gate; ``taps``
    (D, K) and ``taps_bias`` (D,); ``selection.weight``, rows B (hN), Δ (hR), C (hN), applied to the value;
    ``dt_weight`` (hD, R); ``dt_bias`` (hD,); ``A_log`` (hD, N), A = -exp(A_log).
    """

    def __init__(
        self,
        dim: int,
        state_size: int,
        dt_rank: int,
        *,
        groups: Sequence[str],
        halves: int,
        conv_kernel: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.halves = halves
        all_widths = {"B": halves * state_size, "delta": halves * dt_rank, "C": halves * state_size}
        widths = {name: width for name, width in all_widths.items() if name in groups or name == "delta"}
        self.projection = GroupProjection(dim, {"value": dim, "gate": dim}, device=device, dtype=dtype)
        self.selection = GroupProjection(dim, widths, device=device, dtype=dtype)

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.taps = weight(dim, conv_kernel)
        self.taps_bias = weight(dim)
        self.dt_weight = weight(halves * dim, dt_rank)
        self.dt_bias = weight(halves * dim)
        self.A_log = weight(halves * dim, state_size)
        # Decay would pull all states of a channel to one rate; optimizers read this mark, as in Mamba.
        self.A_log.no_weight_decay = True  # type: ignore[attr-defined]
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Mamba's initial values (the projections draw their own)."""
        if self.taps.is_meta:
            return
        for weight in (self.taps, self.dt_weight):
            uniform_(weight, -(weight.shape[1] ** -0.5), weight.shape[1] ** -0.5)
        nn.init.zeros_(self.taps_bias)
        # Step sizes spread from 0.001 to 0.1, evenly in the logarithm; the bias is softplus' inverse of them.
        step = uniform_(self.dt_bias, math.log(SHORTEST_STEP), math.log(LONGEST_STEP)).exp()
        self.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))
        rates = torch.arange(1, self.A_log.shape[1] + 1, device=self.A_log.device, dtype=torch.float32)
        self.A_log.copy_(rates.log().expand_as(self.A_log))

    def forward(self, x: Tensor, names: Sequence[str], cache: LayerCache | None = None) -> Features:
        """The named groups, which include value and delta, and the gate."""
        value, gate = self.projection.fused(x, ("value", "gate")).chunk(2, dim=-1)
        value = stateful.short_conv(value, self.taps, self.taps_bias, activation="silu", cache=cache)
        features = self.selection(value, [name for name in names if name != "value"])
        features |= {"value": value, "gate": gate}
        if self.halves == 1:
            features["delta"] = F.linear(features["delta"], self.dt_weight)
        else:
            ranks, weights = features["delta"].chunk(2, dim=-1), self.dt_weight.chunk(2)
            features["delta"] = F.linear(ranks[0], weights[0])
            features["delta_b"] = F.linear(ranks[1], weights[1])
        return features


class SelectiveSSM(LivLayer):
    """Mamba-1's mixer at expansion 1.

    Args:
        dim: width D of input, output and recurrence.
        state_size: numbers N that each channel's state holds.
        conv_kernel: taps of the convolution before the recurrence.
        dt_rank: rank R of the projection to step sizes; by default D / 16, rounded up.
        residual_layers: layers that add to the same residual stream; scales the output's initial weights.
        groups: feature groups the featurizer makes; by default all of "B", "delta", "value", "C". Only B and
            C can be left out.
        featurizer: another such layer's, to be used instead of an own one.
        device, dtype: of the weights.

    State dict: ``featurizer.*`` (:class:`SelectiveFeaturizer`), ``skip`` (D,) (Mamba's D), ``output.weight``
    (D, D).

    Initialisation: Mamba's: A = -(1, ..., N) in every channel, step sizes log-uniform in 0.001 to 0.1, skip
    ones; projections N(0, 1/D); output N(0, 1/16 / (D · residual_layers)).

    Cache: ``tail`` (B, conv_kernel - 1, D), ``state`` (B, D, N) float32.
    """

    featurizer: SelectiveFeaturizer
    groups = GROUPS
    halves = 1

    def __init__(
        self,
        dim: int,
        state_size: int = 16,
        *,
        conv_kernel: int = 4,
        dt_rank: int | None = None,
        residual_layers: int = 1,
        groups: Sequence[str] | None = None,
        featurizer: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        owner = type(self).__name__
        dt_rank = max(1, math.ceil(dim / 16)) if dt_rank is None else dt_rank
        require_positive(owner, state_size=state_size, conv_kernel=conv_kernel, dt_rank=dt_rank)
        self.state_size = state_size
        self.conv_kernel = conv_kernel
        own = None
        if featurizer is None:
            own = SelectiveFeaturizer(
                dim,
                state_size,
                dt_rank,
                groups=made_groups(owner, GROUPS, groups),
                halves=self.halves,
                conv_kernel=conv_kernel,
                device=device,
                dtype=dtype,
            )
        self._set_featurizer(own, featurizer)
        self.skip = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))
        self.output = OutputProjection(dim, dim, residual_layers=residual_layers, device=device, dtype=dtype)

    def operate(self, features: Features, cache: LayerCache | None = None) -> Tensor:
        """The scan, gated by silu(gate), (B, L, D)."""
        return stateful.selective_scan(
            features["value"],
            features["delta"],
            _rates(self.featurizer.A_log, cache),
            features["B"],
            features["C"],
            self.skip,
            features["gate"],
            self.featurizer.dt_bias,
            cache=cache,
        )

    def cache_tensors(self, max_length: int, shared: Sequence[str] = ()) -> list[CacheTensor]:
        """The convolution's tail and the recurrence's state."""
        return [
            CacheTensor("tail", (self.conv_kernel - 1, self.dim), "tail"),
            CacheTensor("state", (self.dim, self.state_size), "state"),
        ]

    def materialize(self, x: Tensor, given: Mapping[str, Tensor] | None = None) -> Tensor:
        """T (B, D, L, L): silu(gate_i) (C_i·exp(A (Δ_{j+1} + ... + Δ_i)) B_j Δ_j + skip at i = j), j <= i.

        Without the diagonal, a block below it has rank N at most.
        """
        features = self.featurize(x, given=given)
        gate = F.silu(features["gate"]).mT[..., None]
        skip = torch.diag_embed(self.skip[:, None].expand(-1, x.shape[1]))
        matrix = _semi_separable(
            features["delta"], features["B"], features["C"], self.featurizer.A_log, self.featurizer.dt_bias
        )
        return gate * (matrix + skip)


class DiffSelectiveSSM(SelectiveSSM):
    """The difference of two selective scans over one common value, scan_a(v) - λ scan_b(v), then the gate.

    Args and initialisation: as :class:`SelectiveSSM`; λ is one learned number, at first ``lambda_init``. The
    skip belongs to the first half. State dict: also ``lam`` (). Cache: ``tail``, ``state_a``, ``state_b``.
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
                (self.skip, None),
                self.featurizer.dt_bias.chunk(2),
                ("state_a", "state_b"),
                strict=True,
            )
        )
        return first - self.lam.to(first.dtype) * second

    def cache_tensors(self, max_length: int, shared: Sequence[str] = ()) -> list[CacheTensor]:
        """The convolution's tail and both recurrences' states."""
        states = [CacheTensor(name, (self.dim, self.state_size), "state") for name in ("state_a", "state_b")]
        return [CacheTensor("tail", (self.conv_kernel - 1, self.dim), "tail"), *states]

    def materialize(self, x: Tensor, given: Mapping[str, Tensor] | None = None) -> Tensor:
        """T (B, D, L, L), the first half's matrix with the skip minus λ times the second's, gated."""
        features = self.featurize(x, given=given)
        gate = F.silu(features["gate"]).mT[..., None]
        skip = torch.diag_embed(self.skip[:, None].expand(-1, x.shape[1]))
        first, second = (
            _semi_separable(*half)
            for half in zip(
                (features["delta"], features["delta_b"]),
                features["B"].chunk(2, dim=-1),
                features["C"].chunk(2, dim=-1),
                self.featurizer.A_log.chunk(2),
                self.featurizer.dt_bias.chunk(2),
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
