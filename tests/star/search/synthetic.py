"""Evaluators that take no time, importable by worker processes as "synthetic:NAME"."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from star.genome import Genome
from star.search.corpus import CorpusRecord
from star.search.results import evaluate_safely
from star.search.rungs import Bars
from star.search.settings import SearchSettings, preset
from star.search.workers import Task, settings_for


def open_corpus(settings: SearchSettings) -> CorpusRecord:
    """A corpus that nobody reads."""
    return CorpusRecord("synthetic", content_hash="0" * 64, key="0" * 64, vocab_size=256)


def measure(genome: Genome) -> dict[str, float]:
    """Objectives in conflict: few attentions are small, many are good; every genome its own noise."""
    attentions = sum(gene.liv_class <= 4 for gene in genome)
    digest = hashlib.sha256(genome.key.encode()).digest()
    noise = int.from_bytes(digest[:6], "big") / 2**48
    return {
        "quality": 3.0 - attentions / genome.depth + 0.3 * noise,
        "size": 1000 * genome.depth + 512 * attentions,
        "cache": 4096 * attentions,
        "flops": 10.0**6 + 3 * attentions,
    }


def score(text: str, settings: dict[str, Any], candidate_id: int, weights: str | None) -> dict[str, Any]:
    """At once; every seventh model fails; saves a little file as weights."""
    genome = Genome.parse(text)
    digest = hashlib.sha256(genome.key.encode()).digest()
    if digest[0] % 7 == 0:
        return {"status": "failed", "reason": f"diverged: digest {digest[0]}"}
    if weights is not None:
        partial = Path(weights + ".partial")
        partial.write_text(text)
        partial.replace(weights)
    return {"status": "ok", "objectives": measure(genome), "curve": [(1, 4.0, None), (2, 3.0, 3.1)]}


def slow_score(text: str, settings: dict[str, Any], candidate_id: int, weights: str | None) -> dict[str, Any]:
    """As `score`, after a time that depends on the model: answers come out of order."""
    time.sleep(hashlib.sha256(text.encode()).digest()[1] / 255 * 0.02)
    return score(text, settings, candidate_id, weights)


def deadly(text: str, settings: dict[str, Any], candidate_id: int, weights: str | None) -> dict[str, Any]:
    """Candidate 2 kills its worker every time, candidate 4 the first time, 6 ends it by itself."""
    if candidate_id == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if candidate_id == 4 and weights is not None:
        mark = Path(weights).parent.parent / "seen-4"
        if not mark.exists():
            mark.write_text("")
            os.kill(os.getpid(), signal.SIGSEGV)
    if candidate_id == 6:
        os._exit(3)
    return {"status": "ok", "objectives": measure(Genome.parse(text))}


def full_disk(text: str, settings: dict[str, Any], candidate_id: int, weights: str | None) -> dict[str, Any]:
    """No room from candidate 3 on, unless the file "room" stands beside the weights folder."""
    if candidate_id >= 3 and weights is not None and not (Path(weights).parent.parent / "room").exists():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), weights)
    return score(text, settings, candidate_id, weights)


def endless(text: str, settings: dict[str, Any], candidate_id: int, weights: str | None) -> dict[str, Any]:
    """Tells its process number in the file "pid-ID", then never comes back."""
    assert weights is not None
    (Path(weights).parent.parent / f"pid-{candidate_id}").write_text(str(os.getpid()))
    while True:
        time.sleep(60)


def strange(text: str, settings: dict[str, Any], candidate_id: int, weights: str | None) -> Any:
    """What no evaluator should return, another thing for each candidate."""
    good: dict[str, Any] = {"status": "ok", "objectives": measure(Genome.parse(text))}
    returned = [
        None,
        {"status": "maybe"},
        {"status": "ok"},
        {"status": "ok", "objectives": {**good["objectives"], "quality": float("nan")}},
        {"status": "ok", "objectives": {"quality": 1.0}},
        {**good, "curve": ["x" * 3_000_000]},
        {"status": "failed"},
    ]
    if candidate_id == len(returned):
        raise MemoryError("out of\nmemory")
    return returned[candidate_id] if candidate_id < len(returned) else good


STEPS = 40


def climbing(text: str, settings: dict[str, Any], candidate_id: int, weights: str | None) -> dict[str, Any]:
    """A training of STEPS steps, whose losses tell the final quality the better the later they are; it ends
    where the search says so. Every seventh model fails."""
    return _climb(text, settings, noise=0.2)


def foreseeable(
    text: str, settings: dict[str, Any], candidate_id: int, weights: str | None
) -> dict[str, Any]:
    """Likewise, and the first loss tells all."""
    return _climb(text, settings, noise=0.0)


def _climb(text: str, settings: dict[str, Any], noise: float) -> dict[str, Any]:
    values = {name: value for name, value in settings.items() if name not in ("bars", "corpus")}
    given, search = settings.get("bars"), SearchSettings.from_json(values)
    genome = Genome.parse(text)
    exact = measure(genome)
    quality = exact.pop("quality")
    rng = random.Random(genome.key)
    if rng.random() < 1 / 7:
        return {"status": "failed", "reason": "diverged"}
    curve: list[tuple[int, float, float | None]] = []
    for step in range(4, STEPS + 1, 4):
        left = 1 - step / STEPS
        loss = 0.8 * quality + 3.0 * left + noise * left * rng.gauss(0, 1)
        curve.append((step, loss, quality if step == STEPS else None))
        reason = None
        if given is not None and step < STEPS:
            reason = Bars.from_json(given).verdict(curve, exact, search)
        if reason is not None:
            objectives = {**exact, "quality": loss}
            return {"status": "stopped", "reason": reason, "objectives": objectives, "curve": curve}
    return {"status": "ok", "objectives": {**exact, "quality": quality}, "curve": curve}


def gpu_of_worker(
    text: str, settings: dict[str, Any], candidate_id: int, weights: str | None
) -> dict[str, Any]:
    """Its size is the number of the GPU that the worker may use."""
    time.sleep(0.05)  # long enough for every worker to get a candidate
    number = float(os.environ.get("CUDA_VISIBLE_DEVICES", "-1"))
    return {"status": "ok", "objectives": {**measure(Genome.parse(text)), "size": number}}


def hanging(text: str, settings: dict[str, Any], candidate_id: int, weights: str | None) -> dict[str, Any]:
    """Every third candidate never comes back."""
    while candidate_id % 3 == 1:
        time.sleep(60)
    return {"status": "ok", "objectives": measure(Genome.parse(text))}


class Killed(BaseException):
    """Stands for the end of the process."""


class InlineEngine:
    """Evaluates in this process, in an order that `shuffle` decides, and dies after `lives` answers."""

    def __init__(
        self,
        evaluator: Callable[..., dict[str, Any]] = score,
        *,
        shuffle: random.Random | None = None,
        lives: int | None = None,
        settings: SearchSettings | None = None,
    ) -> None:
        self.evaluator, self.shuffle, self.lives = evaluator, shuffle, lives
        self.settings = {} if settings is None else settings.to_json()
        self.evaluated: list[str] = []

    def evaluate(self, tasks: Sequence[Task]) -> Iterator[tuple[int, dict[str, Any]]]:
        tasks = list(tasks)
        if self.shuffle is not None:
            self.shuffle.shuffle(tasks)
        for task in tasks:
            if self.lives is not None:
                if self.lives == 0:
                    raise Killed
                self.lives -= 1
            self.evaluated.append(task.genome)
            given = settings_for(task.to_json(), self.settings)
            yield task.id, evaluate_safely(self.evaluator, task.genome, given, task.id, None)

    def close(self) -> None:
        """Nothing runs."""


def settings(**changes: Any) -> SearchSettings:
    """A search of a second."""
    values = {"population": 6, "generations": 4, "depth": 6, "workers": 2, **changes}
    return preset("demo", **values)
