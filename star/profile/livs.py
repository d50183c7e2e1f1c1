"""Measures the table of a device: every LIV class alone, in each way that sharing leaves it something to do.

All LIVs take their turns, so that the weights of each are as cold as they are in a model, and a machine that
gets slower meanwhile does so for all. What is left over between a whole model (one LIV of each class) and
the sum of its parts becomes the calibration. That model is measured before the LIVs and after them, and again
while the two fastest measurements differ, since whatever else the machine does falls on all genomes there.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from star import pools
from star.bench.timing import threads_set
from star.config import ModelConfig
from star.genome import Gene, Genome
from star.measure.device import PeakMemory, Timer, device_name, device_timer
from star.measure.quantities import at, percentile
from star.measure.settings import MeasureSettings
from star.measure.whole import ROOM, fill, measure_genome, read_prompt, weight_dtype
from star.model import StarModel, build_layer, build_model
from star.pools import LivClass
from star.profile.predict import Predictor
from star.profile.table import AGREEMENT, Calibration, Ends, LivRow, ProfileTable, Steadiness
from star.sharing import LivPlan
from star_kernels.cache import LayerCache
from star_kernels.layers import LivLayer

__all__ = ["Tell", "measure_table"]

Tell = Callable[[str], None]
Whole = Callable[[Genome, ModelConfig, MeasureSettings], Mapping[str, float]]

_WARM_UP_TOKENS = 128
_CALLS_BETWEEN_WAITS = 8  # on a GPU: waiting after every token of one LIV would time the waiting
_WHOLES_AT_MOST = 4
_WILD = (
    1.5  # a median beyond so many times the quarter of quick samples says more of the machine than the LIV
)


@dataclass
class Liv:
    """An LIV that is ready to be called: its layer, its cache, and the features that another lends it."""

    entry: LivClass
    computed: tuple[str, ...]
    layer: LivLayer
    cache: LayerCache
    given: dict[str, Tensor]

    def read(self, x: Tensor, chunk: int) -> None:
        """A whole prompt (1, L, D), from an emptied cache on."""
        self.cache.position = 0
        read_prompt(lambda part: self.layer(part, self.cache, self._lent(part.shape[1])), x, chunk)

    def step(self, x: Tensor, context: int) -> None:
        """One token (1, 1, D) behind a full context."""
        self.cache.position = context
        self.layer(x, self.cache, self._lent(1))

    def _lent(self, length: int) -> dict[str, Tensor] | None:
        return {name: tensor[:, :length] for name, tensor in self.given.items()} or None


def measure_table(
    settings: MeasureSettings,
    *,
    classes: Collection[int] | None = None,
    tell: Tell = lambda text: None,
    timer: Timer | None = None,
    whole: Whole = measure_genome,
) -> ProfileTable:
    """The table of the device that the settings name.

    Args:
        settings: resolved.
        classes: numbers of the LIV classes; all that are registered by default.
        tell: is told what is being done.
        timer: of calls; that of the device by default.
        whole: measures the model of the calibration; tests put a known answer here.

    Raises:
        MeasurementError: there is no memory for a model of one LIV of each class.
        ValueError: a class that does not exist.
    """
    began = time.perf_counter()
    device = torch.device(settings.device)
    timer = device_timer(device) if timer is None else timer
    config = settings.config()
    entries = pools.all_classes() if classes is None else [pools.get(number) for number in sorted(classes)]
    genome = Genome(Gene(entry.id, 1, 1, 1, 1) for entry in entries)
    spent = 0.0

    def measure_whole() -> Mapping[str, float]:
        nonlocal spent
        start = time.perf_counter()
        tell(f"a whole model of {len(entries)} LIVs")
        values = whole(genome, config, settings)
        spent += time.perf_counter() - start
        return values

    wholes = [measure_whole()]
    rows, ends, wild = _parts(genome, settings, timer, tell)
    wholes.append(measure_whole())
    while _differ(wholes, settings) and len(wholes) < _WHOLES_AT_MOST and spent < settings.seconds:
        wholes.append(measure_whole())
    table = ProfileTable(
        device_name=device_name(device),
        versions={name: metadata.version(name) for name in ("torch", "star-kernels")},
        settings=settings,
        rows=tuple(rows),
        ends=tuple(ends),
        calibrations=tuple(_uncalibrated(context, len(entries)) for context in settings.contexts),
        seconds=0.0,
        steadiness=tuple(_steadiness(wholes, context, wild[context]) for context in settings.contexts),
    )
    calibrations = tuple(_calibration(table, genome, context, wholes) for context in settings.contexts)
    return replace(table, calibrations=calibrations, seconds=time.perf_counter() - began)


# ---- LIVs ------------------------------------------------------------------------------------------------


def _parts(
    genome: Genome, settings: MeasureSettings, timer: Timer, tell: Tell
) -> tuple[list[LivRow], list[Ends], dict[int, int]]:
    """Rows, ends, and how many LIVs are wild at each context; the model lives no longer than this call."""
    rows: list[LivRow] = []
    ends: list[Ends] = []
    wild: dict[int, int] = {}
    device = torch.device(settings.device)
    with threads_set(settings.threads), torch.no_grad():
        model = build_model(genome, settings.config(), seed=0, device=device, dtype=weight_dtype(settings))
        for context in settings.contexts:
            tell(f"every LIV alone, {context} tokens")
            found, wild[context] = _rows(model, context, settings, timer)
            rows += found
            ends.append(_ends(model, context, settings, timer))
    return rows, ends, wild


def _rows(
    model: StarModel, context: int, settings: MeasureSettings, timer: Timer
) -> tuple[list[LivRow], int]:
    """Rows of all LIVs at one context, and how many are wild; their caches live no longer than this call."""
    livs = _livs(model, context, settings)
    chunk = min(settings.chunk, context)
    prompt = _noise((1, context, model.config.width), model)
    token = prompt[:, :1]
    for liv in livs:
        liv.read(prompt[:, :_WARM_UP_TOKENS], settings.chunk)
    gauge = PeakMemory(prompt.device)
    gc.collect()
    transients: list[int | None] = []
    first: list[float] = []
    reads = [partial(timer, partial(liv.read, prompt, settings.chunk)) for liv in livs]
    for read in reads:
        gauge.begin()
        first.append(read())
        transients.append(gauge.taken())
    prefill = _in_turns(reads, settings.repetitions, settings.seconds, first)
    for liv in livs:
        fill(liv.cache, context)
        liv.step(token, context)
    calls = _CALLS_BETWEEN_WAITS if prompt.is_cuda else 1
    decode = _in_turns(
        [partial(timer, partial(_often, liv, token, context, calls)) for liv in livs],
        settings.decode_steps,
        settings.seconds,
    )
    rows = [
        LivRow(
            liv_class=liv.entry.id,
            computed=liv.computed,
            context=context,
            prefill=1e3 * statistics.median(read_times),
            decode_p50=1e3 * statistics.median(steps) / calls,
            decode_p95=1e3 * percentile(steps, 95) / calls,
            held=sum(tensor.nbytes for tensor in liv.cache.derived.values()),
            transient=transient,
            features=_feature_bytes(liv, prompt[:, :1]) * chunk,
        )
        for liv, read_times, steps, transient in zip(livs, prefill, decode, transients, strict=True)
    ]
    return rows, sum(
        _wild(read_times) or _wild(steps) for read_times, steps in zip(prefill, decode, strict=True)
    )


def _livs(model: StarModel, context: int, settings: MeasureSettings) -> list[Liv]:
    """Every class in each of its ways to share, those of one class far apart.

    Position-indexed tensors of the caches are those of the class's unshared LIV: one cache a class.
    """
    room = context + settings.decode_steps + ROOM
    chunk = _noise((1, min(settings.chunk, context), model.config.width), model)
    by_way: dict[int, list[Liv]] = {}
    for plan, module in zip(model.plans, model.layers, strict=True):
        layer = cast(LivLayer, module)
        own = layer.allocate_cache(1, room)
        features = layer.featurize(chunk, own)
        for way, shared in enumerate(plan.entry.feature_strategies):
            computed = tuple(name for name in plan.entry.groups if name not in shared)
            follower = layer if not shared else _follower(plan, computed, shared, model, settings)
            cache = own if not shared else follower.allocate_cache(1, room, source=own, shared=shared)
            given = {name: features[name] for name in shared}
            by_way.setdefault(way, []).append(Liv(plan.entry, computed, follower, cache, given))
    return [liv for way in sorted(by_way) for liv in by_way[way]]


def _follower(
    plan: LivPlan,
    computed: tuple[str, ...],
    shared: tuple[str, ...],
    model: StarModel,
    settings: MeasureSettings,
) -> LivLayer:
    """The layer of an LIV that takes some groups from another."""
    followed = LivPlan(plan.index, plan.entry, plan.index, computed, computed, plan.index, shared)
    layer = build_layer(
        followed,
        model.config,
        len(model.plans),
        None,
        torch.device(settings.device),
        weight_dtype(settings),
    )
    return cast(LivLayer, layer).eval()


def _often(liv: Liv, token: Tensor, context: int, calls: int) -> None:
    for _ in range(calls):
        liv.step(token, context)


def _in_turns(
    samples: Sequence[Callable[[], float]], most: int, seconds: float, first: Sequence[float] = ()
) -> list[list[float]]:
    """Samples of all in turns: at most so many of each, the first of them possibly taken already, and no
    further round after so many seconds; one of each at least. Those that are wild are then taken as often
    again."""
    taken: list[list[float]] = [[value] for value in first] or [[] for _ in samples]
    spent = sum(first)
    while len(taken[0]) < most and (spent < seconds or not taken[0]):
        for values, sample in zip(taken, samples, strict=True):
            values.append(sample())
            spent += values[-1]
    for values, sample in zip(taken, samples, strict=True):
        if _wild(values):
            values += [sample() for _ in values]
    return taken


def _wild(samples: Sequence[float]) -> bool:
    """Whether most samples were disturbed: the median is far beyond the first quarter."""
    return statistics.median(samples) > _WILD * percentile(samples, 25)


def _feature_bytes(liv: Liv, token: Tensor) -> int:
    """Of one token's features."""
    liv.cache.position = 0
    features = liv.layer.featurize(token, liv.cache, liv._lent(1))
    return sum(tensor.numel() * tensor.element_size() for tensor in features.values() if tensor.dim() > 2)


# ---- beside the LIVs -------------------------------------------------------------------------------------


def _ends(model: StarModel, context: int, settings: MeasureSettings, timer: Timer) -> Ends:
    """Embedding, head and norms."""
    ids = torch.zeros(1, context, dtype=torch.long, device=model.head_weight.device)

    def whole(part: Tensor) -> Tensor:
        return model.norm(model.embedding(part))

    def outside(tokens: Tensor) -> None:
        hidden = read_prompt(whole, tokens, settings.chunk)
        F.linear(hidden[:, -1:], model.head_weight).argmax(-1)

    stream = _noise((1, context, model.config.width), model)
    norm = model.norms[0]

    def between(x: Tensor) -> None:
        read_prompt(lambda part: norm(part, residual=part)[0], x, settings.chunk)

    def median(call: Callable[[], object], most: int) -> float:
        call()
        return 1e3 * statistics.median(timer(call) for _ in range(most))

    steps, passes = settings.decode_steps, settings.repetitions
    gauge = PeakMemory(stream.device)
    gauge.begin()
    result = norm(stream[:, : settings.chunk], residual=stream[:, : settings.chunk])
    transient = gauge.taken()
    del result
    return Ends(
        context=context,
        prefill=median(lambda: outside(ids), passes),
        decode=median(lambda: outside(ids[:, :1]), steps),
        norm_prefill=median(lambda: between(stream), passes),
        norm_decode=median(lambda: between(stream[:, :1]), steps),
        norm_transient=transient,
    )


def _noise(shape: tuple[int, ...], model: StarModel) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    weight = model.head_weight
    return torch.randn(shape, generator=generator).to(weight.device, weight.dtype)


# ---- the calibration -------------------------------------------------------------------------------------


def _uncalibrated(context: int, livs: int) -> Calibration:
    return Calibration(context, livs, prefill=0.0, decode=0.0, tail=1.0, memory=0)


def _difference(wholes: Sequence[Mapping[str, float]], name: str) -> float:
    """By how much the two fastest of these differ: disturbances only add, and hardly the same twice."""
    first, second = sorted(values[name] for values in wholes)[:2]
    return second / first - 1


def _differ(wholes: Sequence[Mapping[str, float]], settings: MeasureSettings) -> bool:
    return any(
        _difference(wholes, at(name, context)) > AGREEMENT
        for context in settings.contexts
        for name in ("ttft", "decode_p50")
    )


def _steadiness(wholes: Sequence[Mapping[str, float]], context: int, livs: int) -> Steadiness:
    prefill, decode = (_difference(wholes, at(name, context)) for name in ("ttft", "decode_p50"))
    return Steadiness(context, len(wholes), prefill, decode, livs)


def _calibration(
    table: ProfileTable, genome: Genome, context: int, wholes: Sequence[Mapping[str, float]]
) -> Calibration:
    """Of the fastest measurements of prompts and of tokens; memory of the first, before anything else ran."""
    predicted = Predictor(table).predict(genome)
    ttft, token = at("ttft", context), at("decode_p50", context)
    prompts = min(wholes, key=lambda values: values[ttft])
    tokens = min(wholes, key=lambda values: values[token])
    memory = at("peak_memory", context)
    known = memory in wholes[0] and memory in predicted
    return Calibration(
        context=context,
        livs=genome.depth,
        prefill=(prompts[ttft] - predicted[ttft]) / genome.depth,
        decode=(tokens[token] - predicted[token]) / genome.depth,
        tail=tokens[at("decode_p95", context)] / tokens[token],
        memory=round(wholes[0][memory] - predicted[memory]) if known else None,
    )
