"""`star table`: the table of evaluated genomes that `star compare` works on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from star.commands.errors import BadInput, Stopped, reported

if TYPE_CHECKING:
    from rich.console import Console

    from star.comparison.table import Row
    from star.search.settings import SearchSettings

_GENERATIONS = 4
_OBJECTIVES = ("quality", "size", "cache", "recall")


def table(
    runs: Annotated[
        list[Path] | None, typer.Argument(metavar="[RUN]...", help="Runs whose candidates are added.")
    ] = None,
    extend: Annotated[
        Path | None, typer.Option("--extend", metavar="FILE", help="The table, .parquet or .csv; may be new.")
    ] = None,
    random: Annotated[
        int | None,
        typer.Option(
            "--random", metavar="N", min=8, help="Train N genomes first: a quarter random, the rest evolved."
        ),
    ] = None,
    run: Annotated[
        Path | None, typer.Option("--run", help="Where --random trains; runs/table-FILE-SEED by default.")
    ] = None,
    preset: Annotated[str, typer.Option(help="Of --random: demo, laptop or paper.")] = "demo",
    seed: Annotated[int, typer.Option(min=0, help="Of --random.")] = 0,
    workers: Annotated[int | None, typer.Option(help="Processes of --random; one a core.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what the table holds as JSON.")] = False,
) -> None:
    """Make or extend a table of evaluated genomes, from runs or by training new ones.

    The same command goes on with --random where Ctrl-C or a kill stopped it.

    [dim]star table --extend genomes.parquet runs/first runs/second[/dim]
    """
    from star.commands.terminal import screen

    console = screen(as_json)
    with reported():
        if extend is None:
            raise BadInput("table takes --extend FILE, a name that ends in .parquet or .csv")
        from star.comparison import table as tables

        sources = list(runs or ())
        tables.require_suffix(extend)
        # What is wrong with the inputs should not be found out after hours of training.
        there = tables.read(extend) if extend.exists() else []
        added = [row for source in sources for row in tables.rows_of_run(_existing(source))]
        if random is None and not sources and not extend.exists():
            raise BadInput(f"table {extend} does not exist: name runs to make it from, or --random N")
        if random is not None:
            settings = _settings(preset, random, seed, workers)
            directory = run or Path("runs", f"table-{extend.stem}-{seed}")
    if random is not None:
        _train(settings, directory, console)
        with reported(started=True):
            added += tables.rows_of_run(directory)
    with reported(started=random is not None):
        rows, new = tables.extend(extend, added) if added else (there, 0)
        _conclude(console, extend, rows, new, as_json)


def _existing(run: Path) -> Path:
    if not run.exists():
        raise BadInput(f"run directory {run} does not exist")
    return run


def _settings(preset_name: str, count: int, seed: int, workers: int | None) -> SearchSettings:
    """A search whose first generation is random and whose later ones evolve, by all objectives at once."""
    from star.search import preset

    base = preset(preset_name)
    return replace(
        base,
        objectives=_OBJECTIVES,
        population=-(-count // _GENERATIONS),
        generations=_GENERATIONS,
        seed=seed,
        keep_weights=False,
        workers=workers,
    )


def _train(settings: SearchSettings, directory: Path, console: Console) -> None:
    """The search, or the rest of it."""
    from star.commands.progress import SearchProgress
    from star.search import RunStore, SearchInterrupted, resume
    from star.search import search as begin_search

    progress = SearchProgress(console)
    try:
        with progress:
            try:
                if RunStore.begun(directory / "run.db"):
                    _require_same(directory, settings)
                    resume(directory, workers=settings.workers, on_event=progress)
                else:
                    begin_search(settings, directory, on_event=progress)
            except SearchInterrupted:
                raise
            except Exception:
                with reported(started=progress.started):
                    raise
    except (KeyboardInterrupt, SearchInterrupted):
        raise Stopped("table stopped; the same command goes on with it") from None


def _require_same(directory: Path, settings: SearchSettings) -> None:
    """Refuse to go on with a run of another --random, --seed or --preset."""
    from star.search import RunStore

    with RunStore.open(directory) as store:
        recorded = store.settings()
    given: dict[str, Any] = {"data": recorded.data, "model": recorded.model}
    if replace(settings, **given).identity() != recorded.identity():
        raise BadInput(f"{directory} holds a run of other settings: take another --run or --seed")


def _conclude(console: Console, path: Path, rows: list[Row], new: int, as_json: bool) -> None:
    from star.commands.terminal import emit, say
    from star.comparison.table import main_conditions
    from star.report.numbers import count

    objectives = sorted({name for row in rows for name in row.objectives})
    conditions = sorted({row.conditions for row in rows})
    if as_json:
        emit(
            {
                "table": str(path),
                "rows": len(rows),
                "new": new,
                "genomes": len({row.genome for row in rows}),
                "failed": sum(not row.ok for row in rows),
                "objectives": objectives,
                "conditions": conditions,
                "main_conditions": main_conditions(rows) if rows else None,
                "seconds": sum(row.seconds for row in rows),
            }
        )
        return
    say(console, f"{path}: {count(len(rows), 'row')}, {new} of them new", "bold")
    failed = sum(not row.ok for row in rows)
    genomes = count(len({row.genome for row in rows}), "genome")
    sets = count(len(conditions), "set")
    say(console, f"{genomes} ({failed} failed) with {', '.join(objectives)}; {sets} of conditions")
    if rows:
        say(console, f"Compare search algorithms on it:  star compare {path}")
