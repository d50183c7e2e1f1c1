"""What `benchmarks.fidelity` trains: genomes, the truth, and the proxies that are compared with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from star import baselines
from star.config import ModelConfig
from star.genome import Genome
from star.pools import Pool
from star.proxy import ProxySettings
from star.search.variation import mutate

TRUTH = "truth"
SEEDS = 3
STEPS = 800
HALVES = (20, 40, 80, 160)

_BASE = ProxySettings(
    batch_size=2,
    length=128,
    learning_rate=8e-3,
    threads=1,
    dtype="float32",
    device="cpu",
)


@dataclass(frozen=True)
class Training:
    """One way to train, done for every genome of `genomes`, with every seed; `settings.seed` counts for
    nothing."""

    name: str
    settings: ProxySettings
    config: ModelConfig
    genomes: tuple[Genome, ...]
    seeds: tuple[int, ...]

    def jobs(self) -> Iterator[tuple[Training, Genome, int]]:
        """Whole seeds one after the other: the first is complete first."""
        for seed in self.seeds:
            for genome in self.genomes:
                yield self, genome, seed


@dataclass(frozen=True)
class Choice:
    """A proxy: a training read in one way. `settings.steps` may be a prefix of a constant training's."""

    name: str
    training: str
    settings: ProxySettings
    halving: bool = False


@dataclass(frozen=True)
class Plan:
    """All trainings by name, in the order of their turn, and the choices that are read from them."""

    trainings: dict[str, Training]
    choices: tuple[Choice, ...]
    transfer: tuple[str, ...]
    rates: tuple[float, ...]

    @property
    def truth(self) -> Training:
        return self.trainings[TRUTH]


def draw_genomes(depth: int, count: int, seed: int = 0) -> tuple[Genome, ...]:
    """The three layouts; random genomes up to half of `count`; mutants of the layouts, of more and more
    rounds of mutation: neighbours are what a search has to tell apart. All canonical, none twice."""
    rng, pool = np.random.default_rng(seed), Pool()
    layouts = (baselines.transformer_pp, baselines.striped_mamba, baselines.lfm2)
    parents = [make(depth).canonical() for make in layouts]
    found = list(parents)
    while len(found) < count // 2:
        genome = Genome.random(depth, rng).canonical()
        if genome not in found:
            found.append(genome)
    turn = 0
    while len(found) < count:
        genome = parents[turn % 3]
        for _ in range(1 + turn // 3):
            genome = mutate(genome, 0.1, rng, pool).repair(rng, pool)
        genome = genome.canonical()
        turn += 1
        if genome not in found:
            found.append(genome)
    return tuple(found)


def full_plan(vocab_size: int = 256) -> Plan:
    """48 genomes of 12 LIVs at width 64, 800 steps as the truth."""
    return _plan(
        draw_genomes(12, 48), ModelConfig(width=64, head_dim=16, vocab_size=vocab_size), STEPS, SEEDS, HALVES
    )


def quick_plan(vocab_size: int = 256) -> Plan:
    """The same with six genomes of four LIVs and a few steps, for the tests."""
    config = ModelConfig(width=16, head_dim=4, vocab_size=vocab_size)
    genomes = draw_genomes(4, 6)
    return _plan(
        genomes, config, 16, 2, (2, 4, 6, 8), length=16, batches=(2, 2), widths=(16, 32), rates=(4e-3, 8e-3)
    )


def _plan(
    genomes: tuple[Genome, ...],
    config: ModelConfig,
    steps: int,
    seeds: int,
    halves: tuple[int, int, int, int],
    length: int = 128,
    batches: tuple[int, int] = (16, 64),
    widths: tuple[int, ...] = (32, 64, 128),
    rates: tuple[float, ...] = (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2),
) -> Plan:
    """`batches`: held-out batches of a proxy's and of the truth's evaluations."""
    base = replace(_BASE, length=length, validation_batches=batches[0])
    shortest, short, middle, longest = halves
    trainings: list[Training] = []
    # Not one of the truth's: a shared initialisation would flatter the proxies.
    proxy_seeds = (seeds,)

    def add(name: str, settings: ProxySettings) -> None:
        trainings.append(Training(name, settings, config, genomes, proxy_seeds))

    def cosine(count: int, **changes: object) -> ProxySettings:
        return replace(base, steps=count, warmup_steps=count // 10, **changes)  # type: ignore[arg-type]

    # A constant training's prefixes are shorter trainings, so one gives four, and its curve the rest.
    constant = replace(
        base, steps=longest, warmup_steps=middle // 10, schedule="constant", evaluate_every=shortest
    )
    add("constant", constant)
    add(f"cosine {middle}", cosine(middle, average_evaluations=4))
    add(f"cosine {short}", cosine(short))
    # Half the tokens a step, so twice as many batches of the same held-out windows.
    add(f"batch 1, {middle}", cosine(middle, batch_size=1, validation_batches=2 * batches[0]))
    add(f"cosine {shortest}", cosine(shortest))
    transfer = list(_transfer(base, short, genomes[:3], config, widths, rates, proxy_seeds))
    trainings += transfer
    for rate in (4e-3, 1.6e-2):
        add(f"rate {rate:g}, {short}", cosine(short, learning_rate=rate))
    add(f"cosine {longest}", cosine(longest))
    truth = replace(
        base,
        steps=steps,
        warmup_steps=steps // 10,
        validation_batches=batches[1],
        evaluate_every=steps // 10,
    )
    trainings.append(Training(TRUTH, truth, config, genomes, tuple(range(seeds))))
    return Plan(
        {item.name: item for item in trainings},
        tuple(_choices(trainings, halves, constant, steps)),
        tuple(item.name for item in transfer),
        rates,
    )


def _choices(
    trainings: list[Training], halves: tuple[int, int, int, int], constant: ProxySettings, truth_steps: int
) -> Iterator[Choice]:
    _, short, middle, longest = halves
    by_name = {item.name: item.settings for item in trainings}

    def plain(settings: ProxySettings) -> ProxySettings:
        return replace(settings, average_evaluations=1)

    for count in halves:
        name = f"cosine {count}"
        yield Choice(f"cosine, {count} steps", name, plain(by_name[name]))
    name = f"cosine {middle}"
    yield Choice(f"cosine, {middle} steps, mean of 4 evaluations", name, by_name[name])
    for rate in (4e-3, 1.6e-2):
        name = f"rate {rate:g}, {short}"
        yield Choice(f"cosine, {short} steps, rate {rate:g}", name, by_name[name])
    name = f"batch 1, {middle}"
    yield Choice(f"cosine, {middle} steps, batch 1", name, by_name[name])
    for count in halves:
        yield Choice(f"constant, {count} steps", "constant", replace(constant, steps=count))
    averaged = replace(constant, average_evaluations=2)
    yield Choice(f"constant, {longest} steps, mean of 2 evaluations", "constant", averaged)
    for count in (middle, longest):
        later = replace(constant, steps=count, extrapolate_to=truth_steps)
        yield Choice(f"constant, {count} steps, extrapolated to {truth_steps}", "constant", later)
    rungs = ", ".join(map(str, halves))
    yield Choice(f"constant, halving at {rungs} steps", "constant", constant, halving=True)


def _transfer(
    base: ProxySettings,
    steps: int,
    genomes: tuple[Genome, ...],
    config: ModelConfig,
    widths: tuple[int, ...],
    rates: tuple[float, ...],
    seeds: tuple[int, ...],
) -> Iterator[Training]:
    """The layouts at several widths and rates; heads keep their width. Both are the same at `base_width`."""
    base_width = widths[len(widths) // 2]
    head_dim = widths[0] // 4
    for width in widths:
        for kind in ("standard", "mup"):
            if width == base_width and kind == "mup":
                continue
            for rate in rates:
                settings = replace(
                    base,
                    steps=steps,
                    warmup_steps=steps // 10,
                    learning_rate=rate,
                    parametrization=kind,
                    base_width=base_width,
                )
                yield Training(
                    transfer_name(kind, width, rate),
                    settings,
                    replace(config, width=width, head_dim=head_dim),
                    genomes,
                    seeds,
                )


def transfer_name(kind: str, width: int, rate: float) -> str:
    return f"transfer {kind} {width} {rate:g}"
