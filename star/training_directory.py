"""A longer training of one genome, in a directory of its own that can be stopped, resumed, and used.

    training.json            what is trained on what, the learning curve, how it ended
    checkpoint.safetensors   model, optimizer and progress, while it is unfinished
    model.safetensors        the weights, when it is finished
    tokenizer.json           where the tokens come from a tokenizer file

Nothing in it is ever unpickled.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from star.config import ModelConfig
from star.genome import Genome

if TYPE_CHECKING:
    from star.data import Corpus
    from star.proxy import Outcome, Progress, ProxySettings
    from star.search.settings import DataSettings

__all__ = [
    "StoppedTraining",
    "TrainingRecord",
    "is_training",
    "locked",
    "read_training",
    "train",
    "write_whole",
]

FORMAT = 1
RECORD = "training.json"
CHECKPOINT = "checkpoint.safetensors"
WEIGHTS = "model.safetensors"
TOKENIZER = "tokenizer.json"
LOCK = "training.lock"
_RECORD_BYTES_AT_MOST = 16 << 20


class StoppedTraining(Exception):
    """The caller asked for a stop; a checkpoint has been written."""


@dataclass(frozen=True)
class TrainingRecord:
    """training.json: `identity` decides the result, `outcome` is what became of it (None: unfinished)."""

    identity: Mapping[str, Any]
    outcome: Mapping[str, Any] | None

    @property
    def genome(self) -> Genome:
        return Genome.parse(self.identity["genome"]).require_valid()

    @property
    def config(self) -> ModelConfig:
        return ModelConfig.from_json(self.identity["config"])

    @property
    def finished(self) -> bool:
        return self.outcome is not None and self.outcome.get("status") == "ok"


def is_training(directory: Path) -> bool:
    """Whether `train` has written there."""
    return (directory / RECORD).is_file()


Record = TypeVar("Record")


def read_record(path: Path, version: int, interpret: Callable[[Any], Record]) -> Record:
    """What `interpret` makes of a record's JSON: an object with "format", which is `version`, and "identity".

    Raises:
        ValueError: it is damaged.
        OSError: it can not be read.
    """
    with open(path, "rb") as file:
        raw = file.read(_RECORD_BYTES_AT_MOST + 1)
    try:
        if len(raw) > _RECORD_BYTES_AT_MOST:
            raise ValueError("it is too large")
        value = json.loads(raw)
        if value["format"] != version or not isinstance(value["identity"], dict):
            raise ValueError("it has another format")
        return interpret(value)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is damaged: {reason}") from error


def read_training(directory: Path) -> TrainingRecord:
    """The record of a training.

    Raises:
        ValueError: it is damaged.
        OSError: it can not be read.
    """

    def interpret(value: Any) -> TrainingRecord:
        outcome = value["outcome"]
        if outcome is not None and not isinstance(outcome, dict):
            raise ValueError("its outcome is no object")
        record = TrainingRecord(value["identity"], outcome)
        _ = record.genome, record.config
        return record

    return read_record(directory / RECORD, FORMAT, interpret)


def train(
    directory: Path,
    genome: Genome,
    config: ModelConfig,
    settings: ProxySettings,
    corpus: Corpus,
    data: DataSettings,
    *,
    progress: Callable[[Progress], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    checkpoint_every: int = 200,
) -> Outcome:
    """Train `genome` in `directory`, or go on with a training of the same that was stopped there.

    A finished training is not repeated: its outcome is returned.

    Args:
        directory: made if it is missing.
        config: its vocabulary must be the corpus's.
        data: where the corpus comes from, for the record.
        progress: called after every step.
        should_stop: asked after every step; True writes a checkpoint and raises StoppedTraining.
        checkpoint_every: steps between checkpoints.

    Raises:
        StoppedTraining: see `should_stop`.
        ValueError: the directory holds another training, or a text that is too short.
        OSError: something can not be written.
    """
    from star.proxy import Outcome

    identity = _identity(genome, config, settings, corpus, data)
    directory.mkdir(parents=True, exist_ok=True)
    with locked(directory):
        if is_training(directory):
            record = read_training(directory)
            _require_same(directory, record.identity, identity)
            if record.finished and record.outcome is not None and (directory / WEIGHTS).is_file():
                return Outcome.from_json(record.outcome)
        else:
            _write_record(directory, identity, None)
        if corpus.tokenizer.json is not None:
            write_whole(directory / TOKENIZER, corpus.tokenizer.json)
        outcome = _carry_out(
            directory, genome, config, settings, corpus, progress, should_stop, checkpoint_every
        )
        _write_record(directory, identity, outcome.to_json())
        if outcome.ok:
            (directory / CHECKPOINT).unlink(missing_ok=True)
        return outcome


def _carry_out(
    directory: Path,
    genome: Genome,
    config: ModelConfig,
    settings: ProxySettings,
    corpus: Corpus,
    progress: Callable[[Progress], None] | None,
    should_stop: Callable[[], bool],
    checkpoint_every: int,
) -> Outcome:
    from star import parametrization, training, weights
    from star.model import build_model
    from star.proxy import Outcome

    corpus.check_length(settings.length)
    checkpoint = directory / CHECKPOINT
    with training.thread_count(settings.threads):
        model = build_model(genome, config, seed=settings.seed)
        parametrization.scale_initial_weights(model, settings)
        run = training.Training(model, settings, corpus, progress)
        if checkpoint.is_file():
            run.restore(checkpoint)
        try:
            while not run.done:
                run.train_step()
                stopping = should_stop()
                if not run.done and (stopping or run.step % checkpoint_every == 0):
                    run.save(checkpoint)
                if stopping and not run.done:
                    raise StoppedTraining
        except (training.Diverged, RuntimeError, MemoryError) as error:
            return Outcome(
                "failed", training.failure_reason(error), None, tuple(run.curve), run.seconds, run.tokens
            )
        outcome = run.outcome()
    about = {"genome": str(genome), "config": config.to_json(), "content_hash": corpus.content_hash}
    weights.save_weights(model, directory / WEIGHTS, about)
    return outcome


def _identity(
    genome: Genome, config: ModelConfig, settings: ProxySettings, corpus: Corpus, data: DataSettings
) -> dict[str, Any]:
    """What must be equal for a directory to be gone on with; threads and device may change."""
    training = settings.to_json()
    del training["threads"], training["device"]
    return {
        "genome": str(genome),
        "config": config.to_json(),
        "settings": training,
        "data": {**asdict(data.absolute()), "source": list(data.absolute().source)},
        "corpus": {
            "name": corpus.name,
            "content_hash": corpus.content_hash,
            "key": corpus.key,
            "separator": corpus.separator,
        },
    }


def _require_same(directory: Path, recorded: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    from star.proxy import ADDED_SETTINGS

    for section, value in wanted.items():
        there = recorded.get(section)
        if section in ("data",) or there == value:  # the corpus's key decides, not where it came from
            continue
        if section == "corpus":
            if isinstance(there, dict) and there.get("key") == value["key"]:
                continue
            raise ValueError(f"{directory} holds a training on another text, tokenizer or split")
        if isinstance(value, dict) and isinstance(there, dict):
            if section == "settings":
                value, there = {**ADDED_SETTINGS, **value}, {**ADDED_SETTINGS, **there}
            name = next(name for name in {**value, **there} if there.get(name) != value.get(name))
            raise ValueError(
                f"{directory} holds a training with {name} {there.get(name)!r}, not {value.get(name)!r}: "
                "take another --out, or the same options to go on with it"
            )
        raise ValueError(f"{directory} holds a training of another {section}: take another --out")


def _write_record(directory: Path, identity: Mapping[str, Any], outcome: Mapping[str, Any] | None) -> None:
    value = {"format": FORMAT, "identity": identity, "outcome": outcome}
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    write_whole(directory / RECORD, text.encode("utf-8"))


def write_whole(path: Path, data: bytes) -> None:
    """The file appears whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """One training a directory. The lock goes with the process, however it ends."""
    descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{directory} is in use: another training runs there") from None
        yield
    finally:
        os.close(descriptor)
