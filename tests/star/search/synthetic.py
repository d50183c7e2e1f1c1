"""Evaluators that take no time, importable by worker processes as "synthetic:NAME"."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from pathlib import Path
from typing import Any

from star.genome import Genome
from star.search.corpus import CorpusRecord
from star.search.settings import SearchSettings


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
