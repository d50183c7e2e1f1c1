"""The run directory: where a search keeps its files, and the lock that keeps a second search out.

    run.db        the record of everything (star.search.store)
    config.json   the settings, for people to read; must agree with run.db
    weights/      <candidate id>.safetensors of the current front and of the references
    report/       written by `star report`
    export/       written by `star export`
    run.lock      held by the process that is searching

Nothing here is trusted when it is read back: a run directory may come from someone else. Names are made
from integers and constants, never taken from files; symbolic links are refused, since a cleaned weights/
folder must not be someone else's; nothing is unpickled.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from star.search.errors import DiskFull, RunDamaged, RunError, RunInUse, is_disk_full

__all__ = ["RunDirectory"]

CONFIG_BYTES_AT_MOST = 1 << 20
_WEIGHTS_NAME = re.compile(r"(0|[1-9][0-9]{0,8})\.safetensors")
# What a worker that was killed while it saved can leave behind.
_UNFINISHED_WEIGHTS_NAME = re.compile(r"\.?(0|[1-9][0-9]{0,8})\.safetensors\.[A-Za-z0-9_.-]{1,64}")


# How long a worker may hold the lock of a search that was killed while it started this worker.
_SECONDS_FOR_DYING_WORKERS = 10.0


class RunDirectory:
    """Paths and plain files of one run."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def __str__(self) -> str:
        return str(self.path)

    @property
    def database(self) -> Path:
        return self.path / "run.db"

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def lock(self) -> Path:
        return self.path / "run.lock"

    @property
    def weights(self) -> Path:
        return self.path / "weights"

    @property
    def report(self) -> Path:
        return self.path / "report"

    @property
    def export(self) -> Path:
        return self.path / "export"

    def weights_of(self, candidate_id: int) -> Path:
        return self.weights / f"{candidate_id}.safetensors"

    def create(self) -> None:
        """Make the folders that are missing.

        Raises:
            RunError: the path is a file, or can not be made.
            DiskFull: there is no room.
        """
        try:
            for folder in (self.path, self.weights, self.report, self.export):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if is_disk_full(error):
                raise DiskFull(self.path, self.path) from error
            raise RunError(
                f"run directory {self} can not be made: {error.strerror or error} ({error.filename})"
            ) from error

    def require(self) -> None:
        """Refuse what is no directory, or is not there. Raises RunError."""
        if not self.path.is_dir():
            raise RunError(
                f"run directory {self} {'is not a directory' if self.path.exists() else 'does not exist'}"
            )

    def check(self) -> None:
        """Refuse a run directory with symbolic links or with folders where files belong, or the reverse.

        Raises:
            RunError: there is no such directory.
            RunDamaged: an entry is of the wrong kind.
        """
        self.require()
        files = [self.database, self.config, self.lock]
        files += [self.database.with_name(self.database.name + suffix) for suffix in ("-wal", "-shm")]
        for entry in (*files, self.weights, self.report, self.export):
            if entry.is_symlink():
                raise RunDamaged(f"{entry} is a symbolic link: a run directory must hold its own files")
            if entry.exists() and (entry.is_file() != (entry in files)):
                kind = "a plain file" if entry in files else "a folder"
                raise RunDamaged(f"{entry} must be {kind}")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run directory for this process, until the block ends or the process dies.

        The lock is advisory (flock) and belongs to the open file: the kernel drops it when the process
        dies, so a killed search never leaves a stale lock. A worker that it was just starting may hold a
        copy of the open file until it has become another program: then this waits.

        Raises:
            RunInUse: another process holds it.
        """
        try:
            descriptor = os.open(self.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            if is_disk_full(error):
                raise DiskFull(self.lock, self.path) from error
            raise RunError(f"{self.lock} can not be opened: {error.strerror or error}") from error
        try:
            self._take(descriptor)
            self._name_holder(descriptor)
            yield
        finally:
            os.close(descriptor)

    def _take(self, descriptor: int) -> None:
        patience = time.monotonic() + _SECONDS_FOR_DYING_WORKERS
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError as error:
                holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
                if not _is_gone(holder) or time.monotonic() > patience:
                    process = f" by process {holder}" if holder.isdecimal() else ""
                    raise RunInUse(f"run directory {self} is in use{process}: a search runs there") from error
                time.sleep(0.05)
            except OSError as error:
                raise RunError(f"{self.lock} can not be locked: {error.strerror or error}") from error

    def _name_holder(self, descriptor: int) -> None:
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode("ascii"), 0)
        except OSError as error:
            # The lock holds without the number in it, but a full disk stops the search soon anyway.
            if is_disk_full(error):
                raise DiskFull(self.lock, self.path) from error
            raise

    def read_config(self) -> dict[str, Any] | None:
        """config.json as a dict, or None when there is none.

        Raises:
            RunDamaged: it is too large, no JSON, or no object.
        """
        try:
            with open(self.config, "rb") as file:
                raw = file.read(CONFIG_BYTES_AT_MOST + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise RunDamaged(f"{self.config} can not be read: {error.strerror or error}") from error
        if len(raw) > CONFIG_BYTES_AT_MOST:
            raise RunDamaged(f"{self.config} is larger than {CONFIG_BYTES_AT_MOST} bytes: no search wrote it")
        try:
            value = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise RunDamaged(f"{self.config} is not JSON: {str(error).splitlines()[0]}") from error
        if not isinstance(value, dict):
            raise RunDamaged(f"{self.config} holds {type(value).__name__}, not an object")
        return value

    def write_config(self, settings: dict[str, Any]) -> None:
        """Write config.json at once (a reader sees the old file or the new one, never a part).

        Raises:
            DiskFull: there is no room; no part of the file stays.
        """
        unfinished = self.config.with_name(f".config.json.{os.getpid()}")
        try:
            with open(unfinished, "w", encoding="utf-8") as file:
                json.dump(settings, file, indent=2, allow_nan=False)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, self.config)
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            if is_disk_full(error):
                raise DiskFull(self.config, self.path) from error
            raise RunError(f"{self.config} can not be written: {error.strerror or error}") from error

    def keep_weights(self, candidate_ids: Collection[int]) -> None:
        """Delete the weights of all other candidates, and what killed workers left half written.

        Files with names that no search gives are left alone.
        """
        wanted = {f"{candidate_id}.safetensors" for candidate_id in candidate_ids}
        if not self.weights.is_dir():
            return
        with os.scandir(self.weights) as entries:
            for entry in entries:
                finished = _WEIGHTS_NAME.fullmatch(entry.name) is not None
                if finished and entry.name in wanted:
                    continue
                if finished or _UNFINISHED_WEIGHTS_NAME.fullmatch(entry.name):
                    Path(entry.path).unlink(missing_ok=True)


def _is_gone(holder: str) -> bool:
    """Whether the process of this number has ended; what is no number is no answer."""
    if not holder.isdecimal() or not 0 < int(holder) < 2**31:
        return False
    try:
        os.kill(int(holder), 0)
    except ProcessLookupError:
        return True
    except OSError:  # someone else's
        return False
    return False
