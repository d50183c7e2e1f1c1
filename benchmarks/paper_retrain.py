"""The best of each search and the known layouts, trained longer with several seeds, on text and on recall."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.paper_plan import Folder, Plan, append_line, read_lines
from star.genome import Genome
from star.search.corpus import CorpusRecord
from star.search.gpus import Placement
from star.search.layouts import BASELINES
from star.search.workers import Engine, LocalEngine, Task

__all__ = ["Longer", "engine_of", "layouts", "read_longer", "read_retrained", "retrain"]

_LOST = "its worker died"
"""How `star.search.workers.lost_twice` begins its reason."""

EVALUATOR = "star.fidelity.retrain:retrain"

Retrained = dict[str, dict[int, dict[str, Any]]]
"""Results by genome and seed, as star.search.results describes them."""


def layouts(depth: int) -> dict[str, str]:
    """The canonical genomes of Transformer++, StripedMamba and LFM2, by name."""
    return {name: layout(depth).key for name, layout in BASELINES.items()}


# ---- training ------------------------------------------------------------------------------------------


def engine_of(folder: Folder, plan: Plan, corpus: CorpusRecord, placement: Placement) -> Engine:
    """Workers for `retrain`; they start when they are first needed, and stay."""
    settings = plan.longer_settings()
    given = {
        **settings.to_json(),
        "corpus": asdict(corpus),
        "seeds": plan.longer_seeds(),
    }
    given["model"] = {**given["model"], "vocab_size": corpus.vocab_size}
    threads = settings.proxy.threads or 1
    return LocalEngine(
        EVALUATOR,
        given,
        directory=folder.path,
        workers=placement.workers,
        threads=threads,
        gpus=placement.gpus,
    )


def retrain(
    folder: Folder,
    plan: Plan,
    genomes: Sequence[str],
    corpus: CorpusRecord,
    engine: Engine,
    tell: Callable[[str], None],
    lost: set[tuple[str, int]],
) -> None:
    """Train what is not recorded yet of `genomes` (canonical) times `plan.seeds`; seeds outermost, so that a
    stopped experiment has something of everything.

    A training that was lost with its worker is no verdict on its genome: each start does it again, once.
    `lost` has those of this start, and gets those that are lost here.

    Raises:
        RunError, DiskFull: as `star.search.search`.
        ValueError: the record is damaged or of another text.
    """
    there = read_retrained(folder, corpus.key)
    jobs = [
        (seed, genome)
        for seed in range(plan.seeds)
        for genome in dict.fromkeys(genomes)
        if not _is_settled(there.get(genome, {}).get(seed), (genome, seed) in lost)
    ]
    if not jobs:
        return
    tasks = [Task(number * plan.seeds + seed, genome, None) for number, (seed, genome) in enumerate(jobs)]
    for finished, (id, result) in enumerate(engine.evaluate(tasks), start=1):
        seed, genome = jobs[id // plan.seeds]
        line = {"genome": genome, "seed": seed, "corpus": corpus.key, "result": result}
        append_line(folder.retrained_file, line)
        if _is_lost(result):
            lost.add((genome, seed))
        quality = result["objectives"].get("quality")
        said = f"failed: {result['reason']}" if quality is None else f"{quality:.4f} bits per byte"
        tell(f"longer training {finished} of {len(tasks)}, seed {seed}: {said}")


def _is_settled(result: Mapping[str, Any] | None, tried: bool) -> bool:
    return result is not None and (tried or not _is_lost(result))


def _is_lost(result: Mapping[str, Any]) -> bool:
    """Whether the worker died, and not the training."""
    return result["status"] == "failed" and str(result.get("reason")).startswith(_LOST)


def read_retrained(folder: Folder, corpus_key: str | None = None) -> Retrained:
    """What is recorded, by genome and seed; of a training that was done again, the last.

    Raises:
        ValueError: the record is damaged, or of another text than `corpus_key`; one line.
    """
    found: Retrained = {}
    for number, line in enumerate(read_lines(folder.retrained_file), start=1):
        where = f"{folder.retrained_file} is damaged: line {number}"
        genome, seed, result = line.get("genome"), line.get("seed"), line.get("result")
        if not (isinstance(genome, str) and isinstance(seed, int) and isinstance(result, dict)):
            raise ValueError(f"{where} is no training")
        measured = result.get("objectives")
        if not isinstance(measured, dict) or not all(map(_is_number, measured.values())):
            raise ValueError(f"{where} has no numbers")
        if (result.get("status") == "ok") != ("quality" in measured and "recall" in measured):
            raise ValueError(f"{where} has a status that does not fit its numbers")
        if corpus_key is not None and line.get("corpus") != corpus_key:
            raise ValueError(f"{folder.retrained_file} is of another text than the one of today")
        found.setdefault(genome, {})[seed] = result
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# ---- what came of it -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Longer:
    """The longer trainings of one genome.

    Attributes:
        genome: canonical.
        quality: held-out bits per byte, one a seed that succeeded.
        recall: share of right answers, 0 to 1, likewise.
        failed: trainings that failed.
    """

    genome: str
    quality: tuple[float, ...]
    recall: tuple[float, ...]
    failed: int

    @property
    def mean(self) -> float | None:
        """Of the quality; None before the first training."""
        return statistics.mean(self.quality) if self.quality else None


def read_longer(retrained: Mapping[str, Mapping[int, Mapping[str, Any]]], genome: str) -> Longer:
    """The longer trainings of a genome, by seed."""
    results = [result for _, result in sorted(retrained.get(Genome.parse(genome).key, {}).items())]
    good = [result["objectives"] for result in results if result["status"] == "ok"]
    return Longer(
        genome=genome,
        quality=tuple(item["quality"] for item in good),
        recall=tuple(1.0 - item["recall"] for item in good),
        failed=len(results) - len(good),
    )
