"""From a source to a cache entry: hash, split, tokenize, write, all in streams.

An entry is built in a folder of its own under a lock and appears under its name by one rename, so a
killed process, a full disk or a second builder leaves either a whole entry or none. Entries are checked
on opening, and a damaged one is built again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from star.data.corpus import (
    ENTRY_FILE,
    FORMAT,
    TOKENIZER_FILE,
    TRAIN_FILE,
    VALIDATION_FILE,
    Corpus,
    Entry,
    file_hash,
    load_corpus,
    token_dtype,
)
from star.data.errors import DataError
from star.data.sources import CACHE_TAG, Source, open_source
from star.data.tokenization import TokenArray, Tokenizer, open_tokenizer

__all__ = ["default_cache_directory", "open_corpus"]

SMALLEST_TEXT = 4096
"""Bytes of text below which nothing can be learnt and no split makes sense."""

_SMALLEST_VALIDATION = 16384
_BINS = 1 << 16
_ENCODE_BYTES = 1 << 22
_TAG_TEXT = "Signature: 8a477f597d28d172789f06886806bc55\n# Tokenized corpora of star; safe to delete.\n"


def default_cache_directory() -> Path:
    """`$STAR_CACHE`, else `star` below `$XDG_CACHE_HOME`, else below `~/.cache`."""
    if chosen := os.environ.get("STAR_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "star"


def open_corpus(
    source: str | Path | Sequence[str | Path] | None = None,
    *,
    text_column: str | None = None,
    tokenizer: str | Path | None = None,
    cache_directory: str | Path | None = None,
    validation_fraction: float = 0.05,
) -> Corpus:
    """The corpus of a text, built when the cache has no sound entry for it.

    source: None for the Python standard library's sources, a file, a folder, a Hugging Face dataset's
        name, or several of them; see `star.data.sources.open_source`, also for `text_column`.
    tokenizer: path of a `tokenizers` JSON file; None for bytes.
    validation_fraction: part of the text's bytes to hold out, at least 16 KiB and at most about half.

    The split is by document: those whose hash is below a threshold are held out, so equal documents fall
    on one side, and neither part is ever empty. A document longer than a 64th of the text (at least 1 KiB,
    at most 1 MiB) counts as several.

    Raises DataError, one line, for a source that can't be read or is too small, and a cache that can't
    be written.
    """
    if not 0.0 < validation_fraction <= 0.5:
        raise DataError(f"validation_fraction {validation_fraction}: takes more than 0 and at most 0.5")
    cache = Path(cache_directory).expanduser() if cache_directory is not None else default_cache_directory()
    tokens = open_tokenizer(tokenizer)
    try:
        text = open_source(source, text_column)
        survey = _survey(text)
    except OSError as error:
        raise DataError(f"data {source!r}: can't be read: {error}") from error
    threshold = _threshold(survey, validation_fraction, text.name)
    plan = _Plan(text, tokens, survey, threshold, validation_fraction)
    target = cache / "corpora" / plan.key
    try:
        return _open_or_build(plan, target)
    except OSError as error:
        raise DataError(
            f"cache_directory {str(cache)!r}: can't be written: {error.strerror or error}"
        ) from error


# The first pass: hash and size


@dataclass(frozen=True)
class _Survey:
    """What one pass over the text finds; `bins[h]`: bytes of the sections whose hash starts with h."""

    content_hash: str
    documents: int
    sections: int
    total_bytes: int
    bins: npt.NDArray[np.int64]


def _digest(section: bytes) -> bytes:
    return hashlib.blake2b(section, digest_size=32).digest()


def _bin(digest: bytes) -> int:
    return int.from_bytes(digest[:2], "big")


def _survey(source: Source) -> _Survey:
    content = hashlib.sha256()
    bins = np.zeros(_BINS, dtype=np.int64)
    documents = sections = 0
    for document in source.sections():
        documents += 1
        for section in document:
            digest = _digest(section)
            content.update(digest)
            bins[_bin(digest)] += len(section)
            sections += 1
        content.update(b"end of document")
    return _Survey(content.hexdigest(), documents, sections, int(bins.sum()), bins)


def _threshold(survey: _Survey, fraction: float, name: str) -> int:
    """The bin below which sections are held out: the first that holds out enough and leaves some over."""
    total = survey.total_bytes
    if total < SMALLEST_TEXT:
        raise DataError(f"data {name!r}: too small: {total} bytes of text, needs {SMALLEST_TEXT}")
    filled = np.flatnonzero(survey.bins)
    if len(filled) < 2:
        raise DataError(
            f"data {name!r}: all {survey.sections} documents are equal, so none can be held out apart; "
            "give more text"
        )
    wanted = max(fraction * total, min(_SMALLEST_VALIDATION, total // 4))
    held_out = np.cumsum(survey.bins[filled])
    last = min(int(np.searchsorted(held_out, wanted)), len(filled) - 2)
    return int(filled[last]) + 1


# The second pass: tokens


@dataclass(frozen=True)
class _Plan:
    source: Source
    tokenizer: Tokenizer
    survey: _Survey
    threshold: int
    validation_fraction: float

    @property
    def key(self) -> str:
        parts = [FORMAT, self.survey.content_hash, self.tokenizer.identity, self.validation_fraction]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _open_or_build(plan: _Plan, target: Path) -> Corpus:
    target.parent.mkdir(parents=True, exist_ok=True)
    if (target / ENTRY_FILE).exists():
        try:
            return _load(plan, target)
        except DataError:
            pass  # damaged: built again below, under the lock
    with _locked(target.with_name(f"{target.name}.lock")):
        if target.exists():
            try:
                return _load(plan, target)  # another process built it while this one waited
            except DataError:
                shutil.rmtree(target)
        # Holding the lock means that whoever left such a folder was killed.
        for leftover in target.parent.glob(f"{target.name}.building-*"):
            shutil.rmtree(leftover)
        _tag(target.parent)
        _build(plan, target)
    return _load(plan, target)


def _load(plan: _Plan, target: Path) -> Corpus:
    return load_corpus(target, skipped=plan.source.skipped, name=plan.source.name)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on `path`, which the system gives back even when the process is killed."""
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _tag(folder: Path) -> None:
    """Marks the cache as one, for backup programs and for `star.data.sources`."""
    tag = folder / CACHE_TAG
    if not tag.exists():
        tag.write_text(_TAG_TEXT)


def _build(plan: _Plan, target: Path) -> None:
    folder = Path(tempfile.mkdtemp(prefix=f"{target.name}.building-", dir=target.parent))
    try:
        entry = _write_entry(plan, target.name, folder)
        (folder / ENTRY_FILE).write_text(entry.to_text(), "utf-8")
        for path in folder.iterdir():
            _flush_to_disk(path)
        _flush_to_disk(folder)
        folder.chmod(0o755)  # mkdtemp's 0700 would lock other users out of a shared cache
        os.rename(folder, target)
        _flush_to_disk(target.parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_entry(plan: _Plan, key: str, folder: Path) -> Entry:
    """Writes the token files into `folder` and returns the record of them."""
    with open(folder / TRAIN_FILE, "wb") as train, open(folder / VALIDATION_FILE, "wb") as validation:
        validation_bytes = _write_tokens(plan, train, validation)
    if plan.tokenizer.json is not None:
        (folder / TOKENIZER_FILE).write_bytes(plan.tokenizer.json)
    return Entry(
        format=FORMAT,
        key=key,
        name=plan.source.name,
        content_hash=plan.survey.content_hash,
        tokenizer=plan.tokenizer.identity,
        vocab_size=plan.tokenizer.vocab_size,
        separator=plan.tokenizer.separator,
        documents=plan.survey.documents,
        total_bytes=plan.survey.total_bytes,
        validation_fraction=plan.validation_fraction,
        validation_bytes=validation_bytes,
        files={path.name: (path.stat().st_size, file_hash(path)) for path in sorted(folder.iterdir())},
    )


def _write_tokens(plan: _Plan, train: BinaryIO, validation: BinaryIO) -> int:
    """Streams the text's tokens to their files; returns the bytes held out, one a separator."""
    dtype = token_dtype(plan.tokenizer.vocab_size)
    separator = np.array([plan.tokenizer.separator], dtype=dtype)
    validation_bytes = 0
    for pieces in _batches(_pieces(plan, train, validation)):
        encoded = iter(plan.tokenizer.encode_sections([text for _, text in pieces if text is not None]))
        for file, text in pieces:
            tokens: TokenArray = separator if text is None else next(encoded).astype(dtype, copy=False)
            file.write(tokens.tobytes())
            if file is validation:
                validation_bytes += 1 if text is None else len(text)
    return validation_bytes


_Piece = tuple[BinaryIO, "bytes | None"]
"""Where to, and a section, or None for a separator."""


def _pieces(plan: _Plan, train: BinaryIO, validation: BinaryIO) -> Iterator[_Piece]:
    """Each section beside its side's file; a separator where a document ends or its text changes sides."""
    content = hashlib.sha256()
    for document in plan.source.sections():
        side: Any = None
        for section in document:
            digest = _digest(section)
            content.update(digest)
            file = validation if _bin(digest) < plan.threshold else train
            if side is not None and side is not file:
                yield side, None
            side = file
            yield side, section
        content.update(b"end of document")
        if side is not None:
            yield side, None
    if content.hexdigest() != plan.survey.content_hash:
        raise DataError(f"data {plan.source.name!r}: changed while it was read; try again")


def _batches(pieces: Iterator[_Piece]) -> Iterator[list[_Piece]]:
    """Groups of about 4 MiB of text: a tokenizer encodes one in parallel, and memory holds one."""
    group: list[_Piece] = []
    size = 0
    for piece in pieces:
        group.append(piece)
        size += 1 if piece[1] is None else len(piece[1])
        if size >= _ENCODE_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group
