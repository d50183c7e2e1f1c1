"""The report of a run: what was found, how it compares, and what it does not say.

from star.report import read_run, write_report

write_report("runs/first")                  # runs/first/report/index.html and its pictures
read_run("runs/first").verdicts()           # the same conclusions as plain sentences
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from star.report.summary import RunSummary, read_run
    from star.report.write import write_report

__all__ = ["RunSummary", "read_run", "write_report"]

_MODULES = {"RunSummary": "summary", "read_run": "summary", "write_report": "write"}


def __getattr__(name: str) -> Any:
    """Import a public name on its first use (PEP 562): numbers alone cost neither pymoo nor matplotlib."""
    if name not in _MODULES:
        raise AttributeError(f"module 'star.report' has no attribute {name!r}")
    value = getattr(import_module(f"star.report.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
