"""A tokenized, memory-mapped text: the windows that every candidate sees, and its cache entry on disk.

An entry is a folder `<cache>/corpora/<key>/`:

    train.bin, validation.bin   token ids, little-endian uint8, uint16 or uint32
    tokenizer.json              where the tokens come from a tokenizer file
    corpus.json                 `Entry`: what it is made of, and the length and SHA-256 of every file
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from star.data.errors import DataError
from star.data.tokenization import FileTokenizer, TokenArray, Tokenizer, open_tokenizer

__all__ = ["Corpus", "Entry", "load_corpus", "token_dtype"]

FORMAT = 1
ENTRY_FILE = "corpus.json"
TRAIN_FILE = "train.bin"
VALIDATION_FILE = "validation.bin"
TOKENIZER_FILE = "tokenizer.json"

_READ_BYTES = 1 << 20

Windows = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
"""Inputs and targets, both (batch, length); targets are the inputs' next tokens."""


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest little-endian unsigned type that holds ids below `vocab_size`."""
    for name in ("<u1", "<u2", "<u4"):
        dtype = np.dtype(name)
        if vocab_size <= np.iinfo(dtype).max + 1:
            return dtype
    raise DataError(f"tokenizer: {vocab_size} ids, takes at most {2**32}")


@dataclass(frozen=True)
class Entry:
    """The record of a cache entry, `corpus.json`.

    `content_hash` is that of the text alone: SHA-256 over the BLAKE2b digests of its sections in order.
    `files` maps a file name to its length in bytes and SHA-256. `validation_bytes` counts the text of the
    held-out part in bytes, one a separator.
    """

    format: int
    key: str
    name: str
    content_hash: str
    tokenizer: str
    vocab_size: int
    separator: int
    documents: int
    total_bytes: int
    validation_fraction: float
    validation_bytes: int
    files: Mapping[str, tuple[int, str]]

    def to_text(self) -> str:
        """JSON with a checksum of itself."""
        body = json.dumps(asdict(self), sort_keys=True)
        return json.dumps(
            {"checksum": hashlib.sha256(body.encode()).hexdigest(), "entry": json.loads(body)}, indent=1
        )

    @classmethod
    def from_text(cls, text: str) -> Entry:
        """The entry that `to_text` wrote. Raises ValueError when it is damaged or of another format."""
        try:
            outer = json.loads(text)
            body = outer["entry"]
            checksum = outer["checksum"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{ENTRY_FILE} is not readable") from error
        if hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest() != checksum:
            raise ValueError(f"{ENTRY_FILE} does not match its checksum")
        if body.get("format") != FORMAT or set(body) != {field.name for field in fields(cls)}:
            raise ValueError(f"{ENTRY_FILE} has another format")
        body["files"] = {name: (int(size), str(digest)) for name, (size, digest) in body["files"].items()}
        return cls(**body)


class Corpus:
    """A text as token ids, split into a part to train on and a held-out part.

    Made by `star.data.open_corpus` or `load_corpus`. Pickles as its folder, so that worker processes map
    the same file instead of receiving a copy.

    `train`, `validation`: 1-D read-only memory maps of token ids, each document ended by `separator`.
    `bytes_per_token`: bytes of held-out text a token, exactly 1 for bytes; bits per byte of a model are
    its nats per token / ln 2 / `bytes_per_token`.
    `skipped`: what the source left out, by reason ("binary", "undecodable", "unreadable", "empty", …).
    """

    def __init__(self, directory: Path, entry: Entry, skipped: Mapping[str, int], name: str) -> None:
        self.directory = directory
        self.entry = entry
        self.skipped = Counter(skipped)
        self.name = name
        dtype = token_dtype(entry.vocab_size)
        self.train: TokenArray = np.memmap(directory / TRAIN_FILE, dtype=dtype, mode="r")
        self.validation: TokenArray = np.memmap(directory / VALIDATION_FILE, dtype=dtype, mode="r")
        self._tokenizer: Tokenizer | None = None

    @property
    def vocab_size(self) -> int:
        return self.entry.vocab_size

    @property
    def separator(self) -> int:
        """The id that ends each document."""
        return self.entry.separator

    @property
    def content_hash(self) -> str:
        """Hexadecimal hash of the text, whatever its tokenizer and split."""
        return self.entry.content_hash

    @property
    def key(self) -> str:
        """Hexadecimal hash of the text, its tokenizer and its split: equal keys mean equal token arrays."""
        return self.entry.key

    @property
    def bytes_per_token(self) -> float:
        return self.entry.validation_bytes / len(self.validation)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (str(self.directory), dict(self.skipped), self.name)

    def __repr__(self) -> str:
        return (
            f"Corpus({self.name!r}, {len(self.train):,} + {len(self.validation):,} tokens of "
            f"{self.vocab_size}, {self.content_hash[:12]})"
        )

    def check_length(self, length: int) -> None:
        """Raises DataError when either part is too short for a window of `length` tokens and its targets."""
        if length < 1:
            raise DataError(f"length {length}: takes at least 1")
        for part, tokens in (("training", self.train), ("held-out", self.validation)):
            if len(tokens) < length + 1:
                raise DataError(
                    f"length {length}: the {part} text of {self.name!r} has only {len(tokens)} tokens, "
                    f"needs {length + 1}; give more text or a smaller length"
                )

    def batch(self, step: int, batch_size: int, length: int, seed: int) -> Windows:
        """Windows of the training text at random places: inputs and targets, int64, (batch_size, length).

        A function of its arguments and the text alone, the same on every machine.
        """
        self.check_length(length)
        # Raw words of a counter-based generator: unlike Generator.integers, numpy fixes them for good.
        words = np.random.Philox(key=np.array([seed, step], dtype=np.uint64)).random_raw(batch_size)
        starts = (words % np.uint64(len(self.train) - length)).astype(np.int64)
        return _windows(self.train, starts, length)

    def validation_batches(self, batch_size: int, length: int, count: int) -> Iterator[Windows]:
        """At most `count` batches of windows that don't overlap, spread evenly over the held-out text.

        Fewer, and a smaller last one, where the held-out text is too short for all of them.
        """
        self.check_length(length)
        available = (len(self.validation) - 1) // length
        wanted = min(available, batch_size * count)
        starts = np.arange(wanted, dtype=np.int64) * available // wanted * length
        for first in range(0, wanted, batch_size):
            yield _windows(self.validation, starts[first : first + batch_size], length)

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            path = self.directory / TOKENIZER_FILE
            self._tokenizer = open_tokenizer(path if TOKENIZER_FILE in self.entry.files else None)
            if isinstance(self._tokenizer, FileTokenizer) and self._tokenizer.vocab_size != self.vocab_size:
                raise DataError(
                    f"tokenizer {str(path)!r}: {self._tokenizer.vocab_size} ids, not {self.vocab_size}"
                )
        return self._tokenizer

    def encode(self, text: str) -> npt.NDArray[np.int64]:
        """Token ids of a text, without a separator at its end."""
        try:
            section = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(f"text: not valid Unicode: {error}") from error
        return self.tokenizer.encode_sections([section])[0].astype(np.int64)

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer[Any]]) -> str:
        """The text of token ids; separators vanish, and bytes that are not UTF-8 become U+FFFD."""
        return self.tokenizer.decode([int(i) for i in ids])


def _windows(tokens: TokenArray, starts: npt.NDArray[np.int64], length: int) -> Windows:
    rows = tokens[starts[:, None] + np.arange(length + 1)].astype(np.int64)
    return np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])


def file_hash(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def load_corpus(
    directory: str | Path, *, skipped: Mapping[str, int] | None = None, name: str | None = None
) -> Corpus:
    """The corpus of a cache entry's folder, its files checked by length and SHA-256.

    Raises DataError when the entry is not there or damaged.
    """
    directory = Path(directory)
    try:
        entry = Entry.from_text((directory / ENTRY_FILE).read_text("utf-8"))
        for file, (size, digest) in entry.files.items():
            path = directory / file
            if path.stat().st_size != size:
                raise ValueError(f"{file} has {path.stat().st_size} bytes, not {size}")
            if file_hash(path) != digest:
                raise ValueError(f"{file} does not match its hash")
    except OSError as error:
        raise DataError(f"corpus cache {str(directory)!r}: can't be read: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"corpus cache {str(directory)!r}: damaged: {error}") from error
    return Corpus(directory, entry, skipped or {}, name or entry.name)


def _reopen(directory: str, skipped: dict[str, int], name: str) -> Corpus:
    return load_corpus(directory, skipped=skipped, name=name)
