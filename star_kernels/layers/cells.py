"""Nonlinear recurrences solved in parallel: GRU and LSTM with diagonal recurrent weights (ParaRNN, arXiv
2510.21450), in its block of projection, convolution, cell, gated norm, projection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from star_kernels.cache import CacheTensor, LayerCache
from star_kernels.layers import stateful
from star_kernels.layers.base import Features, LivLayer, require_divisor, require_positive
from star_kernels.layers.initial import normal_
from star_kernels.layers.linear_attention import causal_sums
from star_kernels.layers.norm import RMSNorm
from star_kernels.layers.projection import DepthwiseConv, GroupProjection, OutputProjection
from star_kernels.memoryless import glu

SHORTEST_MEMORY, LONGEST_MEMORY = 2.0, 512.0
"""Tokens after which a channel has forgotten, at first: spread over the channels, evenly in the logarithm."""


class CellLayer(LivLayer):
    """What the two cells have in common; a subclass names the cell's inputs and has its recurrence."""

    values = "candidate"
    gate_sign = 1.0

    def __init__(
        self,
        dim: int,
        *,
        inner: int | None = None,
        blocks: int = 1,
        conv_kernel: int = 4,
        norm_eps: float = 1e-6,
        residual_layers: int = 1,
        featurizer: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, featurizer)
        owner = type(self).__name__
        self.inner = dim if inner is None else inner
        self.blocks, self.conv_kernel, self.norm_eps = blocks, conv_kernel, norm_eps
        require_positive(owner, inner=self.inner, blocks=blocks, conv_kernel=conv_kernel)
        require_divisor(owner, "blocks", blocks, inner=self.inner)
        if self.owns_featurizer:
            self._build(device, dtype)
        self.norm = RMSNorm(self.inner, norm_eps, device=device, dtype=dtype)
        self.out_proj = OutputProjection(
            self.inner, dim, residual_layers=residual_layers, device=device, dtype=dtype
        )

    def _build(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        inner, width = self.inner, self.inner // self.blocks
        self.in_proj = GroupProjection(self.dim, {"value": inner, "gate": inner}, device=device, dtype=dtype)
        self.conv1d = DepthwiseConv(
            inner, self.conv_kernel, bias=True, uniform=True, device=device, dtype=dtype
        )
        A = torch.empty(3, inner, device=device, dtype=dtype)
        B = torch.empty(self.blocks, width, 3, width, device=device, dtype=dtype)
        self.A = nn.Parameter(normal_(A, (2 / (5 * inner)) ** 0.5))
        self.B = nn.Parameter(normal_(B, width**-0.5))
        memory = torch.logspace(0, 1, inner, base=LONGEST_MEMORY / SHORTEST_MEMORY, device=device)
        bias = torch.zeros(3, inner, device=device, dtype=dtype)
        bias[0] = self.gate_sign * torch.log(SHORTEST_MEMORY * memory - 1)
        self.b = nn.Parameter(bias)
        for parameter in (self.A, self.b):
            # Recurrent weights and biases in matrices: decay would shorten every memory.
            parameter.no_weight_decay = True  # type: ignore[attr-defined]

    def make_features(self, x: Tensor, names: Sequence[str], cache: LayerCache | None = None) -> Features:
        """The cell's three inputs and the gate, (B, L, E) each: always all."""
        value, gate = self.in_proj.fused(x, ("value", "gate")).chunk(2, dim=-1)
        conv = self.conv1d
        value = stateful.short_conv(value, conv.taps, conv.bias, activation="silu", cache=cache)
        blocks = value.unflatten(-1, (self.blocks, -1))
        inputs = torch.einsum("blhi,hivj->vblhj", blocks, self.B).flatten(3)
        inputs = inputs + self.b.to(inputs.dtype)[:, None, None]
        return {**dict(zip(self.groups, inputs.unbind(0), strict=False)), "gate": gate}

    def _recurrent_weights(self) -> tuple[Tensor, ...]:
        return self.featurizer.A.unbind(0)

    def finish(self, y: Tensor, features: Features) -> Tensor:
        """RMSNorm, times silu(gate)."""
        return glu(features["gate"], self.norm(y))

    def _previous(self, states: Tensor) -> Tensor:
        """The states before every token, zeros before the first, (B, L, E)."""
        return torch.cat([torch.zeros_like(states[:, :1]), states[:, :-1]], dim=1)


class GRUScan(CellLayer):
    """A layer around ParaRNN's GRU cell (see :func:`star_kernels.gru_scan`).

    Args:
        dim: width D of input and output.
        inner: width E of the recurrence; by default D.
        blocks: blocks on the diagonal of the cell's input weights; a divisor of E.
        conv_kernel: taps K of the convolution before the cell.
        norm_eps: added to the mean squares of the norm.
        residual_layers: layers that add to the same residual stream; scales the output's initial weights.
        featurizer: another such layer, whose weights make the cell's inputs and whose recurrent weights are
            used.
        device, dtype: of the weights.

    Raises:
        ValueError: blocks that do not divide ``inner``.

    u = silu(conv(first half of in_proj)); the cell reads B u + b; the output is RMSNorm(h) ⊙ silu(gate),
    projected.

    State dict, with ParaRNN's names for the cell: ``in_proj.weight`` (2E, D), rows value, gate;
    ``conv1d.weight`` (E, 1, K), ``conv1d.bias``; ``A`` (3, E), recurrent weights of update gate z, reset gate
    r, candidate h; ``B`` (blocks, E / blocks, 3, E / blocks), from a block of u to the three inputs of its
    states; ``b`` (3, E); ``norm.weight`` (E,); ``out_proj.weight`` (D, E).

    Initialisation: ``in_proj`` N(0, 1/D), taps ±K^-1/2, B N(0, blocks / E), A N(0, 0.4 / E), so that cells
    start nearly linear in their states; the biases of the update gate are -log(τ - 1) with memories τ of 2 to
    512 tokens (arXiv 1804.11188), other biases zeros; norm ones; output N(0, 1/16 / (E · residual_layers)).

    Cache: ``tail`` (B, K - 1, E), ``state`` (B, E) float32.

    The cell is **no** linear map of anything that the featurizer makes: its gates read the states. It is an
    LIV in a wider sense: along the states that an input leads to, h is a gated linear recurrence of the
    :meth:`candidates` ĥ, and this is what :meth:`materialize` shows.
    """

    groups = ("update", "reset", "candidate", "gate")
    gate_sign = -1.0

    def operate(self, features: Features, cache: LayerCache | None = None) -> Tensor:
        """The states h, (B, L, E)."""
        inputs = [features[name] for name in self.groups[:3]]
        return stateful.gru_scan(inputs, self._recurrent_weights(), cache=cache)

    def cache_tensors(self, max_length: int, shared: Sequence[str] = ()) -> list[CacheTensor]:
        """The convolution's tail and the state."""
        tail = CacheTensor("tail", (self.conv_kernel - 1, self.inner), "tail")
        return [tail, CacheTensor("state", (self.inner,), "state")]

    def candidates(self, x: Tensor, given: Mapping[str, Tensor] | None = None) -> Tensor:
        """ĥ of every token, (B, L, E), along the states that x leads to."""
        return self._trajectory(self.featurize(x, given=given))[1]

    def materialize(self, x: Tensor, given: Mapping[str, Tensor] | None = None) -> Tensor:
        """T (B, E, L, L): z_j (1 - z_{j+1}) ... (1 - z_i) for j <= i, semi-separable of rank 1.

        Applied to :meth:`candidates` it gives what ``operate`` gives; both depend on the states.
        """
        update = self._trajectory(self.featurize(x, given=given))[0].mT
        kept = causal_sums(F.logsigmoid(-update)).exp().tril()
        return kept * update.sigmoid()[..., None, :]

    def _trajectory(self, features: Features) -> tuple[Tensor, Tensor]:
        """Update gates, before their sigmoid, and candidates at every token, (B, L, E) each."""
        before = self._previous(self.operate(features))
        az, ar, ah = self._recurrent_weights()
        update = features["update"] + az * before
        reset = torch.sigmoid(features["reset"] + ar * before)
        return update, torch.tanh(features["candidate"] + ah * reset * before)


class LSTMScan(CellLayer):
    """A layer around ParaRNN's LSTM cell with coupled gates (see :func:`star_kernels.lstm_scan`).

    Args, initialisation and state dict: as :class:`GRUScan`; the rows of ``A``, ``B`` and ``b`` are forget
    gate f, output gate o, candidate z, and the biases of the forget gate are +log(τ - 1).

    Cache: ``tail`` (B, K - 1, E), ``cell`` and ``state`` (B, E) float32: c and h.

    Like the GRU it is no linear map of its features; :meth:`materialize` shows it along an input's states.
    """

    groups = ("forget", "expose", "candidate", "gate")

    def operate(self, features: Features, cache: LayerCache | None = None) -> Tensor:
        """The states h, (B, L, E)."""
        inputs = [features[name] for name in self.groups[:3]]
        return stateful.lstm_scan(inputs, self._recurrent_weights(), cache=cache)

    def cache_tensors(self, max_length: int, shared: Sequence[str] = ()) -> list[CacheTensor]:
        """The convolution's tail and the states c and h."""
        tail = CacheTensor("tail", (self.conv_kernel - 1, self.inner), "tail")
        return [tail, *(CacheTensor(name, (self.inner,), "state") for name in ("cell", "state"))]

    def candidates(self, x: Tensor, given: Mapping[str, Tensor] | None = None) -> Tensor:
        """z of every token, (B, L, E), along the states that x leads to."""
        return self._trajectory(self.featurize(x, given=given))[2]

    def materialize(self, x: Tensor, given: Mapping[str, Tensor] | None = None) -> Tensor:
        """T (B, E, L, L): (o_i tanh(c_i) / c_i) f_i ... f_{j+1} (1 - f_j) for j <= i.

        Semi-separable of rank 1. Applied to :meth:`candidates` it gives what ``operate`` gives; all factors
        depend on the states.
        """
        forget, expose, candidate = self._trajectory(self.featurize(x, given=given))
        kept = causal_sums(F.logsigmoid(forget.mT)).exp().tril()
        cells = kept * torch.sigmoid(-forget.mT)[..., None, :]
        c = torch.einsum("bdij,bjd->bid", cells, candidate)
        # tanh(c) / c is 1 at 0.
        shrink = torch.where(c == 0, torch.ones_like(c), torch.tanh(c) / torch.where(c == 0, 1.0, c))
        return (expose * shrink).mT[..., None] * cells

    def _trajectory(self, features: Features) -> tuple[Tensor, Tensor, Tensor]:
        """Forget gates, before their sigmoid, output gates and candidates at every token, (B, L, E) each."""
        before = self._previous(self.operate(features))
        af, ao, az = self._recurrent_weights()
        forget = features["forget"] + af * before
        expose = torch.sigmoid(features["expose"] + ao * before)
        return forget, expose, torch.tanh(features["candidate"] + az * before)
