"""`star compare`: search algorithms under one budget, replayed over a table of evaluated genomes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from star.commands.errors import BadInput, reported

if TYPE_CHECKING:
    from rich.table import Table

    from star.comparison.replay import Comparison


def compare(
    table: Annotated[Path, typer.Argument(metavar="TABLE", help="What star table made.")],
    objectives: Annotated[
        str, typer.Option(help="One or more of the table's, with commas.")
    ] = "quality,size",
    algorithms: Annotated[
        str | None, typer.Option(help="nsga2, ga, regularised, random, parameters; all by default.")
    ] = None,
    population: Annotated[int, typer.Option(min=2, help="Candidates of a generation.")] = 16,
    generations: Annotated[int, typer.Option(min=1, help="Generations.")] = 18,
    seeds: Annotated[int, typer.Option(min=1, help="Searches of each algorithm.")] = 10,
    processes: Annotated[int | None, typer.Option(min=1, help="One a core by default.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write the result as Markdown too.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Compare search algorithms without training: a table of genomes, and a surrogate for all others.

    Hypervolumes are in the table's units, with bootstrap intervals over the seeds.

    [dim]star compare benchmarks/data/genomes.parquet --objectives quality,cache[/dim]
    [dim]star compare benchmarks/data/genomes.parquet --out benchmarks/results/compare.md[/dim]
    """
    from star.commands.terminal import emit, say, screen

    console = screen(as_json)
    with reported():
        _require_scikit_learn()
        if out is not None:
            _require_writable(out)
        from star.comparison import replay
        from star.comparison.table import read

        names = [name.strip() for name in objectives.split(",") if name.strip()]
        chosen = None if algorithms is None else [name.strip() for name in algorithms.split(",")]
        with console.status("fitting the surrogate"):
            landscape = replay.Landscape(read(table), names)
        with console.status("replaying the algorithms"):
            result = replay.compare(
                landscape,
                **({} if chosen is None else {"algorithms": chosen}),
                population=population,
                generations=generations,
                seeds=seeds,
                processes=processes,
            )
        if out is not None:
            out.write_text(markdown(result, table, chosen), encoding="utf-8")
    if as_json:
        emit({"table": str(table), **result.to_json()})
        return
    for line in landscape_lines(result):
        say(console, line)
    console.print(_table(result))
    if out is not None:
        say(console, f"Written to {out}")


def _require_scikit_learn() -> None:
    from importlib.util import find_spec

    if find_spec("sklearn") is None:
        raise BadInput("compare needs scikit-learn: pip install 'star-kernels[compare]'")


def _require_writable(out: Path) -> None:
    """What keeps the result from being written should not be found out after the work."""
    if not out.parent.is_dir():
        raise BadInput(f"--out is {out}, and the folder {out.parent} does not exist")
    if out.is_dir():
        raise BadInput(f"--out is {out}, a folder; takes the name of a file")


def landscape_lines(result: Comparison) -> list[str]:
    """What the algorithms were compared on, and how far to believe it."""
    from star.report.numbers import count, duration

    landscape = result.landscape
    left = f" ({count(landscape.left_out, 'row')} of other conditions left out)" if landscape.left_out else ""
    lines = [
        f"{len(landscape.known)} trained genomes of {landscape.depth} LIVs{left}; {result.population} x "
        f"{result.generations} candidates a search, {count(len(result.results), 'algorithm')} x "
        f"{count(result.seeds, 'seed')}, {duration(result.seconds)}"
    ]
    for name, value in landscape.fidelity.items():
        lines.append(
            f"Surrogate of {name}: Kendall's tau {value.tau:.2f}, Spearman's rho {value.rho:.2f} in "
            f"cross-validation (parameter count alone: tau {landscape.parameter_count[name].tau:.2f})"
        )
    for name, seeds in landscape.seeds.items():
        lines.append(
            f"Two trainings of one genome that differ in their seed: tau {seeds.tau:.2f} for {name} over "
            f"{count(seeds.genomes, 'genome')}"
        )
    return lines


def _cells(result: Comparison) -> list[tuple[str, ...]]:
    def cell(value: object) -> str:
        return f"{value.mean:.4f} [{value.low:.4f}, {value.high:.4f}]"  # type: ignore[attr-defined]

    return [
        (
            item.algorithm,
            cell(item.final),
            cell(item.half),
            "–" if item.wins is None or item.algorithm == "random" else f"{100 * item.wins:.0f} %",
        )
        for item in result.results
    ]


_HEADS = ("algorithm", "hypervolume [95 %]", "at half the budget", "above random search")


def _table(result: Comparison) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in _HEADS:
        table.add_column(head, justify="left" if head == "algorithm" else "right", no_wrap=True)
    for cells in _cells(result):
        table.add_row(*cells)
    return table


def markdown(result: Comparison, table: Path, algorithms: list[str] | None = None) -> str:
    """The result as a page, under the command that makes it again.

    Args:
        algorithms: that were asked for; None for all.
    """
    landscape = result.landscape
    chosen = "" if algorithms is None else f"--algorithms {','.join(algorithms)} "
    lines = [
        f"# Search algorithms on {', '.join(landscape.objectives)}",
        "",
        f"`star compare {table} --objectives {','.join(landscape.objectives)} {chosen}"
        f"--population {result.population} --generations {result.generations} --seeds {result.seeds}`",
        "",
        f"- {table}: {landscape.rows} rows",
        *(f"- {line}" for line in landscape_lines(result)),
        "",
        f"| {' | '.join(_HEADS)} |",
        f"|{'|'.join(['---', *['---:'] * (len(_HEADS) - 1)])}|",
        *(f"| {' | '.join(cells)} |" for cells in _cells(result)),
        "",
        "In each objective 0 is the table's best value and 1 its worst, and the reference point is 1.1.",
        "Genomes that the table does not hold have the surrogate's values, never better than its best.",
    ]
    return "\n".join(lines) + "\n"
