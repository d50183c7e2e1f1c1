"""Decoding on the CPU allocates nothing after the first token that outlives the token.

The caches are allocated once and written in place. What a token's operators put out is freed with the token,
and is as much for a late token as for an early one: nothing is copied, grown or collected as tokens come.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from star import Genome, ModelConfig, build_model, pools
from star import model as star_model
from star.genome import Gene
from tests.star_kernels.layers.test_layers import CASES, DIM, Case

TOKENS = 150
PROMPT = 5
EVERY_CLASS = Genome([Gene(entry.id) for entry in pools.all_classes()[:17]])


@dataclass(frozen=True)
class Allocations:
    """What torch's CPU allocator did: calls, bytes of all of them, the most at once, bytes not given back."""

    calls: int
    total: int
    peak: int
    kept: int


def _read(profiler: Any) -> Allocations:
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    calls = total = peak = kept = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        kept += event.nbytes()
        peak = max(peak, kept)
        calls += event.nbytes() > 0
        total += max(0, event.nbytes())
    return Allocations(calls, total, peak, kept)


def allocations(call: Callable[[], object]) -> Allocations:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    return _read(profiler)


def test_the_counter_counts() -> None:
    held: list[Tensor] = []
    assert allocations(lambda: held.append(torch.zeros(1000))).kept == 4000
    assert allocations(lambda: torch.zeros(1000).neg()) == Allocations(2, 8000, 8000, 0)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@torch.no_grad()
def test_a_late_token_allocates_what_an_early_one_did(case: Case) -> None:
    layer = case.make(dtype=torch.float32)
    cache = layer.allocate_cache(2, TOKENS)
    token = torch.randn(2, 1, DIM, generator=torch.Generator().manual_seed(0))
    layer(token.expand(-1, PROMPT, -1), cache)
    layer(token, cache)
    pointers = {name: tensor.data_ptr() for name, tensor in (cache.tensors | cache.derived).items()}
    early = allocations(lambda: layer(token, cache))
    while cache.position < TOKENS - 1:
        layer(token, cache)
    late = allocations(lambda: layer(token, cache))
    assert early == late
    assert late.kept == 0
    # A few rows of activations, not a copy of a cache of 150 tokens.
    assert late.total < 64 * 2 * DIM * 4
    assert pointers == {name: tensor.data_ptr() for name, tensor in (cache.tensors | cache.derived).items()}


def test_generation_keeps_nothing_from_token_to_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside `StarModel.generate`: from the draw of an early token to that of a late one, nothing is kept."""
    model = build_model(EVERY_CLASS, ModelConfig(width=32, head_dim=8, vocab_size=64), seed=0)
    seen: list[Allocations] = []
    drawn, watched = 0, {10: 11, 20: 60, 100: 101}
    profiler: Any = None
    plain = star_model.sample

    def sample(*arguments: Any, **options: Any) -> Tensor:
        nonlocal drawn, profiler
        drawn += 1
        if profiler is not None and drawn in watched.values():
            profiler.__exit__(None, None, None)
            seen.append(_read(profiler))
            profiler = None
        if drawn in watched:
            profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            profiler.__enter__()
        return plain(*arguments, **options)

    monkeypatch.setattr(star_model, "sample", sample)
    ids = torch.randint(0, 64, (2, PROMPT), generator=torch.Generator().manual_seed(0))
    model.generate(ids, 120, temperature=0)
    early, span, late = seen
    assert early == late
    # Alive at both ends are hidden states and logits of the token that is drawn, and no more after 40 tokens.
    assert early.kept == span.kept == 2 * (32 + 64) * 4
    assert span.total == 40 * early.total
