"""AdamW with clipping in one fused pass, and the learning-rate schedule.

`torch.optim` is not used: constructing its first optimizer imports torch._dynamo, which takes a second and
would be most of a candidate's time. The update itself is the very kernel that
`torch.optim.AdamW(fused=True)` calls.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

__all__ = ["AdamW", "learning_rate"]


def learning_rate(step: int, *, steps: int, warmup_steps: int, peak: float, final_rate: float) -> float:
    """Rate of step 0..steps-1: linear up to `peak`, then half a cosine down to `final_rate * peak`."""
    warmup = min(warmup_steps, steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup - 1)
    return peak * (final_rate + (1 - final_rate) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


class AdamW:
    """Decoupled weight decay (Loshchilov and Hutter, 2019), on matrices only.

    `parameters`: names and parameters, each once. Those with two or more dimensions decay, unless they carry
    the attribute `no_weight_decay` set to True. A parameter without a gradient is left alone.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        weight_decay: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        self.parameters = {name: p for name, p in parameters if p.requires_grad}
        self.first = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.second = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.weight_decay = weight_decay
        self.betas = betas
        self.eps = eps
        self.steps = 0

    def zero_gradients(self) -> None:
        """Drops the gradients, so that backward stores new ones instead of adding to zeros."""
        for parameter in self.parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """Norm of all gradients together, a float32 scalar on their device."""
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        if not gradients:
            return torch.zeros(())
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))

    @torch.no_grad()
    def step(self, rate: float, gradient_divisor: Tensor) -> None:
        """One update; the gradients are divided by `gradient_divisor` (a float32 scalar) on the way."""
        self.steps += 1
        decaying = [n for n, p in self.parameters.items() if p.grad is not None and _decays(p)]
        others = [n for n, p in self.parameters.items() if p.grad is not None and not _decays(p)]
        count = torch.full((), float(self.steps), device=gradient_divisor.device)
        for names, decay in ((decaying, self.weight_decay), (others, 0.0)):
            if names:
                self._update(names, rate, decay, count, gradient_divisor)

    def _update(self, names: list[str], rate: float, decay: float, count: Tensor, divisor: Tensor) -> None:
        torch._fused_adamw_(
            [self.parameters[name] for name in names],
            [self.parameters[name].grad for name in names],  # type: ignore[misc]
            [self.first[name] for name in names],
            [self.second[name] for name in names],
            [],  # maxima of AMSGrad
            [count] * len(names),
            lr=rate,
            beta1=self.betas[0],
            beta2=self.betas[1],
            weight_decay=decay,
            eps=self.eps,
            amsgrad=False,
            maximize=False,
            grad_scale=divisor,
            found_inf=None,
        )


def _decays(parameter: nn.Parameter) -> bool:
    return parameter.dim() >= 2 and not getattr(parameter, "no_weight_decay", False)
