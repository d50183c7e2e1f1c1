"""`star bench`: time the operators on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from star.commands.errors import reported

if TYPE_CHECKING:
    from star.bench import Measurement


def bench(
    operators: Annotated[
        list[str] | None,
        typer.Argument(metavar="[OPERATOR]...", help="Like gated_short_conv; all of them by default."),
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="Its sizes, like 4,2048,768,3; --list names them.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; torch's own number by default.")
    ] = None,
    backward: Annotated[bool, typer.Option("--backward", help="Forward and backward pass.")] = False,
    seconds: Annotated[float, typer.Option(min=0.0, help="About as long for each operator.")] = 2.0,
    list_them: Annotated[bool, typer.Option("--list", help="Name the operators and their sizes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Time the operators, backend by backend, beside a copy of the same bytes.

    [dim]star bench gated_short_conv --shape 4,2048,768,3 --threads 2[/dim]
    """
    with reported():
        from star import bench as timing
        from star.commands.terminal import emit, screen

        sizes = None if shape is None else _sizes(shape)
        if sizes is not None and len(operators or ()) != 1:
            raise ValueError("--shape takes one operator with it, since their sizes differ")
        cases = [timing.case(name, sizes) for name in operators or timing.CASES]
        if list_them:
            if as_json:
                emit({case.operator: dict(case.sizes) for case in cases})
                return
            for case in cases:
                numbers = ",".join(str(size) for size in case.sizes.values())
                screen().print(f"{case.operator:24} {' '.join(case.sizes):12} {numbers}")
            return
        if backward and operators is None:
            cases = [case for case in cases if case.gradients]
        console, log = screen(as_json), screen(True)
        results: list[Measurement] = []
        for case in cases:
            with log.status(f"timing {case.operator}"):
                results.append(
                    timing.measure(
                        case, dtype=dtype, device=device, threads=threads, backward=backward, seconds=seconds
                    )
                )
            if not as_json:
                console.print(_table(results[-1]))
    if as_json:
        emit([result.to_json() for result in results])


def _sizes(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"shape is {text!r}, takes sizes with commas, like 4,2048,768") from None


def _table(result: Measurement) -> object:
    from rich import box
    from rich.table import Table

    sizes = ", ".join(f"{name} {size}" for name, size in result.sizes.items())
    passes = "forward + backward" if result.backward else "forward"
    table = Table(
        title=f"{result.operator}  {sizes}  {result.dtype}, {result.device}, "
        f"{result.threads} threads, {passes}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("backend", no_wrap=True, min_width=10)
    for name in ("median", "fastest", "ratio", "GB/s", "of a copy", "samples"):
        table.add_column(name, justify="right", no_wrap=True)
    quickest = min(timing.median for timing in result.timings)
    for timing in (*result.timings, result.copy):
        table.add_row(
            timing.backend,
            _milliseconds(timing.median),
            _milliseconds(timing.fastest),
            f"{timing.median / quickest:.2f}x",
            f"{result.bandwidth(timing) / 1e9:.1f}",
            f"{result.copy_fraction(timing):.0%}",
            str(timing.samples),
            style="bold" if timing.median == quickest else "dim" if timing is result.copy else "",
        )
    return table


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3f} ms"
