"""Gated memoryless units: operators that mix no tokens, T_ii = silu(gate_i). Class GMemless of STAR."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from star_kernels.cache import CacheTensor, LayerCache
from star_kernels.layers.base import Features, LivLayer, made_groups, require_positive
from star_kernels.layers.projection import GroupProjection, OutputProjection
from star_kernels.memoryless import glu


class SwiGLUFeaturizer(nn.Module):
    """Makes gate and up, (B, L, hidden) each. State dict: ``projection.weight``, rows gate, up."""

    def __init__(
        self,
        dim: int,
        widths: Mapping[str, int],
        *,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        # A featurizer whose layer takes every group from another one has nothing to project.
        self.projection = GroupProjection(dim, widths, device=device, dtype=dtype) if widths else None

    def forward(self, x: Tensor, names: Sequence[str], cache: LayerCache | None = None) -> Features:
        """The named groups."""
        if self.projection is None:
            raise ValueError(f"featurizer makes no group; {names[0]!r} must be given by another layer")
        return self.projection(x, names)


class SwiGLU(LivLayer):
    """silu(gate) ⊙ up, projected back (arXiv 2002.05202).

    Args:
        dim: width D of input and output.
        hidden: width of gate and up; by default 8/3 D.
        residual_layers: layers that add to the same residual stream; scales the output's initial weights.
        groups: feature groups the featurizer makes; by default both.
        featurizer: another such layer's, to be used instead of an own one.
        device, dtype: of the weights.

    State dict: ``featurizer.projection.weight`` (2 hidden, D), rows gate, up; ``output.weight`` (D, hidden).

    Initialisation: projection N(0, 1/D), output N(0, 1/16 / (hidden · residual_layers)). Cache: nothing.
    """

    groups = ("gate", "up")
    values = "up"

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        *,
        residual_layers: int = 1,
        groups: Sequence[str] | None = None,
        featurizer: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim)
        hidden = max(1, round(8 * dim / 3)) if hidden is None else hidden
        require_positive("SwiGLU", hidden=hidden)
        self.hidden = hidden
        own = None
        if featurizer is None:
            made = made_groups("SwiGLU", self.groups, groups)
            own = SwiGLUFeaturizer(dim, dict.fromkeys(made, hidden), device=device, dtype=dtype)
        self._set_featurizer(own, featurizer)
        self.output = OutputProjection(
            hidden, dim, residual_layers=residual_layers, device=device, dtype=dtype
        )

    def operate(self, features: Features, cache: LayerCache | None = None) -> Tensor:
        """silu(gate) ⊙ up, (B, L, hidden)."""
        return glu(features["gate"], features["up"])

    def cache_tensors(self, max_length: int, shared: Sequence[str] = ()) -> list[CacheTensor]:
        """Nothing to remember."""
        return []

    def materialize(self, x: Tensor, given: Mapping[str, Tensor] | None = None) -> Tensor:
        """T (B, hidden, L, L), diagonal (see the base)."""
        gate = self.featurize(x, given=given)["gate"]
        return torch.diag_embed(nn.functional.silu(gate).mT)
