"""Do random genomes train from their first weights? 20 steps of 500 random, repaired genomes on real text.

    python benchmarks/initialisation.py            # all 500, writes benchmarks/results/initialisation.md
    python benchmarks/initialisation.py --genomes 20 --out /tmp/sample.md

A genome trains if no loss and no gradient is NaN or infinite, and the mean of the last five losses is below
the first. Genomes are drawn as a search may meet them at worst: every gene uniform over all classes, labels
and strategies, then repaired. Prints and records the time from genome to finished first step as well.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from rich.progress import track

from star import Genome, ModelConfig, pools
from star.data import Corpus, open_corpus
from star.genome import Gene
from star.proxy import Progress, ProxySettings, train_candidate

STEPS = 20
LAST = 5
RESULT = Path(__file__).parent / "results" / "initialisation.md"


@dataclass(frozen=True)
class Trial:
    """One genome's training.

    Args:
        genome: text of the genome.
        reason: why it failed; empty where it did not.
        first, last: first loss, mean of the last ones, bits per byte.
        start: seconds from genome to the end of the first step.
    """

    genome: str
    reason: str
    first: float
    last: float
    start: float

    @property
    def trains(self) -> bool:
        """No failure, and the loss fell."""
        return not self.reason and self.last < self.first


def repaired_genome(depth: int, rng: np.random.Generator) -> Genome:
    """Every gene uniform over classes, labels and strategies, then repaired."""
    pool = pools.Pool()
    genes = []
    for _ in range(depth):
        gene = Gene(int(rng.choice(pool.classes)))
        for position in range(1, 5):
            name = Gene._fields[position]
            gene = gene._replace(**{name: int(rng.choice(pool.options(position, gene)))})
        genes.append(gene)
    return Genome(genes).repair(rng)


def try_genome(genome: Genome, config: ModelConfig, settings: ProxySettings, corpus: Corpus) -> Trial:
    """Trains the genome for the settings' steps."""
    losses: list[float] = []
    starts: list[float] = []
    begin = time.perf_counter()

    def note(progress: Progress) -> None:
        starts.append(time.perf_counter() - begin)
        losses.append(progress.train)

    outcome = train_candidate(genome, config, settings, corpus, progress=note)
    reason = "" if outcome.ok else outcome.reason
    first, last = (losses[0], statistics.mean(losses[-LAST:])) if losses else (float("nan"), float("nan"))
    return Trial(str(genome), reason, first, last, starts[0] if starts else float("nan"))


def report(trials: list[Trial], config: ModelConfig, settings: ProxySettings, seed: int, depth: int) -> str:
    """The result as Markdown."""
    good = [trial for trial in trials if trial.trains]
    begun = [trial for trial in trials if trial.start == trial.start]  # a first step, so a number
    ended = [trial for trial in trials if not trial.reason]
    share = 100 * len(good) / len(trials)
    lines = [
        "# Initialisation: random genomes train",
        "",
        f"`python benchmarks/initialisation.py --genomes {len(trials)} --seed {seed}`; {platform.machine()}, "
        f"one thread.",
        "",
        f"{len(trials)} random, repaired genomes of {depth} LIVs x {config.width}, {settings.steps} steps of "
        f"AdamW (peak {settings.learning_rate:g}, {settings.warmup_steps} steps of warm-up, clipped at "
        f"{settings.gradient_clip:g}) on {settings.batch_size} x {settings.length} bytes of Python source.",
        "",
        "| | |",
        "|---|---|",
        f"| train without NaN and with falling loss | {len(good)} of {len(trials)} ({share:.1f} %) |",
        f"| first loss, bits per byte (uniform guess: 8) | {_spread([t.first for t in begun])} |",
        f"| mean of the last {LAST} losses | {_spread([t.last for t in ended])} |",
        f"| fall of the loss | {_spread([t.first - t.last for t in ended])} |",
        f"| genome to finished first step, seconds | {_spread([t.start for t in begun], 3)} |",
        "",
        "Each cell: smallest, 5th percentile, median, 95th percentile, largest.",
    ]
    bad = [trial for trial in trials if not trial.trains]
    if bad:
        lines += ["", "Those that do not:", ""]
        lines += [f"- `{t.genome}`: {t.reason or f'{t.first:.2f} -> {t.last:.2f}'}" for t in bad]
    return "\n".join(lines) + "\n"


def _spread(values: list[float], digits: int = 2) -> str:
    quantiles = np.quantile(values, [0, 0.05, 0.5, 0.95, 1])
    return " / ".join(f"{value:.{digits}f}" for value in quantiles)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--genomes", type=int, default=500)
    parser.add_argument("--depth", type=int, default=24)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    corpus = open_corpus(None)
    config = ModelConfig(width=options.width, head_dim=options.width // 4, vocab_size=corpus.vocab_size)
    settings = ProxySettings(
        steps=STEPS, batch_size=8, length=64, warmup_steps=5, validation_batches=1, threads=1
    )
    rng = np.random.default_rng(options.seed)
    genomes = [repaired_genome(options.depth, rng) for _ in range(options.genomes)]
    trials = [try_genome(genome, config, settings, corpus) for genome in track(genomes, "training")]
    text = report(trials, config, settings, options.seed, options.depth)
    print(text)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text)


if __name__ == "__main__":
    main()
