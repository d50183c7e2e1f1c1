"""What a certificate is made from: how many candidates are retrained, how long, and how often."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from star.proxy import ProxySettings

__all__ = ["FidelitySettings", "longer_training"]

_RANGES = {"sample": (2, 10_000), "budget": (1, 1_000), "seeds": (1, 100)}


def longer_training(proxy: ProxySettings, times: int) -> ProxySettings:
    """A training `times` as long as the proxy's, with its seed.

    Steps, warm-up and the distance of evaluations are `times` as many, and the rate is lowered in the end, as
    in trainings that are meant to reach something; what it reaches is measured and not extrapolated.
    """
    return replace(
        proxy,
        steps=proxy.steps * times,
        warmup_steps=proxy.warmup_steps * times,
        evaluate_every=proxy.evaluate_every * times,
        schedule="cosine",
        extrapolate_to=0,
    )


@dataclass(frozen=True)
class FidelitySettings:
    """How candidates are retrained.

    Attributes:
        sample: how many candidates.
        budget: how many times as long as under the proxy.
        seeds: trainings of each.

    Raises:
        ValueError: a value out of range; one line that names it.
    """

    sample: int = 24
    budget: int = 10
    seeds: int = 3

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ValueError(f"{name} is {value!r}, takes an integer from {low} to {high}")

    def trainings(self, proxy: ProxySettings) -> tuple[ProxySettings, ...]:
        """The longer trainings that are compared with `proxy`, one a seed.

        Their seeds follow the proxy's and are none of its own: what luck with initialisation and data gave a
        candidate in the search must not be found again.
        """
        longer = longer_training(proxy, self.budget)
        return tuple(replace(longer, seed=(proxy.seed + 1 + place) % 2**63) for place in range(self.seeds))

    def to_json(self) -> dict[str, Any]:
        """A plain dict; `from_json` turns it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> FidelitySettings:
        """The settings that `to_json` wrote. Raises ValueError for anything else."""
        names = {field.name for field in fields(cls)}
        if not isinstance(value, Mapping) or set(value) != names:
            raise ValueError(f"settings of a certificate take {', '.join(sorted(names))}")
        return cls(**value)
