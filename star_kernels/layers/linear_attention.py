"""Linear attention with decay: GLA (arXiv 2312.06635) and Mamba-2 (arXiv 2405.21060).

S_t = diag(exp(g_t)) S_{t-1} + k_t v_tᵀ, y_t = scale · S_tᵀ q_t: every head is a sequentially semi-separable
operator, of the rank of its keys.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from star_kernels.cache import CacheTensor, LayerCache
from star_kernels.layers import stateful
from star_kernels.layers.base import Features, LivLayer, require_divisor, require_positive
from star_kernels.layers.initial import uniform_
from star_kernels.layers.norm import RMSNorm
from star_kernels.layers.projection import (
    DepthwiseConv,
    GroupProjection,
    OutputProjection,
    Projection,
    step_bias_,
)
from star_kernels.memoryless import glu
from star_kernels.norm import rms_norm


class GatedLinearAttention(LivLayer):
    """GLA: linear attention whose state forgets at a rate of its own in every key channel.

    Args:
        dim: width D of input and output.
        heads: heads H.
        key_dim: channels of all heads' queries and keys; by default D / 2.
        value_dim: channels of all heads' values; by default D.
        gate_rank: rank R of the projection to the decays.
        gate_normalizer: the logarithms of the decays are logsigmoid(projection) / gate_normalizer.
        norm_eps: added to the mean squares of the norm of the heads.
        residual_layers: layers that add to the same residual stream; scales the output's initial weights.
        featurizer: another such layer, whose weights make the features.
        device, dtype: of the weights.

    Raises:
        ValueError: heads that do not divide key_dim and value_dim.

    The heads' outputs are normalised and gated: RMSNorm(y) ⊙ silu(gate).

    State dict, as flash-linear-attention's: ``q_proj.weight`` and ``k_proj.weight`` (key_dim, D),
    ``v_proj.weight`` and ``g_proj.weight`` (value_dim, D), ``gk_proj.0.weight`` (R, D), ``gk_proj.1.weight``
    (key_dim, R), ``gk_proj.1.bias``, ``g_norm_swish_gate.weight`` (value_dim / H,), ``o_proj.weight``
    (D, value_dim).

    Initialisation: projections N(0, 1/fan-in), so that decays start around 0.96, biases zeros, norm ones,
    output N(0, 1/16 / (value_dim · residual_layers)).

    Cache: ``state`` (B, H, key_dim / H, value_dim / H) float32.
    """

    groups = ("query", "key", "value", "decay", "gate")
    output_name = "o_proj"

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        key_dim: int | None = None,
        value_dim: int | None = None,
        gate_rank: int = 16,
        gate_normalizer: float = 16.0,
        norm_eps: float = 1e-5,
        residual_layers: int = 1,
        featurizer: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, featurizer)
        owner = type(self).__name__
        self.heads = heads
        self.key_dim = max(1, dim // 2) if key_dim is None else key_dim
        self.value_dim = dim if value_dim is None else value_dim
        self.gate_normalizer, self.norm_eps = gate_normalizer, norm_eps
        require_positive(owner, heads=heads, gate_rank=gate_rank)
        require_positive(owner, key_dim=self.key_dim, value_dim=self.value_dim)
        require_divisor(owner, "heads", heads, key_dim=self.key_dim, value_dim=self.value_dim)
        if not gate_normalizer > 0:
            raise ValueError(f"{owner}: gate_normalizer is {gate_normalizer!r}; it takes a number above 0")
        if self.owns_featurizer:
            self.q_proj = Projection(dim, self.key_dim, device=device, dtype=dtype)
            self.k_proj = Projection(dim, self.key_dim, device=device, dtype=dtype)
            self.v_proj = Projection(dim, self.value_dim, device=device, dtype=dtype)
            self.g_proj = Projection(dim, self.value_dim, device=device, dtype=dtype)
            self.gk_proj = nn.Sequential(
                Projection(dim, gate_rank, device=device, dtype=dtype),
                Projection(gate_rank, self.key_dim, bias=True, device=device, dtype=dtype),
            )
        self.g_norm_swish_gate = RMSNorm(self.value_dim // heads, norm_eps, device=device, dtype=dtype)
        self.o_proj = OutputProjection(
            self.value_dim, dim, residual_layers=residual_layers, device=device, dtype=dtype
        )

    def make_features(self, x: Tensor, names: Sequence[str], cache: LayerCache | None = None) -> Features:
        """Queries, keys and decays (B, L, H, key_dim / H), values and gates (B, L, H, value_dim / H)."""
        made = {
            "query": self.q_proj,
            "key": self.k_proj,
            "value": self.v_proj,
            "decay": self.gk_proj,
            "gate": self.g_proj,
        }
        features = {name: made[name](x).unflatten(-1, (self.heads, -1)) for name in names}
        if "decay" in features:
            # In float32 at least: 64 tokens on, half precision would be off by a quarter.
            wide = features["decay"].to(torch.promote_types(features["decay"].dtype, torch.float32))
            features["decay"] = F.logsigmoid(wide) / self.gate_normalizer
        return features

    def operate(self, features: Features, cache: LayerCache | None = None) -> Tensor:
        """Linear attention, heads side by side, (B, L, value_dim)."""
        query, key, value = features["query"], features["key"], features["value"]
        return stateful.gated_linear_attention(query, key, value, features["decay"], cache=cache).flatten(2)

    def finish(self, y: Tensor, features: Features) -> Tensor:
        """RMSNorm of every head, times silu(gate)."""
        heads = self.g_norm_swish_gate(y.unflatten(-1, (self.heads, -1)))
        return glu(features["gate"], heads).flatten(2)

    def cache_tensors(self, max_length: int, shared: Sequence[str] = ()) -> list[CacheTensor]:
        """The states."""
        return [
            CacheTensor(
                "state", (self.heads, self.key_dim // self.heads, self.value_dim // self.heads), "state"
            )
        ]

    def materialize(self, x: Tensor, given: Mapping[str, Tensor] | None = None) -> Tensor:
        """T (B, H, L, L): Dk^-1/2 Σ_d q_id k_jd exp(g_{j+1,d} + ... + g_{i,d}) for j <= i (see the base)."""
        features = self.featurize(x, given=given)
        decay = features["decay"].to(x.dtype)
        since = causal_sums(decay.movedim(1, -1)).exp().tril()  # (B, H, Dk, L, L)
        query, key = features["query"], features["key"]
        return torch.einsum("bihd,bhdij,bjhd->bhij", query, since, key) * query.shape[-1] ** -0.5


class Mamba2(LivLayer):
    """Mamba-2's mixer: a scalar decay for every head.

    Args:
        dim: width D of input and output.
        state_size: numbers N that each channel's state holds.
        inner: width E of the recurrence; by default 2D.
        head_dim: channels of a head; a divisor of E. There are H = E / head_dim heads.
        n_groups: groups G of heads; those of a group have one B and one C. A divisor of H.
        conv_kernel: taps K of the convolution before the recurrence.
        conv_bias: whether the convolution has a bias.
        bias: give ``in_proj`` and ``out_proj`` biases.
        dt_limit: smallest and largest step size.
        norm_eps: added to the mean squares of the norm.
        residual_layers: layers that add to the same residual stream; scales the output's initial weights.
        featurizer: another such layer, whose weights make the features.
        device, dtype: of the weights.

    Raises:
        ValueError: sizes that do not divide as said.

    Value, B and C come out of one convolution and a SiLU. With Δ = softplus(delta + dt_bias) it is linear
    attention of queries C, keys B, values Δ · value and log-decays -exp(A_log) Δ, plus D · value; the result
    is gated by silu(gate) and then normalised, each of the G groups of channels by itself.

    State dict, as Mamba-2's: ``in_proj.weight`` (2E + 2GN + H, D), rows gate, value, B, C, delta;
    ``conv1d.weight`` (E + 2GN, 1, K), ``conv1d.bias``; ``dt_bias``, ``A_log`` and ``D`` (H,); ``norm.weight``
    (E,); ``out_proj.weight`` (D, E).

    Initialisation: Mamba-2's: A uniform in 1 to 16, step sizes log-uniform in 0.001 to 0.1, D and norm ones,
    taps ±K^-1/2; ``in_proj`` N(0, 1/D); output N(0, 1/16 / (E · residual_layers)).

    Cache: ``tail`` (B, K - 1, E + 2GN), ``state`` (B, H, N, head_dim) float32.
    """

    groups = ("gate", "value", "B", "C", "delta")

    def __init__(
        self,
        dim: int,
        state_size: int = 128,
        *,
        inner: int | None = None,
        head_dim: int = 64,
        n_groups: int = 1,
        conv_kernel: int = 4,
        conv_bias: bool = True,
        bias: bool = False,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        norm_eps: float = 1e-5,
        residual_layers: int = 1,
        featurizer: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, featurizer)
        owner = type(self).__name__
        self.inner = 2 * dim if inner is None else inner
        self.state_size, self.head_dim, self.n_groups = state_size, head_dim, n_groups
        self.conv_kernel, self.conv_bias, self.bias = conv_kernel, conv_bias, bias
        self.dt_limit, self.norm_eps = dt_limit, norm_eps
        require_positive(owner, state_size=state_size, inner=self.inner, head_dim=head_dim)
        require_positive(owner, n_groups=n_groups, conv_kernel=conv_kernel)
        require_divisor(owner, "head_dim", head_dim, inner=self.inner)
        self.heads = self.inner // head_dim
        require_divisor(owner, "n_groups", n_groups, heads=self.heads)
        self.conv_dim = self.inner + 2 * n_groups * state_size
        if self.owns_featurizer:
            widths = {"gate": self.inner, "convolved": self.conv_dim, "delta": self.heads}
            self.in_proj = GroupProjection(dim, widths, bias=bias, device=device, dtype=dtype)
            self.conv1d = DepthwiseConv(
                self.conv_dim, conv_kernel, bias=conv_bias, uniform=True, device=device, dtype=dtype
            )
            self.dt_bias = nn.Parameter(step_bias_(torch.ones(self.heads, device=device, dtype=dtype)))
            rates = uniform_(torch.ones(self.heads, device=device, dtype=dtype), 1, 16)
            self.A_log = nn.Parameter(rates.log())
        self.D = nn.Parameter(torch.ones(self.heads, device=device, dtype=dtype))
        self.norm = RMSNorm(self.inner, norm_eps, device=device, dtype=dtype)
        self.out_proj = OutputProjection(
            self.inner, dim, bias=bias, residual_layers=residual_layers, device=device, dtype=dtype
        )

    def make_features(self, x: Tensor, names: Sequence[str], cache: LayerCache | None = None) -> Features:
        """Gate (B, L, E), value (B, L, H, head_dim), B and C (B, L, G, N), delta (B, L, H): always all."""
        made = self.in_proj(x, ("gate", "convolved", "delta"))
        conv = self.conv1d
        convolved = stateful.short_conv(
            made["convolved"], conv.taps, conv.bias, activation="silu", cache=cache
        )
        shared = self.n_groups * self.state_size
        value, B, C = convolved.split([self.inner, shared, shared], dim=-1)
        return {
            "gate": made["gate"],
            "value": value.unflatten(-1, (self.heads, self.head_dim)),
            "B": B.unflatten(-1, (self.n_groups, self.state_size)),
            "C": C.unflatten(-1, (self.n_groups, self.state_size)),
            "delta": made["delta"],
        }

    def _steps(self, features: Features) -> tuple[Tensor, Tensor]:
        """Step sizes and log-decays, (B, L, H), float32 at least."""
        wide = torch.promote_types(features["delta"].dtype, torch.float32)
        step = F.softplus(features["delta"].to(wide) + self.featurizer.dt_bias.to(wide))
        if self.dt_limit != (0.0, math.inf):
            step = step.clamp(*self.dt_limit)
        return step, step * -torch.exp(self.featurizer.A_log.to(wide))

    def operate(self, features: Features, cache: LayerCache | None = None) -> Tensor:
        """The recurrence and the skip, (B, L, E)."""
        value = features["value"]
        step, log_decay = self._steps(features)
        scaled = value * step.to(value.dtype)[..., None]
        y = stateful.gated_linear_attention(
            features["C"], features["B"], scaled, log_decay, scale=1.0, cache=cache
        )
        return torch.addcmul(y, value, self.D.to(y.dtype)[:, None]).flatten(2)

    def finish(self, y: Tensor, features: Features) -> Tensor:
        """y · silu(gate), normalised in every group."""
        gated = glu(features["gate"], y)
        if self.n_groups == 1:
            return cast(Tensor, self.norm(gated))
        ones = torch.ones(self.inner // self.n_groups, device=y.device, dtype=self.norm.weight.dtype)
        groups = cast(Tensor, rms_norm(gated.unflatten(-1, (self.n_groups, -1)), ones, self.norm_eps))
        return groups.flatten(2) * self.norm.weight.to(y.dtype)

    def cache_tensors(self, max_length: int, shared: Sequence[str] = ()) -> list[CacheTensor]:
        """The convolution's tail and the states."""
        return [
            CacheTensor("tail", (self.conv_kernel - 1, self.conv_dim), "tail"),
            CacheTensor("state", (self.heads, self.state_size, self.head_dim), "state"),
        ]

    def materialize(self, x: Tensor, given: Mapping[str, Tensor] | None = None) -> Tensor:
        """T (B, H, L, L): C_i·B_j exp(a_{j+1} + ... + a_i) Δ_j for j <= i, plus D on the diagonal."""
        features = self.featurize(x, given=given)
        step, log_decay = (part.to(x.dtype).mT for part in self._steps(features))
        product = torch.einsum("bign,bjgn->bgij", features["C"], features["B"])
        product = product.repeat_interleave(self.heads // self.n_groups, dim=1)
        matrix = (product * causal_sums(log_decay).exp() * step[..., None, :]).tril()
        return matrix + torch.diag_embed(self.D[:, None].expand(-1, x.shape[1]))


def causal_sums(log_decay: Tensor) -> Tensor:
    """g_{j+1} + ... + g_i for j <= i, zero above the diagonal; (..., L) to (..., L, L)."""
    total = log_decay.cumsum(-1)
    return (total[..., :, None] - total[..., None, :]).tril()
