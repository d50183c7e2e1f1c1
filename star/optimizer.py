"""AdamW with clipping in one fused pass, and the learning-rate schedule.

`torch.optim` is not used: constructing its first optimizer imports torch._dynamo, which takes a second and
would be most of a candidate's time. The update itself is the very kernel that
`torch.optim.AdamW(fused=True)` calls.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

__all__ = ["AdamW", "decays", "learning_rate"]


def learning_rate(
    step: int, *, steps: int, warmup_steps: int, peak: float, final_rate: float, schedule: str = "cosine"
) -> float:
    """Rate of step 0..steps-1: linear up to `peak`, then half a cosine down to `final_rate * peak`, or with
    the schedule "constant" the peak to the end, whatever `steps` is."""
    warmup = min(warmup_steps, steps)
    if step < warmup:
        # A constant schedule's warm-up must not depend on the steps either, or prefixes would differ.
        return peak * (step + 1) / (warmup_steps if schedule == "constant" else warmup)
    if schedule == "constant":
        return peak
    done = (step - warmup) / max(1, steps - warmup - 1)
    return peak * (final_rate + (1 - final_rate) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


class AdamW:
    """Decoupled weight decay (Loshchilov and Hutter, 2019), on matrices only.

    `parameters`: names and parameters, each once. Those with two or more dimensions decay, unless they carry
    the attribute `no_weight_decay` set to True. A parameter without a gradient is left alone.

    `rate_scales`: what the learning rate is multiplied by, by parameter's name; 1 where a name is missing.
    A step's decay is not scaled: it stays rate x `weight_decay`, so that weights forget where they were after
    as many steps (Wang and Aitchison, arXiv 2405.13698).
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        weight_decay: float,
        rate_scales: Mapping[str, float] | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        self.parameters = {name: p for name, p in parameters if p.requires_grad}
        self.first = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.second = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.weight_decay = weight_decay
        self.rate_scales = dict(rate_scales or {})
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
        count = torch.full((), float(self.steps), device=gradient_divisor.device)
        for (decaying, scale), names in self._groups().items():
            decay = self.weight_decay / scale if decaying else 0.0
            self._update(names, rate * scale, decay, count, gradient_divisor)

    def _groups(self) -> dict[tuple[bool, float], list[str]]:
        """(whether it decays, scale of its rate) -> names of the parameters that have a gradient."""
        groups: dict[tuple[bool, float], list[str]] = {}
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                key = decays(parameter), self.rate_scales.get(name, 1.0)
                groups.setdefault(key, []).append(name)
        return groups

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


def decays(parameter: nn.Parameter) -> bool:
    """Whether weight decay is for it: a matrix that does not say otherwise."""
    return parameter.dim() >= 2 and not getattr(parameter, "no_weight_decay", False)
