"""Longer trainings that take no time: records of them, and an engine without processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from recorded_runs import small_settings

from star.fidelity.record import Retraining, identity
from star.fidelity.sample import Member
from star.fidelity.settings import FidelitySettings
from star.pools import load_object
from star.search.corpus import CorpusRecord
from star.search.results import evaluate_safely
from star.search.settings import SearchSettings
from star.search.workers import Task

CORPUS_KEY = "cd" * 32
"""Of the runs that `recorded_runs` makes."""


def open_corpus(settings: SearchSettings) -> CorpusRecord:
    """A corpus that nobody reads."""
    return CorpusRecord("some text", content_hash="ab" * 32, key=CORPUS_KEY, vocab_size=256)


def open_other_corpus(settings: SearchSettings) -> CorpusRecord:
    """Another one."""
    return CorpusRecord("other text", content_hash="ef" * 32, key="01" * 32, vocab_size=256)


def trainings(
    sample: Sequence[Member], settings: FidelitySettings, qualities: Sequence[Sequence[float | None]]
) -> dict[str, list[Retraining]]:
    """Retrainings of each member with these qualities, one list a member; None failed."""
    longer = settings.trainings(small_settings().proxy)
    return {
        member.evaluation.key: [
            Retraining(
                member.evaluation.key,
                identity(training),
                "failed" if quality is None else "ok",
                "diverged: loss is nan" if quality is None else None,
                quality,
                3.0,
            )
            for training, quality in zip(longer, row, strict=True)
        ]
        for member, row in zip(sample, qualities, strict=True)
    }


def lines(directory: Path) -> list[str]:
    """Of the record."""
    return (directory / "fidelity.jsonl").read_text().splitlines()


class InlineEngine:
    """Made as `LocalEngine` is; evaluates in this process."""

    def __init__(self, evaluator: str, settings: Mapping[str, Any], **options: Any) -> None:
        self.evaluator, self.settings = load_object(evaluator), dict(settings)

    def evaluate(self, tasks: Sequence[Task]) -> Iterator[tuple[int, dict[str, Any]]]:
        for task in tasks:
            yield task.id, evaluate_safely(self.evaluator, task.genome, self.settings, task.id, None)

    def close(self) -> None:
        """Nothing runs."""
