"""Tokens: bytes, and tokenizer files with all their switches."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from star.data.errors import DataError
from star.data.tokenization import ByteTokenizer, open_tokenizer


def write_tokenizer(path: Path, special: list[str], **switches: Any) -> Path:
    """A byte-level BPE of 300 tokens, trained on a few words."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat with the other cat"] * 9, trainer)
    if "truncate" in switches:
        tokenizer.enable_truncation(switches["truncate"])
        tokenizer.enable_padding(length=switches["truncate"])
    tokenizer.save(str(path))
    return path


@given(st.text())
def test_bytes_there_and_back(text: str) -> None:
    tokenizer = ByteTokenizer()
    (ids,) = tokenizer.encode_sections([text.encode()])
    assert tokenizer.separator not in ids
    assert tokenizer.decode([*ids, tokenizer.separator]) == text


def test_bytes_that_are_not_text_decode_to_replacements() -> None:
    assert ByteTokenizer().decode([0xC3, 0x28]) == "\ufffd("


def test_tokenizer_file_there_and_back(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(write_tokenizer(tmp_path / "bpe.json", ["<pad>", "<|endoftext|>"]))
    texts = ["the cat", "", "äöü the other\n", "<|endoftext|> spelt out"]
    encoded = tokenizer.encode_sections([text.encode() for text in texts])
    assert [tokenizer.decode(list(ids)) for ids in encoded] == texts
    assert len(encoded[0]) < len(texts[0])
    assert tokenizer.separator == 1
    assert 256 < tokenizer.vocab_size <= 300
    assert all(tokenizer.separator not in ids for ids in encoded)


def test_a_file_without_separator_gets_one_more_id(tmp_path: Path) -> None:
    path = write_tokenizer(tmp_path / "bpe.json", ["<pad>"])
    own = len(json.loads(path.read_text())["model"]["vocab"])
    tokenizer = open_tokenizer(path)
    assert (tokenizer.separator, tokenizer.vocab_size) == (own, own + 1)
    assert tokenizer.decode([own]) == ""


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path) -> None:
    plain = open_tokenizer(write_tokenizer(tmp_path / "plain.json", ["<pad>"]))
    switched = open_tokenizer(write_tokenizer(tmp_path / "switched.json", ["<pad>"], truncate=3))
    sections = [b"the cat sat on the mat", b"a"]
    for a, b in zip(plain.encode_sections(sections), switched.encode_sections(sections), strict=True):
        assert a.tolist() == b.tolist()


def test_identity_follows_the_file(tmp_path: Path) -> None:
    one = open_tokenizer(write_tokenizer(tmp_path / "one.json", ["<pad>"]))
    same = open_tokenizer(write_tokenizer(tmp_path / "same.json", ["<pad>"]))
    other = open_tokenizer(write_tokenizer(tmp_path / "other.json", ["</s>"]))
    assert one.identity == same.identity != other.identity != open_tokenizer(None).identity


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path) -> str:
        with pytest.raises(DataError) as error:
            open_tokenizer(path)
        assert "\n" not in str(error.value)
        return str(error.value)

    file = tmp_path / "bad.json"
    assert "No such file" in refused(file)
    file.write_text('{"model": 3}')
    assert "not a tokenizers JSON file" in refused(file)
    file.write_bytes(b"\xff\xfe")
    assert "not a tokenizers JSON file" in refused(file)
    tokenizers.Tokenizer(models.BPE()).save(str(file))
    assert "vocabulary is empty" in refused(file)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert "pip install tokenizers" in refused(file)
