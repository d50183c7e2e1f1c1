"""`star train`: train one architecture for longer, or on a synthetic task."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from star.commands.errors import BadInput, Failed, Stopped, reported

if TYPE_CHECKING:
    from star.proxy import Outcome, ProxySettings
    from star.search.settings import DataSettings
    from star.targets import Target

_MODEL = "Model"
_TEXT = "Text"
_EVALUATIONS = 20
_FEWEST_STEPS = 100  # between evaluations, which cost as much as several steps


def train(
    target: Annotated[
        str,
        typer.Argument(metavar="GENOME|RUN", help="A genome, a baseline's name, or a run (its best)."),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Directory for the weights; RUN/trained/ID by default."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 1000,
    task: Annotated[
        str | None, typer.Option(metavar="NAME[:SIZE=N,…]", help="A task instead of text, like mqar:pairs=4.")
    ] = None,
    id: Annotated[int | None, typer.Option("--id", min=0, help="Candidate of the run.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences a step.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens a sequence.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    evaluate_every: Annotated[int | None, typer.Option(help="Steps between evaluations.")] = None,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 200,
    seed: Annotated[int | None, typer.Option(help="Of weights and data order.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32 or bfloat16.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; the run's, or 1.")] = None,
    proxy: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Any other, like schedule=constant; repeatable."),
    ] = None,
    depth: Annotated[int | None, typer.Option(help="LIVs of a baseline.", rich_help_panel=_MODEL)] = None,
    width: Annotated[
        int | None, typer.Option(help="Model width; 128, or the run's.", rich_help_panel=_MODEL)
    ] = None,
    head_dim: Annotated[int | None, typer.Option(help="Width of a head.", rich_help_panel=_MODEL)] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="As for star search; the run's own.", rich_help_panel=_TEXT)
    ] = None,
    text_column: Annotated[
        str | None, typer.Option(help="Column of a table that holds the text.", rich_help_panel=_TEXT)
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="A tokenizers JSON file.", rich_help_panel=_TEXT)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train one architecture for longer. The same command goes on where Ctrl-C stopped it.

    [dim]star train runs/first --id 12 --steps 5000[/dim]
    """
    from star.targets import is_run, open_target

    if task is not None:
        with reported():
            _train_on_task(
                target,
                task,
                sizes={"id": id, "depth": depth, "width": width, "head_dim": head_dim},
                options={
                    "batch_size": batch_size,
                    "learning_rate": learning_rate,
                    "seed": seed,
                    "device": device,
                    "dtype": dtype,
                    "threads": threads,
                },
                text={
                    **{"length": length, "proxy": proxy, "data": data},
                    **{"text-column": text_column, "tokenizer": tokenizer},
                },
                out=out,
                steps=steps,
                evaluate_every=evaluate_every,
                checkpoint_every=checkpoint_every,
                as_json=as_json,
            )
        return
    with reported():
        from star.commands.proxy import proxy_settings
        from star.search.settings import PRESETS, DataSettings

        if width is None and not is_run(target):
            width = PRESETS["laptop"].model.width
        chosen = open_target(target, id=id, depth=depth, width=width, head_dim=head_dim)
        directory = _directory(chosen) if out is None else out
        found = PRESETS["laptop"].proxy if chosen.settings is None else chosen.settings.proxy
        settings = _settings(
            # A proxy need not end well, as it is only compared with others; this training should. And it is
            # read as what was measured, not as what a longer one would be worth.
            replace(found, schedule="cosine", extrapolate_to=0),
            steps,
            proxy_settings(
                proxy or (),
                {
                    "steps": steps,
                    "batch_size": batch_size,
                    "length": length,
                    "learning_rate": learning_rate,
                    "evaluate_every": max(_FEWEST_STEPS, steps // _EVALUATIONS)
                    if evaluate_every is None
                    else evaluate_every,
                    "seed": seed,
                    "device": device,
                    "dtype": dtype,
                    "threads": threads,
                },
            ),
        )
        text = DataSettings() if chosen.settings is None else chosen.settings.data
        given: dict[str, Any] = {
            "source": tuple(data) if data else None,
            "text_column": text_column,
            "tokenizer": tokenizer,
        }
        text = replace(text, **{name: value for name, value in given.items() if value is not None})
        outcome = _carry_out(chosen, settings, text, directory, checkpoint_every, as_json)
    _conclude(chosen, outcome, directory, as_json)


def _train_on_task(
    target: str,
    name: str,
    *,
    sizes: dict[str, int | None],
    options: dict[str, Any],
    text: dict[str, Any],
    out: Path | None,
    steps: int,
    evaluate_every: int | None,
    checkpoint_every: int,
    as_json: bool,
) -> None:
    """`star train --task`. `text` holds the options that belong to texts."""
    from star.commands import train_task
    from star.targets import is_run, open_target
    from star.tasks import open_task

    task = open_task(name)
    for option, value in text.items():
        if value:
            raise BadInput(f"--{option} is for texts: the task {task.name} makes its own sequences")
    if evaluate_every is not None and evaluate_every < 1:
        raise BadInput(f"--evaluate-every is {evaluate_every}, takes at least 1")
    if sizes["width"] is None and not is_run(target):
        sizes = {**sizes, "width": train_task.WIDTH}
    chosen = open_target(target, **sizes)
    train_task.train_task(
        chosen,
        task,
        train_task.settings_of(chosen, steps, options),
        train_task.directory_of(chosen, task) if out is None else out,
        evaluate_every or max(1, steps // train_task.POINTS),
        checkpoint_every,
        as_json,
    )


def _directory(chosen: Target) -> Path:
    """Where a training goes that was not told: into the run."""
    if chosen.run is None or chosen.evaluation is None:
        raise BadInput("train takes --out DIR with a genome or a baseline")
    return chosen.run / "trained" / str(chosen.evaluation.id)


def _settings(base: ProxySettings, steps: int, options: dict[str, Any]) -> ProxySettings:
    warmup = min(base.warmup_steps, max(1, steps // 10))
    return replace(base, **{"steps": steps, "warmup_steps": warmup, **options})


def _carry_out(
    chosen: Target,
    settings: ProxySettings,
    text: DataSettings,
    out: Path,
    checkpoint_every: int,
    as_json: bool,
) -> Outcome:
    from star import training_directory
    from star.commands.progress import training_progress
    from star.commands.stopping import stop_signal
    from star.commands.terminal import say, screen
    from star.data import open_corpus

    console = screen(as_json)
    with console.status("reading the text"):
        corpus = open_corpus(
            list(text.source) or None,
            text_column=text.text_column,
            tokenizer=text.tokenizer,
            validation_fraction=text.validation_fraction,
        )
    say(console, f"Training {chosen.name} on {corpus.name} in {out}")
    config = replace(chosen.config, vocab_size=corpus.vocab_size)
    try:
        with stop_signal() as stopped, training_progress(console, "training") as progress:
            return training_directory.train(
                out,
                chosen.genome,
                config,
                settings,
                corpus,
                text,
                progress=progress,
                should_stop=lambda: bool(stopped),
                checkpoint_every=checkpoint_every,
            )
    except training_directory.StoppedTraining:
        raise Stopped(f"training stopped; the same command goes on with it (checkpoint in {out})") from None
    except KeyboardInterrupt:
        raise Stopped(
            f"training stopped; the same command goes on from its last checkpoint in {out}"
        ) from None


def _conclude(chosen: Target, outcome: Outcome, out: Path, as_json: bool) -> None:
    from star.commands.terminal import emit, say, screen
    from star.report.numbers import duration, value

    if not outcome.ok:
        raise Failed(f"training {chosen.name} failed: {outcome.reason}")
    if as_json:
        emit({"genome": str(chosen.genome), "directory": str(out), **outcome.to_json()})
        return
    console = screen()
    say(
        console,
        f"{value('quality', outcome.quality)} bits per byte on held-out text after "
        f"{outcome.tokens:,} tokens ({duration(outcome.seconds)})",
        "bold",
    )
    say(console, f'Let it write:  star generate {out} "def "')
