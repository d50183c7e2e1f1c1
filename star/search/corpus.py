"""The text of a search: opened once by the parent, recorded, and opened again by each worker."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from star.search.errors import RunError
from star.search.settings import DataSettings, SearchSettings

if TYPE_CHECKING:
    from star.data import Corpus

__all__ = ["CorpusRecord", "open_corpus_of", "open_recorded"]


@dataclass(frozen=True)
class CorpusRecord:
    """Which text a search uses.

    Attributes:
        name: for people.
        content_hash: of the text.
        key: of the tokens and their split; equal keys mean equal training.
        vocab_size: token ids.
        directory: where this machine keeps the tokens; not recorded, and no part of what must agree.
    """

    name: str
    content_hash: str
    key: str
    vocab_size: int
    directory: str | None = None

    def facts(self) -> dict[str, Any]:
        """What the run records."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "directory"}


def open_corpus_of(settings: SearchSettings) -> CorpusRecord:
    """Build or open the corpus that the settings name.

    Raises:
        ValueError: the text can not be used, is too short for the proxy, or there is no room for its tokens.
    """
    corpus = _open(settings.data)
    corpus.check_length(settings.proxy.length)
    return CorpusRecord(
        name=corpus.name,
        content_hash=corpus.content_hash,
        key=corpus.key,
        vocab_size=corpus.vocab_size,
        directory=str(corpus.directory),
    )


def open_recorded(data: DataSettings, record: CorpusRecord) -> Corpus:
    """The corpus of a record: the tokens that the parent has made, where they are on this machine.

    Raises:
        RunError: the text here is another one.
        ValueError: it can not be opened.
    """
    from star.data import load_corpus

    if record.directory is not None and Path(record.directory).is_dir():
        corpus = load_corpus(record.directory, name=record.name)
    else:
        corpus = _open(data)
    if corpus.key != record.key:
        raise RunError(
            f"the text {corpus.name!r} is not the one that the search began with "
            f"(content hash {corpus.content_hash[:12]}, not {record.content_hash[:12]})"
        )
    return corpus


def _open(data: DataSettings) -> Corpus:
    from star.data import open_corpus

    return open_corpus(
        list(data.source) or None,
        text_column=data.text_column,
        tokenizer=data.tokenizer,
        validation_fraction=data.validation_fraction,
    )
