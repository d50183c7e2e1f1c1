"""`star generate`: text from a found model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from star.commands.errors import BadInput, reported


def generate(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN|DIR", help="A run directory, or what star train or star export has made."
        ),
    ],
    prompt: Annotated[str, typer.Argument(help="Text to go on with; empty for a new document.")] = "",
    id: Annotated[int | None, typer.Option("--id", min=0, help="Candidate; the best by default.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to write.")] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Draw from the k likeliest; 0 from all.")] = 50,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Let a found model write. Where its weights were not kept, it is trained again first.

    [dim]star generate runs/first "def main(" --tokens 300 --seed 7[/dim]
    """
    if not run.is_dir():
        raise BadInput(f"run directory {run} does not exist")
    with reported():
        from star.commands.progress import training_progress
        from star.commands.terminal import emit, say, screen
        from star.generation import open_writer

        log = screen(True)
        writer = open_writer(run, id, lambda title: training_progress(log, title))
        say(log, writer.name, "dim")
        text = writer.write(prompt, tokens, temperature=temperature, top_k=top_k or None, seed=seed)
    if as_json:
        emit({"model": writer.name, "prompt": prompt, "text": text, "tokens": tokens, "seed": seed})
    else:
        print(_printable(prompt + text))


def _printable(text: str) -> str:
    """Without what would move a terminal's cursor or change its colours."""
    return "".join(
        char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in text
    )
