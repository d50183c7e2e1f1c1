"""The vocabulary in which every public operator states what it takes.

An operator opens a :class:`Contract`, names each argument with the shape it takes ("B L D"), and the
contract binds dimension names as it goes, so that every error can say what was given, what is taken and
where the number it disagrees with came from::

    short_conv: weight has shape (7, 3); it takes (D, K) with D = 8 from x

The checks run before every backend, and once; backends trust them.
"""

from __future__ import annotations

import itertools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


_parsed: dict[str, tuple[tuple[str, int], ...]] = {}


def _parse(shape: str) -> tuple[tuple[str, int], ...]:
    """Splits "S K-1 D" into (("S", 0), ("K", -1), ("D", 0)); a plain number is ("", number)."""
    if shape in _parsed:
        return _parsed[shape]
    dims: list[tuple[str, int]] = []
    for word in shape.split():
        if word.isdigit():
            dims.append(("", int(word)))
        else:
            name, _, less = word.partition("-")
            dims.append((name, -int(less) if less else 0))
    _parsed[shape] = tuple(dims)
    return _parsed[shape]


def _shape_text(shape: str) -> str:
    words = shape.split()
    return f"({words[0]},)" if len(words) == 1 else f"({', '.join(words)})"


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    words = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


class Contract:
    """The checks of one call of ``function``. The first tensor sets the device and the dtype of the call."""

    __slots__ = ("device", "dims", "dtype", "first", "function", "sources")

    def __init__(self, function: str) -> None:
        self.function = function
        self.dims: dict[str, int] = {}
        self.sources: dict[str, str] = {}
        self.dtype: torch.dtype | None = None
        self.device: torch.device | None = None
        self.first = ""

    def tensor(self, name: str, value: Tensor, shape: str) -> None:
        """An activation: floating point, the dtype and device of the first one, with this shape."""
        self._is_tensor(name, value, "a tensor")
        dtype = value.dtype
        if self.dtype is None:
            if dtype not in FLOATING:
                raise TypeError(f"{self.function}: {name} has dtype {dtype}; it takes {_names(FLOATING)}")
            self.dtype, self.device, self.first = dtype, value.device, name
        else:
            if dtype != self.dtype:
                raise TypeError(
                    f"{self.function}: {name} has dtype {dtype}; it takes {self.first}'s, {self.dtype}"
                )
            self._on_device(name, value)
        self._has_shape(name, value, shape)

    def optional_tensor(self, name: str, value: Tensor | None, shape: str) -> None:
        """An activation that may be left out."""
        if value is not None:
            self.tensor(name, value, shape)

    def tensor_like(self, name: str, value: Tensor, other: Tensor) -> None:
        """An activation of exactly the first one's shape, however many dimensions that has."""
        self.tensor(name, value, "...")
        if value.shape != other.shape:
            raise ValueError(
                f"{self.function}: {name} has shape {tuple(value.shape)}; "
                f"it takes {self.first}'s, {tuple(other.shape)}"
            )

    def parameter(self, name: str, value: Tensor, shape: str) -> None:
        """A weight: any floating dtype (mixed precision keeps weights in float32), on the call's device."""
        self._is_tensor(name, value, "a tensor")
        self._of(name, value, shape, FLOATING)

    def optional_parameter(self, name: str, value: Tensor | None, shape: str) -> None:
        """A weight that may be left out."""
        if value is not None:
            self.parameter(name, value, shape)

    def state(self, name: str, value: Tensor | None, shape: str) -> None:
        """A recurrent state that may be left out: any floating dtype, on the call's device."""
        if value is not None:
            self._is_tensor(name, value, "a tensor or None")
            self._of(name, value, shape, FLOATING)

    def written(self, name: str, value: Tensor) -> None:
        """A tensor that the call changes in place: no two of its elements may be one number in memory."""
        shared = [dim for dim in range(value.dim()) if value.shape[dim] > 1 and value.stride(dim) == 0]
        if shared and value.numel():
            raise ValueError(
                f"{self.function}: {name} is expanded along dimension {shared[0]}; it is changed in place, "
                "and takes memory of its own for every element"
            )

    def integers(self, name: str, value: Tensor, shape: str, dtypes: tuple[torch.dtype, ...]) -> None:
        """An index tensor of one of these integer dtypes, on the call's device."""
        self._is_tensor(name, value, "a tensor")
        self._of(name, value, shape, dtypes)

    def sequences(self, cu_seqlens: Tensor | None) -> None:
        """Binds S, the number of sequences that have a state: the batch, or the packed sequences.

        ``cu_seqlens`` (S + 1,) int32 packs sequences into a batch of 1 and rises from 0 to L. Its values
        are read where that costs no synchronisation; elsewhere the kernels keep to the tensor's bounds.
        """
        if cu_seqlens is None:
            self.bind("S", self.dims["B"], self.sources["B"])
            return
        name = "cu_seqlens"
        self._is_tensor(name, cu_seqlens, "a tensor or None")
        self._of(name, cu_seqlens, "S+1", (torch.int32,))
        batch, length = self.dims["B"], self.dims["L"]
        if cu_seqlens.shape[0] < 1:
            raise ValueError(f"{self.function}: {name} is empty; it takes (S + 1,) offsets from 0 to L")
        if batch != 1:
            raise ValueError(
                f"{self.function}: {name} packs sequences into a batch of 1; {self.first} has batch {batch}"
            )
        if cu_seqlens.shape[0] == 1 and length > 0:
            raise ValueError(f"{self.function}: {name} has no sequence; it must rise from 0 to L = {length}")
        self.bind("S", cu_seqlens.shape[0] - 1, name)
        if cu_seqlens.device.type == "cpu" and holds_values(cu_seqlens):
            offsets = cu_seqlens.tolist()
            rising = all(left <= right for left, right in itertools.pairwise(offsets))
            if offsets[0] != 0 or offsets[-1] != length or not rising:
                raise ValueError(
                    f"{self.function}: {name} must rise from 0 to L = {length}; got {_short(offsets)}"
                )

    def bind(self, dim: str, size: int, source: str) -> None:
        """Gives a dimension name its size, as if ``source`` had shown it."""
        self.dims[dim], self.sources[dim] = size, source

    def multiple(self, dim: str, of: str) -> None:
        """Dimension ``dim`` is a multiple of dimension ``of``."""
        if self.dims[of] == 0 or self.dims[dim] % self.dims[of]:
            raise ValueError(
                f"{self.function}: {self.sources[of]} has {of} = {self.dims[of]}; "
                f"it takes a divisor of {dim} = {self.dims[dim]} from {self.sources[dim]}"
            )

    def at_least(self, dim: str, size: int) -> None:
        """Dimension ``dim`` is at least ``size``."""
        if self.dims[dim] < size:
            raise ValueError(
                f"{self.function}: {self.sources[dim]} has {dim} = {self.dims[dim]}; it takes at least {size}"
            )

    def choice(self, name: str, value: Any, choices: tuple[Any, ...]) -> None:
        """One of a few values."""
        if not any(value is option or value == option for option in choices):
            raise ValueError(
                f"{self.function}: {name} is {value!r}; it takes {' or '.join(map(repr, choices))}"
            )

    def flag(self, name: str, value: Any) -> None:
        """True or False."""
        if not isinstance(value, bool):
            raise TypeError(f"{self.function}: {name} is {value!r}; it takes True or False")

    def number(self, name: str, value: Any, *, above: float | None = None) -> None:
        """A finite Python number, strictly above a bound where one is given."""
        is_symbol = isinstance(value, torch.SymFloat | torch.SymInt)
        if isinstance(value, bool) or not (isinstance(value, int | float) or is_symbol):
            raise TypeError(f"{self.function}: {name} is {value!r}; it takes a number")
        if not is_symbol and (value != value or value in (float("inf"), float("-inf"))):
            raise ValueError(f"{self.function}: {name} is {value!r}; it takes a finite number")
        if above is not None and not value > above:
            raise ValueError(f"{self.function}: {name} is {value!r}; it takes a number above {above:g}")

    def optional_number(self, name: str, value: Any, *, above: float | None = None) -> None:
        """A number that may be left out."""
        if value is not None:
            self.number(name, value, above=above)

    def count(self, name: str, value: Any, *, at_least: int = 1) -> None:
        """A Python int of at least ``at_least``."""
        if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
            raise TypeError(f"{self.function}: {name} is {value!r}; it takes an int of at least {at_least}")
        if value < at_least:
            raise ValueError(f"{self.function}: {name} is {value!r}; it takes an int of at least {at_least}")

    def _is_tensor(self, name: str, value: Any, takes: str) -> None:
        if not isinstance(value, Tensor):
            raise TypeError(f"{self.function}: {name} is {type(value).__name__}; it takes {takes}")
        if value.layout is not torch.strided or value.is_nested:
            raise TypeError(f"{self.function}: {name} is sparse or nested; it takes a dense tensor")

    def _on_device(self, name: str, value: Tensor) -> None:
        if self.device is not None and value.device != self.device:
            raise ValueError(
                f"{self.function}: {name} is on {value.device}; it takes {self.first}'s device, {self.device}"
            )

    def _of(self, name: str, value: Tensor, shape: str, dtypes: tuple[torch.dtype, ...]) -> None:
        if value.dtype not in dtypes:
            raise TypeError(f"{self.function}: {name} has dtype {value.dtype}; it takes {_names(dtypes)}")
        self._on_device(name, value)
        if shape == "S+1":
            if value.dim() != 1:
                raise ValueError(f"{self.function}: {name} has shape {tuple(value.shape)}; it takes (S + 1,)")
        else:
            self._has_shape(name, value, shape)

    def _has_shape(self, name: str, value: Tensor, shape: str) -> None:
        sizes = value.shape
        dims = _parse(shape)
        if dims and dims[0][0] == "...":
            dims = dims[1:]
            if len(sizes) < len(dims):
                self._refuse_shape(name, value, shape)
            sizes = sizes[len(sizes) - len(dims) :]
        elif len(sizes) != len(dims):
            self._refuse_shape(name, value, shape)
        for size, (dim, offset) in zip(sizes, dims, strict=True):
            if not dim:
                if size != offset:
                    self._refuse_shape(name, value, shape)
            elif dim not in self.dims:
                self.dims[dim], self.sources[dim] = size - offset, name
            elif size != self.dims[dim] + offset:
                self._refuse_shape(name, value, shape)

    def _refuse_shape(self, name: str, value: Tensor, shape: str) -> None:
        known = [
            f"{dim} = {self.dims[dim]} from {self.sources[dim]}"
            for dim in dict.fromkeys(dim for dim, _ in _parse(shape))
            if dim in self.dims and self.sources[dim] != name
        ]
        takes = _shape_text(shape) + (f" with {', '.join(known)}" if known else "")
        raise ValueError(f"{self.function}: {name} has shape {tuple(value.shape)}; it takes {takes}")


def under_fake_tensors() -> bool:
    """Whether tensors that are made now have no values (FakeTensorMode): such must not be kept."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def holds_values(tensor: Tensor) -> bool:
    """Whether the tensor's values can be read now: not while compiling, not a fake or meta tensor."""
    if torch.compiler.is_compiling():
        return False
    return tensor.device.type != "meta" and not isinstance(tensor, torch._subclasses.FakeTensor)


def _short(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:6]))}, ..., {values[-1]}]"


def autocast_together(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Activations as autocast would have them: all in its dtype where it is on, untouched where it is off.

    Weights are left alone: every operator takes them in float32 beside half-precision activations.
    """
    if not torch._C._is_any_autocast_enabled():  # a fifth of a microsecond, for decode steps
        return tensors
    first = next((tensor for tensor in tensors if isinstance(tensor, Tensor)), None)
    if first is None or not _autocasts(first):
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)
    return tuple(
        tensor.to(dtype)
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64
        else tensor
        for tensor in tensors
    )


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Keeps autocast from turning a reference's float32 matrix products into half-precision ones."""
    return torch.autocast(tensor.device.type, enabled=False) if _autocasts(tensor) else nullcontext()


def _autocasts(tensor: Tensor) -> bool:
    device = tensor.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
