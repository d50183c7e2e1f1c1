"""`star export`: a found model as a directory that others can load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from star.commands.errors import BadInput, reported

if TYPE_CHECKING:
    from star.trained import Trained

_MODEL = "A genome instead of a run"


def export(
    to: Annotated[Path, typer.Option("--to", help="Directory to make.", show_default=False)],
    run: Annotated[
        Path | None,
        typer.Argument(
            metavar="[RUN|DIR]", help="A run directory, or what star train has made.", show_default=False
        ),
    ] = None,
    id: Annotated[int | None, typer.Option("--id", min=0, help="Candidate; the best by default.")] = None,
    native: Annotated[
        bool,
        typer.Option("--native", help="As LlamaForCausalLM or Lfm2ForCausalLM, if it is one in disguise."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an export that is there.")] = False,
    genome: Annotated[
        str | None,
        typer.Option(help="A genome or a baseline's name: its initial weights.", rich_help_panel=_MODEL),
    ] = None,
    depth: Annotated[
        int | None, typer.Option(min=1, help="LIVs of a baseline.", rich_help_panel=_MODEL)
    ] = None,
    width: Annotated[int | None, typer.Option(help="Model width; 768.", rich_help_panel=_MODEL)] = None,
    head_dim: Annotated[int | None, typer.Option(help="Width of a head.", rich_help_panel=_MODEL)] = None,
    vocab_size: Annotated[int | None, typer.Option(help="Token ids; 256.", rich_help_panel=_MODEL)] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of the weights; 0.", rich_help_panel=_MODEL)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write a model as config.json, safetensors, tokenizer and model card, for transformers.

    [dim]star export runs/first --id 12 --to exports/mine[/dim]
    """
    sizes = {"--depth": depth, "--width": width, "--head-dim": head_dim, "--vocab-size": vocab_size}
    given = [name for name, value in {**sizes, "--seed": seed}.items() if value is not None]
    if (run is None) == (genome is None):
        raise BadInput("export takes a run directory or --genome, one of them")
    if run is not None:
        if given:
            raise BadInput(f"{given[0]} is for --genome: the sizes of {run} are given")
        if not run.is_dir():
            raise BadInput(f"run directory {run} does not exist")
    elif id is not None:
        raise BadInput("--id is for a run directory")
    with reported():
        from star.commands.terminal import emit, say, screen
        from star.export.write import export as write

        if run is not None:
            trained = _of_directory(run, id)
        else:
            assert genome is not None
            trained = _of_genome(genome, depth, width, head_dim, vocab_size, seed or 0)
        architecture = write(trained, to, native=native, replace=force)
    if as_json:
        emit(
            {
                "model": trained.name,
                "directory": str(to),
                "architecture": architecture,
                "genome": str(trained.model.genome),
                "parameters": sum(parameter.numel() for parameter in trained.model.parameters()),
                "tokenizer": trained.tokenizer is not None,
            }
        )
        return
    say(screen(), f"{trained.name} is in {to}, for {architecture}", "bold")
    if architecture == "StarForCausalLM" and trained.tokenizer is not None:
        say(screen(), f'Let it write:  star generate {to} "def "')


def _of_directory(run: Path, id: int | None) -> Trained:
    from star.commands.progress import training_progress
    from star.commands.terminal import screen
    from star.trained import open_trained

    log = screen(True)
    return open_trained(run, id, lambda title: training_progress(log, title))


def _of_genome(
    text: str,
    depth: int | None,
    width: int | None,
    head_dim: int | None,
    vocab_size: int | None,
    seed: int,
) -> Trained:
    from star.targets import BASELINES, is_run, open_target
    from star.trained import untrained

    if is_run(text):
        raise BadInput(f"--genome is {text!r}, takes a genome or one of {', '.join(BASELINES)}")
    target = open_target(text, depth=depth, width=width, head_dim=head_dim, vocab_size=vocab_size)
    return untrained(target.genome, target.config, seed)
