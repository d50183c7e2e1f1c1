"""What a command is about: a genome as text, a baseline by its name, or a candidate of a run."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from star import baselines
from star.config import LARGEST_REPEAT, ModelConfig
from star.genome import Genome, GenomeError

if TYPE_CHECKING:
    from star.search.settings import SearchSettings
    from star.search.store import Evaluation

__all__ = ["BASELINES", "Target", "best", "is_run", "model_config", "open_target"]

BASELINES = {
    "transformer_pp": baselines.transformer_pp,
    "striped_mamba": baselines.striped_mamba,
    "lfm2": baselines.lfm2,
}

DEFAULT_DEPTH = 24
PAPER_WIDTH = 768
_HEAD_DIMS = (64, 48, 32, 16, 8, 4)
_GENOME_CHARACTERS = frozenset("0123456789.-")


@dataclass(frozen=True)
class Target:
    """A genome at a size.

    Attributes:
        genome: valid.
        config: sizes of the model.
        name: for people: the genome's text, the baseline's name, or "candidate 12 of runs/first".
        run, evaluation, settings: where it comes from a run.
    """

    genome: Genome
    config: ModelConfig
    name: str
    run: Path | None = None
    evaluation: Evaluation | None = None
    settings: SearchSettings | None = None


def is_run(text: str) -> bool:
    """Whether a command's argument means a directory rather than a genome or a baseline: what exists, and
    what looks more like a name than like a genome with a slip in it."""
    if text in BASELINES:
        return False
    if os.path.exists(text) or os.sep in text:
        return True
    return 2 * sum(char in _GENOME_CHARACTERS for char in text) < len(text)


def open_target(
    text: str,
    *,
    id: int | None = None,
    depth: int | None = None,
    width: int | None = None,
    head_dim: int | None = None,
    vocab_size: int | None = None,
) -> Target:
    """The genome that `text` names, at the sizes given (a run's candidate: at its run's where none is given).

    Args:
        text: a genome, "transformer_pp", "striped_mamba" or "lfm2", or a run directory.
        id: of the run's candidate; the best one by default. Only for runs.
        depth: LIVs of a baseline, by default 24. Only for baselines.
        width, head_dim, vocab_size: by default the run's, else 768, the largest that fits, and 256.

    Raises:
        ValueError: no such genome (the message names the gene), option or size.
        RunError: no such run, or it has no such candidate.
    """
    if depth is not None and text not in BASELINES:
        raise ValueError(f"--depth is for {', '.join(BASELINES)}: the depth of {text} is given")
    if is_run(text):
        return _of_run(Path(text), id, width, head_dim, vocab_size)
    if id is not None:
        raise ValueError(f"--id is for a run directory, and {text!r} is none")
    config = model_config(width, head_dim, vocab_size)
    if text in BASELINES:
        return Target(BASELINES[text](DEFAULT_DEPTH if depth is None else depth), config, text)
    return Target(Genome.parse(text).require_valid(), config, text)


def best(evaluations: list[Evaluation], id: int | None = None) -> Evaluation | None:
    """The candidate with this id, or the successful one of the best quality (references apart)."""
    if id is not None:
        return next((evaluation for evaluation in evaluations if evaluation.id == id), None)
    ranked = [
        (evaluation.objectives["quality"], evaluation.id, evaluation)
        for evaluation in evaluations
        if evaluation.ok and evaluation.generation is not None and "quality" in evaluation.objectives
    ]
    return min(ranked, key=lambda item: item[:2])[2] if ranked else None


def model_config(
    width: int | None = None,
    head_dim: int | None = None,
    vocab_size: int | None = None,
    base: ModelConfig | None = None,
) -> ModelConfig:
    """`base` with other sizes; without a base, the paper's width 768.

    A width that comes without a head width takes the base's where it fits, else the largest that fits.
    """
    if base is None:
        base = ModelConfig(width=PAPER_WIDTH)
    width = base.width if width is None else width
    if head_dim is None:
        fitting = [size for size in (base.head_dim, *_HEAD_DIMS) if width % (size * LARGEST_REPEAT) == 0]
        head_dim = fitting[0] if fitting else base.head_dim
    vocab_size = base.vocab_size if vocab_size is None else vocab_size
    return replace(base, width=width, head_dim=head_dim, vocab_size=vocab_size)


def _of_run(
    directory: Path, id: int | None, width: int | None, head_dim: int | None, vocab_size: int | None
) -> Target:
    from star.search.budgets import judged
    from star.search.directory import RunDirectory
    from star.search.errors import RunDamaged, RunError
    from star.search.store import RunStore

    run = RunDirectory(directory)
    if not directory.exists() and os.sep not in str(directory):
        raise RunError(
            f"{str(directory)!r} is no run directory, no genome and none of {', '.join(BASELINES)}"
        )
    run.check()
    with RunStore.open(run.database) as store:
        settings = store.settings()
        evaluations = store.evaluations()
    # Without an id, the best of those that keep the run's budgets.
    chosen = best(evaluations if id is not None else judged(evaluations, settings.budgets), id)
    if chosen is None:
        if id is None:
            raise RunError(f"{run} has no successful candidate yet")
        ids = f"0 to {len(evaluations) - 1}" if evaluations else "none so far"
        raise RunError(f"{run} has no candidate {id}; its ids are {ids}")
    try:
        genome = Genome.parse(chosen.key).require_valid()
    except GenomeError as error:
        raise RunDamaged(f"candidate {chosen.id} of {run} is no genome: {error}") from error
    config = model_config(width, head_dim, vocab_size, settings.model)
    return Target(genome, config, f"candidate {chosen.id} of {run}", directory, chosen, settings)
