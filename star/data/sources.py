"""Where text comes from: files, folders, JSONL and Parquet columns, Hugging Face datasets.

A `Source` is read as often as needed from its beginning, always in the same order, and never whole:
a document is an iterable of chunks of UTF-8 bytes. `sections` cuts the documents that are long
beside the whole text at line ends, so that one long book can be split as well as a folder of files.
"""

from __future__ import annotations

import codecs
import importlib
import io
import json
import os
import platform
import re
import stat
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from star.data.errors import DataError

__all__ = ["Document", "Source", "cut", "open_source"]

Document = Iterable[bytes]
"""One document: chunks of bytes that are valid UTF-8 once joined."""

DEFAULT_TEXT_COLUMN = "text"
JSONL_SUFFIXES = frozenset({".jsonl", ".ndjson"})
PARQUET_SUFFIXES = frozenset({".parquet"})

_CHUNK_BYTES = 1 << 20
_SMALLEST_SECTION = 1 << 10
_LARGEST_SECTION = 1 << 20
_SECTIONS_A_TEXT = 64
_UNKNOWN_TOTAL = _SECTIONS_A_TEXT * _LARGEST_SECTION

# A directory that holds this file holds a cache, not data (https://bford.info/cachedir/).
CACHE_TAG = "CACHEDIR.TAG"

_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
_PACKAGE_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__"})
_DATASET_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?(:[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """A text that can be read again and again.

    `documents` starts a new pass. `total_bytes` is the size of the text, exact for plain text and an
    estimate for rows. `skipped` counts what `open_source` and the latest pass left out, by reason.
    """

    name: str
    documents: Callable[[], Iterator[Document]]
    total_bytes: int
    skipped: Counter[str] = field(default_factory=Counter)

    @property
    def section_bytes(self) -> int:
        """Longest section in bytes: a 64th part of the text, at least 1 KiB and at most 1 MiB."""
        return min(max(self.total_bytes // _SECTIONS_A_TEXT, _SMALLEST_SECTION), _LARGEST_SECTION)

    def sections(self) -> Iterator[Iterator[bytes]]:
        """For each document an iterator over its non-empty sections; exhaust one before the next."""
        limit = self.section_bytes
        for document in self.documents():
            yield cut(document, limit)


def cut(document: Document, limit: int) -> Iterator[bytes]:
    """Sections of at most `limit` bytes, ended at the last line end that fits, else between characters."""
    pending, start = b"", 0
    for chunk in document:
        pending, start = pending[start:] + chunk, 0
        while len(pending) - start > limit:
            end = _end_of_section(pending, start, start + limit)
            yield pending[start:end]
            start = end
    if start < len(pending):
        yield pending[start:]


def _end_of_section(text: bytes, start: int, end: int) -> int:
    newline = text.rfind(b"\n", start, end)
    if newline >= 0:
        return newline + 1
    boundary = end
    while text[boundary] & 0xC0 == 0x80:  # a continuation byte of UTF-8: step back to its character
        boundary -= 1
    return boundary if boundary > start else end


def open_source(source: str | Path | Sequence[str | Path] | None, text_column: str | None = None) -> Source:
    """The source that `source` names; nothing but the check of plain text files is read yet.

    None: the Python standard library's `.py` files without tests. A path of a plain text file, of a
    folder, of a `.jsonl`/`.ndjson` or `.parquet` file, or the name of a Hugging Face dataset
    (`owner/name`, `owner/name:configuration`; its split "train"). Several: read one after the other.
    `text_column` names the column of JSONL, Parquet and datasets (default "text"); in a folder it makes
    the JSONL and Parquet files be read by that column, and nothing else.
    Raises DataError, one line, when there is no such source or it holds no text.
    """
    if source is None:
        return _standard_library()
    if isinstance(source, (str, Path)):
        return _open_one(source, text_column)
    if not source:
        raise DataError("data: got an empty list, takes at least one path or dataset name")
    return _chain([_open_one(one, text_column) for one in source])


def _open_one(source: str | Path, text_column: str | None) -> Source:
    text = os.fspath(source)
    if not text:
        raise DataError("data: got an empty name, takes a file, a folder or a dataset name")
    path = Path(text).expanduser()
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return _hugging_face(text, text_column)
    except (OSError, ValueError) as error:
        raise DataError(f"data {text!r}: can't be read: {getattr(error, 'strerror', error)}") from error
    if stat.S_ISDIR(mode):
        return _folder(path, text_column)
    if not stat.S_ISREG(mode):
        raise DataError(f"data {text!r}: not a file or folder")
    if path.suffix.lower() in JSONL_SUFFIXES | PARQUET_SUFFIXES:
        return _row_file(path, text_column or DEFAULT_TEXT_COLUMN)
    if text_column is not None:
        raise DataError(f"text_column {text_column!r}: {text!r} is plain text, which has no columns")
    return _text_file(path)


def _chain(sources: list[Source]) -> Source:
    skipped: Counter[str] = Counter()

    def documents() -> Iterator[Document]:
        skipped.clear()
        for source in sources:
            yield from source.documents()
            skipped.update(source.skipped)

    name = " + ".join(source.name for source in sources)
    return Source(name, documents, sum(source.total_bytes for source in sources), skipped)


# Plain text


def _text_file(path: Path) -> Source:
    kind = _kind_of_file(path)
    if kind is not None:
        raise DataError(f"data {str(path)!r}: {kind} file, takes UTF-8 text")
    return Source(path.name, lambda: iter([_chunks(path)]), path.stat().st_size)


def _chunks(path: Path) -> Iterator[bytes]:
    try:
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                yield chunk
    except OSError as error:
        raise DataError(f"data {str(path)!r}: can't be read: {error.strerror}") from error


def _kind_of_file(path: Path) -> str | None:
    """None for UTF-8 text, else why it is not: special, unreadable, empty, binary, undecodable."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return "special"  # a pipe or a device: opening it could wait for ever
        decoder = codecs.getincrementaldecoder("utf-8")()
        empty = True
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                if b"\0" in chunk:
                    return "binary"
                decoder.decode(chunk)
                empty = False
        decoder.decode(b"", final=True)
    except OSError:
        return "unreadable"
    except UnicodeDecodeError:
        return "undecodable"
    return "empty" if empty else None


def _files(folder: Path, skipped: Counter[str], left_out: Callable[[str], bool]) -> list[Path]:
    """Every file below `folder`, ordered by path; links are followed, each folder is entered once."""
    found: list[Path] = []
    entered: set[tuple[int, int]] = set()

    def unreadable(error: OSError) -> None:
        skipped["unreadable"] += 1

    for place, folders, files in os.walk(folder, followlinks=True, onerror=unreadable):
        here = os.stat(place)
        if (here.st_dev, here.st_ino) in entered or CACHE_TAG in files:
            folders.clear()
            continue
        entered.add((here.st_dev, here.st_ino))
        folders[:] = sorted((name for name in folders if not left_out(name)), key=os.fsencode)
        found.extend(Path(place, name) for name in sorted(files, key=os.fsencode) if not left_out(name))
    return found


def _folder(folder: Path, text_column: str | None) -> Source:
    skipped: Counter[str] = Counter()
    files = _files(folder, skipped, lambda name: name.startswith("."))
    name = folder.resolve().name or str(folder)
    if text_column is not None:
        rows = [path for path in files if path.suffix.lower() in JSONL_SUFFIXES | PARQUET_SUFFIXES]
        if not rows:
            raise DataError(f"data {str(folder)!r}: no .jsonl or .parquet file to take {text_column!r} from")
        source = _chain([_row_file(path, text_column) for path in rows])
        return Source(name, source.documents, source.total_bytes, source.skipped)
    return _texts(name, files, skipped, where=f"data {str(folder)!r}")


def _texts(name: str, files: list[Path], skipped: Counter[str], where: str) -> Source:
    """A source of one document a file, without those that are not UTF-8 text."""
    texts = []
    for path in files:
        kind = _kind_of_file(path)
        if kind is None:
            texts.append(path)
        else:
            skipped[kind] += 1
    if not texts:
        left = ", ".join(f"{count} {kind}" for kind, count in sorted(skipped.items())) or "it is empty"
        raise DataError(
            f"{where}: no UTF-8 text file in it ({left}); text_column reads .jsonl and .parquet files"
        )
    total = sum(path.stat().st_size for path in texts)
    return Source(name, lambda: (_chunks(path) for path in texts), total, skipped)


def _standard_library() -> Source:
    """The `.py` files of this Python's standard library without its tests, about 12 MB."""
    folder = Path(sysconfig.get_path("stdlib"))

    def left_out(name: str) -> bool:
        return name in _TEST_FOLDERS or name in _PACKAGE_FOLDERS

    skipped: Counter[str] = Counter()
    # _sysconfigdata* is written when Python is built and names that machine's folders.
    files = [
        path
        for path in _files(folder, skipped, left_out)
        if path.suffix == ".py" and not path.name.startswith("_sysconfigdata")
    ]
    if not files:
        raise DataError(f"data: this Python has no standard library sources in {folder}; name a text instead")
    name = f"{platform.python_implementation()} {platform.python_version()} standard library"
    return _texts(name, files, skipped, where=f"data {str(folder)!r}")


# Rows


def _row_file(path: Path, column: str) -> Source:
    if path.suffix.lower() in JSONL_SUFFIXES:
        return _jsonl(path, column)
    return _parquet(path, column)


def _row_documents(values: Iterable[Any], where: str, skipped: Counter[str]) -> Iterator[Document]:
    """One document a value; null and empty ones are counted in `skipped`, other types refused."""
    for value in values:
        if value is None or value == "":
            skipped["empty"] += 1
        elif not isinstance(value, str):
            raise DataError(f"{where}: got {type(value).__name__} in a row, takes text")
        else:
            try:
                yield [value.encode("utf-8")]
            except UnicodeEncodeError:  # a lone surrogate, which JSON can spell and UTF-8 can't
                skipped["undecodable"] += 1


def _jsonl(path: Path, column: str) -> Source:
    skipped: Counter[str] = Counter()
    where = f"data {str(path)!r}, column {column!r}"

    def values() -> Iterator[Any]:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.isspace():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise DataError(f"data {str(path)!r}: line {number} is not JSON: {error}") from error
                if not isinstance(row, dict) or column not in row:
                    got = ", ".join(map(repr, row)) if isinstance(row, dict) else type(row).__name__
                    raise DataError(f"text_column {column!r}: not in line {number} of {str(path)!r} ({got})")
                yield row[column]

    def documents() -> Iterator[Document]:
        skipped.clear()
        try:
            yield from _row_documents(values(), where, skipped)
        except OSError as error:
            raise DataError(f"data {str(path)!r}: can't be read: {error.strerror}") from error

    return Source(path.name, documents, path.stat().st_size, skipped)


def _parquet(path: Path, column: str) -> Source:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(
            f"data {str(path)!r}: Parquet needs the package pyarrow (pip install pyarrow)"
        ) from error
    skipped: Counter[str] = Counter()
    where = f"data {str(path)!r}, column {column!r}"

    def opened() -> Any:
        try:
            return parquet.ParquetFile(path, pre_buffer=False)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"data {str(path)!r}: not a readable Parquet file: {_line(error)}") from error

    with opened() as file:
        names = file.schema_arrow.names
        if column not in names:
            raise DataError(
                f"text_column {column!r}: not in {str(path)!r}, which has {', '.join(map(repr, names))}"
            )
        total = _column_bytes(file.metadata, column)

    def values() -> Iterator[Any]:
        with opened() as file:
            # Group by group and, inside one, batch by batch: a row group may be gigabytes.
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(256, row_groups=[group], columns=[column], use_threads=False):
                    yield from batch.column(0).to_pylist()

    def documents() -> Iterator[Document]:
        skipped.clear()
        try:
            yield from _row_documents(values(), where, skipped)
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(f"data {str(path)!r}: damaged Parquet file: {_line(error)}") from error

    return Source(path.name, documents, total, skipped)


def _column_bytes(metadata: Any, column: str) -> int:
    """Uncompressed bytes of a top-level column."""
    total = 0
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        for index in range(row_group.num_columns):
            chunk = row_group.column(index)
            if chunk.path_in_schema.split(".")[0] == column:
                total += chunk.total_uncompressed_size
    return total


def _hugging_face(text: str, text_column: str | None) -> Source:
    """The split "train" of a dataset of the Hugging Face library, `owner/name[:configuration]`."""
    if not _DATASET_NAME.fullmatch(text):
        raise DataError(f"data {text!r}: no such file or folder")
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise DataError(
            f"data {text!r}: no such file or folder, and a Hugging Face dataset of that name needs the "
            "package datasets (pip install datasets)"
        ) from error
    name, _, configuration = text.partition(":")
    try:
        rows = datasets.load_dataset(name, configuration or None, split="train")
    except Exception as error:  # the library raises whatever its network and file layers raise
        raise DataError(
            f"data {text!r}: no such file or folder, and no such dataset: {_line(error)}"
        ) from error
    column = text_column or DEFAULT_TEXT_COLUMN
    if column not in rows.column_names:
        had = ", ".join(map(repr, rows.column_names))
        raise DataError(f"text_column {column!r}: not in dataset {text!r}, which has {had}")
    skipped: Counter[str] = Counter()

    def values() -> Iterator[Any]:
        for batch in rows.select_columns([column]).iter(batch_size=256):
            yield from batch[column]

    def documents() -> Iterator[Document]:
        skipped.clear()
        yield from _row_documents(values(), f"dataset {text!r}, column {column!r}", skipped)

    return Source(text, documents, getattr(rows.info, "dataset_size", None) or _UNKNOWN_TOTAL, skipped)


def _line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return next(iter(io.StringIO(str(error).strip())), type(error).__name__).strip()
