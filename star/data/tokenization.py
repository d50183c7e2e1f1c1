"""From text to token ids: bytes as they are, or a `tokenizers` JSON file.

Both end each document by a separator token. For bytes it is 0xFF, which no UTF-8 text contains, so
that bytes need no id beyond 0..255. For a tokenizer file it is the first of `SEPARATOR_TOKENS` that
the file has, else one id more than the file's own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from star.data.errors import DataError

__all__ = ["SEPARATOR_TOKENS", "ByteTokenizer", "FileTokenizer", "Tokenizer", "open_tokenizer"]

SEPARATOR_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")

TokenArray = npt.NDArray[np.unsignedinteger[Any]]


class Tokenizer(Protocol):
    """What a corpus asks of a tokenizer; `identity` changes whenever the ids of a text could change."""

    vocab_size: int
    separator: int
    identity: str

    @property
    def json(self) -> bytes | None: ...
    def encode_sections(self, sections: Sequence[bytes]) -> list[TokenArray]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


class ByteTokenizer:
    """Ids are the bytes of the text's UTF-8 form; vocabulary 256, separator 0xFF."""

    vocab_size = 256
    separator = 0xFF
    identity = "bytes"
    json = None

    def encode_sections(self, sections: Sequence[bytes]) -> list[TokenArray]:
        return [np.frombuffer(section, dtype=np.uint8) for section in sections]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i != self.separator).decode("utf-8", errors="replace")


class FileTokenizer:
    """A tokenizer of the `tokenizers` library from the bytes of its JSON file.

    Padding, truncation and added special tokens of the file are off: every token stands for text. Text
    that spells a special token is encoded as ordinary text.
    """

    def __init__(self, json: bytes, name: str) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise DataError(
                f"tokenizer {name!r}: needs the package tokenizers (pip install tokenizers)"
            ) from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json.decode("utf-8"))
        except Exception as error:  # the library raises bare Exception for a file it can't read
            message = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(f"tokenizer {name!r}: not a tokenizers JSON file: {message}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise DataError(f"tokenizer {name!r}: its vocabulary is empty")
        own = max(vocabulary.values()) + 1
        self.separator: int = next((vocabulary[t] for t in SEPARATOR_TOKENS if t in vocabulary), own)
        self.vocab_size: int = max(own, self.separator + 1)
        self.identity: str = f"tokenizers {tokenizers.__version__} {hashlib.sha256(json).hexdigest()}"
        self.json = json

    def encode_sections(self, sections: Sequence[bytes]) -> list[TokenArray]:
        texts = [section.decode("utf-8") for section in sections]
        encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode([int(i) for i in ids if i != self.separator])
        return text


def open_tokenizer(path: str | Path | None) -> Tokenizer:
    """Bytes for None, else the `tokenizers` JSON file at `path`. Raises DataError when it can't be read."""
    if path is None:
        return ByteTokenizer()
    try:
        json = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise DataError(f"tokenizer {str(path)!r}: can't be read: {error.strerror}") from error
    return FileTokenizer(json, str(path))
