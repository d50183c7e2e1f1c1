"""What all layers have in common.

A layer is a linear input-varying operator (LIV): a **featurizer** makes feature groups from the input, the
**operator** mixes the values with a matrix T that the other features define, what follows it token by token
(a norm, a gate) **finishes** it, and an **output** projection mixes channels. No norm in front and no
residual connection inside: (B, L, D) in, (B, L, D) out.

Two layers can share the featurizer (``featurizer=``: the weights once, each on its own input) or features
(``given=``: the very tensors that another layer computed for the same tokens).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from star_kernels.cache import CacheTensor, LayerCache
from star_kernels.layers import loading

Features = dict[str, Tensor]
LayerType = TypeVar("LayerType", bound="LivLayer")


class LivLayer(nn.Module):
    """Base of all layers. A subclass sets ``groups``, ``values`` and ``output_name``, builds the modules that
    make its features where :attr:`owns_featurizer`, and defines :meth:`make_features`, :meth:`operate`,
    :meth:`cache_tensors` and :meth:`materialize`.

    Submodules and parameters have the names of the family that the layer comes from (``q_proj``, ``in_proj``,
    ``A_log``), so that its weights go to and from other implementations by name.

    Args:
        dim: width D of input and output.
        featurizer: another layer of the same class and sizes, whose weights make the features. They stay that
            layer's, in the state dict as well. None: the layer has its own.

    Attributes:
        groups: names of the feature groups, in the order in which they are made.
        own_groups: those that no other layer's features can stand for.
        values: the group that T is applied to.
        output_name: the submodule that is the output projection.
        decodes_by_row: whether single tokens go to each row's own place where :attr:`LayerCache.lengths` is
            set. Asked of layers whose caches are indexed by position; states and tails have no places.
    """

    groups: tuple[str, ...] = ()
    own_groups: tuple[str, ...] = ()
    values: str = "value"
    output_name: str = "out_proj"
    decodes_by_row: bool = False

    def __init__(self, dim: int, featurizer: nn.Module | None = None) -> None:
        super().__init__()
        owner = type(self).__name__
        require_positive(owner, dim=dim)
        if featurizer is not None and type(featurizer) is not type(self):
            raise ValueError(
                f"{owner}: featurizer is a {type(featurizer).__name__}; it takes None or another {owner}"
            )
        self.dim = dim
        # Not an attribute of the module: that would make it a submodule, and its weights this layer's.
        self.__dict__["_lender"] = featurizer

    @property
    def owns_featurizer(self) -> bool:
        """Whether the features are made with the layer's own weights."""
        return self.__dict__["_lender"] is None

    @property
    def featurizer(self: LayerType) -> LayerType:
        """The layer whose weights make the features: this one, or the one that it was given."""
        return self if self.owns_featurizer else cast(LayerType, self.__dict__["_lender"])

    @property
    def output(self) -> nn.Linear:
        """The output projection."""
        return cast(nn.Linear, self._modules[self.output_name])

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
            ValueError: x of another shape, a group that is neither given nor made by the featurizer, no room
                left in the cache, or a cache for another batch.
            TypeError: a cache that is none of :meth:`allocate_cache`'s.
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
            require_cache(type(self).__name__, cache, x)
        if not given:
            return self.featurizer.make_features(x, self.groups, cache)
        takes = [name for name in self.groups if name not in self.own_groups]
        if strange := [name for name in given if name not in takes]:
            raise ValueError(
                f"{type(self).__name__}: given has {strange[0]!r}; it takes groups out of {', '.join(takes)}"
            )
        names = tuple(name for name in self.groups if name not in given)
        made = self.featurizer.make_features(x, names, cache) if names else {}
        return {**made, **given}

    def make_features(self, x: Tensor, names: Sequence[str], cache: LayerCache | None = None) -> Features:
        """The named groups from x (B, L, D), with this layer's own weights.

        Called on the layer that owns them; the cache is the calling layer's.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define make_features")

    def mix(self, features: Features, cache: LayerCache | None = None) -> Tensor:
        """The output (B, L, D) from the features: operator, finish, output projection."""
        y = self.output(self.finish(self.operate(features, cache), features))
        if cache is not None:
            cache.position += y.shape[1]
        return y

    def operate(self, features: Features, cache: LayerCache | None = None) -> Tensor:
        """T applied to the values, (B, L, width of the values)."""
        raise NotImplementedError(f"{type(self).__name__} does not define operate")

    def finish(self, y: Tensor, features: Features) -> Tensor:
        """What every token of T · values goes through before the output projection: nothing, norm, gate."""
        return y

    def materialize(self, x: Tensor, given: Mapping[str, Tensor] | None = None) -> Tensor:
        """The operator as a matrix, (B, M, L, L), for small inputs; M counts heads or channels.

        Applied to the values it gives what :meth:`operate` gives::

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

    @classmethod
    def from_module(cls: type[LayerType], module: nn.Module, **arguments: Any) -> LayerType:
        """A layer of the sizes, settings and weights of another implementation's module.

        Args:
            module: of one of the classes that ``load_from`` takes; its dtype and device are the layer's.
            arguments: further arguments of the constructor.

        Raises:
            ValueError: as :meth:`load_from`.
        """
        found = loading.read(cls.__name__, module)
        example = next(iter(found.weights.values()))
        layer = cls(**{"device": example.device, "dtype": example.dtype, **found.arguments, **arguments})
        return layer.load_from(module)

    def load_from(self: LayerType, module: nn.Module) -> LayerType:
        """Takes the weights of another implementation's module; returns the layer itself.

        Taken are the classes of transformers that :data:`star_kernels.layers.loading.SOURCES` lists for the
        layer's class. The layer then computes what the module computes; weights are copied, in the layer's
        dtype.

        Raises:
            ValueError: a module of another class, one with an option that the layer does not have, or one of
                other sizes or settings than the layer's.
        """
        loading.load(self, module)
        return self


def require_cache(owner: str, cache: LayerCache, x: Tensor) -> None:
    """Raises unless ``cache`` is one, for the batch of x (B, L, D), with room for its tokens."""
    if not isinstance(cache, LayerCache):
        raise TypeError(f"{owner}: cache is {type(cache).__name__}; it takes None or allocate_cache's")
    for name, tensor in cache.tensors.items():
        if tensor.shape[0] != x.shape[0]:
            raise ValueError(
                f"{owner}: x has a batch of {x.shape[0]}; the cache's {name} takes {tensor.shape[0]}"
            )
        break  # all of them have the same
    cache.require_room(x.shape[1])


def require_positive(owner: str, **sizes: int) -> None:
    """Raises ValueError unless every size is an integer of at least 1."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{owner}: {name} is {size!r}; it takes an integer of at least 1")


def require_divisor(owner: str, name: str, divisor: int, **sizes: int) -> None:
    """Raises ValueError unless ``divisor``, the argument ``name``, divides every size."""
    for size_name, size in sizes.items():
        if size % divisor:
            raise ValueError(f"{owner}: {name} is {divisor}; it takes a divisor of {size_name} = {size}")


def made_groups(owner: str, groups: tuple[str, ...], wanted: Sequence[str] | None) -> tuple[str, ...]:
    """The groups that a featurizer makes, in the layer's order: all, or the ones wanted."""
    if wanted is None:
        return groups
    strange = [name for name in wanted if name not in groups]
    if strange:
        raise ValueError(f"{owner}: groups has {strange[0]!r}; it takes names out of {', '.join(groups)}")
    return tuple(name for name in groups if name in wanted)
