"""The commands of `star`, one file each. They parse, call and print; what they do is done elsewhere.

Nothing heavy is imported before a command runs, so `star --help` answers at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

from star.commands import (
    bench,
    compare,
    eval,
    export,
    fidelity,
    generate,
    profile,
    report,
    resume,
    search,
    show,
    table,
    train,
)
from star.commands.errors import StarGroup

__all__ = ["app"]

app = typer.Typer(
    cls=StarGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"star-kernels {version('star-kernels')}")
        raise typer.Exit


@app.callback()
def star(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Evolve neural architectures on your own text, on your own machine.

    [dim]star search --data my-texts/ · star report runs/… · star generate runs/… "Once"[/dim]
    """


app.command("search")(search.search)
app.command("resume")(resume.resume)
app.command("report")(report.report)
app.command("fidelity")(fidelity.fidelity)
app.command("show")(show.show)
app.command("train")(train.train)
app.command("generate")(generate.generate)
app.command("export")(export.export)
app.command("eval")(eval.evaluate)
app.command("table")(table.table)
app.command("compare")(compare.compare)
app.command("profile")(profile.profile)
app.command("bench")(bench.bench)
