"""Writing a report: the page and its pictures, each whole or not at all."""

from __future__ import annotations

import os
import re
from pathlib import Path

from star.report.device_plots import device_plots
from star.report.fidelity_plots import fidelity_plots
from star.report.figures import png
from star.report.page import draw_backbones, page
from star.report.plots import plots
from star.report.summary import RunSummary, read_run
from star.search.directory import RunDirectory
from star.search.errors import RunError, is_disk_full

__all__ = ["write_report"]

# Pictures of earlier reports of the same run, which this one may not have any more.
_PICTURE = re.compile(
    r"(front|scores|device)-[a-z0-9-]+\.png|(hypervolume|curves|classes|sharing|fidelity)\.png"
)


def write_report(run: RunSummary | Path | str) -> Path:
    """Write report/index.html and the plots as PNG files into the run directory, and return the page's path.

    Raises:
        RunError: there is no run, or the files can not be written.
        RunDamaged: the run directory does not hold what a search writes.
    """
    summary = run if isinstance(run, RunSummary) else read_run(run)
    directory = RunDirectory(summary.directory)
    drawn = [*plots(summary), *device_plots(summary), *fidelity_plots(summary)]
    files = {f"{plot.name}.png": png(plot.figure) for plot in drawn}
    files["index.html"] = page(summary, drawn, draw_backbones(summary)).encode("utf-8")
    try:
        directory.report.mkdir(exist_ok=True)
        for old in directory.report.iterdir():
            if _PICTURE.fullmatch(old.name) and old.name not in files:
                old.unlink()
        for name, data in files.items():
            _write_whole(directory.report / name, data)
    except OSError as error:
        if is_disk_full(error):
            raise RunError(f"no room on the disk to write {error.filename or directory.report}") from error
        raise RunError(
            f"{error.filename or directory.report} can not be written: {error.strerror}"
        ) from error
    return directory.report / "index.html"


def _write_whole(path: Path, data: bytes) -> None:
    """Write beside, then rename. Never through a link that someone has put into the directory."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
