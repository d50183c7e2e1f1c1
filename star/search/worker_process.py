"""What runs inside a local worker process: read a task, evaluate it, answer, until the parent is gone."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import threading
from multiprocessing.connection import Connection
from typing import Any

from star.pools import load_object
from star.search.errors import RunError, is_disk_full
from star.search.results import evaluate_safely
from star.search.workers import settings_for

__all__ = ["main"]


def main(connection_descriptor: int, lifeline: int) -> None:
    """Serve tasks that come over the connection until it closes.

    Messages are JSON objects. In: first {evaluator, settings}, then a `Task` each. Out: first
    {ready} or {fatal: why}, then {result} each, or {disk_full: what could not be written}.
    """
    faulthandler.enable()
    threading.Thread(target=_die_with_parent, args=(lifeline,), daemon=True).start()
    connection = Connection(connection_descriptor)
    # When the parent closes the connection, nobody wants an answer any more.
    with contextlib.suppress(EOFError, ConnectionResetError, BrokenPipeError):
        _serve(connection)
    # Threads and C++ destructors of whatever the evaluator loaded must not delay the end.
    os._exit(0)


def _serve(connection: Connection) -> None:
    first = _receive(connection)
    try:
        evaluator = load_object(first["evaluator"])
    except (ImportError, ValueError) as error:
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        _send(connection, {"fatal": f"evaluator {first['evaluator']!r} can not be imported: {line}"})
        return
    _send(connection, {"ready": True})
    while True:
        task = _receive(connection)
        try:
            settings = settings_for(task, first["settings"])
            result = evaluate_safely(evaluator, task["genome"], settings, task["id"], task["weights"])
        except RunError as error:
            _send(connection, {"fatal": str(error)})
            continue
        except OSError as error:
            if not is_disk_full(error):
                raise
            _send(connection, {"disk_full": str(error.filename or task["weights"] or "a worker's file")})
            continue
        _send(connection, {"result": result})


def _die_with_parent(lifeline: int) -> None:
    """Nothing is ever written to the lifeline: reading ends when the parent's end is closed, by whatever."""
    os.read(lifeline, 1)
    os._exit(1)


def _receive(connection: Connection) -> dict[str, Any]:
    message: dict[str, Any] = json.loads(connection.recv_bytes())
    return message


def _send(connection: Connection, message: dict[str, Any]) -> None:
    connection.send_bytes(json.dumps(message, allow_nan=False).encode())
