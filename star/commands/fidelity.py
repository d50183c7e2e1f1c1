"""`star fidelity`: retrain a sample of a run for longer, and say how far its order can be believed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from star.commands.errors import Failed, Stopped, reported

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from star.fidelity.certificate import Certificate
    from star.fidelity.run import Event, RetrainingStarted


def fidelity(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, finished or not.")],
    sample: Annotated[int, typer.Option(help="Candidates that are retrained: the front, and others.")] = 24,
    budget: Annotated[int, typer.Option(help="How many times as long as in the search.")] = 10,
    seeds: Annotated[int, typer.Option(help="Trainings of each candidate.")] = 3,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; the search's by default.")] = None,
    no_report: Annotated[bool, typer.Option("--no-report", help="Write no report.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the certificate as JSON.")] = False,
) -> None:
    """Certify a run: does longer training put its candidates in the same order?

    Kendall's tau with intervals, beside that of parameter count alone; the noise between seeds;
    how probably each member of the front is truly non-dominated. RUN/fidelity.json and the report
    hold it. The same command goes on where Ctrl-C or a kill stopped it, and a larger --sample or
    more --seeds take over what is there.

    [dim]star fidelity runs/first --sample 8 --budget 5[/dim]
    """
    from star.commands.terminal import emit, screen

    console = screen(as_json)
    with reported():
        from star.fidelity.settings import FidelitySettings

        settings = FidelitySettings(sample, budget, seeds)
        from star.fidelity.run import make_certificate
    try:
        with retraining_progress(console) as progress:
            try:
                certificate = make_certificate(run, settings, workers=workers, on_event=progress)
            except Exception:
                # Which kind of error it is depends on how far the work has come.
                with reported(started=progress.started):
                    raise
    except KeyboardInterrupt:
        raise Stopped(f"fidelity stopped; the same command goes on with {run}") from None
    page = None
    if not no_report:
        from star.commands.report import write

        with reported(started=True):
            _, page = write(run)
    if as_json:
        from star.fidelity.document import to_json

        emit({"run": str(run), **to_json(certificate), "report": None if page is None else str(page)})
    else:
        _conclude(console, certificate, page)
    if not certificate.ranked:
        raise Failed(f"every longer training of {run} failed: {certificate.failures[0][1]}")


class _Progress:
    """Shows the trainings: a bar in a terminal, a line each elsewhere.

    `training`, `of`: what they are and whose, for people.
    `started`: the run has been read, so what goes wrong from here on is no wrong input.
    """

    def __init__(self, console: Console, training: str, of: str) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.started = False
        self._console, self._training, self._of = console, training, of
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[last]}", style="dim"),
            console=console,
            transient=True,
        )
        self._bar = self.bars.add_task(f"{training}s", total=None, last="")

    def __call__(self, event: Event) -> None:
        from star.commands.terminal import say
        from star.fidelity.run import RetrainingFinished
        from star.search.events import WorkerLost

        if isinstance(event, WorkerLost):
            then = "it is tried again" if event.retried else "given up"
            lost = f"A worker was lost with {self._of} {event.candidate_id} ({event.reason})"
            say(self._console, f"{lost}: {then}")
        elif not isinstance(event, RetrainingFinished):
            self.started = True
            self.bars.update(self._bar, total=event.planned, completed=event.stored)
            say(self._console, _plan(event, self._training, self._of))
        else:
            done = event.done
            result = f"failed: {done.reason}" if done.quality is None else f"{done.quality:.4f} bits per byte"
            last = f"{self._of} {event.candidate_id}, seed {event.seed}: {result}"
            self.bars.update(self._bar, completed=event.finished, last=last)
            if not self._console.is_terminal or not done.ok:
                say(self._console, f"{event.finished}/{event.planned}  {last}")


@contextmanager
def retraining_progress(
    console: Console, training: str = "longer training", of: str = "candidate"
) -> Iterator[_Progress]:
    """A listener of retrainings, for as long as the block lasts; star table --again has them too."""
    progress = _Progress(console, training, of)
    if not console.is_terminal:
        yield progress
        return
    with progress.bars:
        yield progress


def _plan(event: RetrainingStarted, training: str, of: str) -> str:
    """How much there is to do, and for about how long."""
    from star.report.numbers import count, duration

    stored = f", {event.stored} of them are there already" if event.stored else ""
    left = event.planned - event.stored
    time = f"; about {duration(event.seconds / event.workers)} on {count(event.workers, 'worker')}"
    trainings = count(event.planned, training)
    return f"{trainings} of {count(event.candidates, of)}{stored}{time if left else ''}"


def _conclude(console: Console, certificate: Certificate, page: Path | None) -> None:
    from star.commands.terminal import say
    from star.report.fidelity import judged

    for sentence, good in judged(certificate):
        say(console, f"• {sentence}", {True: "green", False: "yellow", None: ""}[good])
    if certificate.front:
        console.print(_front_table(certificate))
    if page is not None:
        say(console, f"Report: {page}", "bold")


def _front_table(certificate: Certificate) -> Table:
    """How probably each member of the front is truly non-dominated."""
    from rich import box
    from rich.table import Table

    from star.report.fidelity import FRONT_HEADS, front_rows

    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, title="Probability of being truly non-dominated", title_style=""
    )
    for head in FRONT_HEADS:
        table.add_column(head, justify="right", no_wrap=True)
    for row in front_rows(certificate):
        table.add_row(*row)
    return table
