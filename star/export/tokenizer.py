"""A corpus's tokenizer as files that `AutoTokenizer` loads without remote code, with the very same ids."""

from __future__ import annotations

import json
from typing import Any

from star.data.tokenization import SEPARATOR_TOKENS, ByteTokenizer, Tokenizer

__all__ = ["separator_text", "tokenizer_files"]

TOKENIZER_CONFIG = "tokenizer_config.json"


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json.

    Nothing is added around a text, as in a corpus, and text that spells the separator is ordinary text.

    Raises:
        ValueError: a tokenizer file that does not give its separator the corpus's id once it is written.
    """
    text = separator_text(tokenizer)
    description = (
        _bytes_as_tokens(text) if isinstance(tokenizer, ByteTokenizer) else _of_file(tokenizer, text)
    )
    _check(description, tokenizer, text)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": text,
        "bos_token": text,
        "pad_token": text,
        "padding_side": "left",
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000_000,
    }
    return {
        "tokenizer.json": (json.dumps(description, ensure_ascii=False) + "\n").encode("utf-8"),
        TOKENIZER_CONFIG: (json.dumps(config, indent=2) + "\n").encode("utf-8"),
    }


def separator_text(tokenizer: Tokenizer) -> str:
    """The token that stands for the end of a document."""
    if tokenizer.json is None:
        return SEPARATOR_TOKENS[0]
    known = {id: token for token, id in _vocabulary(json.loads(tokenizer.json)).items()}
    return known.get(tokenizer.separator, SEPARATOR_TOKENS[0])


def _bytes_as_tokens(separator: str) -> dict[str, Any]:
    """Byte-level pieces without a single merge: the ids are the bytes; the separator has the id 0xFF, which
    no UTF-8 text contains."""
    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    del vocabulary[_byte_characters()[ByteTokenizer.separator]]
    vocabulary[separator] = ByteTokenizer.separator
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(ByteTokenizer.separator, separator)],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }


def _byte_characters() -> list[str]:
    """The character that stands for each byte in byte-level vocabularies (GPT-2's table): itself where it is
    printed, else the next of those from 256 on."""
    printed = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printed else chr(next(others)) for byte in range(256)]


def _of_file(tokenizer: Tokenizer, separator: str) -> dict[str, Any]:
    """A corpus's file without padding, truncation and added special tokens, with the separator as a token."""
    assert tokenizer.json is not None
    description: dict[str, Any] = json.loads(tokenizer.json)
    description.update(padding=None, truncation=None, post_processor=None)
    if tokenizer.separator not in _vocabulary(description).values():
        added = description.setdefault("added_tokens", [])
        added.append(_added(tokenizer.separator, separator))
    return description


def _added(id: int, text: str) -> dict[str, Any]:
    return {
        "id": id,
        "content": text,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }


def _vocabulary(description: dict[str, Any]) -> dict[str, int]:
    import tokenizers

    known = tokenizers.Tokenizer.from_str(json.dumps(description))
    return dict(known.get_vocab(with_added_tokens=True))


def _check(description: dict[str, Any], tokenizer: Tokenizer, separator: str) -> None:
    vocabulary = _vocabulary(description)
    if vocabulary.get(separator) != tokenizer.separator or len(vocabulary) > tokenizer.vocab_size:
        raise ValueError(
            f"tokenizer: its file can not give the separator {separator!r} the corpus's id "
            f"{tokenizer.separator}, so the exported tokenizer would be another one"
        )
