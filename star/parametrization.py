"""Maximal-update parametrisation: one learning rate for models of every width.

Of "Feature Learning in Infinite-Width Neural Networks" (arXiv 2011.14522) and Adam's rules in "Tensor
Programs V" (arXiv 2203.03466, table 3): with m = width / base_width, what a step changes in the activations
stays of one size as the width grows. At m = 1 it is the standard parametrisation, bit for bit.

Adam moves every entry of a parameter by about the learning rate, and a sum over n correlated entries moves n
times as far. So what counts is which of a parameter's dimensions grow with the width. That is found out by
comparing the shapes of two small models of the genome, one wider than the other; so layers of other packages
are covered, if their parameters are as nn.Linear and nn.Conv1d have them: outputs first, what is summed over
behind.

hidden      A matrix of which two dimensions grow: projections to features, outputs of layers, Mamba's step
            sizes, the cells' input weights. They start with variance 1 / fan-in, as the rules ask; their rate
            is 1 / m, since they sum over the fan-in.
readout     A matrix that sums over a growing dimension into a fixed one: GLA's decays of fixed rank. Rate
            1 / m; initial values times m^-1/2, variance 1 / fan-in² as it were, or what they read would be
            pushed along their rows, all entries alike, and they would grow with √m.
input       A matrix that sums over a fixed dimension: taps of convolutions, implicit kernels, what comes out
            of a fixed rank. Nothing depends on the width: rate 1, initial values as they are.
vector      One number a channel: norms, biases, and what a layer marks `no_weight_decay`, such as the decays
            of a recurrence. Nothing is summed: rate 1. (The cells' recurrent weights start with variance
            0.4 / width, nearer to zero the wider; what they learn does not shrink.)
embedding   N(0, 1 / base_width), that is the model's N(0, 1 / width) times m^1/2, so that it is as large as
            ever beside the layers, which together add a variance of 1/16 to the stream at every width. Rate
            1.
final norm  The embedding is also the head, where an output weight's rules ask for logits divided by m. That
            factor is the initial weight of the final norm, 1 / m instead of 1, and its rate is 1 / m: for
            Adam the same as a factor behind it. So a model trained this way is a model like any other, in
            exports and elsewhere.

Weight decay is `weight_decay` times the unscaled rate (`star.optimizer`). Two things are not carried over:
gradients are clipped together at one threshold, and attention divides its scores by √head_dim, so heads
should keep their width and grow in number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import nn

from star.config import ModelConfig
from star.genome import Genome
from star.optimizer import decays

if TYPE_CHECKING:
    from star.pools import LivClass
    from star.proxy import ProxySettings

__all__ = ["POWERS", "kinds", "rate_scales", "scale_initial_weights"]

POWERS: Mapping[str, tuple[float, float]] = {
    "hidden": (0.0, -1.0),
    "readout": (-0.5, -1.0),
    "input": (0.0, 0.0),
    "vector": (0.0, 0.0),
    "embedding": (0.5, 0.0),
    "final norm": (-1.0, -1.0),
}
"""Kind of parameter -> powers of m that scale its initial values and its learning rate."""

_ROLES = {"embedding.weight": "embedding", "norm.weight": "final norm"}
# Both small, and further apart than what sizes are rounded to (SwiGLU's). Real tensors rather than the meta
# device, whose first torch.arange imports torch._dynamo, for seconds.
_WIDTHS = (16, 64)
_HEAD_DIM = 4


def rate_scales(model: nn.Module, settings: ProxySettings) -> dict[str, float]:
    """What the learning rate is multiplied by, by parameter's name; 1 where a name is missing.

    Raises:
        ValueError: "mup" at another width than `base_width`, of a model that `star.build_model` did not make.
    """
    multiple = _width_multiple(model, settings)
    if multiple == 1:
        return {}
    return {name: multiple ** POWERS[kind][1] for name, kind in kinds(model).items()}


@torch.no_grad()
def scale_initial_weights(model: nn.Module, settings: ProxySettings) -> None:
    """Turns fresh weights of the standard parametrisation into the settings', in place. Raises as above."""
    multiple = _width_multiple(model, settings)
    if multiple == 1:
        return
    of = kinds(model)
    for name, parameter in model.named_parameters():
        if (power := POWERS[of[name]][0]) != 0:
            parameter.mul_(multiple**power)


def kinds(model: nn.Module) -> dict[str, str]:
    """The kind of each parameter of a model that `star.build_model` made, a name of `POWERS`.

    Raises:
        ValueError: another model.
    """
    from star.model import StarModel

    if not isinstance(model, StarModel):
        raise ValueError(
            f"parametrization is 'mup', takes a model of star.build_model, not {type(model).__name__}"
        )
    entries = tuple(plan.entry for plan in model.plans)
    return dict(_kinds(model.genome, model.config, entries))


@lru_cache(maxsize=4)
def _kinds(genome: Genome, config: ModelConfig, entries: tuple[LivClass, ...]) -> dict[str, str]:
    """`entries`: the classes that the genome's numbers stand for, since they are part of the answer."""
    from star.model import build_model

    narrow, wide = (
        build_model(
            genome, dataclasses.replace(config, width=width, head_dim=_HEAD_DIM, vocab_size=1), seed=0
        )
        for width in _WIDTHS
    )
    return {
        name: _ROLES.get(name) or _kind(parameter, other)
        for (name, parameter), other in zip(narrow.named_parameters(), wide.parameters(), strict=True)
    }


def _kind(parameter: nn.Parameter, wider: nn.Parameter) -> str:
    if not decays(parameter):
        return "vector"
    growing = [place for place, size in enumerate(parameter.shape) if wider.shape[place] > size]
    if len(growing) >= 2:
        return "hidden"
    return "readout" if growing and growing[0] > 0 else "input"


def _width_multiple(model: nn.Module, settings: ProxySettings) -> float:
    """m; 1 for the standard parametrisation."""
    if settings.parametrization == "standard":
        return 1.0
    width: int = model.head_weight.shape[1]  # type: ignore[assignment,index]
    return width / settings.base_width
