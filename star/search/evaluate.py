"""The evaluator of every real search: genome in, costs and the proxy's verdict out. Runs in the workers.

What training needs is imported here and not on first use: an installation that lacks something must stop
the search when its first worker starts, not fail one candidate after another.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import star.model
import star.training  # noqa: F401
from star.data import Corpus
from star.genome import Genome
from star.proxy import CurvePoint, Outcome, train_candidate
from star.search.corpus import CorpusRecord, open_recorded
from star.search.errors import RunError, is_disk_full
from star.search.measures import Candidate, MeasurementFailed
from star.search.results import failure
from star.search.rungs import Bars
from star.search.settings import SearchSettings
from star.search.store import canonical_json

__all__ = ["evaluate"]


def evaluate(
    genome_text: str, settings: dict[str, Any], candidate_id: int, weights_path: str | None
) -> dict[str, Any]:
    """Train one candidate by the proxy and measure all objectives.

    Args:
        genome_text: a valid genome.
        settings: what `SearchSettings.to_json` gives, under "corpus" the `CorpusRecord` of the search, and
            under "bars", where there are any, what the candidate has to pass (star.search.rungs).
        candidate_id: its id in the search; equal genomes give equal results whatever it is.
        weights_path: where to save the trained weights, or None.

    Returns:
        What star.search.results describes.

    Raises:
        RunError: the corpus is not the one that the search began with, or fits no candidate.
        OSError: there is no room for the weights.
    """
    settings = dict(settings)
    bars = settings.pop("bars", None)
    search, corpus = _prepared(canonical_json(settings))
    genome = Genome.parse(genome_text)
    stop = None if bars is None else _judge(Bars.from_json(bars), genome, search)
    try:
        outcome = train_candidate(genome, search.model, search.proxy, corpus, save_to=weights_path, stop=stop)
    except (ValueError, OSError) as error:
        # Neither is the candidate's fault: wrong settings for this text, or weights that can not be written.
        if is_disk_full(error):
            raise
        raise RunError(str(error).splitlines()[0]) from error
    result = outcome.to_json()
    if outcome.status == "failed":
        return result
    candidate = Candidate(genome, search, outcome)
    began = time.perf_counter()
    try:
        result["objectives"] = {item.name: item.load()(candidate) for item in search.measured()}
    except MeasurementFailed as error:
        return {**failure(str(error)), "curve": result["curve"], "seconds": _seconds(outcome, began)}
    result["seconds"] = _seconds(outcome, began)
    return result


def _judge(
    bars: Bars, genome: Genome, search: SearchSettings
) -> Callable[[Sequence[CurvePoint]], str | None]:
    """The judge at the rungs: why the training with this curve ends, or None."""
    untrained = Candidate(genome, search, Outcome("ok"))
    exact = {item.name: item.load()(untrained) for item in search.measured() if not item.trained}
    return lambda curve: bars.verdict(curve, exact, search)


def _seconds(outcome: Outcome, began: float) -> float:
    """Of the proxy training and all measurements."""
    return outcome.seconds + time.perf_counter() - began


@lru_cache(maxsize=1)
def _prepared(settings_text: str) -> tuple[SearchSettings, Corpus]:
    """Settings and corpus, once a worker process."""
    settings = json.loads(settings_text)
    record = CorpusRecord(**settings.pop("corpus"))
    search = SearchSettings.from_json(settings)
    return search, open_recorded(search.data, record)
