"""What each CUDA kernel takes of a GPU, from the compiler's own account: `make compile-cuda`, without a GPU.

setup.py keeps what `ptxas -v` says beside each object that it compiles. This reads it and writes
benchmarks/results/cuda_compile.md. A kernel that spills registers to local memory makes the exit code 1.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "cuda_compile.md"
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100", "sm_120")


@dataclass(frozen=True)
class Usage:
    """One kernel (an instance of a template) on one architecture; all numbers but registers in bytes."""

    source: str
    kernel: str
    architecture: str
    registers: int
    spilled: int
    stack: int
    shared: int


_COMPILING = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:.*?, (\d+) bytes smem)?")


def parse(source: str, log: str) -> Iterator[Usage]:
    """The kernels that a log of `ptxas -v` names, in its order.

    Raises:
        ValueError: a kernel's account is not complete, as after a change of ptxas' words.
    """
    for part in log.split("Compiling entry function")[1:]:
        part = "Compiling entry function" + part
        compiling, frame, used = _COMPILING.search(part), _FRAME.search(part), _USED.search(part)
        if compiling is None or frame is None or used is None:
            raise ValueError(f"{source}: what ptxas says is not understood: {part.splitlines()[0]}")
        yield Usage(
            source=source,
            kernel=compiling[1],
            architecture=compiling[2],
            registers=int(used[1]),
            spilled=int(frame[2]) + int(frame[3]),
            stack=int(frame[1]),
            shared=int(used[2] or 0),
        )


def build_folder() -> Path:
    """Where the last build of _C_cuda in this tree keeps its objects.

    Raises:
        FileNotFoundError: there is none.
    """
    found = sorted(ROOT.glob("build/temp*/ninja_cuda/build.ninja"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(
            "there are no compiled CUDA kernels here: `make build` on a machine with nvcc"
        )
    return found[-1].parent


def usages(folder: Path) -> list[Usage]:
    """All kernels of the sources that the folder's build.ninja compiles."""
    objects = re.findall(r"build (\S+\.o): compile_cuda (\S+)", (folder / "build.ninja").read_text())
    found: list[Usage] = []
    for output, source in objects:
        name = str(Path(source.replace("$ ", " ")).relative_to(ROOT / "csrc"))
        found += parse(name, Path(output.replace("$ ", " ") + ".log").read_text())
    return found


def plain_names(mangled: Iterable[str]) -> dict[str, str]:
    """By mangled name the kernel's name as its source has it, without namespaces, template and arguments."""
    names = sorted(set(mangled))
    program = shutil.which("c++filt")
    if program is None:
        return {name: name for name in names}
    listed = subprocess.run([program], input="\n".join(names), capture_output=True, text=True, check=True)
    return {name: plain_name(full) for name, full in zip(names, listed.stdout.splitlines(), strict=True)}


def plain_name(demangled: str) -> str:
    """`void star::(anonymous namespace)::step<float, 4>(star::Call)` -> `step`."""
    text = demangled.replace("(anonymous namespace)", "_")
    text = re.split(r"[<(]", text, maxsplit=1)[0]
    return text.split()[-1].split("::")[-1]


def grouped(found: Sequence[Usage]) -> Mapping[tuple[str, str], Sequence[Usage]]:
    """The usages by source and plain name."""
    names = plain_names(usage.kernel for usage in found)
    groups: dict[tuple[str, str], list[Usage]] = {}
    for usage in sorted(found, key=lambda usage: (usage.source, names[usage.kernel])):
        groups.setdefault((usage.source, names[usage.kernel]), []).append(usage)
    return groups


def document(found: Sequence[Usage], compiler: str) -> str:
    """The whole file."""
    spilling = sorted({usage.kernel for usage in found if usage.spilled})
    kernels = grouped(found)
    lines = [
        "# CUDA kernels, compiled",
        "",
        f"Remade by `make compile-cuda`, without a GPU: {compiler}, {len(found)} compiled kernels "
        f"for {', '.join(ARCHITECTURES)}.",
        "",
        "Cells: registers a thread / bytes of spilled registers a thread (stores and loads) / bytes of local "
        "memory a thread / KiB of static shared memory a block, the most over all variants of the kernel "
        "(dtypes, widths, optional arguments).",
        "",
        f"Kernels that spill: {len(spilling)}.",
        "",
        f"| source | kernel | variants | {' | '.join(ARCHITECTURES)} |",
        f"|{' --- |' * (3 + len(ARCHITECTURES))}",
    ]
    for (source, name), group in kernels.items():
        variants = len({usage.kernel for usage in group})
        cells = " | ".join(
            cell([usage for usage in group if usage.architecture == arch]) for arch in ARCHITECTURES
        )
        lines.append(f"| {source} | {name} | {variants} | {cells} |")
    return "\n".join(lines) + "\n"


def cell(group: Sequence[Usage]) -> str:
    """The most of each resource over the variants, – where the kernel is not compiled."""
    if not group:
        return "–"
    registers, spilled, stack, shared = (
        max(getattr(usage, name) for usage in group) for name in ("registers", "spilled", "stack", "shared")
    )
    return f"{registers} / {spilled} / {stack} / {shared / 1024:.3g}"


def compiler_name(folder: Path) -> str:
    """nvcc's release, of the nvcc that the folder's build.ninja names."""
    named = re.search(r"^nvcc = (\S+)", (folder / "build.ninja").read_text(), re.MULTILINE)
    if named is None:
        raise ValueError(f"{folder}/build.ninja names no nvcc")
    answer = subprocess.run([named[1], "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release [\d.]+, V([\d.]+)", answer)
    return f"nvcc {release[1]}" if release else "nvcc"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda_compile", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULT, help="the Markdown file to write")
    options = parser.parse_args(arguments)
    try:
        folder = build_folder()
        found = usages(folder)
    except (FileNotFoundError, ValueError) as error:
        print(f"cuda_compile: {error}", file=sys.stderr)
        return 2
    options.out.write_text(document(found, compiler_name(folder)), encoding="utf-8")
    spilling = [usage for usage in found if usage.spilled]
    names = plain_names(usage.kernel for usage in spilling)
    for usage in spilling:
        print(f"{usage.source}: {names[usage.kernel]} spills {usage.spilled} bytes on {usage.architecture}")
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
