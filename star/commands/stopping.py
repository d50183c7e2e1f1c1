"""Ctrl-C during a training: the first lets the step end whole, the second interrupts."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["stop_signal"]


@contextmanager
def stop_signal() -> Iterator[list[int]]:
    """A list that the first Ctrl-C puts something into, so that the step ends whole; the next interrupts."""
    stopped: list[int] = []

    def note(number: int, frame: object) -> None:
        stopped.append(number)
        signal.signal(signal.SIGINT, before)

    try:
        before = signal.signal(signal.SIGINT, note)
    except ValueError:  # not in the main thread, where nobody presses Ctrl-C
        yield stopped
        return
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)
