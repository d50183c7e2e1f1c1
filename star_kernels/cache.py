"""Inference caches: what a layer remembers of the tokens it has read.

Three kinds of tensors, all with the batch first:

- ``"position"``: one entry a token (keys, values, the products of a long convolution), (B, max_length, ...);
- ``"tail"``: the last inputs of a short convolution, (B, K - 1, D), oldest first;
- ``"state"``: the state of a recurrence, in float32 (float64 in a float64 cache).

Layers that share feature groups share the position-indexed tensors made of them: one tensor, written by the
layer that computes the features. Tails and states belong to one layer alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class CacheTensor:
    """What a layer asks of its cache.

    Args:
        name: its name in :attr:`LayerCache.tensors`.
        shape: sizes after the batch.
        kind: "position", "tail" or "state".
        groups: the feature groups that a position-indexed tensor is made of.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    groups: tuple[str, ...] = ()


@dataclass
class LayerCache:
    """The memory of one layer.

    Args:
        tensors: by name; zeros at first.
        max_length: tokens there is room for.
        aliased: names of the tensors that belong to another layer's cache, which writes them.
        position: tokens read so far.
        derived: tensors computed once from the layer's weights (the kernel of a long convolution) or from
            nothing (rotary tables); no memory of the tokens, so not part of :attr:`nbytes`. A cache is of no
            use after its weights have changed.
        lengths: where single tokens go behind each row's own last one: tokens read by every row, (B,) int64
            on the device, the very tensor of :attr:`ModelCache.lengths`. None: all rows are at ``position``.
    """

    tensors: dict[str, Tensor]
    max_length: int
    aliased: frozenset[str] = frozenset()
    position: int = 0
    derived: dict[str, Tensor] = field(default_factory=dict)
    lengths: Tensor | None = None

    @classmethod
    def allocate(
        cls,
        wanted: Sequence[CacheTensor],
        batch: int,
        max_length: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str | None,
        source: LayerCache | None = None,
        shared: Sequence[str] = (),
    ) -> LayerCache:
        """Zeros for everything wanted, but what is made of shared groups alone is the source's own tensor."""
        tensors: dict[str, Tensor] = {}
        aliased = set()
        of_state = torch.promote_types(dtype, torch.float32)
        for spec in wanted:
            is_shared = spec.kind == "position" and set(spec.groups) <= set(shared)
            if source is not None and is_shared and spec.name in source.tensors:
                tensors[spec.name] = source.tensors[spec.name]
                aliased.add(spec.name)
            else:
                tensors[spec.name] = torch.zeros(
                    batch, *spec.shape, dtype=of_state if spec.kind == "state" else dtype, device=device
                )
        return cls(tensors, max_length, frozenset(aliased))

    def require_room(self, length: int) -> None:
        """Raises ValueError unless ``length`` more tokens fit."""
        if self.position + length > self.max_length:
            raise ValueError(
                f"cache has room for {self.max_length} tokens and holds {self.position}; "
                f"it takes at most {self.max_length - self.position} more, got {length}"
            )

    def extend(self, name: str, new: Tensor) -> Tensor:
        """Writes new tokens (B, L, ...) behind those read, and returns all of them in the dtype of ``new``.

        Tokens of an aliased tensor are there already: its owner wrote them.
        """
        self.write(name, new)
        return self.tensors[name][:, : self.position + new.shape[1]].to(new.dtype)

    def write(self, name: str, new: Tensor) -> None:
        """Writes new tokens (B, L, ...) behind those read, unless the tensor's owner does."""
        if name in self.aliased:
            return
        tensor = self.tensors[name]
        if self.goes_by_row(new):
            assert self.lengths is not None
            rows = torch.arange(new.shape[0], device=new.device)
            tensor.index_put_((rows, self.lengths), new[:, 0].to(tensor.dtype))
        else:
            tensor.narrow(1, self.position, new.shape[1]).copy_(new)

    def goes_by_row(self, new: Tensor) -> bool:
        """Whether new tokens (B, L, ...) go behind each row's own last one."""
        return self.lengths is not None and new.shape[1] == 1

    def counts(self, batch: int, device: torch.device) -> Tensor:
        """Tokens of every row, the one that is being read included, (B,) int32."""
        if self.lengths is not None:
            return (self.lengths + 1).to(torch.int32)
        counts = self.derive("counts", lambda: torch.empty(batch, dtype=torch.int32, device=device))
        return counts.fill_(self.position + 1)

    def derive(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """What ``compute`` makes of the layer's weights, made once and kept in ``derived``."""
        if name not in self.derived:
            self.derived[name] = compute()
        return self.derived[name]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors; an aliased one counts here as well."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def reset(self) -> None:
        """Forgets all tokens; keeps the tensors."""
        self.position = 0
        for tensor in self.tensors.values():
            tensor.zero_()


@dataclass
class ModelCache:
    """The memory of a model: one :class:`LayerCache` a layer, in their order.

    Args:
        layers: of the layers.
        lengths: tokens read by every row, once :meth:`track` was called.
        ragged: whether the rows may differ in them.
    """

    layers: list[LayerCache]
    lengths: Tensor | None = None
    ragged: bool = False

    @property
    def position(self) -> int:
        """Tokens read so far."""
        return self.layers[0].position

    @property
    def max_length(self) -> int:
        """Tokens there is room for."""
        return self.layers[0].max_length

    @property
    def nbytes(self) -> int:
        """Bytes allocated; a tensor that several layers use counts once."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor once."""
        seen: set[int] = set()
        for layer in self.layers:
            for tensor in layer.tensors.values():
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield tensor

    def reset(self) -> None:
        """Forgets all tokens; keeps the tensors."""
        for layer in self.layers:
            layer.reset()
        if self.lengths is not None:
            self.lengths.zero_()
        self.ragged = False

    def reorder(self, rows: Tensor) -> None:
        """Row b becomes a copy of row ``rows[b]``, in place (beam search). ``rows`` is (B,) int64, of any
        device."""
        for tensor in self.tensors():
            tensor.copy_(tensor.index_select(0, rows.to(tensor.device)))
        if self.lengths is not None:
            self.lengths.copy_(self.lengths.index_select(0, rows.to(self.lengths.device)))

    def track(self, lengths: Tensor, *, longest: int, ragged: bool) -> None:
        """From now on a single token goes behind each row's own last one, whose place is on the device.

        So rows of different lengths decode side by side, and a step has no number on the host, as a CUDA
        graph needs. Entry t of a row's position-indexed tensors is its token t; entries behind its length
        are of no meaning.

        Args:
            lengths: (B,) int64 on the cache's device, tokens read by every row; copied.
            longest: the largest of them.
            ragged: whether they may differ.
        """
        if self.lengths is None:
            self.lengths = lengths.clone()
        else:
            self.lengths.copy_(lengths)  # in place: a captured graph reads this very tensor
        self.ragged = ragged
        for layer in self.layers:
            layer.lengths = self.lengths
            layer.position = longest

    def skip(self, length: int) -> None:
        """Counts tokens on the host that a replayed graph has read."""
        for layer in self.layers:
            layer.position += length

    def put_rows(self, rows: Tensor, source: ModelCache) -> None:
        """Rows ``rows`` (N,) int64 become those of ``source``, a cache of the same model with N rows and at
        most as much room."""
        for mine, theirs in zip(self.tensors(), source.tensors(), strict=True):
            if mine.shape[1:] == theirs.shape[1:]:
                mine[rows] = theirs
            else:
                mine[rows, : theirs.shape[1]] = theirs
