"""What people see while a search or a training runs: a live picture in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from star.commands.errors import one_line
from star.commands.terminal import candidates_table, say
from star.report.numbers import count, duration, value
from star.search.events import (
    CandidateFinished,
    CandidateStarted,
    CorpusOpened,
    DeviceMeasured,
    DeviceUnsteady,
    Event,
    GenerationFinished,
    GenerationStarted,
    RunStarted,
    WorkerLost,
)
from star.search.store import Evaluation, RunStore

if TYPE_CHECKING:
    from star.proxy import Progress

__all__ = ["SearchProgress", "training_progress"]

_LINES_BESIDE_TABLE = 10
_REFRESHES_A_SECOND = 4
_BAR_WIDTH = 40
_SECONDS_BETWEEN_LINES = 10.0


class SearchProgress:
    """Listens to a search and shows where it stands.

        with SearchProgress(console) as progress:
            search(settings, directory, on_event=progress)

    `started`: the search has its record and its text, so what goes wrong from here on is no wrong input.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.started = False
        self._run: RunStarted | None = None
        self._note = "reading the text"
        self._evaluations: dict[int, Evaluation] = {}
        self._front: tuple[int, ...] = ()
        self._running: dict[int, float] = {}
        self._generation = 0
        self._hypervolume: float | None = None
        self._finished = 0
        self._finished_here = 0
        self._began = time.monotonic()
        self._live = Live(
            get_renderable=self._picture,
            console=console,
            refresh_per_second=_REFRESHES_A_SECOND,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def __enter__(self) -> SearchProgress:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self._live.stop()

    def __call__(self, event: Event) -> None:
        """Take note of an event, and print its line where there is no live picture (or where it stays)."""
        self._note_event(event)
        line = self._line(event)
        lasting = isinstance(
            event, (RunStarted, CorpusOpened, DeviceUnsteady, WorkerLost, GenerationFinished)
        )
        if line and (lasting or not self.console.is_terminal):
            say(self.console, line)

    def _note_event(self, event: Event) -> None:
        if isinstance(event, RunStarted):
            self.started = True
            self._run, self._finished, self._note = event, event.stored, "starting the workers"
            if event.stored:  # a resumed run: what is there already is not told again
                with RunStore.open(event.directory) as store:
                    self._evaluations = {item.id: item for item in store.evaluations()}
        elif isinstance(event, DeviceMeasured):
            self._note = f"measuring {event.what}"
        elif isinstance(event, GenerationStarted):
            self._generation, self._note = event.generation, ""
        elif isinstance(event, CandidateStarted):
            self._running[event.candidate_id] = time.monotonic()
        elif isinstance(event, CandidateFinished):
            self._running.pop(event.evaluation.id, None)
            self._evaluations[event.evaluation.id] = event.evaluation
            self._front, self._finished = event.front, event.finished
            self._finished_here += 1
        elif isinstance(event, WorkerLost):
            self._running.pop(event.candidate_id, None)
        elif isinstance(event, GenerationFinished):
            self._front, self._hypervolume = event.front, event.hypervolume

    # ---- plain lines ---------------------------------------------------------------------------------

    def _line(self, event: Event) -> str:
        if isinstance(event, RunStarted):
            settings = event.settings
            stored = f", {event.stored} of them are there already" if event.stored else ""
            workers = count(settings.worker_count(), "worker")
            return (
                f"Searching in {event.directory}: {settings.depth} LIVs of width {settings.model.width} for "
                f"{', '.join(settings.objectives)}; at most {event.planned} trainings{stored}; {workers}"
            )
        if isinstance(event, CorpusOpened):
            return f"Text: {event.name} ({event.content_hash[:12]})"
        if isinstance(event, DeviceMeasured):
            return f"Measuring {event.what}"
        if isinstance(event, DeviceUnsteady):
            return f"Warning: {event.warning}"
        if isinstance(event, CandidateFinished):
            return f"{event.finished}/{event.planned}  {self._describe(event.evaluation)}"
        if isinstance(event, WorkerLost):
            then = "it is tried again" if event.retried else "given up"
            return f"A worker was lost with candidate {event.candidate_id} ({event.reason}): {then}"
        if isinstance(event, GenerationFinished):
            return self._describe_generation(event)
        return ""

    def _describe(self, evaluation: Evaluation) -> str:
        name = f"candidate {evaluation.id}"
        kind, _, reference = evaluation.origin.partition(":")
        if kind == "reference":
            name += f" ({reference})"
        if not evaluation.ok:
            return f"{name} {evaluation.status}: {evaluation.reason}"
        numbers = ", ".join(f"{key} {value(key, number)}" for key, number in evaluation.objectives.items())
        best = "  on the front" if evaluation.id in self._front else ""
        return f"{name}: {numbers}  ({duration(evaluation.seconds)}){best}"

    def _describe_generation(self, event: GenerationFinished) -> str:
        planned = self._run.settings.generations if self._run is not None else "?"
        volume = "" if event.hypervolume is None else f", hypervolume {event.hypervolume:.4f}"
        when = "was there already" if event.replayed else f"took {duration(event.seconds)}"
        return (
            f"Generation {event.generation + 1} of {planned} {when}: "
            f"{count(len(event.front), 'candidate')} on the front{volume}"
        )

    # ---- the live picture ----------------------------------------------------------------------------

    def _picture(self) -> RenderableType:
        if self._run is None:
            return Spinner("dots", Text(self._note))
        run = self._run
        elapsed = time.monotonic() - self._began
        head = Table.grid(padding=(0, 2))
        head.add_row(
            Spinner("dots", Text(f"generation {self._generation + 1} of {run.settings.generations}", "bold")),
            ProgressBar(total=max(1, run.planned), completed=self._finished, width=_BAR_WIDTH),
            Text(f"{self._finished} of at most {run.planned}"),
            Text(f"{duration(elapsed)}{self._remaining(elapsed)}", "dim"),
        )
        parts: list[RenderableType] = [head, Text(self._activity(), "dim", no_wrap=True, overflow="ellipsis")]
        members = [self._evaluations[id] for id in self._front if id in self._evaluations]
        if members:
            room = max(3, self.console.height - _LINES_BESIDE_TABLE - len(self._references()))
            parts.append(candidates_table(members, run.settings, references=self._references(), rows=room))
        parts.append(Text("Ctrl-C stops; nothing is lost, star resume goes on", "dim"))
        return Group(*parts)

    def _references(self) -> list[tuple[str, Evaluation]]:
        split = ((item.origin.partition(":"), item) for item in self._evaluations.values())
        return [(name, item) for (kind, _, name), item in split if kind == "reference"]

    def _remaining(self, elapsed: float) -> str:
        """An upper limit: proposals that repeat others are not trained."""
        if self._run is None or not self._finished_here:
            return ""
        left = (self._run.planned - self._finished) * elapsed / self._finished_here
        return f", about {duration(left)} left"

    def _activity(self) -> str:
        """What the workers do, what failed, the hypervolume."""
        parts = []
        if self._running:
            ids = ", ".join(str(id) for id in sorted(self._running))
            parts.append(f"training {ids}")
        elif self._note:
            parts.append(self._note)
        failed = [item for item in self._evaluations.values() if item.failed]
        if failed:
            parts.append(f"{len(failed)} failed (last: {one_line(failed[-1].reason or '')[:60]})")
        stopped = sum(item.stopped for item in self._evaluations.values())
        if stopped:
            parts.append(f"{stopped} stopped early")
        if self._hypervolume is not None:
            parts.append(f"hypervolume {self._hypervolume:.4f}")
        return " · ".join(parts)


@contextmanager
def training_progress(
    console: Console, what: str, unit: str = "bits per byte"
) -> Iterator[Callable[[Progress], None]]:
    """A callback for `star.training` that shows steps, losses (in `unit`) and the time left."""
    if console.is_terminal:
        with _training_bar(console, what, unit) as update:
            yield update
        return
    last = float("-inf")
    say(console, f"{what} …")

    def print_line(progress: Progress) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _SECONDS_BETWEEN_LINES or progress.step == progress.steps:
            last = now
            say(console, f"step {progress.step} of {progress.steps}: {_losses(progress, unit)}")

    yield print_line


@contextmanager
def _training_bar(console: Console, what: str, unit: str) -> Iterator[Callable[[Any], None]]:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[losses]}", style="dim"),
    )
    with Bars(*columns, console=console, transient=True) as bars:
        task = bars.add_task(what, total=None, losses="")

        def update(progress: Progress) -> None:
            bars.update(task, total=progress.steps, completed=progress.step, losses=_losses(progress, unit))

        yield update


def _losses(progress: Progress, unit: str) -> str:
    validation = "" if progress.validation is None else f", held-out {progress.validation:.4f}"
    return f"training {progress.train:.4f}{validation} {unit}"
