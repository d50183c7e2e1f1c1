"""What all layers have in common.

A layer is a linear input-varying operator (LIV): a **featurizer** makes feature groups from the input, the
**operator** mixes the values with a matrix T that the other features define, and an **output** projection
mixes channels. No norm and no residual connection inside: (B, L, D) in, (B, L, D) out.

Two layers can share the featurizer (``featurizer=``: the weights once, each on its own input) or features
(``given=``: the very tensors that another layer computed for the same tokens).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from star_kernels.cache import CacheTensor, LayerCache

Features = dict[str, Tensor]


class LivLayer(nn.Module):
    """Base of all layers. A subclass sets ``groups`` and ``values``, adds its featurizer with
    :meth:`_set_featurizer`, and defines :meth:`operate`, :meth:`cache_tensors` and :meth:`materialize`.

    Attributes:
        groups: names of the feature groups, in the order in which the featurizer makes them.
        values: the group that T is applied to.
        featurizer: module called as ``featurizer(x, names, cache)``; gives a dict with the named groups.
        output: the output projection.
    """

    groups: tuple[str, ...] = ()
    values: str = "value"
    featurizer: nn.Module
    output: nn.Linear

    def __init__(self, dim: int) -> None:
        super().__init__()
        require_positive(type(self).__name__, dim=dim)
        self.dim = dim

    def _set_featurizer(self, own: nn.Module | None, shared: nn.Module | None) -> None:
        """The layer's own featurizer, or another layer's, which stays that layer's in the state dict."""
        if shared is None:
            assert own is not None
            self.featurizer = own
        else:
            self.__dict__["featurizer"] = shared

    def forward(
        self,
        x: Tensor,
        cache: LayerCache | None = None,
        given: Mapping[str, Tensor] | None = None,
        *,
        return_features: bool = False,
    ) -> Any:
        """The layer's output for all tokens of x; with a cache, for tokens that follow those it has read.

        Args:
            x: (B, L, D).
            cache: from :meth:`allocate_cache`; updated in place. A prompt, a further chunk and a single
                token are the same call. No gradients are recorded with a cache.
            given: features of another layer for the same tokens, by group name, to be used as they are.
            return_features: also return the features.

        Returns:
            (B, L, D), or (that, features).

        Raises:
            ValueError: x of another shape, a group that is neither given nor made by the featurizer, or no
                room left in the cache.
        """
        if cache is not None and torch.is_grad_enabled():
            with torch.no_grad():
                return self.forward(x, cache, given, return_features=return_features)
        features = self.featurize(x, cache, given)
        y = self.mix(features, cache)
        return (y, features) if return_features else y

    def featurize(
        self, x: Tensor, cache: LayerCache | None = None, given: Mapping[str, Tensor] | None = None
    ) -> Features:
        """All feature groups for the tokens of x: those given as they are, the others from x."""
        if x.dim() != 3 or x.shape[2] != self.dim:
            raise ValueError(
                f"{type(self).__name__}: x has shape {tuple(x.shape)}; it takes (B, L, D) with D = {self.dim}"
            )
        if cache is not None:
            cache.require_room(x.shape[1])
        if not given:
            return self.featurizer(x, self.groups, cache)
        names = tuple(name for name in self.groups if name not in given)
        if len(names) + len(given) != len(self.groups):
            strange = next(name for name in given if name not in self.groups)
            known = ", ".join(self.groups)
            raise ValueError(f"{type(self).__name__}: given has {strange!r}; it takes groups out of {known}")
        return {**self.featurizer(x, names, cache), **given} if names else dict(given)

    def mix(self, features: Features, cache: LayerCache | None = None) -> Tensor:
        """The output (B, L, D) from the features: the operator, then the output projection."""
        y = self.output(self.operate(features, cache))
        if cache is not None:
            cache.position += y.shape[1]
        return y

    def operate(self, features: Features, cache: LayerCache | None = None) -> Tensor:
        """T applied to the values, (B, L, width of the values): the layer's output before ``output``."""
        raise NotImplementedError(f"{type(self).__name__} does not define operate")

    def materialize(self, x: Tensor, given: Mapping[str, Tensor] | None = None) -> Tensor:
        """The operator as a matrix, (B, M, L, L), for small inputs; M counts heads or channels.

        Applied to the values it gives the layer's output before the output projection::

            operate(f)[b, i, m] = Σ_j T[b, m, i, j] · f[values][b, j, m]

        where f is ``featurize(x, given=given)`` and m a channel, or a head with all its channels (query head
        m reads the values' head m // repeat).
        """
        raise NotImplementedError(f"{type(self).__name__} does not define materialize")

    def cache_tensors(self, max_length: int, shared: Sequence[str] = ()) -> list[CacheTensor]:
        """What the layer's cache holds where the groups of ``shared`` are another layer's."""
        raise NotImplementedError(f"{type(self).__name__} does not define cache_tensors")

    def allocate_cache(
        self,
        batch: int,
        max_length: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        *,
        source: LayerCache | None = None,
        shared: Sequence[str] = (),
    ) -> LayerCache:
        """An empty cache.

        Args:
            batch: number of sequences.
            max_length: tokens there shall be room for.
            dtype: of keys, values, histories and convolution tails; by default the weights'. Another dtype
                than the activations' saves memory and costs a conversion at every call. States of recurrences
                are float32 at least.
            device: by default the weights'.
            source: cache of the layer whose features are used, where some are.
            shared: the feature groups taken from it; tensors made of them alone are the source's own.

        Raises:
            ValueError: a batch or a length below 1.
        """
        require_positive(type(self).__name__, batch=batch, max_length=max_length)
        weight = self.output.weight
        return LayerCache.allocate(
            self.cache_tensors(max_length, shared),
            batch,
            max_length,
            dtype=weight.dtype if dtype is None else dtype,
            device=weight.device if device is None else device,
            source=source,
            shared=shared,
        )


def require_positive(owner: str, **sizes: int) -> None:
    """Raises ValueError unless every size is an integer of at least 1."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{owner}: {name} is {size!r}; it takes an integer of at least 1")


def made_groups(owner: str, groups: tuple[str, ...], wanted: Sequence[str] | None) -> tuple[str, ...]:
    """The groups that a featurizer makes, in the layer's order: all, or the ones wanted."""
    if wanted is None:
        return groups
    strange = [name for name in wanted if name not in groups]
    if strange:
        raise ValueError(f"{owner}: groups has {strange[0]!r}; it takes names out of {', '.join(groups)}")
    return tuple(name for name in groups if name in wanted)
