"""What a genome leaves open: the width, the vocabulary and the constants of the layers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Keys and values are repeated at most this often (class SA-3); heads must divide by it.
LARGEST_REPEAT = 4


@dataclass(frozen=True)
class ModelConfig:
    """Sizes that all LIVs of a backbone have in common.

    Args:
        width: d, features of the residual stream; a multiple of `head_dim`, with a multiple of 4 heads, so
            that every LIV class can be built at this width.
        vocab_size: tokens that the embedding knows (256: bytes).
        head_dim: width of an attention head; a multiple of 4, because the differential classes put rotary
            embeddings on half heads.
        short_conv_kernel: taps of the short convolutions of SA-2 and GConv-1.
        swiglu_multiple: GMemless' hidden width is a multiple of it.
        rope_theta: base of the rotary frequencies.
        norm_eps: added to the mean square inside RMS norms.
        mamba_conv_kernel: taps of the convolution inside the recurrences.

    Raises:
        ValueError: a size that no model can have; one line that names it.
    """

    width: int
    vocab_size: int = 256
    head_dim: int = 64
    short_conv_kernel: int = 3
    swiglu_multiple: int = 64
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    mamba_conv_kernel: int = 4

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int":
                _require_positive_integer(field.name, value)
            else:
                _require_positive_number(field.name, value)
        if self.head_dim % 4:
            raise ValueError(f"ModelConfig: head_dim is {self.head_dim}, takes a multiple of 4")
        if self.width % self.head_dim:
            raise ValueError(
                f"ModelConfig: width is {self.width}, takes a multiple of head_dim ({self.head_dim})"
            )
        if self.heads % LARGEST_REPEAT:
            raise ValueError(
                f"ModelConfig: width {self.width} over head_dim {self.head_dim} gives {self.heads} heads, "
                f"takes a multiple of {LARGEST_REPEAT}"
            )

    @property
    def heads(self) -> int:
        """Attention heads: width over head_dim."""
        return self.width // self.head_dim

    @property
    def swiglu_width(self) -> int:
        """Hidden width of GMemless: 8/3 width, rounded to the nearest multiple of `swiglu_multiple`."""
        # Integers only: a float 8/3 would round differently at the exact halves. Halves round up.
        multiple = self.swiglu_multiple
        nearest = (16 * self.width + 3 * multiple) // (6 * multiple)
        return multiple * max(1, nearest)

    @property
    def dt_rank(self) -> int:
        """Rank of the projection that makes the recurrences' time steps (Mamba: a sixteenth of the width)."""
        return max(1, math.ceil(self.width / 16))

    def to_json(self) -> dict[str, Any]:
        """A plain dict of numbers; `from_json` turns it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelConfig:
        """The configuration that `to_json` wrote.

        Raises:
            ValueError: a name that is no field, or a missing width.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(data) - set(names))
        if unknown:
            raise ValueError(f"ModelConfig: unknown field {unknown[0]!r}, takes {', '.join(names)}")
        if "width" not in data:
            raise ValueError("ModelConfig: field 'width' is missing")
        return cls(**data)


def _require_positive_integer(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"ModelConfig: {name} is {value!r}, takes a positive integer")


def _require_positive_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"ModelConfig: {name} is {value!r}, takes a positive number")
