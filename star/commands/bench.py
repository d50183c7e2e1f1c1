"""`star bench`: time the operators on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from star.commands.errors import reported

if TYPE_CHECKING:
    from star.bench import Case, Measurement, Timing


def bench(
    operators: Annotated[
        list[str] | None,
        typer.Argument(metavar="[OPERATOR]...", help="Like gated_short_conv; all but steps by default."),
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
    compiled: Annotated[
        bool, typer.Option("--compile", help="Also the reference under torch.compile (may take minutes).")
    ] = False,
    peers: Annotated[
        bool, typer.Option("--peers/--no-peers", help="Also other packages; some take minutes.")
    ] = True,
    seconds: Annotated[float, typer.Option(min=0.0, help="About as long for each operator.")] = 2.0,
    tune: Annotated[
        Path | None,
        typer.Option(metavar="TABLE", help="Instead, tune the Triton kernels and write this table."),
    ] = None,
    list_them: Annotated[bool, typer.Option("--list", help="Name the operators and their sizes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Time the operators: each backend, PyTorch compositions and installed peers.

    Beside them a copy of the same bytes and a matrix product, which bound what can be reached.

    [dim]star bench gated_short_conv --shape 4,2048,768,3 --threads 2[/dim]
    """
    with reported():
        from star import bench as timing
        from star.bench.gpu_cases import gpu_cases
        from star.commands.terminal import emit, say, screen

        sizes = None if shape is None else _sizes(shape)
        if sizes is not None and len(operators or ()) != 1:
            raise ValueError("--shape takes one operator with it, since their sizes differ")
        if list_them:
            names = operators or [*timing.CASES, *timing.STEPS]
            _list([timing.case(name, sizes) for name in names], as_json)
            return
        cases = [timing.case(name, sizes) for name in operators or timing.CASES]
        if tune is not None:
            if sizes is None and device.startswith("cuda"):
                cases = list(gpu_cases(operators))
            _tune(cases, operators is None, dtype, device, tune, as_json)
            return
        if backward and operators is None:
            cases = [case for case in cases if case.gradients]
        console, log = screen(as_json), screen(True)
        results: list[Measurement] = []
        for case in cases:
            with log.status(f"timing {case.operator}"):
                results.append(
                    timing.measure(
                        case,
                        dtype=dtype,
                        device=device,
                        threads=threads,
                        passes="both" if backward else "forward",
                        seconds=seconds,
                        compiled=compiled,
                        peers=("",) if peers else (),
                    )
                )
            if not as_json:
                console.print(_table(results[-1]))
                if results[-1].compile_seconds is not None:
                    say(console, f"torch.compile took {results[-1].compile_seconds:.1f} s", "dim")
                for name, reason in results[-1].absent.items():
                    say(console, f"not timed: {name} ({reason})", "dim")
    if as_json:
        emit([result.to_json() for result in results])


def _tune(cases: list[Case], every: bool, dtype: str, device: str, table: Path, as_json: bool) -> None:
    """Tunes the kernels of the operators named; of all that have Triton kernels where none is named."""
    from dataclasses import asdict

    from star import bench as timing
    from star.bench.tune import faster_backends, tune, write_table
    from star.commands.terminal import emit, say, screen
    from star_kernels import dispatch

    if dtype not in timing.DTYPES:
        raise ValueError(f"dtype is {dtype!r}, takes one of {', '.join(timing.DTYPES)}")
    place = timing.device_named(device)
    if every:
        cases = [case for case in cases if dispatch.form(case.operator, "triton") is not None]
        if not cases:
            raise ValueError(f"device is {device!r}; the Triton kernels to tune need a GPU")
    console, log = screen(as_json), screen(True)
    with log.status("tuning") as status:
        tuned = tune(
            cases,
            dtype=timing.DTYPES[dtype],
            device=place,
            tell=lambda text: status.update(f"tuning {text}"),
        )
        write_table(tuned, table, place)
        status.update("comparing backends")
        faster = faster_backends(cases, table, dtype=dtype, device=place)
        write_table([], table, place, faster)
    if as_json:
        emit([asdict(line) for line in tuned])
        return
    for line in tuned:
        blocks = ", ".join(f"{name} {value}" for name, value in line.configuration.items())
        say(
            console,
            f"{line.kernel:36} {line.shape:24} {1e6 * line.seconds:9.1f} µs {line.gain:5.2f}x  {blocks}",
        )
    for operator, backend in faster.items():
        say(console, f"{operator}: {backend} is the faster backend")
    say(console, f"{len(tuned)} kernels in {table}; STAR_KERNELS_TABLE={table} makes star_kernels use it")


def _sizes(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"shape is {text!r}, takes sizes with commas, like 4,2048,768") from None


def _list(cases: list[Case], as_json: bool) -> None:
    from star.commands.terminal import emit, screen

    if as_json:
        emit({case.operator: dict(case.sizes) for case in cases})
        return
    for case in cases:
        numbers = ",".join(str(size) for size in case.sizes.values())
        screen().print(f"{case.operator:28} {' '.join(case.sizes):12} {numbers}")


def _table(result: Measurement) -> object:
    from rich import box
    from rich.table import Table

    sizes = ", ".join(f"{name} {size}" for name, size in result.sizes.items())
    passes = "forward + backward" if result.passes == "both" else result.passes
    threads = f"{result.threads} thread{'s' if result.threads > 1 else ''}"
    table = Table(
        title=f"{result.operator}  {sizes}  {result.dtype}, {result.device}, {threads}, {passes}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("", min_width=14)
    for name in ("median", "ratio", "GB/s", "of a copy", "GFLOP/s", "of a product"):
        table.add_column(name, justify="right", no_wrap=True, min_width=max(8, len(name)))
    quickest = min(timing.median for timing in (*result.backends, *result.peers))
    for group in (result.backends, result.peers):
        for timing in group:
            style = "bold" if timing.median == quickest else ""
            table.add_row(*_numbers(result, timing, quickest), style=style)
        table.add_section()
    copied = f"{result.bytes / result.copy.median / 1e9:.1f}"
    multiplied = f"{result.product_operations / result.product.median / 1e9:.1f}"
    table.add_row("copy", _time(result.copy), "", copied, style="dim")
    table.add_row("matrix product", _time(result.product), "", "", "", multiplied, style="dim")
    return table


def _numbers(result: Measurement, timing: Timing, quickest: float) -> tuple[str, ...]:
    return (
        timing.name,
        _time(timing),
        f"{timing.median / quickest:.2f}x",
        f"{result.bandwidth(timing) / 1e9:.3g}",
        f"{result.copy_fraction(timing):.0%}",
        f"{result.rate(timing) / 1e9:.3g}",
        f"{result.product_fraction(timing):.1%}",
    )


def _time(timing: Timing) -> str:
    seconds = timing.median
    if seconds < 1e-3:
        return f"{1e6 * seconds:.4g} µs"
    return f"{1e3 * seconds:.4g} ms" if seconds < 1 else f"{seconds:.4g} s"
