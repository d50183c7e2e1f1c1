"""Text from a trained model: of a run's candidate, or of a directory that `star train` made.

A candidate whose weights the search did not keep is trained again, which gives the same weights: everything
in its training is decided by the run's settings.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from star import training_directory, weights
from star.config import ModelConfig
from star.data.tokenization import Tokenizer, open_tokenizer
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

__all__ = ["Writer", "open_writer"]

ShowTraining = Callable[[str], "AbstractContextManager[Callable[[Progress], None]]"]


@dataclass(frozen=True)
class Writer:
    """A trained model with its tokenizer. `name` says which."""

    name: str
    model: StarModel
    tokenizer: Tokenizer

    def write(
        self, prompt: str, tokens: int, *, temperature: float = 0.8, top_k: int | None = 50, seed: int = 0
    ) -> str:
        """What the model writes after `prompt`; after an empty one, the beginning of a document.

        Raises:
            ValueError: a prompt that is no Unicode, or an option out of range.
        """
        try:
            section = prompt.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"prompt is not valid Unicode: {error.reason}") from error
        ids = [int(id) for id in self.tokenizer.encode_sections([section])[0]] or [self.tokenizer.separator]
        place = next(self.model.parameters()).device
        row = torch.tensor([ids], device=place)
        written = self.model.generate(row, tokens, temperature=temperature, top_k=top_k, seed=seed)
        return self.tokenizer.decode(written[0, len(ids) :].tolist())


def open_writer(directory: Path, id: int | None, show_training: ShowTraining) -> Writer:
    """The trained model of a run's candidate (the best one by default) or of a training directory.

    Args:
        directory: a run, or what `star train` made.
        id: of the run's candidate.
        show_training: given a title, a context manager whose value is called with the training's progress;
            used only when the weights are not there.

    Raises:
        ValueError: something in the directory can not be used.
        RunError: there is no run, or no such candidate, or its training fails.
    """
    if training_directory.is_training(directory):
        if id is not None:
            raise ValueError(f"--id is for runs, and {directory} is a single training")
        return _of_training(directory)
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
    return Writer(target.name, model.eval(), tokenizer)


def _of_training(directory: Path) -> Writer:
    record = training_directory.read_training(directory)
    path = directory / training_directory.WEIGHTS
    if not record.finished or not path.is_file():
        raise ValueError(f"the training in {directory} is not finished: go on with it by star train")
    tokenizer_path = directory / training_directory.TOKENIZER
    tokenizer = open_tokenizer(tokenizer_path if tokenizer_path.is_file() else None)
    model = build_model(record.genome, record.config, seed=0)
    _load(model, path, record.genome)
    return Writer(str(directory), model.eval(), _require_vocabulary(tokenizer, record.config, directory))


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
