"""Linear maps: to feature groups, between the tokens of a channel, and back to the residual stream."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from star_kernels.layers.initial import normal_, uniform_


class Projection(nn.Linear):
    """Projects x to one feature group; the weight is drawn from N(0, 1 / dim), a bias is zeros."""

    def __init__(
        self,
        dim: int,
        width: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, width, bias=bias, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draws the weight from N(0, 1 / dim): inputs of unit variance give features of unit variance."""
        normal_(self.weight, self.in_features**-0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class DepthwiseConv(nn.Module):
    """Weights of a causal convolution inside every channel, named and shaped as those of ``nn.Conv1d``.

    Args:
        channels: C.
        kernel_size: taps K.
        bias: whether there is one.

    State dict: ``weight`` (C, 1, K), tap K - 1 on the current token; ``bias`` (C,).

    Initialised from N(0, 1 / K), filters of unit norm, or with ``uniform`` as ``nn.Conv1d`` from ±K^-1/2; the
    bias is zeros.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        *,
        bias: bool = False,
        uniform: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.uniform = uniform
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel_size, device=device, dtype=dtype))
        zeros = torch.zeros(channels, device=device, dtype=dtype) if bias else None
        self.bias = None if zeros is None else nn.Parameter(zeros)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the taps; sets the bias to zeros."""
        gain = self.weight.shape[2] ** -0.5
        if self.uniform:
            uniform_(self.weight, -gain, gain)
        else:
            normal_(self.weight, gain)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @property
    def taps(self) -> Tensor:
        """The weight as the operators take it, (C, K)."""
        return self.weight.squeeze(1)

    def extra_repr(self) -> str:
        channels, _, kernel_size = self.weight.shape
        return f"{channels}, kernel_size={kernel_size}, bias={self.bias is not None}"


SHORTEST_STEP, LONGEST_STEP = 1e-3, 1e-1


@torch.no_grad()
def step_bias_(bias: Tensor) -> Tensor:
    """Fills in what softplus turns into step sizes spread from 0.001 to 0.1, log-uniform (Mamba)."""
    if bias.is_meta:
        return bias
    step = uniform_(bias, math.log(SHORTEST_STEP), math.log(LONGEST_STEP)).exp()
    return bias.copy_(step + torch.log(-torch.expm1(-step)))


class StepProjection(nn.Linear):
    """From R numbers to the step sizes of the channels, before their softplus.

    Weight from ±R^-1/2; the bias is the inverse softplus of step sizes log-uniform in 0.001 to 0.1.
    """

    def __init__(
        self,
        rank: int,
        channels: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(rank, channels, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Mamba's initial values."""
        gain = self.in_features**-0.5
        uniform_(self.weight, -gain, gain)
        step_bias_(self.bias)


class GroupProjection(Projection):
    """Projects x to several feature groups with one matrix product.

    The weight's rows are the groups, one below the other in the order of ``widths``, so a module that makes
    only some of them for one caller multiplies only their rows. Groups side by side cost one product.

    Args:
        dim: width of the input.
        widths: group name -> number of its features, in the order of the rows.

    Initialised as :class:`Projection`.
    """

    def __init__(
        self,
        dim: int,
        widths: Mapping[str, int],
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.widths = dict(widths)
        super().__init__(dim, sum(widths.values()), bias=bias, device=device, dtype=dtype)
        ends = list(accumulate(widths.values()))
        self._known_runs: dict[tuple[str, ...], list[tuple[list[str], list[int]]]] = {}
        self._rows = {name: (end - widths[name], end) for name, end in zip(widths, ends, strict=True)}

    def rows(self, names: Sequence[str]) -> slice:
        """The rows of groups that lie side by side, given in their order.

        Raises:
            ValueError: a group that this projection does not make.
        """
        for name in names:
            if name not in self._rows:
                raise not_made(name, self._rows)
        return slice(self._rows[names[0]][0], self._rows[names[-1]][1])

    def fused(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """The features of groups that lie side by side, given in their order: (..., sum of their widths)."""
        rows = self.rows(names)
        is_whole = rows.stop - rows.start == self.out_features
        if is_whole:
            return F.linear(x, self.weight, self.bias)
        return F.linear(x, self.weight[rows], None if self.bias is None else self.bias[rows])

    def forward(self, x: Tensor, names: Sequence[str]) -> dict[str, Tensor]:  # type: ignore[override]
        """The named groups, given in the order of the rows, each (..., its width)."""
        names = tuple(names)
        if names not in self._known_runs:
            self._known_runs[names] = self._runs(names)
        features: dict[str, Tensor] = {}
        for run, widths in self._known_runs[names]:
            features.update(zip(run, self.fused(x, run).split_with_sizes(widths, dim=-1), strict=True))
        return features

    def _runs(self, names: Sequence[str]) -> list[tuple[list[str], list[int]]]:
        """The names, cut where rows of another group lie between two of them, and the widths of each."""
        runs: list[list[str]] = []
        for name in names:
            adjoins = runs and self.rows(runs[-1]).stop == self.rows([name]).start
            if adjoins:
                runs[-1].append(name)
            else:
                runs.append([name])
        return [(run, [self.widths[name] for name in run]) for run in runs]


def not_made(name: str, makes: Iterable[str]) -> ValueError:
    """The error of a layer that is asked for a feature group it has no weights for."""
    known = ", ".join(makes) or "no group"
    return ValueError(f"featurizer makes {known}; {name!r} must be given by another layer")


OUTPUT_GAIN = 0.25


class OutputProjection(nn.Linear):
    """The dense channel mixing at the end of a layer, whose result is added to the residual stream.

    Initialised from N(0, 1/16 / (width · residual_layers)): from inputs of unit variance, all
    ``residual_layers`` layers of a model together add a variance of 1/16 to the stream, however many they are
    (the 1 / depth is GPT-2's). The 1/16 goes with embeddings of variance 1/D: small enough beside them that
    every layer sees which token it is at, large enough that a head tied to the embedding does not insist on
    repeating that token.
    """

    def __init__(
        self,
        width: int,
        dim: int,
        *,
        bias: bool = False,
        residual_layers: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.residual_layers = residual_layers
        super().__init__(width, dim, bias=bias, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draws the weight from N(0, 1/16 / (width · residual_layers))."""
        normal_(self.weight, OUTPUT_GAIN * (self.in_features * self.residual_layers) ** -0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
