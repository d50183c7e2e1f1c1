"""`star eval`: a model before the tasks of lm-eval."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from star.commands.errors import BadInput, Failed, reported

if TYPE_CHECKING:
    from star.evaluation import Evaluation


def evaluate(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR|RUN", help="What star export or star train made, or a run.")
    ],
    tasks: Annotated[str, typer.Option(help="Names with commas.", show_default=False)],
    id: Annotated[int | None, typer.Option("--id", min=0, help="Candidate of the run; the best.")] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder of task files (YAML), so that nothing is downloaded.")
    ] = None,
    shots: Annotated[int | None, typer.Option(min=0, help="Examples before each question.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of a task at most.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 8,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of a sequence at most.")] = 2048,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the examples' choice.")] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Results file; evaluation.json in DIR.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Evaluate a model on downstream tasks with lm-eval (extra "eval").

    [dim]star eval exports/mine --tasks count --include-path examples/tasks[/dim]
    """
    if not directory.is_dir():
        raise BadInput(f"directory {directory} does not exist")
    with reported():
        from star.commands.progress import training_progress
        from star.commands.terminal import emit, say, screen
        from star.evaluation import evaluate as carry_out
        from star.evaluation import require_packages, results_path, write_results

        try:
            require_packages()
        except ModuleNotFoundError as error:
            raise Failed(str(error)) from error
        log = screen(True)
        found = carry_out(
            directory,
            [name for name in tasks.split(",") if name],
            lambda title: training_progress(log, title),
            id=id,
            include_path=include_path,
            shots=shots,
            limit=limit,
            batch_size=batch_size,
            max_length=max_length,
            device=device,
            seed=seed,
        )
        path = results_path(directory, id) if out is None else out
        write_results(found, path)
    if as_json:
        emit(found.to_json())
        return
    console = screen()
    console.print(_table(found))
    say(console, f"results in {path}", "dim")


def _table(found: Evaluation) -> object:
    from rich import box
    from rich.table import Table

    table = Table(title=found.model, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("task")
    table.add_column("metric")
    for name in ("value", "± standard error", "questions"):
        table.add_column(name, justify="right")
    for score in found.scores:
        table.add_row(
            score.task,
            score.metric,
            "–" if score.value is None else f"{score.value:.4f}",
            "" if score.error is None else f"{score.error:.4f}",
            "" if score.samples is None else f"{score.samples:,}",
        )
    return table
