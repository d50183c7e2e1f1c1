"""Gated memoryless units: operators that mix no tokens, T_ii = silu(gate_i). Class GMemless of STAR."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from star_kernels.cache import CacheTensor, LayerCache
from star_kernels.layers.base import Features, LivLayer, made_groups, require_positive
from star_kernels.layers.projection import OutputProjection, Projection, not_made
from star_kernels.memoryless import glu

PROJECTIONS = {"gate": "gate_proj", "up": "up_proj"}


class SwiGLU(LivLayer):
    """silu(gate) ⊙ up, projected back (arXiv 2002.05202).

    Args:
        dim: width D of input and output.
        hidden: width of gate and up; by default 8/3 D.
        residual_layers: layers that add to the same residual stream; scales the output's initial weights.
        groups: feature groups that the layer makes itself; by default both.
        featurizer: another such layer, whose weights make the features.
        device, dtype: of the weights.

    State dict, as Llama's: ``gate_proj.weight`` and ``up_proj.weight`` (hidden, D), ``down_proj.weight``
    (D, hidden).

    Initialisation: projections N(0, 1/D), output N(0, 1/16 / (hidden · residual_layers)). Cache: nothing.
    """

    groups = ("gate", "up")
    values = "up"
    output_name = "down_proj"

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
        super().__init__(dim, featurizer)
        hidden = max(1, round(8 * dim / 3)) if hidden is None else hidden
        require_positive("SwiGLU", hidden=hidden)
        self.hidden = hidden
        if self.owns_featurizer:
            for name in made_groups("SwiGLU", self.groups, groups):
                self.add_module(PROJECTIONS[name], Projection(dim, hidden, device=device, dtype=dtype))
        self.down_proj = OutputProjection(
            hidden, dim, residual_layers=residual_layers, device=device, dtype=dtype
        )

    def make_features(self, x: Tensor, names: Sequence[str], cache: LayerCache | None = None) -> Features:
        """The named groups, (B, L, hidden) each."""
        features: Features = {}
        for name in names:
            projection = self._modules.get(PROJECTIONS[name])
            if projection is None:
                raise not_made(name, [n for n in self.groups if PROJECTIONS[n] in self._modules])
            features[name] = projection(x)
        return features

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
