"""`star report`: the report of a run, as one HTML file and its pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from star.commands.errors import BadInput, reported

if TYPE_CHECKING:
    from rich.console import Console

    from star.report.summary import RunSummary

_ROWS = 20


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, finished or not.")],
    open_it: Annotated[bool, typer.Option("--open", help="Open the report in the browser.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Write the report of a run: RUN/report/index.html, one file that needs nothing else.

    [dim]star report runs/first --open[/dim]
    """
    from star.commands.terminal import emit, screen

    with reported():
        _require_run(run)
        summary, page = write(run)
    if as_json:
        emit({**summary.to_json(), "report": str(page)})
    else:
        conclude(screen(), summary, page)
    if open_it:
        import webbrowser

        if not webbrowser.open(page.resolve().as_uri()):
            from star.commands.terminal import say

            say(screen(True), f"No browser could be opened; the report is {page}")


def _require_run(run: Path) -> None:
    if not run.exists():
        raise BadInput(f"run directory {run} does not exist")


def write(run: Path) -> tuple[RunSummary, Path]:
    """The summary of a run, and the page that has been written."""
    from star.report import read_run, write_report

    summary = read_run(run)
    return summary, write_report(summary)


def conclude(console: Console, summary: RunSummary, page: Path | None) -> None:
    """Print what was found and where it is."""
    from star.commands.terminal import candidates_table, say

    say(console, summary.status(), "bold")
    if summary.front or summary.references:
        console.print(
            candidates_table(
                summary.front, summary.settings, references=summary.references.items(), rows=_ROWS
            )
        )
    for sentence in summary.verdicts():
        say(console, f"• {sentence}")
    if summary.champion is not None:
        run, id = summary.directory, summary.champion.id
        say(console, f"Draw the best:  star show {run} --id {id}")
        say(console, f'Let it write:   star generate {run} --id {id} "def "')
    if page is not None:
        say(console, f"Report:         {page}", "bold")
