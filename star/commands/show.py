"""`star show`: a backbone drawn in the terminal or as a picture, with its costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from star.commands.errors import BadInput, one_line, reported

if TYPE_CHECKING:
    from star.targets import Target

CACHE_LENGTH = 4096


def show(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="GENOME|RUN",
            show_default=False,
            help="A genome; transformer_pp, striped_mamba or lfm2; or a run directory (its best candidate).",
        ),
    ] = None,
    id: Annotated[int | None, typer.Option("--id", min=0, help="Candidate of the run.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Draw into this file, .svg or .png, as well.")
    ] = None,
    depth: Annotated[int | None, typer.Option(min=1, help="LIVs of a baseline.  [dim]24[/dim]")] = None,
    width: Annotated[int | None, typer.Option(help="Model width.  [dim]768, or the run's[/dim]")] = None,
    head_dim: Annotated[
        int | None, typer.Option(help="Width of a head.  [dim]64 where it fits[/dim]")
    ] = None,
    vocab_size: Annotated[int | None, typer.Option(help="Token ids.  [dim]256, or the run's[/dim]")] = None,
    length: Annotated[int, typer.Option(min=1, help="Tokens that FLOPs are counted for.")] = CACHE_LENGTH,
    pools: Annotated[bool, typer.Option("--pools", help="Show all LIV classes instead.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Draw a backbone, and count its parameters, cache and FLOPs.

    [dim]star show 21211-31112-21221-32112 --out backbone.svg · star show runs/first --id 12[/dim]
    """
    if pools:
        if target is not None:
            raise BadInput("show takes a genome or --pools, not both")
        _show_pools(as_json)
        return
    if target is None:
        raise BadInput("show takes a genome, a baseline's name, a run directory, or --pools")
    from star.targets import open_target

    with reported():
        shown = open_target(target, id=id, depth=depth, width=width, head_dim=head_dim, vocab_size=vocab_size)
        if out is not None:
            _draw(shown, out)
        costs = _costs(shown, length)
    if as_json:
        _print_json(shown, costs)
    else:
        _print(shown, costs, length, out)


def _show_pools(as_json: bool) -> None:
    from star.commands.terminal import emit, screen

    if not as_json:
        from star.draw import pools_table

        screen().print(pools_table())
        return
    from star import pools

    emit(
        [
            {
                "id": entry.id,
                "name": entry.name,
                "family": entry.family,
                "operator": str(entry.operator),
                "featurizer": {group.name: str(group) for group in entry.featurizer},
                "feature_strategies": [list(names) for names in entry.feature_strategies],
                "summary": entry.summary,
            }
            for entry in pools.all_classes()
        ]
    )


def _draw(shown: Target, out: Path) -> None:
    from star import draw

    try:
        draw.save(shown.genome, out)
    except ValueError as error:
        raise BadInput(str(error)) from error
    except OSError as error:
        raise BadInput(f"{out} can not be written: {error.strerror or error}") from error


def _costs(shown: Target, length: int) -> dict[str, int]:
    from star import cost

    return {
        "parameters": cost.parameters(shown.genome, shown.config),
        "cache_bytes": cost.cache_bytes(shown.genome, shown.config, length=CACHE_LENGTH),
        "flops": cost.flops(shown.genome, shown.config, length),
    }


def _print_json(shown: Target, costs: dict[str, int]) -> None:
    from star import pools
    from star.commands.terminal import emit
    from star.sharing import resolve

    livs: list[dict[str, Any]] = [
        {
            "class": plan.entry.id,
            "name": plan.entry.name,
            "family": plan.entry.family,
            "featurizer_of": None if plan.featurizer_owner == plan.index else plan.featurizer_owner + 1,
            "features_of": None if plan.source is None else plan.source + 1,
            "shared": list(plan.shared),
        }
        for plan in resolve(shown.genome)
    ]
    families = {pools.get(liv["class"]).family for liv in livs}
    counts = {family: sum(liv["family"] == family for liv in livs) for family in sorted(families)}
    value: dict[str, Any] = {
        "genome": str(shown.genome),
        "canonical": shown.genome.key,
        "depth": shown.genome.depth,
        "config": shown.config.to_json(),
        **costs,
        "families": counts,
        "livs": livs,
    }
    if shown.evaluation is not None:
        value["candidate"] = {"id": shown.evaluation.id, "objectives": dict(shown.evaluation.objectives)}
    emit(value)


def _print(shown: Target, costs: dict[str, int], length: int, out: Path | None) -> None:
    from rich.table import Table

    from star import draw
    from star.commands.terminal import say, screen
    from star.report.numbers import count, title, value

    console = screen()
    config = shown.config
    say(console, f"{shown.name}: {count(shown.genome.depth, 'LIV')}", "bold")
    console.print(draw.terminal(shown.genome))
    console.print()
    table = Table.grid(padding=(0, 2))
    table.add_row("  model", f"width {config.width}, {count(config.heads, 'head')} of {config.head_dim}")
    table.add_row("  parameters", f"{costs['parameters']:,}  (without embeddings, norms and biases)")
    table.add_row("  cache", f"{costs['cache_bytes']:,} B  ({CACHE_LENGTH:,} tokens, bfloat16)")
    table.add_row("  FLOPs", f"{value('flops', costs['flops'])} forward, {count(length, 'token')}")
    if shown.evaluation is not None:
        measured = shown.evaluation.objectives
        if "quality" in measured:
            quality = value("quality", measured["quality"])
            when = (
                "where its training was ended"
                if shown.evaluation.stopped
                else "after the run's proxy training"
            )
            table.add_row("  quality", f"{quality} {title('quality')} {when}")
        if not shown.evaluation.ok:
            table.add_row(f"  {shown.evaluation.status}", one_line(shown.evaluation.reason or ""))
    console.print(table)
    if shown.evaluation is not None:
        say(console, f"  {shown.genome}", "dim")
    if out is not None:
        say(console, f"  drawn into {out}")
