"""`star resume`: carry on a search that was stopped, killed, or ran out of disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from star.commands.errors import reported


def resume(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run directory.")],
    workers: Annotated[int | None, typer.Option(min=1, help="Processes, if other than before.")] = None,
    workers_per_gpu: Annotated[
        int | None, typer.Option(min=1, help="Processes that share each GPU, if other than before.")
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(help="Seconds after which a candidate has failed, if other than before.")
    ] = None,
    engine: Annotated[str | None, typer.Option(help="local or ray, if other than before.")] = None,
    no_report: Annotated[bool, typer.Option("--no-report", help="Write no report.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Carry a search to its end. It finds what it would have found had it never been stopped.

    [dim]star resume runs/2026-11-03-141530[/dim]
    """
    from star.commands.search import carry_out

    with reported():
        from star.search import resume as resume_search
    carry_out(
        lambda listener: resume_search(
            run,
            workers=workers,
            workers_per_gpu=workers_per_gpu,
            timeout=timeout,
            engine=engine,
            on_event=listener,
        ),
        run,
        not no_report,
        as_json,
    )
