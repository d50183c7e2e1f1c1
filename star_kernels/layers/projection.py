"""Linear maps without a bias: one whose rows are several feature groups, and the one that ends a layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from star_kernels.layers.initial import normal_


class GroupProjection(nn.Linear):
    """Projects x to several feature groups with one matrix product.

    The weight's rows are the groups, one below the other in the order of ``widths``, so a module that makes
    only some of them for one caller multiplies only their rows. Groups side by side cost one product.

    Args:
        dim: width of the input.
        widths: group name -> number of its features, in the order of the rows.

    Initialised from N(0, 1 / dim), so that inputs of unit variance give features of unit variance.
    """

    def __init__(
        self,
        dim: int,
        widths: Mapping[str, int],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.widths = dict(widths)
        super().__init__(dim, sum(widths.values()), bias=False, device=device, dtype=dtype)
        ends = list(accumulate(widths.values()))
        self._known_runs: dict[tuple[str, ...], list[tuple[list[str], list[int]]]] = {}
        self._rows = {name: (end - widths[name], end) for name, end in zip(widths, ends, strict=True)}

    def reset_parameters(self) -> None:
        """Draws the weight from N(0, 1 / dim)."""
        normal_(self.weight, self.in_features**-0.5)

    def rows(self, names: Sequence[str]) -> slice:
        """The rows of groups that lie side by side, given in their order.

        Raises:
            ValueError: a group that this projection does not make.
        """
        for name in names:
            if name not in self._rows:
                makes = ", ".join(self._rows) or "no group"
                raise ValueError(f"featurizer makes {makes}; {name!r} must be given by another layer")
        return slice(self._rows[names[0]][0], self._rows[names[-1]][1])

    def fused(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """The features of groups that lie side by side, given in their order: (..., sum of their widths)."""
        rows = self.rows(names)
        is_whole = rows.stop - rows.start == self.out_features
        return F.linear(x, self.weight if is_whole else self.weight[rows])

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
        residual_layers: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.residual_layers = residual_layers
        super().__init__(width, dim, bias=False, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draws the weight from N(0, 1/16 / (width · residual_layers))."""
        normal_(self.weight, OUTPUT_GAIN * (self.in_features * self.residual_layers) ** -0.5)
