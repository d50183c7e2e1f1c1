"""Rotary position embedding: its settings, and cosines and sines computed once and kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from star_kernels.contracts import under_fake_tensors

_SHORTEST = 64
_tables: dict[tuple[Rotary, int, torch.device], tuple[Tensor, Tensor]] = {}


@dataclass(frozen=True)
class Rotary:
    """Token t turns the pair i of a head's channels by the angle t · f_i (RoFormer, arXiv 2104.09864).

    Args:
        theta: base of the frequencies f_i = theta^(-2i / width).
        frequencies: the f_i themselves, half a head's width of them, where another rule makes them (longer
            contexts by linear scaling, YaRN, Llama 3); theta is then not used.
        scale: factor of cosine and sine (YaRN's attention factor).
    """

    theta: float = 10000.0
    frequencies: tuple[float, ...] | None = None
    scale: float = 1.0

    def of_width(self, width: int) -> tuple[float, ...]:
        """The frequencies for heads of ``width`` channels. Raises ValueError where they are for others."""
        if self.frequencies is None:
            return tuple(self.theta ** (-2 * i / width) for i in range(width // 2))
        if len(self.frequencies) != width // 2:
            raise ValueError(
                f"Rotary: frequencies has {len(self.frequencies)} entries; heads of {width} channels "
                f"take {width // 2}"
            )
        return self.frequencies


def rotary_tables(
    start: int, length: int, rotary: Rotary, width: int, device: torch.device, *, room: int = 0
) -> tuple[Tensor, Tensor]:
    """cos and sin for tokens ``start`` to ``start + length - 1``, each (length, width / 2) float32.

    Tables are kept for all settings, widths and devices, and double when they are too short; ``room`` is the
    number of tokens they shall have at least, so that decoding up to it finds them.
    """
    end = start + length
    if not _may_keep(device):
        cos, sin = _compute(end, rotary, width, device)
        return cos[start:end], sin[start:end]
    key = (rotary, width, device)
    kept = _tables.get(key)
    if kept is None or kept[0].shape[0] < max(end, room):
        with torch.inference_mode(False):
            size = max(_SHORTEST, 1 << (max(end, room) - 1).bit_length())
            kept = _compute(size, rotary, width, device)
        _tables[key] = kept
    return kept[0][start:end], kept[1][start:end]


def _may_keep(device: torch.device) -> bool:
    """Not tensors of a trace, nor without values: they would be handed to later calls."""
    return not (device.type == "meta" or torch.compiler.is_compiling() or under_fake_tensors())


@torch.no_grad()
def _compute(length: int, rotary: Rotary, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    # In float64: the angle of a late token has no digits left in float32.
    frequencies = torch.tensor(rotary.of_width(width), dtype=torch.float64, device=device)
    positions = torch.arange(length, dtype=torch.float64, device=device)
    angles = torch.outer(positions, frequencies)
    return (angles.cos() * rotary.scale).float(), (angles.sin() * rotary.scale).float()
