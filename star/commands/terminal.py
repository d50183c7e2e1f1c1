"""Where commands write: results to stdout, everything else to stderr where programs read stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from star.commands.errors import one_line

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from star.search.settings import SearchSettings
    from star.search.store import Evaluation

__all__ = ["backbone_text", "candidates_table", "emit", "say", "screen"]

_LONGEST_BACKBONE = 32
_PIPE_COLUMNS = 120


def screen(as_json: bool = False) -> Console:
    """The console for people: stdout, or stderr where stdout is for a program."""
    from rich.console import Console

    file = sys.stderr if as_json else sys.stdout
    # A file or a pipe has no width: tables should not be folded to the 80 columns that rich assumes.
    width = None if file.isatty() else _PIPE_COLUMNS
    return Console(file=file, width=width, highlight=False, emoji=False, markup=False)


def emit(value: Any) -> None:
    """One JSON value on stdout."""
    print(json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False))


def say(console: Console, text: str, style: str = "") -> None:
    """One line, whatever the width."""
    console.print(one_line(text), style=style, soft_wrap=True)


def candidates_table(
    evaluations: Iterable[Evaluation],
    settings: SearchSettings,
    *,
    references: Iterable[tuple[str, Evaluation]] = (),
    rows: int | None = None,
) -> Table:
    """Candidates with their objectives and backbones; the searched objectives first, references last."""
    from rich import box
    from rich.table import Table

    from star.report.numbers import measured_objectives, title, value

    members = list(evaluations)
    others = [(name, evaluation) for name, evaluation in references if evaluation.ok]
    columns = measured_objectives([*members, *(evaluation for _, evaluation in others)], settings.objectives)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("candidate", justify="right", no_wrap=True)
    for name in columns:
        style = "bold" if name in settings.objectives else "dim"
        table.add_column(title(name), justify="right", no_wrap=True, style=style)
    table.add_column("gen", justify="right", no_wrap=True)
    table.add_column("backbone", no_wrap=True)
    shown = members if rows is None else members[:rows]
    for evaluation in shown:
        numbers = [value(name, evaluation.objectives.get(name)) for name in columns]
        generation = "" if evaluation.generation is None else str(evaluation.generation + 1)
        table.add_row(str(evaluation.id), *numbers, generation, backbone_text(evaluation.key))
    if len(shown) < len(members):
        table.add_row("", *[""] * len(columns), "", f"and {len(members) - len(shown)} more")
    if others:
        table.add_section()
    for name, evaluation in others:
        numbers = [value(objective, evaluation.objectives.get(objective)) for objective in columns]
        table.add_row(name, *numbers, "", backbone_text(evaluation.key), style="italic")
    return table


def backbone_text(genome: str) -> Text:
    """A backbone in one line: a letter a LIV, the first of its family's name, on the family's colour."""
    from rich.text import Text

    from star import pools
    from star.draw import family_colour
    from star.genome import Genome, GenomeError

    try:
        genes = Genome.parse(genome).genes
    except GenomeError:
        return Text(one_line(genome)[:_LONGEST_BACKBONE])
    text = Text()
    for gene in genes[:_LONGEST_BACKBONE]:
        entry = pools.find(gene.liv_class)
        if entry is None:
            text.append("?")
        else:
            text.append(entry.family[0].upper(), f"white on {family_colour(entry.family)}")
    return text.append("…") if len(genes) > _LONGEST_BACKBONE else text
