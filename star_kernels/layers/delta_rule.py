"""The gated delta rule: Gated DeltaNet (arXiv 2412.06464), as in Qwen3-Next.

S_t = exp(g_t) S_{t-1} + β_t k_t (v_t - (exp(g_t) S_{t-1})ᵀ k_t)ᵀ, y_t = Dk^-1/2 S_tᵀ q_t: what the state
holds under a key is rewritten, where linear attention only adds to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from star_kernels.cache import CacheTensor, LayerCache
from star_kernels.layers import stateful
from star_kernels.layers.base import Features, LivLayer, require_divisor, require_positive
from star_kernels.layers.initial import uniform_
from star_kernels.layers.linear_attention import causal_sums
from star_kernels.layers.norm import RMSNorm
from star_kernels.layers.projection import DepthwiseConv, OutputProjection, Projection, step_bias_
from star_kernels.memoryless import glu
from star_kernels.norm import rms_norm

L2_EPS = 1e-6


class GatedDeltaNet(LivLayer):
    """Gated DeltaNet's mixer.

    Args:
        dim: width D of input and output.
        key_heads: heads Hk of queries and keys.
        value_heads: heads Hv of values, gates and states, a multiple of Hk: value head i has the query and
            key of head i // (Hv / Hk). By default Hk.
        key_head_dim: channels Dk of a query or key; by default D / Hk.
        value_head_dim: channels Dv of a value; by default Dk.
        conv_kernel: taps K of the convolution of queries, keys and values.
        norm_eps: added to the mean squares of the norm of the heads.
        residual_layers: layers that add to the same residual stream; scales the output's initial weights.
        featurizer: another such layer, whose weights make the features.
        device, dtype: of the weights.

    Raises:
        ValueError: sizes that do not divide as said.

    Queries, keys and values go through a convolution and a SiLU; queries and keys are normalised to length 1;
    β = σ(b), g = -exp(A_log) softplus(a + dt_bias); the heads' outputs become RMSNorm(y) ⊙ silu(z).

    State dict, as Qwen3-Next's: ``in_proj_qkvz.weight`` (2 Hk Dk + 2 Hv Dv, D), for every key head the rows
    of its query, its key, its values, their gates z; ``in_proj_ba.weight`` (2 Hv, D), for every key head the
    b and the a of its value heads; ``conv1d.weight`` (2 Hk Dk + Hv Dv, 1, K), all queries, all keys, all
    values; ``dt_bias`` and ``A_log`` (Hv,); ``norm.weight`` (Dv,); ``out_proj.weight`` (D, Hv Dv).

    Initialisation: projections N(0, 1/D), taps ±K^-1/2, A uniform in 1 to 16, softplus(dt_bias) log-uniform
    in 0.001 to 0.1, norm ones, output N(0, 1/16 / (Hv Dv · residual_layers)).

    Cache: ``tail`` (B, K - 1, 2 Hk Dk + Hv Dv), ``state`` (B, Hv, Dk, Dv) float32.
    """

    groups = ("query", "key", "value", "beta", "decay", "gate")

    def __init__(
        self,
        dim: int,
        key_heads: int,
        value_heads: int | None = None,
        *,
        key_head_dim: int | None = None,
        value_head_dim: int | None = None,
        conv_kernel: int = 4,
        norm_eps: float = 1e-6,
        residual_layers: int = 1,
        featurizer: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, featurizer)
        owner = type(self).__name__
        require_positive(owner, key_heads=key_heads, conv_kernel=conv_kernel)
        if key_head_dim is None:
            require_divisor(owner, "key_heads", key_heads, dim=dim)
            key_head_dim = dim // key_heads
        self.key_heads = key_heads
        self.value_heads = key_heads if value_heads is None else value_heads
        self.key_head_dim = key_head_dim
        self.value_head_dim = key_head_dim if value_head_dim is None else value_head_dim
        self.conv_kernel, self.norm_eps = conv_kernel, norm_eps
        require_positive(owner, value_heads=self.value_heads)
        require_positive(owner, key_head_dim=self.key_head_dim, value_head_dim=self.value_head_dim)
        require_divisor(owner, "key_heads", key_heads, value_heads=self.value_heads)
        self.key_dim = key_heads * self.key_head_dim
        self.value_dim = self.value_heads * self.value_head_dim
        if self.owns_featurizer:
            self._build(device, dtype)
        self.norm = RMSNorm(self.value_head_dim, norm_eps, device=device, dtype=dtype)
        self.out_proj = OutputProjection(
            self.value_dim, dim, residual_layers=residual_layers, device=device, dtype=dtype
        )

    def _build(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        width = 2 * self.key_dim + self.value_dim
        self.in_proj_qkvz = Projection(self.dim, width + self.value_dim, device=device, dtype=dtype)
        self.in_proj_ba = Projection(self.dim, 2 * self.value_heads, device=device, dtype=dtype)
        self.conv1d = DepthwiseConv(width, self.conv_kernel, uniform=True, device=device, dtype=dtype)
        numbers = torch.empty(2, self.value_heads, device=device, dtype=dtype)
        self.dt_bias = nn.Parameter(step_bias_(numbers[0].clone()))
        self.A_log = nn.Parameter(uniform_(numbers[1].clone(), 1, 16).log())

    def make_features(self, x: Tensor, names: Sequence[str], cache: LayerCache | None = None) -> Features:
        """Queries and keys (B, L, Hk, Dk), values and gates (B, L, Hv, Dv), β and log-decays (B, L, Hv):
        always all."""
        each = self.value_heads // self.key_heads
        widths = [self.key_head_dim] * 2 + [each * self.value_head_dim] * 2
        by_head = self.in_proj_qkvz(x).unflatten(-1, (self.key_heads, -1)).split(widths, dim=-1)
        rates = self.in_proj_ba(x).unflatten(-1, (self.key_heads, -1))
        b, a = (part.flatten(2) for part in rates.chunk(2, dim=-1))
        mixed = torch.cat([part.flatten(2) for part in by_head[:3]], dim=-1)
        mixed = stateful.short_conv(mixed, self.conv1d.taps, activation="silu", cache=cache)
        query, key, value = mixed.split([self.key_dim, self.key_dim, self.value_dim], dim=-1)
        wide = torch.promote_types(a.dtype, torch.float32)
        rate = torch.exp(self.A_log.to(wide))
        return {
            "query": _unit(query.unflatten(-1, (self.key_heads, -1))),
            "key": _unit(key.unflatten(-1, (self.key_heads, -1))),
            "value": value.unflatten(-1, (self.value_heads, -1)),
            "beta": b.sigmoid(),
            "decay": -rate * F.softplus(a.to(wide) + self.dt_bias.to(wide)),
            "gate": by_head[3].flatten(2).unflatten(-1, (self.value_heads, -1)),
        }

    def operate(self, features: Features, cache: LayerCache | None = None) -> Tensor:
        """The delta rule, heads side by side, (B, L, Hv Dv)."""
        query, key, value = features["query"], features["key"], features["value"]
        y = stateful.gated_delta_rule(query, key, value, features["beta"], features["decay"], cache=cache)
        return y.flatten(2)

    def finish(self, y: Tensor, features: Features) -> Tensor:
        """RMSNorm of every head, times silu(gate)."""
        heads = self.norm(y.unflatten(-1, (self.value_heads, -1)))
        return glu(features["gate"], heads).flatten(2)

    def cache_tensors(self, max_length: int, shared: Sequence[str] = ()) -> list[CacheTensor]:
        """The convolution's tail and the states."""
        return [
            CacheTensor("tail", (self.conv_kernel - 1, 2 * self.key_dim + self.value_dim), "tail"),
            CacheTensor("state", (self.value_heads, self.key_head_dim, self.value_head_dim), "state"),
        ]

    def materialize(self, x: Tensor, given: Mapping[str, Tensor] | None = None) -> Tensor:
        """T (B, Hv, L, L) = Dk^-1/2 tril(Q Kᵀ ⊙ Γ) (I + β tril(K Kᵀ ⊙ Γ, -1))⁻¹ β.

        Γ_ij = exp(g_{j+1} + ... + g_i). The inverse turns the values into what is left of them to write after
        the earlier ones.
        """
        features = self.featurize(x, given=given)
        each = self.value_heads // self.key_heads
        query, key = (features[name].repeat_interleave(each, dim=2) for name in ("query", "key"))
        decay = causal_sums(features["decay"].to(x.dtype).mT).exp()
        beta = features["beta"].mT[..., None]
        scores = (torch.einsum("bihd,bjhd->bhij", query, key) * decay).tril()
        overlap = beta * (torch.einsum("bihd,bjhd->bhij", key, key) * decay).tril(-1)
        written = torch.linalg.solve_triangular(
            overlap, torch.diag_embed(beta[..., 0]), upper=False, unitriangular=True
        )
        return scores @ written * self.key_head_dim**-0.5


def _unit(x: Tensor) -> Tensor:
    """x / sqrt(Σ x² + ε) over the last dimension: a root-mean-square norm with the weight Dk^-1/2."""
    width = x.shape[-1]
    weight = torch.full((width,), width**-0.5, device=x.device, dtype=x.dtype)
    return cast(Tensor, rms_norm(x, weight, L2_EPS / width))
