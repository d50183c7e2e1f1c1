"""Every kind of source: what it reads, in which order, what it leaves out, and how it refuses."""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from star.data.errors import DataError
from star.data.sources import Source, cut, open_source


def documents(source: Source) -> list[str]:
    return [b"".join(chunks).decode() for chunks in source.documents()]


def refused(*arguments: object) -> str:
    """The message of the DataError that opening and reading raises; it is one line."""
    with pytest.raises(DataError) as error:
        documents(open_source(*arguments))  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    return str(error.value)


# Plain text


def test_text_file_is_one_document(tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    file.write_text("eins\nzwei\näöü\n")
    source = open_source(file)
    assert documents(source) == ["eins\nzwei\näöü\n"]
    assert documents(source) == documents(source)
    assert (source.name, source.total_bytes) == ("book.txt", file.stat().st_size)


def test_folder_is_read_in_order_of_paths_and_hidden_entries_are_not(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.py", "a/a.md", ".git/config", ".hidden", "c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert documents(open_source(tmp_path)) == ["b.txt", "c", "a/a.md", "a/z.py"]


def test_folder_counts_what_it_skips(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("text")
    (tmp_path / "picture").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "latin").write_bytes("äöü".encode("latin-1"))
    (tmp_path / "cut").write_bytes("ä".encode()[:1])
    (tmp_path / "nothing").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    source = open_source(tmp_path)
    assert documents(source) == ["text"]
    expected = {"binary": 1, "undecodable": 2, "empty": 1, "unreadable": 1, "special": 1}
    assert source.skipped == expected


def test_a_late_invalid_byte_makes_a_large_file_undecodable(tmp_path: Path) -> None:
    (tmp_path / "good").write_text("good")
    (tmp_path / "large").write_bytes(b"x" * (3 << 20) + b"\xff")
    source = open_source(tmp_path)
    assert documents(source) == ["good"]
    assert source.skipped == {"undecodable": 1}


def test_symlink_loops_are_harmless(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "text").write_text("once")
    (tmp_path / "inner" / "up").symlink_to(tmp_path)
    (tmp_path / "itself").symlink_to("itself")
    source = open_source(tmp_path)
    assert documents(source) == ["once"]
    assert source.skipped == {"unreadable": 1}


def test_symlinked_files_and_folders_are_read(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a").write_text("linked")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    assert documents(open_source(folder)) == ["linked"]


def test_caches_inside_a_folder_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("text")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "CACHEDIR.TAG").touch()
    (tmp_path / "cache" / "corpus.json").write_text("{}")
    assert documents(open_source(tmp_path)) == ["text"]


def test_several_sources_follow_each_other(tmp_path: Path) -> None:
    (tmp_path / "b").write_text("first")
    (tmp_path / "a").write_text("second")
    (tmp_path / "c.jsonl").write_text('{"text": "third"}\n{"text": ""}\n')
    source = open_source([tmp_path / "b", str(tmp_path / "a"), tmp_path / "c.jsonl"])
    for _ in range(2):
        assert documents(source) == ["first", "second", "third"]
        assert source.skipped == {"empty": 1}
    assert source.name == "b + a + c.jsonl"


def test_refusals_of_plain_text(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "binary").write_bytes(b"\0")
    (tmp_path / "text").write_text("text")
    os.mkfifo(tmp_path / "pipe")
    assert "empty file" in refused(tmp_path / "empty")
    assert "binary file" in refused(tmp_path / "binary")
    assert "not a file or folder" in refused(tmp_path / "pipe")
    assert "no such file or folder" in refused(str(tmp_path / "missing/deep/er"))
    assert "no columns" in refused(tmp_path / "text", "body")
    assert "empty name" in refused("")
    assert "empty list" in refused([])
    assert "can't be read" in refused("nul\0byte")
    assert "no such file or folder" in refused(tmp_path / "text" / "below")


def test_folder_without_text_says_what_was_in_it(tmp_path: Path) -> None:
    assert "it is empty" in refused(tmp_path)
    (tmp_path / "a").write_bytes(b"\0")
    (tmp_path / "b").write_bytes(b"\0")
    assert "2 binary" in refused(tmp_path)


def test_standard_library_needs_no_arguments() -> None:
    source = open_source(None)
    assert 5e6 < source.total_bytes < 5e7
    assert "standard library" in source.name
    assert open_source(None).total_bytes == source.total_bytes


# Rows


def test_jsonl_rows_are_documents(tmp_path: Path) -> None:
    file = tmp_path / "rows.JSONL"
    rows = [{"text": "one\ntwo"}, {"text": None}, {"text": ""}, {"text": "ä"}, {"text": "\ud800"}]
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    source = open_source(file)
    assert documents(source) == ["one\ntwo", "ä"]
    assert source.skipped == {"empty": 2, "undecodable": 1}


def test_jsonl_refusals_name_the_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "fine"}\n{"text": "cut off')
    assert "line 2 is not JSON" in refused(file)
    file.write_text('{"text": "fine"}\n{"body": "other"}\n')
    assert "'text': not in line 2" in refused(file)
    assert "'body'" in refused(file)
    file.write_text('{"text": 3}\n')
    assert "got int" in refused(file)
    file.write_text('"text"\n')
    assert "not in line 1" in refused(file)
    file.write_text("[" * 100_000)
    assert "line 1 is not JSON" in refused(file)
    file.write_bytes(b'{"text": "\xff"}\n')
    assert "line 1 is not JSON" in refused(file)


def write_parquet(path: Path, rows: int, group: int) -> list[str]:
    texts = [f"document {i}" for i in range(rows)]
    table = pyarrow.table({"id": list(range(rows)), "body": texts})
    parquet.write_table(table, path, row_group_size=group)
    return texts


def test_parquet_column_over_several_row_groups(tmp_path: Path) -> None:
    texts = write_parquet(tmp_path / "rows.parquet", rows=1000, group=300)
    source = open_source(tmp_path / "rows.parquet", "body")
    assert documents(source) == texts
    assert documents(source) == texts
    assert source.total_bytes > 0


def test_parquet_nulls_are_counted(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"text": ["a", None, ""]}), tmp_path / "rows.parquet")
    source = open_source(tmp_path / "rows.parquet")
    assert documents(source) == ["a"]
    assert source.skipped == {"empty": 2}


def test_parquet_refusals(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    write_parquet(file, rows=10, group=10)
    assert "which has 'id', 'body'" in refused(file)
    assert "got int" in refused(file, "id")
    whole = file.read_bytes()
    file.write_bytes(whole[:-9])
    assert "not a readable Parquet file" in refused(file)
    file.write_bytes(b"")
    assert "not a readable Parquet file" in refused(file)


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "rows.parquet", rows=1, group=1)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install pyarrow" in refused(tmp_path / "rows.parquet", "body")


def test_text_column_makes_a_folder_of_shards(tmp_path: Path) -> None:
    write_parquet(tmp_path / "0.parquet", rows=2, group=1)
    (tmp_path / "1.jsonl").write_text('{"body": "last"}\n')
    (tmp_path / "README.md").write_text("not a row")
    assert documents(open_source(tmp_path, "body")) == ["document 0", "document 1", "last"]
    (tmp_path / "other").mkdir()
    assert "no .jsonl or .parquet file" in refused(tmp_path / "other", "body")


# Hugging Face datasets


class FakeDataset:
    column_names = ("body", "id")
    info = types.SimpleNamespace(dataset_size=30)

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def select_columns(self, columns: list[str]) -> FakeDataset:
        assert columns == ["body"]
        return self

    def iter(self, batch_size: int) -> list[dict[str, list[str]]]:
        step = min(batch_size, 2)
        return [{"body": self.texts[i : i + step]} for i in range(0, len(self.texts), step)]


def test_hugging_face_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, configuration: str | None, split: str) -> FakeDataset:
        asked.append((name, configuration, split))
        if name == "owner/gated":
            raise ConnectionError("no route\nto host")
        return FakeDataset(["a", "b", "", "c"])

    module = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", module)
    source = open_source("owner/name:en", "body")
    assert documents(source) == ["a", "b", "c"]
    assert source.skipped == {"empty": 1}
    assert documents(open_source("name", "body")) == ["a", "b", "c"]
    assert asked == [("owner/name", "en", "train"), ("name", None, "train")]
    assert "which has 'body', 'id'" in refused("owner/name")
    assert refused("owner/gated").endswith("no such dataset: no route")


def test_without_the_datasets_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in refused("owner/name")
    assert "no such file or folder" in refused("owner/name")


# Sections


@given(st.lists(st.text(max_size=40), max_size=8), st.integers(4, 30))
def test_cut_loses_nothing_and_keeps_characters_whole(texts: list[str], limit: int) -> None:
    chunks = [text.encode() for text in texts]
    sections = list(cut(chunks, limit))
    assert b"".join(sections) == b"".join(chunks)
    assert all(0 < len(section) <= limit for section in sections)
    for section in sections:
        section.decode()


@given(st.text("ab\n", max_size=200), st.integers(4, 30), st.integers(1, 50))
def test_cut_does_not_depend_on_chunks(text: str, limit: int, chunk: int) -> None:
    data = text.encode()
    whole = list(cut([data], limit))
    assert list(cut([data[i : i + chunk] for i in range(0, len(data), chunk)], limit)) == whole
    for section in whole[:-1]:
        assert section.endswith(b"\n") or b"\n" not in section


def test_sections_are_a_64th_of_the_text(tmp_path: Path) -> None:
    file = tmp_path / "book"
    file.write_text("a line\n" * 100_000)
    source = open_source(file)
    (sections,) = [list(document) for document in source.sections()]
    assert source.section_bytes == 700_000 // 64
    assert 64 <= len(sections) <= 66
    assert all(section.endswith(b"\n") for section in sections)
