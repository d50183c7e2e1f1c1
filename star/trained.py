"""Models with their weights: a run's candidate, what `star train` made, an export, or a genome just built.

A candidate whose weights the search did not keep is trained again, which gives the same weights: everything
in its training is decided by the run's settings. Nothing here is ever unpickled.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from star import cost, training_directory, weights
from star.config import ModelConfig
from star.data.tokenization import Tokenizer, open_tokenizer
from star.export import directory as exported
from star.genome import Genome
from star.model import StarModel, build_model
from star.proxy import train_candidate
from star.search.corpus import CorpusRecord, open_recorded
from star.search.directory import RunDirectory
from star.search.errors import RunDamaged, RunError, RunInUse
from star.search.store import RunStore
from star.targets import Target, open_target

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from star.proxy import Progress

__all__ = ["Facts", "ShowTraining", "Trained", "open_trained", "untrained"]

ShowTraining = Callable[[str], "AbstractContextManager[Callable[[Progress], None]]"]
"""Given a title, a context manager whose value is called with a training's progress."""


@dataclass(frozen=True)
class Facts:
    """What is known of how a model came to be.

    Args:
        origin: one sentence.
        settings: of its training, by name; empty where it was not trained.
        corpus: name and hashes of the text, as recorded.
        objectives: measured values by name.
        references: those of other models under the same training, by model.
        versions: of the packages that the results depend on.
    """

    origin: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    corpus: Mapping[str, Any] = field(default_factory=dict)
    objectives: Mapping[str, float] = field(default_factory=dict)
    references: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Trained:
    """A model with its weights and its tokenizer, if it has one. `name` says which it is."""

    name: str
    model: StarModel
    tokenizer: Tokenizer | None
    facts: Facts


def open_trained(directory: Path, id: int | None, show_training: ShowTraining) -> Trained:
    """The model of a run's candidate (the best one by default), of a training directory, or of an export.

    Args:
        directory: a run, what `star train` made, or what `star export` made.
        id: of the run's candidate.
        show_training: used only when the weights are not there.

    Raises:
        ValueError: something in the directory can not be used.
        RunError: there is no run, or no such candidate, or its training fails.
    """
    is_single = training_directory.is_training(directory) or exported.is_export(directory)
    if is_single and id is not None:
        raise ValueError(f"--id is for runs, and {directory} holds a single model")
    if training_directory.is_training(directory):
        return _of_training(directory)
    if is_single:
        return _of_export(directory)
    return _of_run(directory, id, show_training)


def untrained(genome: Genome, config: ModelConfig, seed: int) -> Trained:
    """A genome at a size with its initial weights; bytes are its tokens where it knows 256."""
    model = build_model(genome, config, seed=seed).eval()
    tokenizer = open_tokenizer(None) if config.vocab_size == 256 else None
    facts = Facts(f"Built from the genome with its initial weights (seed {seed}); it has not been trained.")
    return Trained(str(genome), model, tokenizer, facts)


def _of_run(directory: Path, id: int | None, show_training: ShowTraining) -> Trained:
    target = open_target(str(directory), id=id)
    if target.evaluation is None or target.settings is None:
        raise RunError(f"{directory} is no run directory")
    tokenizer = _require_vocabulary(open_tokenizer(target.settings.data.tokenizer), target.config, directory)
    model = build_model(target.genome, target.config, seed=0)
    path = RunDirectory(directory).weights_of(target.evaluation.id)
    if path.is_symlink():
        raise RunDamaged(f"{path} is a symbolic link: a run directory must hold its own files")
    if path.is_file():
        _load(model, path, target.genome)
    else:
        with _trained_again(target, directory, show_training) as trained:
            _load(model, trained, target.genome)
    return Trained(target.name, model.eval(), tokenizer, _facts_of_run(target, directory))


def _facts_of_run(target: Target, directory: Path) -> Facts:
    assert target.settings is not None
    assert target.evaluation is not None
    with RunStore.open(RunDirectory(directory).database) as store:
        recorded = store.facts()
        references = store.references()
    corpus, versions = recorded.get("data"), recorded.get("versions")
    generation = target.evaluation.generation
    when = "a reference" if generation is None else f"of generation {generation + 1}"
    searched = ", ".join(target.settings.objectives)
    first = target.settings.objectives
    order = sorted(target.evaluation.objectives, key=lambda name: (name not in first, name))
    if target.evaluation.stopped:  # these weights were trained further than its quality
        when += ", stopped at a rung and trained to the end later"
        order = [name for name in order if name != "quality"]
    return Facts(
        f"Candidate {target.evaluation.id} ({when}) of an evolutionary search for {searched}, "
        "with the weights of its proxy training.",
        target.settings.proxy.to_json(),
        corpus if isinstance(corpus, dict) else {},
        {name: target.evaluation.objectives[name] for name in order},
        {name: evaluation.objectives for name, evaluation in references.items() if evaluation.ok},
        versions if isinstance(versions, dict) else {},
    )


def _of_training(directory: Path) -> Trained:
    record = training_directory.read_training(directory)
    path = directory / training_directory.WEIGHTS
    if not record.finished or not path.is_file():
        raise ValueError(f"the training in {directory} is not finished: go on with it by star train")
    tokenizer_path = directory / training_directory.TOKENIZER
    tokenizer = open_tokenizer(tokenizer_path if tokenizer_path.is_file() else None)
    model = build_model(record.genome, record.config, seed=0)
    _load(model, path, record.genome)
    settings, corpus = record.identity.get("settings"), record.identity.get("corpus")
    quality = (record.outcome or {}).get("quality")
    facts = Facts(
        "Trained by `star train`.",
        settings if isinstance(settings, dict) else {},
        corpus if isinstance(corpus, dict) else {},
        {"quality": float(quality)} if isinstance(quality, (int, float)) else {},
    )
    tokenizer = _require_vocabulary(tokenizer, record.config, directory)
    return Trained(str(directory), model.eval(), tokenizer, facts)


def _of_export(directory: Path) -> Trained:
    genome, config, dtype = exported.read_config(directory)
    _require_weights_of(genome, config, directory)
    model = build_model(genome, config, seed=0, dtype=dtype)
    exported.load_weights(model, directory)
    path = directory / exported.TOKENIZER
    tokenizer: Tokenizer | None = None
    if path.is_file():
        tokenizer = open_tokenizer(path)
        if tokenizer.vocab_size > config.vocab_size:
            _require_vocabulary(tokenizer, config, directory)
    facts = Facts(f"Exported before, from {directory.name}; its own card says more.")
    return Trained(str(directory), model.eval(), tokenizer, facts)


def _require_weights_of(genome: Genome, config: ModelConfig, directory: Path) -> None:
    """Refuses sizes that the files can not hold the weights of, before any are made room for."""
    least = 2 * cost.parameters(genome, config)  # no dtype of weights has fewer bytes
    found = sum(path.stat().st_size for path in exported.weight_files(directory))
    if 0 < found < least:
        raise ValueError(
            f"{directory}: its {exported.CONFIG} is of a model of at least {least:,} bytes, and its weights "
            f"have {found:,}"
        )


def _require_vocabulary(tokenizer: Tokenizer, config: ModelConfig, directory: Path) -> Tokenizer:
    if tokenizer.vocab_size != config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} token ids, and the models of {directory} have "
            f"{config.vocab_size}: it is not the one that they were trained with"
        )
    return tokenizer


def _load(model: StarModel, path: Path, genome: Genome) -> None:
    about = weights.load_weights(model, path)
    if about.get("genome") != str(genome):
        raise RunDamaged(f"{path} holds the weights of another genome")


@contextlib.contextmanager
def _trained_again(target: Target, directory: Path, show_training: ShowTraining) -> Iterator[Path]:
    """The candidate's weights from its own training once more; kept in the run unless a search is there."""
    assert target.settings is not None
    assert target.evaluation is not None
    run = RunDirectory(directory)
    settings = target.settings
    with RunStore.open(run.database) as store:
        facts = store.facts().get("data")
    try:
        record = CorpusRecord(**facts) if isinstance(facts, dict) else None
    except TypeError:
        record = None
    if record is None:
        raise RunDamaged(f"{run.database} is damaged: it does not say which text it was trained on")
    corpus = open_recorded(settings.data, record)
    with contextlib.ExitStack() as stack:
        path = _place(run, target.evaluation.id, stack)
        with show_training(f"training candidate {target.evaluation.id} again") as progress:
            outcome = train_candidate(
                target.genome, target.config, settings.proxy, corpus, progress=progress, save_to=path
            )
        if not outcome.ok:
            raise RunError(f"{target.name} can not be trained: {outcome.reason}")
        yield path


def _place(run: RunDirectory, id: int, stack: contextlib.ExitStack) -> Path:
    """Where the weights go: into the run, or into a temporary folder while a search may delete them there."""
    try:
        stack.enter_context(run.locked())
    except RunInUse:
        return Path(stack.enter_context(tempfile.TemporaryDirectory())) / f"{id}.safetensors"
    run.weights.mkdir(exist_ok=True)
    return run.weights_of(id)
