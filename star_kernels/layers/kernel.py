"""The kernel of a long convolution as a function of time: Hyena's implicit filter (arXiv 2302.10866)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from star_kernels.layers.initial import normal_, uniform_

BANDS = 8
HIDDEN = 32
SHORTEST_PERIOD, LONGEST_PERIOD = 4.0, 4096.0
FASTEST_DECAY, SLOWEST_DECAY = 4.0, 1024.0


class ImplicitKernel(nn.Module):
    """kernel_t = r(t) ⊙ exp(-t / τ) · sqrt(1 - exp(-2 / τ)), with r a small network of the time t in tokens.

    The network reads log(1 + t) and sine and cosine of t at periods of 4 to 4096 tokens, and has two hidden
    layers of 32 sines. Time is absolute: an entry does not depend on the length asked for, so that decoding
    token by token computes what the parallel form computes. The last factor gives the window unit norm.

    Args:
        channels: kernels D.
        device, dtype: of the weights.

    State dict: ``first.weight`` (32, 17), ``first.bias``, ``second.weight`` (32, 32), ``second.bias``,
    ``last.weight`` (D, 32), ``log_decay`` (D,), the logarithms of the time constants τ.

    Initialisation: τ spread from 4 to 1024 tokens over the channels, evenly in the logarithm; r of unit
    variance: weights N(0, 1 / fan-in) times 2 before the sines, phases uniform on the circle.
    """

    def __init__(
        self, channels: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.first = _Sines(1 + 2 * BANDS, HIDDEN, device=device, dtype=dtype)
        self.second = _Sines(HIDDEN, HIDDEN, device=device, dtype=dtype)
        self.last = _Sum(HIDDEN, channels, bias=False, device=device, dtype=dtype)
        spread = torch.linspace(math.log(FASTEST_DECAY), math.log(SLOWEST_DECAY), channels, device=device)
        self.log_decay = nn.Parameter(spread.to(dtype or torch.get_default_dtype()))

    def forward(self, length: int) -> Tensor:
        """Entries 0 to length - 1, (D, length), float32 (float64 with such weights), with autocast off."""
        device = self.log_decay.device
        if device.type != "meta" and torch.is_autocast_enabled(device.type):
            with torch.autocast(device.type, enabled=False):
                return self.forward(length)
        wide = torch.promote_types(self.log_decay.dtype, torch.float32)
        time = torch.arange(length, device=device, dtype=wide)
        waves = self.second(self.first(_time_features(time)))
        rate = torch.exp(-self.log_decay.to(wide))[:, None]
        window = torch.exp(-rate * time) * torch.sqrt(-torch.expm1(-2 * rate))
        return self.last.weight.to(wide) @ waves.T * window


class _Sines(nn.Linear):
    def reset_parameters(self) -> None:
        normal_(self.weight, 2 * self.in_features**-0.5)
        uniform_(self.bias, -math.pi, math.pi)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype)))


class _Sum(nn.Linear):
    def reset_parameters(self) -> None:
        # A sine of a random phase has variance 1/2.
        normal_(self.weight, (self.in_features / 2) ** -0.5)


def _time_features(time: Tensor) -> Tensor:
    """(length, 1 + 2 · BANDS), of order one."""
    steps = torch.arange(BANDS, device=time.device, dtype=time.dtype) / (BANDS - 1)
    periods = SHORTEST_PERIOD * (LONGEST_PERIOD / SHORTEST_PERIOD) ** steps
    angles = torch.outer(time, 2 * math.pi / periods)
    since = torch.log1p(time)[:, None] / math.log(LONGEST_PERIOD)
    return torch.cat([since, angles.cos(), angles.sin()], dim=1)
