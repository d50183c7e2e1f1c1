"""`star profile`: what each LIV of a backbone takes on a device, and what they take together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from star.commands.errors import BadInput, Failed, reported

if TYPE_CHECKING:
    from rich.console import Console

    from star.measure.settings import MeasureSettings
    from star.profile.predict import Predictor
    from star.profile.table import ProfileTable
    from star.targets import Target


def profile(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="GENOME|RUN",
            show_default=False,
            help="A genome; transformer_pp, striped_mamba or lfm2; a run directory. None: all LIV classes.",
        ),
    ] = None,
    id: Annotated[int | None, typer.Option("--id", min=0, help="Candidate of the run.")] = None,
    depth: Annotated[int | None, typer.Option(min=1, help="LIVs of a baseline.  [dim]24[/dim]")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.  [dim]auto[/dim]")] = None,
    width: Annotated[
        int | None, typer.Option("--target-width", "--width", help="Model width.  [dim]768[/dim]")
    ] = None,
    head_dim: Annotated[
        int | None,
        typer.Option("--target-head-dim", "--head-dim", help="Width of a head.  [dim]64 where it fits[/dim]"),
    ] = None,
    vocab_size: Annotated[int | None, typer.Option(help="Token ids of the head.  [dim]256[/dim]")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16, float16.  [dim]auto: float32 on a CPU, else bfloat16[/dim]"),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.  [dim]torch's own number[/dim]")] = None,
    context: Annotated[
        str | None,
        typer.Option(help="Tokens of prompt and cache.  [dim]4096 on a CPU, else 4096,32768[/dim]"),
    ] = None,
    chunk: Annotated[int | None, typer.Option(help="Of a prompt, read at once.  [dim]4096[/dim]")] = None,
    seconds: Annotated[
        float | None, typer.Option(help="No repetition begins after these.  [dim]60 a context[/dim]")
    ] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Measure the whole model as well.")] = False,
    table: Annotated[
        Path | None, typer.Option("--profile", help="Use this table instead of measuring one.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the table into this file.")] = None,
    anew: Annotated[bool, typer.Option("--anew", help="Measure even if a table is kept.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure a device once, LIV by LIV, and predict what a backbone takes there.

    Untrained weights, real caches and kernels, one sequence. A CPU takes minutes;
    the table is kept in ~/.cache/star/profiles. One that is stopped begins anew.

    [dim]star profile lfm2 --device cpu --measure[/dim]
    [dim]star profile --device cuda --context 4096,32768 --out gpu.json[/dim]
    """
    if measure and target is None:
        raise BadInput("--measure takes a genome, a baseline's name or a run directory with it")
    with reported():
        shown = None if target is None else _target(target, id, depth, width, head_dim, vocab_size)
        asked = {
            "device": device,
            "width": width,
            "head_dim": head_dim,
            "vocab_size": vocab_size,
            "dtype": dtype,
            "threads": threads,
            "contexts": None if context is None else _contexts(context),
            "chunk": chunk,
            "seconds": seconds,
        }
        given = {name: value for name, value in asked.items() if value is not None}
        recorded = None if shown is None or shown.settings is None else shown.settings.profile
        if recorded is not None and not given and table is None and not anew:
            found = recorded  # the one that the run's candidates were predicted from
        else:
            found = _table(given, table, anew)
        if out is not None:
            _write(found, out)
    from star.commands.terminal import emit, say, screen
    from star.profile.predict import Predictor

    warning = found.warning()
    if warning is not None:
        say(screen(True), f"Warning: {warning}", "yellow")
    if shown is None:
        if as_json:
            emit(found.to_json())
        else:
            _print_table(screen(), found)
        return
    with reported():
        predictor = Predictor(found)
        predicted = predictor.predict(shown.genome)
    measured = _measured(shown, found) if measure else {}
    if as_json:
        emit(_json(shown, predictor, predicted, measured))
    else:
        _print(screen(), shown, predictor, predicted, measured)


def _target(
    text: str,
    id: int | None,
    depth: int | None,
    width: int | None,
    head_dim: int | None,
    vocab_size: int | None,
) -> Target:
    from star.targets import open_target

    return open_target(text, id=id, depth=depth, width=width, head_dim=head_dim, vocab_size=vocab_size)


def _contexts(text: str) -> tuple[int, ...]:
    from star.commands.search import contexts

    return contexts(text)


def _table(asked: dict[str, Any], file: Path | None, anew: bool) -> ProfileTable:
    """The table of the file, which must be of what is asked for; or the kept or a new one."""
    from star import pools
    from star.commands.terminal import say, screen
    from star.measure.errors import MeasurementError
    from star.measure.settings import MeasureSettings
    from star.profile.cached import agrees, find_or_measure
    from star.profile.table import read_table

    if file is not None:
        if anew:
            raise ValueError("--anew measures a table, and --profile gives one")
        found = read_table(file)
        agrees(found, replace(found.settings, **asked))
        return found
    settings = MeasureSettings(**asked).resolved(vocab_size=256)
    log = screen(True)
    try:
        return find_or_measure(
            settings,
            [entry.id for entry in pools.all_classes()],
            tell=lambda text: say(log, f"measuring {text}", "dim"),
            anew=anew,
        )
    except MeasurementError as error:
        raise Failed(str(error)) from error


def _write(table: ProfileTable, out: Path) -> None:
    try:
        table.write(out)
    except OSError as error:
        raise BadInput(f"{out} can not be written: {error.strerror or error}") from error


def _measured(shown: Target, table: ProfileTable) -> dict[str, float]:
    from star.commands.terminal import say, screen
    from star.measure.errors import MeasurementError
    from star.measure.process import measure_in_process

    say(screen(True), "measuring the whole model", "dim")
    try:
        return measure_in_process(shown.genome, table)
    except MeasurementError as error:
        raise Failed(str(error)) from error


def _json(
    shown: Target, predictor: Predictor, predicted: dict[str, float], measured: dict[str, float]
) -> dict[str, Any]:
    from star.measure.quantities import relative_errors

    table = predictor.table
    livs = {
        str(context): [
            {
                "class": row.liv_class,
                "name": plan.entry.name,
                "computed": list(row.computed),
                "prefill_ms": row.prefill,
                "decode_p50_ms": row.decode_p50,
                "decode_p95_ms": row.decode_p95,
            }
            for plan, row in predictor.shares(shown.genome, context)
        ]
        for context in table.settings.contexts
    }
    errors = {name: values[0] for name, values in relative_errors([(predicted, measured)]).items()}
    return {
        "genome": str(shown.genome),
        "device": table.device_name,
        "settings": table.settings.to_json(),
        "livs": livs,
        "predicted": predicted,
        "measured": measured,
        "relative_error": errors,
    }


def _print(
    console: Console,
    shown: Target,
    predictor: Predictor,
    predicted: dict[str, float],
    measured: dict[str, float],
) -> None:
    from rich import box
    from rich.table import Table

    from star.commands.terminal import say
    from star.report.numbers import count

    table = predictor.table
    say(console, f"{shown.name}: {count(shown.genome.depth, 'LIV')} on {_device(table)}", "bold")
    for context in table.settings.contexts:
        grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=f"{context} tokens", title_justify="left")
        for name in ("LIV", "class", "computes"):
            grid.add_column(name, no_wrap=True)
        for name in ("prefill ms", "decode ms a token"):
            grid.add_column(name, justify="right")
        for plan, row in predictor.shares(shown.genome, context):
            computes = "all" if plan.source is None else ", ".join(row.computed) or "nothing"
            grid.add_row(
                str(plan.index + 1), plan.entry.name, computes, f"{row.prefill:.2f}", f"{row.decode_p50:.3f}"
            )
        depth = shown.genome.depth
        ends, calibration = predictor.ends(context)
        grid.add_section()
        grid.add_row(
            "", "ends", "embedding, norm, head", f"{ends.prefill:.2f}", f"{ends.decode:.3f}", style="dim"
        )
        grid.add_row(
            "",
            "norms",
            "residual sums, norms",
            f"{depth * ends.norm_prefill:.2f}",
            f"{depth * ends.norm_decode:.3f}",
            style="dim",
        )
        grid.add_row(
            "",
            "beyond",
            "a whole model's beyond its parts",
            f"{depth * calibration.prefill:.2f}",
            f"{depth * calibration.decode:.3f}",
            style="dim",
        )
        console.print(grid)
    console.print(_quantities(predicted, measured))


def _quantities(predicted: dict[str, float], measured: dict[str, float]) -> object:
    """Predicted beside measured, one quantity a row."""
    from rich import box
    from rich.table import Table

    from star.report.numbers import difference, title, value

    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    grid.add_column("")
    grid.add_column("predicted", justify="right")
    if measured:
        grid.add_column("measured", justify="right")
        grid.add_column("prediction", justify="right")
    for name, number in predicted.items():
        cells = [title(name), value(name, number)]
        if measured:
            other = measured.get(name)
            relative = "–" if other is None else difference(number, other)
            cells += [value(name, other), relative]
        grid.add_row(*cells)
    return grid


def _print_table(console: Console, table: ProfileTable) -> None:
    """All classes; those that share nothing, and below how much less a follower takes."""
    from rich import box
    from rich.table import Table

    from star import pools
    from star.commands.terminal import say

    say(console, _device(table), "bold")
    for context in table.settings.contexts:
        grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=f"{context} tokens", title_justify="left")
        for name in ("class", "computes"):
            grid.add_column(name, no_wrap=True)
        for name in ("prefill ms", "decode p50 ms", "p95"):
            grid.add_column(name, justify="right")
        rows = [row for row in table.rows if row.context == context]
        for row in sorted(rows, key=lambda row: row.liv_class):
            entry = pools.get(row.liv_class)
            whole = row.computed == entry.groups
            grid.add_row(
                entry.name if whole else "",
                "all" if whole else ", ".join(row.computed) or "nothing",
                f"{row.prefill:.2f}",
                f"{row.decode_p50:.3f}",
                f"{row.decode_p95:.3f}",
                style="" if whole else "dim",
            )
        console.print(grid)


def _device(table: ProfileTable) -> str:
    """The device and what was measured on it, in one line."""
    from star.report.numbers import count, duration

    settings: MeasureSettings = table.settings
    config = settings.config()
    threads = f", {count(settings.threads or 1, 'thread')}" if settings.device == "cpu" else ""
    return (
        f"{table.device_name} ({settings.device}{threads}), width {config.width}, {settings.dtype}, "
        f"torch {table.versions.get('torch', '?')}; table measured in {duration(table.seconds)}"
    )
