"""`star table`: the table of evaluated genomes that `star compare` works on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from star.commands.errors import BadInput, Failed, Stopped, reported

if TYPE_CHECKING:
    from rich.console import Console

    from star.comparison.seeds import SeedAgreement
    from star.comparison.table import Row
    from star.profile.table import ProfileTable
    from star.search.settings import SearchSettings

_GENERATIONS = 4
_FURTHER_SEEDS = 2
_OBJECTIVES = ("quality", "size", "cache", "recall")


def table(
    runs: Annotated[
        list[Path] | None, typer.Argument(metavar="RUN", help="Runs whose candidates are added.")
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
    again: Annotated[
        int | None,
        typer.Option("--again", metavar="N", min=2, help="Train N genomes of the table with further seeds."),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option("--seeds", metavar="K", min=1, max=100, help="Of --again; 2 by default.")
    ] = None,
    run: Annotated[
        Path | None, typer.Option("--run", help="Where --random trains; runs/table-FILE-SEED by default.")
    ] = None,
    predict: Annotated[
        bool, typer.Option("--predict", help="Add latencies and memory of every genome on this device.")
    ] = False,
    profile: Annotated[
        Path | None, typer.Option("--profile", help="Of --predict: this table, of star profile --out.")
    ] = None,
    preset: Annotated[str, typer.Option(help="Of --random: demo, laptop or paper.")] = "demo",
    seed: Annotated[int, typer.Option(min=0, help="Of the draws of genomes, by --random.")] = 0,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes of --random and --again; one a core.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what the table holds as JSON.")] = False,
) -> None:
    """Make or extend a table of evaluated genomes, from runs or by training new ones.

    A training of the preset demo takes about 16 s of one core, recall among it.
    The same command goes on with --random and --again where Ctrl-C or a kill stopped it.

    --again takes genomes of all ranks of quality, and says how far seeds agree.

    [dim]star table --extend genomes.parquet runs/first runs/second[/dim]
    [dim]star table --extend genomes.parquet --again 24 --seeds 2[/dim]
    [dim]star table --extend genomes.parquet --predict[/dim]
    """
    from star.commands.terminal import say, screen

    console = screen(as_json)
    with reported():
        if extend is None:
            raise BadInput("table takes --extend FILE, a name that ends in .parquet or .csv")
        _require_alone(again, seeds, random)
        from star.comparison import table as tables

        sources = list(runs or ())
        tables.require_suffix(extend)
        # What is wrong with the inputs should not be found out after hours of training.
        there = tables.read(extend) if extend.exists() else []
        added = [row for source in sources for row in tables.rows_of_run(_existing(source))]
        if profile is not None and not predict:
            raise BadInput("--profile is for --predict: the table that latencies are predicted from")
        if random is None and not sources and not extend.exists():
            raise BadInput(f"table {extend} does not exist: name runs to make it from, or --random N")
        if random is not None:
            settings = _settings(preset, random, seed, workers)
            directory = run or Path("runs", f"table-{extend.stem}-{seed}")
        device = _device(profile, console) if predict else None
        warning = None if device is None else device.warning()
        if warning is not None:
            say(console, f"Warning: {warning}", "yellow")
    if random is not None:
        _train(settings, directory, console)
        with reported(started=True):
            added += tables.rows_of_run(directory)
    with reported(started=random is not None):
        rows, new = tables.extend(extend, added) if added else (there, 0)
    if again is not None:
        before = len(rows)
        rows = _train_again(extend, rows, sources, again, seeds or _FURTHER_SEEDS, workers, console)
        new += len(rows) - before
    with reported(started=again is not None or random is not None):
        if device is not None:
            from star.comparison.latencies import with_latencies

            rows = with_latencies(rows, device)
            tables.write(extend, rows)
        _conclude(console, extend, rows, new, device, again is not None, as_json)


def _require_alone(again: int | None, seeds: int | None, random: int | None) -> None:
    if again is None and seeds is not None:
        raise BadInput("--seeds is for --again: the further seeds of each genome")
    if again is not None and random is not None:
        raise BadInput("--again takes genomes that the table holds: give --random in a command before it")


def _device(profile: Path | None, console: Console) -> ProfileTable:
    """The table of the file, or the kept or a new one of this machine, as star profile has it."""
    from star import pools
    from star.commands.terminal import say
    from star.measure.errors import MeasurementError
    from star.measure.settings import MeasureSettings
    from star.profile.cached import find_or_measure
    from star.profile.table import read_table

    if profile is not None:
        return read_table(profile)
    settings = MeasureSettings().resolved(vocab_size=256)
    try:
        return find_or_measure(
            settings,
            [entry.id for entry in pools.all_classes()],
            tell=lambda text: say(console, f"measuring {text}", "dim"),
        )
    except MeasurementError as error:
        raise Failed(str(error)) from error


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


def _train_again(
    path: Path,
    rows: list[Row],
    runs: list[Path],
    count: int,
    seeds: int,
    workers: int | None,
    console: Console,
) -> list[Row]:
    """The table's rows with those of further seeds."""
    from star.commands.fidelity import retraining_progress
    from star.comparison.again import plan, text_of_runs, train_again

    with reported():
        wanted = plan(rows, count, seeds, data=text_of_runs(runs, rows), workers=workers)
    try:
        with retraining_progress(console, "further training", "genome") as progress:
            try:
                return train_again(path, wanted, rows, on_event=progress)
            except Exception:
                with reported(started=progress.started):
                    raise
    except KeyboardInterrupt:
        raise Stopped("table stopped; the same command goes on with it") from None


def _require_same(directory: Path, settings: SearchSettings) -> None:
    """Refuse to go on with a run of another --random, --seed or --preset."""
    from star.search import RunStore

    with RunStore.open(directory) as store:
        recorded = store.settings()
    given: dict[str, Any] = {"data": recorded.data, "model": recorded.model}
    if replace(settings, **given).identity() != recorded.identity():
        raise BadInput(f"{directory} holds a run of other settings: take another --run or --seed")


def _conclude(
    console: Console,
    path: Path,
    rows: list[Row],
    new: int,
    device: ProfileTable | None,
    with_seeds: bool,
    as_json: bool,
) -> None:
    from star.commands.terminal import emit, say
    from star.comparison.table import device_label, main_conditions
    from star.report.numbers import count

    objectives = sorted({name for row in rows for name in row.objectives})
    conditions = sorted({row.conditions for row in rows})
    agreements = _agreements(rows) if with_seeds else {}
    if as_json:
        emit(
            {
                "table": str(path),
                "rows": len(rows),
                "new": new,
                "predicted_for": None if device is None else device_label(device),
                "genomes": len({row.genome for row in rows}),
                "failed": sum(not row.ok for row in rows),
                "objectives": objectives,
                "conditions": conditions,
                "main_conditions": main_conditions(rows) if rows else None,
                "seed_agreement": {name: value.to_json() for name, value in agreements.items()},
                "seconds": sum(row.seconds for row in rows),
            }
        )
        return
    say(console, f"{path}: {count(len(rows), 'row')}, {new} of them new", "bold")
    failed = sum(not row.ok for row in rows)
    genomes = count(len({row.genome for row in rows}), "genome")
    sets = count(len(conditions), "set")
    say(console, f"{genomes} ({failed} failed) with {', '.join(objectives)}; {sets} of conditions")
    for name, value in agreements.items():
        say(console, _sentence(name, value))
    if device is not None:
        say(console, f"Latencies and memory predicted for {device.device_name}")
    if rows:
        say(console, f"Compare search algorithms on it:  star compare {path}")


def _agreements(rows: list[Row]) -> dict[str, SeedAgreement]:
    """Of each trained objective that genomes have with two seeds."""
    from star.comparison.seeds import agreement
    from star.comparison.table import main_conditions
    from star.search.objectives import OBJECTIVES

    main = main_conditions(rows)
    same = [row for row in rows if row.conditions == main]
    found = {name: agreement(same, name, rounds=2000) for name, item in OBJECTIVES.items() if item.trained}
    return {name: value for name, value in found.items() if value is not None}


def _sentence(name: str, value: SeedAgreement) -> str:
    from star.report.numbers import count
    from star.search.objectives import OBJECTIVES

    low, high = value.interval or (float("nan"), float("nan"))
    return (
        f"{name}: Kendall's tau {value.tau:.2f} [{low:.2f}, {high:.2f}] between two seeds, seed noise "
        f"{value.deviation:.4f} {OBJECTIVES[name].unit} "
        f"({count(value.genomes, 'genome')} of {value.seeds} seeds)"
    )
