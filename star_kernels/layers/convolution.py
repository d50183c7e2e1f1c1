"""Gated convolutions with short explicit and long implicit kernels, and their differential variants.

y = C ⊙ (K * (B ⊙ v)): a scaled Toeplitz operator. Classes GConv-1 (LFM2, arXiv 2511.23404) and GConv-2
(Hyena, arXiv 2302.10866) of STAR.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from star_kernels.cache import CacheTensor, LayerCache
from star_kernels.layers import stateful
from star_kernels.layers.base import Features, LivLayer, made_groups, require_positive
from star_kernels.layers.kernel import ImplicitKernel
from star_kernels.layers.projection import DepthwiseConv, GroupProjection, OutputProjection, not_made

GROUPS = ("B", "C", "value")


class GatedConv(LivLayer):
    """What the gated convolutions have in common; a subclass has the kernel and its cache.

    The gates B and C and the value are (B, L, D) each; a differential operator's gates are (B, L, 2D): those
    of the first half, then those of the second.
    """

    lam: nn.Parameter
    groups = GROUPS
    halves = 1

    def __init__(
        self,
        dim: int,
        *,
        bias: bool,
        residual_layers: int,
        groups: Sequence[str] | None,
        featurizer: nn.Module | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(dim, featurizer)
        self.bias = bias
        self.in_proj: GroupProjection | None = None
        made = made_groups(type(self).__name__, GROUPS, groups)
        # A layer that takes every group from another one has nothing to project.
        if self.owns_featurizer and made:
            widths = {name: dim if name == "value" else self.halves * dim for name in made}
            self.in_proj = GroupProjection(dim, widths, bias=bias, device=device, dtype=dtype)
        self.out_proj = OutputProjection(
            dim, dim, bias=bias, residual_layers=residual_layers, device=device, dtype=dtype
        )

    def make_features(self, x: Tensor, names: Sequence[str], cache: LayerCache | None = None) -> Features:
        """The named groups."""
        if self.in_proj is None:
            raise not_made(names[0], ())
        return self.in_proj(x, names)

    def _toeplitz(self, length: int) -> Tensor:
        """The convolution as a matrix, (halves · D, L, L), the term of the skip included."""
        raise NotImplementedError(f"{type(self).__name__} does not define _toeplitz")

    def materialize(self, x: Tensor, given: Mapping[str, Tensor] | None = None) -> Tensor:
        """T (B, D, L, L) = C_i K_{i-j} B_j, lower triangular (see the base); differential: T_a - λ T_b.

        A bias of the convolution adds C ⊙ bias to T · values.
        """
        features = self.featurize(x, given=given)
        toeplitz = self._toeplitz(x.shape[1])
        matrix = features["C"].mT[..., :, None] * toeplitz * features["B"].mT[..., None, :]
        if self.halves == 1:
            return matrix
        first, second = matrix.chunk(2, dim=1)
        return first - self.lam * second


class GatedShortConv(GatedConv):
    """LFM2's gated short convolution: C ⊙ conv(B ⊙ v), raw linear gates, no activation, no bias.

    Args:
        dim: width D of input and output.
        kernel_size: taps K of the depthwise causal convolution.
        bias: give both projections and the convolution biases.
        residual_layers: layers that add to the same residual stream; scales the output's initial weights.
        groups: feature groups that the layer makes itself; by default all of "B", "C", "value".
        featurizer: another such layer, whose weights make the features and whose taps are used.
        device, dtype: of the weights.

    State dict, as LFM2's: ``in_proj.weight`` (3D, D), rows B, C, value; ``conv.weight`` (D, 1, K), tap K-1 on
    the current token; ``out_proj.weight`` (D, D); and their ``bias``.

    Initialisation: projection N(0, 1/D), taps N(0, 1/K), output N(0, 1/16 / (D · residual_layers)), biases
    zeros.

    Cache: ``tail`` (B, K - 1, D), the last products B ⊙ v.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int = 3,
        *,
        bias: bool = False,
        residual_layers: int = 1,
        groups: Sequence[str] | None = None,
        featurizer: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim,
            bias=bias,
            residual_layers=residual_layers,
            groups=groups,
            featurizer=featurizer,
            device=device,
            dtype=dtype,
        )
        require_positive(type(self).__name__, kernel_size=kernel_size)
        self.kernel_size = kernel_size
        if self.owns_featurizer:
            channels = self.halves * dim
            self.conv = DepthwiseConv(channels, kernel_size, bias=bias, device=device, dtype=dtype)

    def operate(self, features: Features, cache: LayerCache | None = None) -> Tensor:
        """C ⊙ conv(B ⊙ v), (B, L, D)."""
        conv = self.featurizer.conv
        return stateful.gated_short_conv(
            features["B"], features["C"], features["value"], conv.taps, conv.bias, cache=cache
        )

    def cache_tensors(self, max_length: int, shared: Sequence[str] = ()) -> list[CacheTensor]:
        """The convolution's tail."""
        return [CacheTensor("tail", (self.kernel_size - 1, self.dim), "tail")]

    def _toeplitz(self, length: int) -> Tensor:
        return toeplitz(self.featurizer.conv.taps.flip(1), length)


class DiffGatedShortConv(GatedShortConv):
    """C_a ⊙ conv_a(B_a ⊙ v) - λ C_b ⊙ conv_b(B_b ⊙ v), over one common value (STAR's GConv-1-Diff).

    Args and initialisation: as :class:`GatedShortConv`; λ is one learned number, at first ``lambda_init``.
    State dict: ``in_proj.weight`` (5D, D), rows B_a, B_b, C_a, C_b, value; ``conv.weight`` (2D, 1, K);
    ``lam`` (); ``out_proj.weight``. Cache: ``tail_a``, ``tail_b``.
    """

    halves = 2

    def __init__(
        self,
        dim: int,
        kernel_size: int = 3,
        *,
        lambda_init: float = 0.8,
        residual_layers: int = 1,
        groups: Sequence[str] | None = None,
        featurizer: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim,
            kernel_size,
            residual_layers=residual_layers,
            groups=groups,
            featurizer=featurizer,
            device=device,
            dtype=dtype,
        )
        self.lam = nn.Parameter(torch.full((), lambda_init, device=device, dtype=dtype))

    def operate(self, features: Features, cache: LayerCache | None = None) -> Tensor:
        """The difference of the two halves, (B, L, D)."""
        value = features["value"]
        first, second = (
            stateful.gated_short_conv(b, c, value, kernel, None, cache=cache, name=name)
            for b, c, kernel, name in zip(
                features["B"].chunk(2, dim=-1),
                features["C"].chunk(2, dim=-1),
                self.featurizer.conv.taps.chunk(2),
                ("tail_a", "tail_b"),
                strict=True,
            )
        )
        return first - self.lam.to(first.dtype) * second

    def cache_tensors(self, max_length: int, shared: Sequence[str] = ()) -> list[CacheTensor]:
        """Both convolutions' tails."""
        shape = (self.kernel_size - 1, self.dim)
        return [CacheTensor(name, shape, "tail") for name in ("tail_a", "tail_b")]


class GatedLongConv(GatedConv):
    """Hyena's operator: C ⊙ (K * (B ⊙ v) + skip ⊙ B ⊙ v), K an implicit kernel as long as the sequence.

    Args:
        dim: width D of input and output.
        residual_layers, groups, featurizer, device, dtype: as :class:`GatedShortConv`.

    State dict: ``in_proj.weight`` (3D, D), rows B, C, value; ``filter_fn.*`` (:class:`ImplicitKernel`); ``D``
    (D,), the skip; ``out_proj.weight`` (D, D).

    Initialisation: projection N(0, 1/D), the kernel as :class:`ImplicitKernel` says, skip ones, output
    N(0, 1/16 / (D · residual_layers)).

    Cache: ``history`` (B, max_length, D), all products B ⊙ v; the kernel's entries are computed once a cache.
    """

    decodes_by_row = True

    def __init__(
        self,
        dim: int,
        *,
        residual_layers: int = 1,
        groups: Sequence[str] | None = None,
        featurizer: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim,
            bias=False,
            residual_layers=residual_layers,
            groups=groups,
            featurizer=featurizer,
            device=device,
            dtype=dtype,
        )
        if self.owns_featurizer:
            self.filter_fn = ImplicitKernel(self.halves * dim, device=device, dtype=dtype)
        self.D = nn.Parameter(torch.ones(self.halves * dim, device=device, dtype=dtype))

    def _kernel(self, length: int, cache: LayerCache | None) -> Tensor:
        """The kernel for this call: of its length, or the cache's, evaluated when it is first asked for."""
        kernel = self.featurizer.filter_fn
        if cache is None:
            return kernel(length)
        return cache.derive("kernel", lambda: kernel(cache.max_length))

    def operate(self, features: Features, cache: LayerCache | None = None) -> Tensor:
        """C ⊙ (K * (B ⊙ v) + skip ⊙ B ⊙ v), (B, L, D)."""
        b, c, value = features["B"], features["C"], features["value"]
        kernel = self._kernel(value.shape[1], cache)
        return stateful.gated_long_conv(b, c, value, kernel, self.D, cache=cache)

    def cache_tensors(self, max_length: int, shared: Sequence[str] = ()) -> list[CacheTensor]:
        """All products; those of a layer whose gate and value are both another's are that layer's."""
        return [CacheTensor("history", (max_length, self.dim), "position", ("B", "value"))]

    def _toeplitz(self, length: int) -> Tensor:
        kernel = self.featurizer.filter_fn(length)
        return toeplitz(kernel, length) + torch.diag_embed(self.D[:, None].expand(-1, length))


class DiffGatedLongConv(GatedLongConv):
    """The difference of two gated long convolutions over one common value (STAR's GConv-2-Diff).

    Args and initialisation: as :class:`GatedLongConv`; λ is one learned number, at first ``lambda_init``.
    State dict: ``in_proj.weight`` (5D, D), rows B_a, B_b, C_a, C_b, value; ``filter_fn.*`` (one network of
    time, 2D kernels); ``D`` (2D,); ``lam`` (); ``out_proj.weight``. Cache: ``history_a``, ``history_b``.
    """

    halves = 2

    def __init__(
        self,
        dim: int,
        *,
        lambda_init: float = 0.8,
        residual_layers: int = 1,
        groups: Sequence[str] | None = None,
        featurizer: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim,
            residual_layers=residual_layers,
            groups=groups,
            featurizer=featurizer,
            device=device,
            dtype=dtype,
        )
        self.lam = nn.Parameter(torch.full((), lambda_init, device=device, dtype=dtype))

    def operate(self, features: Features, cache: LayerCache | None = None) -> Tensor:
        """The difference of the two halves, (B, L, D)."""
        value = features["value"]
        first, second = (
            stateful.gated_long_conv(b, c, value, kernel, skip, cache=cache, name=name)
            for b, c, kernel, skip, name in zip(
                features["B"].chunk(2, dim=-1),
                features["C"].chunk(2, dim=-1),
                self._kernel(value.shape[1], cache).chunk(2),
                self.D.chunk(2),
                ("history_a", "history_b"),
                strict=True,
            )
        )
        return first - self.lam.to(first.dtype) * second

    def cache_tensors(self, max_length: int, shared: Sequence[str] = ()) -> list[CacheTensor]:
        """All products of both halves."""
        shape, groups = (max_length, self.dim), ("B", "value")
        return [CacheTensor(name, shape, "position", groups) for name in ("history_a", "history_b")]


def toeplitz(kernel: Tensor, length: int) -> Tensor:
    """Lower-triangular (D, L, L) with kernel (D, Lk) entry i - j at (i, j), zero from Lk on."""
    lag = torch.arange(length, device=kernel.device)
    lag = lag[:, None] - lag
    inside = (lag >= 0) & (lag < kernel.shape[1])
    return kernel[:, lag.clamp(0, kernel.shape[1] - 1)] * inside
