"""`star search`: begin a search."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from star.commands.errors import BadInput, Failed, Stopped, reported

if TYPE_CHECKING:
    from rich.console import Console

    from star.report.summary import RunSummary
    from star.search.events import Event, Listener
    from star.search.settings import SearchSettings

_TEXT = "Text"
_SEARCH = "Search (as the preset says, where not given)"
_PROXY = "What is trained, and how (as the preset says)"
_DEVICE = "The device that the models are for, measured at their target size"
_DEFAULT_PRESET = "demo"
# Written out, since --help imports nothing; a test holds them against the registries.
_OBJECTIVES = (
    "quality,size by default; also cache, flops, recall, ttft, prefill, decode_p50, decode_p95, peak_memory."
)
_ALGORITHMS = "nsga2 (default), ga, regularised, random or parameters."
_LARGEST_CLASS = 99


def _preset(help: str, panel: str, *names: str, rare: bool = False, **more: Any) -> Any:
    """An option that overrides the preset; a rare one is shown by --help-all alone."""
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=False, hidden=rare, **more)


def _help_all(context: typer.Context, value: bool) -> None:
    """Show the rare options as well, and leave."""
    if value:
        for parameter in context.command.params:
            parameter.hidden = False  # type: ignore[attr-defined]
        typer.echo(context.get_help(), nl=False)
        raise typer.Exit


def search(
    run: Annotated[
        Path | None,
        typer.Argument(metavar="RUN", help="A new run directory; runs/<date-time> by default."),
    ] = None,
    preset: Annotated[
        str,
        typer.Option(help="demo (default, minutes), laptop (under an hour), paper.", show_default=False),
    ] = _DEFAULT_PRESET,
    data: Annotated[
        list[str] | None,
        _preset("File, folder, JSONL, Parquet, dataset; repeatable.", _TEXT),
    ] = None,
    text_column: Annotated[
        str | None, _preset("Column of a table that holds the text.", _TEXT, rare=True)
    ] = None,
    tokenizer: Annotated[str | None, _preset("A tokenizers JSON file; bytes by default.", _TEXT)] = None,
    objectives: Annotated[str | None, _preset(_OBJECTIVES, _SEARCH)] = None,
    algorithm: Annotated[str | None, _preset(_ALGORITHMS, _SEARCH)] = None,
    depth: Annotated[int | None, _preset("LIVs of a backbone.", _SEARCH)] = None,
    width: Annotated[int | None, _preset("Model width.", _SEARCH)] = None,
    head_dim: Annotated[int | None, _preset("Width of an attention head.", _SEARCH)] = None,
    classes: Annotated[str | None, _preset("Only these LIV classes, like 1,3,7-9.", _SEARCH)] = None,
    population: Annotated[int | None, _preset("Candidates of a generation.", _SEARCH)] = None,
    generations: Annotated[int | None, _preset("Generations with the first, random one.", _SEARCH)] = None,
    mutation_rate: Annotated[float | None, _preset("Chance that a position changes.", _SEARCH)] = None,
    tournament: Annotated[int | None, _preset("Contenders for each parent.", _SEARCH, rare=True)] = None,
    survival: Annotated[
        str | None, _preset("crowding (default), or hv: hypervolume improvement.", _SEARCH, metavar="RULE")
    ] = None,
    rungs: Annotated[
        str | None, _preset("Like 0.25,0.5, where who is behind is stopped.", _SEARCH, metavar="PARTS")
    ] = None,
    rung_rivals: Annotated[
        str | None, _preset("survivors, or front: behind whom.", _SEARCH, metavar="WHO", rare=True)
    ] = None,
    rung_confidence: Annotated[
        float | None, _preset("That they are behind; 0.95.", _SEARCH, rare=True)
    ] = None,
    seed: Annotated[int | None, _preset("Of every draw.", _SEARCH)] = None,
    steps: Annotated[int | None, _preset("Optimizer steps.", _PROXY)] = None,
    batch_size: Annotated[int | None, _preset("Sequences a step.", _PROXY)] = None,
    length: Annotated[int | None, _preset("Tokens a sequence.", _PROXY)] = None,
    learning_rate: Annotated[float | None, _preset("Peak learning rate.", _PROXY)] = None,
    device: Annotated[str | None, _preset("auto, cpu, cuda or cuda:N.", _PROXY)] = None,
    dtype: Annotated[str | None, _preset("auto, float32 or bfloat16.", _PROXY)] = None,
    seed_baselines: Annotated[
        bool | None,
        _preset("Begin with the known layouts, too.", _PROXY, "--seed-baselines/--no-seed-baselines"),
    ] = None,
    references: Annotated[
        bool | None,
        _preset("Train them, to compare with.", _PROXY, "--references/--no-references"),
    ] = None,
    proxy: Annotated[
        list[str] | None,
        _preset("Any other, like schedule=constant; repeatable.", _PROXY, metavar="NAME=VALUE", rare=True),
    ] = None,
    most: Annotated[
        list[str] | None,
        _preset("Budget, like ttft=200ms; of size, cache, flops at --width.", _DEVICE, "--max"),
    ] = None,
    least: Annotated[list[str] | None, _preset("Likewise, prefill=500tokens/s.", _DEVICE, "--min")] = None,
    context: Annotated[
        str | None, _preset("Tokens, like 4096,32768 (the CPU's default is 4096).", _DEVICE)
    ] = None,
    target_width: Annotated[int | None, _preset("Width that is measured; 768.", _DEVICE)] = None,
    target_head_dim: Annotated[int | None, _preset("Its heads' width; 64.", _DEVICE, rare=True)] = None,
    target_dtype: Annotated[
        str | None, _preset("auto, float32, bfloat16, float16.", _DEVICE, rare=True)
    ] = None,
    target_device: Annotated[str | None, _preset("auto, cpu, cuda or cuda:N.", _DEVICE)] = None,
    profile: Annotated[Path | None, _preset("A table that star profile --out has written.", _DEVICE)] = None,
    measure_every: Annotated[
        int | None, _preset("Each of so many is measured whole; 0: the front alone.", _DEVICE, rare=True)
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes; one a core by default.")] = None,
    workers_per_gpu: Annotated[int | None, typer.Option(help="Processes that share each GPU.")] = None,
    timeout: Annotated[
        float | None, typer.Option(help="Seconds after which a candidate has failed.", hidden=True)
    ] = None,
    engine: Annotated[str | None, typer.Option(help="local or ray.")] = None,
    no_report: Annotated[bool, typer.Option("--no-report", help="Write no report.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
    help_all: Annotated[
        bool,
        typer.Option("--help-all", is_eager=True, callback=_help_all, help="All options, rare ones too."),
    ] = False,
) -> None:
    """Search for architectures and report what was found; Ctrl-C stops, star resume RUN goes on.

    [dim]star search --data my-texts/ --objectives quality,cache --preset laptop[/dim]
    """
    with reported():
        from star.commands.proxy import proxy_settings
        from star.profile import read_table
        from star.search import search as begin_search
        from star.search.budgets import parse_budgets

        settings = _settings(
            preset,
            changes={
                "objectives": None if objectives is None else _names(objectives),
                "pool": None if classes is None else _pool(classes),
                "algorithm": algorithm,
                "depth": depth,
                "population": population,
                "generations": generations,
                "mutation_rate": mutation_rate,
                "tournament": tournament,
                "survival": survival,
                "rungs": None if rungs is None else _parts(rungs),
                "rung_rivals": rung_rivals,
                "rung_confidence": rung_confidence,
                "budgets": parse_budgets(most or (), least or ()) or None,
                "profile": None if profile is None else read_table(profile),
                "seed": seed,
                "seed_baselines": seed_baselines,
                "references": references,
                "workers": workers,
                "workers_per_gpu": workers_per_gpu,
                "timeout": timeout,
                "engine": engine,
            },
            model={"width": width, "head_dim": head_dim},
            proxy=proxy_settings(
                proxy or (),
                {
                    "steps": steps,
                    "batch_size": batch_size,
                    "length": length,
                    "learning_rate": learning_rate,
                    "device": device,
                    "dtype": dtype,
                },
            ),
            measure={
                "width": target_width,
                "head_dim": target_head_dim,
                "dtype": target_dtype,
                "device": target_device,
                "contexts": None if context is None else contexts(context),
                "every": measure_every,
            },
            data={
                "source": tuple(data) if data else None,
                "text_column": text_column,
                "tokenizer": tokenizer,
            },
        )
    directory = _new_directory() if run is None else run
    made_here = not directory.exists()
    try:
        carry_out(
            lambda listener: begin_search(settings, directory, on_event=listener),
            directory,
            not no_report,
            as_json,
        )
    except BadInput:
        if made_here:
            _remove_unused(directory)
        raise


def carry_out(work: Callable[[Listener], Any], directory: Path, with_report: bool, as_json: bool) -> None:
    """Run a search or the rest of one, show its progress, and print what was found."""
    from star.commands.progress import SearchProgress
    from star.commands.report import conclude, write
    from star.commands.terminal import emit, screen

    console = screen(as_json)
    progress = SearchProgress(console)
    try:
        with progress:
            try:
                work(_with_warnings(progress, console))
            except Exception:
                # Which kind of error it is depends on how far the work has come.
                with reported(started=progress.started):
                    raise
    except KeyboardInterrupt:
        raise Stopped(_how_to_go_on(directory)) from None
    with reported(started=True):
        if with_report:
            summary, page = write(directory)
        else:
            from star.report import read_run

            summary, page = read_run(directory), None
    if as_json:
        emit({**summary.to_json(), "report": None if page is None else str(page)})
    else:
        conclude(console, summary, page)
    if summary.candidates and not summary.front:
        raise Failed(_nothing_found(summary))


def _with_warnings(listener: Listener, console: Console) -> Listener:
    """The listener, and a line at the start of a search for each budget that can not bind."""
    from star.commands.terminal import say
    from star.report.device import budget_text
    from star.report.numbers import count, value
    from star.search.budgets import loose_budgets
    from star.search.events import RunStarted

    def listen(event: Event) -> None:
        listener(event)
        if not isinstance(event, RunStarted) or event.stored:
            return
        for name, most in loose_budgets(event.settings).items():
            say(
                console,
                f"Warning: the budget {budget_text(event.settings, name)} keeps nobody off the front: no "
                f"backbone of {count(event.settings.depth, 'LIV')} has more than {value(name, most)}",
                "yellow",
            )

    return listen


def _nothing_found(summary: RunSummary) -> str:
    """Why a run with candidates has no front: all failed, or none keeps the budget."""
    from star.report.device import budget_text
    from star.report.numbers import title, value
    from star.search.budgets import violation

    budgets, over = summary.settings.budgets, summary.over_budget
    if not over:
        return f"no candidate of {summary.directory} succeeded; its failures are in the report"
    nearest = min(over, key=lambda item: (violation(item.objectives, budgets), item.id))
    limits = " and ".join(budget_text(summary.settings, name) for name in budgets)
    has = " and ".join(
        f"{title(name)} {value(name, nearest.objectives[name])}"
        for name in budgets
        if name in nearest.objectives and violation(nearest.objectives, {name: budgets[name]}) > 0
    )
    return f"no candidate keeps the budget: {limits}; the nearest, candidate {nearest.id}, has {has}"


def _remove_unused(directory: Path) -> None:
    """Remove the directory of a search that was refused before it recorded anything."""
    from star.search.directory import RunDirectory

    run = RunDirectory(directory)
    if run.database.exists():
        return
    run.lock.unlink(missing_ok=True)
    for folder in (run.weights, run.report, run.export, run.path):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _how_to_go_on(directory: Path) -> str:
    """For a Ctrl-C outside of the loop: while the text is read, or between the search and its end."""
    from star.search.store import RunStore

    if RunStore.begun(directory / "run.db"):
        return f"search stopped; continue with: star resume {directory}"
    return "search stopped before anything was recorded"


def _settings(
    preset_name: str,
    *,
    changes: dict[str, Any],
    model: dict[str, Any],
    proxy: dict[str, Any],
    measure: dict[str, Any],
    data: dict[str, Any],
) -> SearchSettings:
    """The preset with what the options say; None leaves a setting alone."""
    from star.search import preset
    from star.targets import model_config

    settings = preset(preset_name)
    table = changes["profile"]
    # What is not asked for otherwise is as in the table that is given.
    measured = settings.measure if table is None else table.settings
    return replace(
        settings,
        **_given(changes),
        measure=replace(measured, **_given(measure)),
        model=model_config(**model, base=settings.model),
        proxy=_proxy(settings, _given(proxy)),
        data=replace(settings.data, **_given(data)),
    )


def _proxy(settings: SearchSettings, given: dict[str, Any]) -> Any:
    """The proxy's settings; a warm-up that would outlast the training is cut to a tenth of it."""
    steps = given.get("steps", settings.proxy.steps)
    if "warmup_steps" not in given and settings.proxy.warmup_steps >= steps:
        given["warmup_steps"] = steps // 10
    return replace(settings.proxy, **given)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def contexts(text: str) -> tuple[int, ...]:
    """Numbers of tokens, with commas."""
    parts = _names(text)
    if not parts or not all(part.isascii() and part.isdecimal() for part in parts):
        raise ValueError(f"context is {text!r}, takes numbers of tokens with commas, like 4096,32768")
    return tuple(int(part) for part in parts)


def _parts(text: str) -> tuple[float, ...]:
    """Parts of a training, with commas; none where the text is empty."""
    try:
        return tuple(float(part) for part in _names(text))
    except ValueError:
        raise ValueError(f"rungs is {text!r}, takes parts of a training with commas, like 0.25,0.5") from None


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _pool(text: str) -> Any:
    """The option pool with some classes only, "1,3,7-9"."""
    from star.pools import Pool

    numbers: list[int] = []
    for part in _names(text):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"classes has {part!r}, takes numbers and ranges like 1,3,7-9")
        least, most = int(first), int(last if dash else first)
        if most > _LARGEST_CLASS:
            raise ValueError(f"classes has {part!r}, takes numbers from 1 to {_LARGEST_CLASS}")
        numbers += range(least, most + 1)
    return Pool(classes=tuple(numbers))


def _new_directory() -> Path:
    """runs/<date-time>, with a number behind it where two searches begin in one second."""
    name = time.strftime("%Y-%m-%d-%H%M%S")
    directory, number = Path("runs", name), 2
    while directory.exists():
        directory, number = Path("runs", f"{name}-{number}"), number + 1
    return directory
