"""What can stop a search, each as one line that a person can act on."""

from __future__ import annotations

import errno
import sqlite3
from pathlib import Path

__all__ = ["DiskFull", "RunDamaged", "RunError", "RunInUse", "SearchInterrupted", "is_disk_full"]

_FULL_DISK_NUMBERS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_FULL_DISK_TEXTS: tuple[str, ...] = (
    "disk is full",
    "no space left on device",
    "disk quota exceeded",
    "file too large",
)
# How Rust libraries (safetensors among them) print the same numbers of the operating system.
_FULL_DISK_TEXTS += tuple(f"os error {number}" for number in sorted(_FULL_DISK_NUMBERS))


class RunError(Exception):
    """A search can not start or go on. The message is one line."""


class RunInUse(RunError):
    """Another process is searching in the same run directory."""


class RunDamaged(RunError):
    """The run directory does not hold what a search writes there."""


class DiskFull(RunError):
    """There was no room to write `path`. Nothing that was recorded is lost."""

    def __init__(self, path: Path | str, run_directory: Path | str) -> None:
        super().__init__(
            f"no room on the disk to write {path}: make room, then continue with: star resume {run_directory}"
        )


class SearchInterrupted(RunError):
    """The user stopped the search with Ctrl-C. Nothing that was recorded is lost."""

    def __init__(self, run_directory: Path | str) -> None:
        super().__init__(f"search stopped; continue with: star resume {run_directory}")


def is_disk_full(error: BaseException | str) -> bool:
    """Whether an error, or its text, says that the disk, the quota or the file size limit is used up."""
    if isinstance(error, OSError):
        return error.errno in _FULL_DISK_NUMBERS
    if isinstance(error, sqlite3.Error) and "disk i/o error" in str(error).lower():
        # SQLite says so for every number but ENOSPC; its extended code (Python 3.11) tells writes from reads.
        name = getattr(error, "sqlite_errorname", "SQLITE_IOERR_WRITE")
        return name in ("SQLITE_IOERR_WRITE", "SQLITE_IOERR_TRUNCATE", "SQLITE_IOERR_SHMSIZE")
    return any(text in str(error).lower() for text in _FULL_DISK_TEXTS)
