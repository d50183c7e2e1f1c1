"""The option pools as a table: what `star show --pools` prints."""

from __future__ import annotations

from collections.abc import Mapping

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from star import pools
from star.draw.arcs import family_colour


def pools_table() -> RenderableType:
    """All LIV classes: operator genome, feature groups with their featurizer genome, sharing strategies.

    Readable from 80 columns on.
    """
    table = Table(show_lines=True, box=box.ROUNDED)
    table.add_column("class", no_wrap=True)
    table.add_column("operator\ngenome", no_wrap=True)
    table.add_column("featurizer genome\nof each feature group", no_wrap=True)
    table.add_column("feature-sharing\nstrategies", no_wrap=True)
    for entry in pools.all_classes():
        name = Text(f"{entry.id:>2} ").append(entry.name, f"white on {family_colour(entry.family)}")
        table.add_row(
            Group(name, Text(f"   {entry.family}", "dim")),
            str(entry.operator),
            _featurizer(entry),
            _strategies(entry),
        )
    return Group(table, Text(), _legend())


def _featurizer(entry: pools.LivClass) -> RenderableType:
    """One line a group: name, four codes, expansion, repeat and halves where they are not 1."""
    grid = Table.grid(padding=(0, 1))
    for group in entry.featurizer:
        codes, _, _ = str(group).split(" ")
        repeat = f"r{group.repeat}" if group.repeat > 1 else ""
        halves = f"{group.halves}h" if group.halves > 1 else ""
        grid.add_row(group.name, codes, f"x{group.expansion}", f"{repeat} {halves}".strip())
    for name in entry.constants:
        grid.add_row(name, "----")
    return grid


def _strategies(entry: pools.LivClass) -> RenderableType:
    """Every strategy's number with the groups it shares, two a line."""
    named = ["none", *("+".join(names) for names in entry.feature_strategies[1:])]
    texts = [f"{number} {names}" for number, names in enumerate(named, start=1)]
    grid = Table.grid(padding=(0, 2))
    for index in range(0, len(texts), 2):
        grid.add_row(*texts[index : index + 2])
    return grid


def _legend() -> RenderableType:
    """What the digits of the genomes mean."""
    grid = Table.grid(padding=(0, 2))
    rows: list[tuple[str, str]] = [
        ("operator genome", "featurizer class, token mixing, sparsity, nonlinearity, channel mixing"),
        (
            "featurizer genome",
            "token mixing, sparsity, nonlinearity, channel mixing; "
            "x: expansion, width of the group over width of the LIV (of B and C in recurrences: "
            "states a channel); r: repeat, channels that use one feature; "
            "2h: two halves, one for each operator of a differential class; "
            "----: made from weights alone",
        ),
        ("token mixing", _codes(pools.TOKEN_MIXINGS)),
        ("sparsity", _codes(pools.SPARSITIES)),
        ("nonlinearity", _codes(pools.NONLINEARITIES)),
        ("channel mixing", _codes(pools.CHANNEL_MIXINGS)),
        ("featurizer sharing", _codes(pools.FEATURIZER_STRATEGIES)),
    ]
    for name, meaning in rows:
        grid.add_row(Text(name, "bold"), meaning)
    return grid


def _codes(codes: Mapping[int, str]) -> str:
    return ", ".join(f"{code} {meaning}" for code, meaning in codes.items())
