"""A whole model measured on a device: a prompt, then single tokens over a full cache."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from star.bench.timing import threads_set
from star.config import ModelConfig
from star.genome import Genome
from star.measure.device import PeakMemory, Timer, device_timer
from star.measure.errors import MeasurementError
from star.measure.quantities import values_of_context
from star.measure.settings import MeasureSettings
from star.model import StarModel, build_model

if TYPE_CHECKING:
    from star_kernels.cache import LayerCache, ModelCache

__all__ = ["ROOM", "fill", "measure_genome", "measure_model", "read_prompt", "repeated", "weight_dtype"]

ROOM = 8
"""Tokens of a cache beyond the prompt and those that are timed, for warming up."""

_TINY_WIDTH = 16
_LONG_PASS = 20.0  # seconds: a prompt that takes longer is read once, cold


def weight_dtype(settings: MeasureSettings) -> torch.dtype:
    """The torch dtype that resolved settings name."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[settings.dtype]


def measure_genome(
    genome: Genome, config: ModelConfig, settings: MeasureSettings, *, timer: Timer | None = None
) -> dict[str, float]:
    """Build the genome's untrained model and measure it.

    Args:
        genome: valid.
        config: the model's sizes.
        settings: resolved.
        timer: of calls; that of the device by default.

    Returns:
        The quantities of star.measure.quantities, by their names with contexts. Peak memory counts from
        before the model is built; it is missing where the machine can not say.

    Raises:
        MeasurementError: there is no memory for it.
    """
    device = torch.device(settings.device)
    gauge = PeakMemory(device)
    with threads_set(settings.threads), torch.no_grad():
        _warm_up(genome, device, weight_dtype(settings))
        gc.collect()
        gauge.begin()
        try:
            model = build_model(genome, config, seed=0, device=device, dtype=weight_dtype(settings))
            return measure_model(model, settings, gauge, timer)
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise MeasurementError(f"no memory for the model on {device}") from error
        except RuntimeError as error:  # torch's CPU allocator has no type of its own
            if "alloc" not in str(error):
                raise
            raise MeasurementError(f"no memory for the model: {str(error).splitlines()[0]}") from error


def measure_model(
    model: StarModel, settings: MeasureSettings, gauge: PeakMemory | None = None, timer: Timer | None = None
) -> dict[str, float]:
    """As `measure_genome`, of a model that is there. Memory counts from where `gauge` began; without a gauge
    it is not measured. Gradients must be off."""
    timer = device_timer(torch.device(settings.device)) if timer is None else timer
    values: dict[str, float] = {}
    for context in settings.contexts:  # in rising order, so that each one's memory is its own peak
        values |= _measure_context(model, context, settings, gauge, timer)
    return values


def _measure_context(
    model: StarModel, context: int, settings: MeasureSettings, gauge: PeakMemory | None, timer: Timer
) -> dict[str, float]:
    cache = model.allocate_cache(1, context + settings.decode_steps + ROOM)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, context), generator=generator)
    ids = ids.to(model.head_weight.device)

    def prompt() -> float:
        return timer(lambda: first_token(model, ids, cache, settings.chunk))

    passes = [prompt()]
    if passes[0] < _LONG_PASS:  # else the first one counts, although it was cold
        passes = repeated(prompt, settings.repetitions, settings.seconds - passes[0])
    steps = _decode(model, cache, context, settings.decode_steps, timer)
    memory = None if gauge is None else gauge.taken()
    return values_of_context(context, 1e3 * statistics.median(passes), [1e3 * step for step in steps], memory)


def repeated(sample: Callable[[], float], most: int, seconds: float) -> list[float]:
    """At most so many samples, and none after they took so many seconds together; one at least."""
    samples = [sample()]
    while len(samples) < most and sum(samples) < seconds:
        samples.append(sample())
    return samples


def first_token(model: StarModel, ids: Tensor, cache: ModelCache, chunk: int) -> Tensor:
    """The likeliest token behind a prompt (1, L), which an emptied cache reads chunk by chunk."""
    for layer in cache.layers:
        layer.position = 0
    hidden = read_prompt(lambda part: model.hidden(part, cache), ids, chunk)
    return F.linear(hidden[:, -1:], model.head_weight).argmax(-1)


def read_prompt(read: Callable[[Tensor], Tensor], prompt: Tensor, chunk: int) -> Tensor:
    """`read` of every chunk (B, chunk, ...) in order; what the last one gave."""
    result = prompt
    for part in prompt.split(chunk, dim=1):
        result = read(part)
    return result


def _decode(model: StarModel, cache: ModelCache, context: int, steps: int, timer: Timer) -> list[float]:
    """Seconds of single tokens, each fed with the last one's, behind a context of anything."""
    for layer in cache.layers:
        fill(layer, context)
    token = torch.zeros(1, 1, dtype=torch.long, device=model.head_weight.device)

    def step() -> None:
        nonlocal token
        token = model(token, cache).argmax(-1)

    for _ in range(ROOM):
        step()
    return [timer(step) for _ in range(steps)]


def fill(cache: LayerCache, context: int) -> None:
    """Makes a cache look as if it had read `context` tokens: of moderate random numbers, which take as long
    as any."""
    for name, tensor in cache.tensors.items():
        if name not in cache.aliased:
            tensor.normal_(std=0.1)
    cache.position = context


def _warm_up(genome: Genome, device: torch.device, dtype: torch.dtype) -> None:
    """Run the genome's model once at a tiny width: what is loaded and started on first use should neither be
    timed nor count as the model's memory."""
    config = ModelConfig(width=_TINY_WIDTH, head_dim=4)
    model = build_model(genome, config, seed=0, device=device, dtype=dtype)
    cache = model.allocate_cache(1, 2 * _TINY_WIDTH)
    ids = torch.zeros(1, _TINY_WIDTH, dtype=torch.long, device=device)
    first_token(model, ids, cache, chunk=_TINY_WIDTH)
    model(ids[:, :1], cache).sum().item()
