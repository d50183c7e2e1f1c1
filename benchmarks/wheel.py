"""The wheel outside this tree: `make test-wheel`, or by hand under other Pythons and other torches.

Each ENVIRONMENT is PYTHON or PYTHON=REQUIREMENT: an interpreter, and the torch to install there (without one,
that of constraints.txt). It gets a virtual environment with nothing but the wheel, what it requires, and the
test tools; the tests are copied to an empty folder and run there, so that nothing of this tree is imported:

    make wheel
    python -m benchmarks.wheel python3.10=torch==2.10.0 python3.13=torch==2.15.0 --write

The torches of PyPI are CUDA builds of several GB. With one of them `_C_cuda` must load, too, without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "wheel.md"
TESTS = (
    "test_symbols.py",
    "test_driver.py",
    "test_dispatch.py",
    "test_steps_attention.py",
    "test_steps_convolution.py",
    "test_steps_recurrence.py",
    "test_operators.py",
    "layers/test_layers.py",
)
# What needs a C++ compiler at run time, Triton or the source tree is tested in the source tree.
SELECTION = "not triton and not compile and not opcheck"

PROBE = """
import importlib, json, sys
import torch, star_kernels, star_kernels._C
from star_kernels import dispatch
found = {
    "python": sys.version.split()[0],
    "torch": torch.__version__,
    "cuda": torch.version.cuda,
    "package": star_kernels.__file__,
}
dispatch.load_cuda()
found["sentence"] = dispatch._problems.get("cuda", "")
try:
    module = importlib.import_module("star_kernels._C_cuda")
except ImportError as error:
    found["cuda_error"] = str(error).splitlines()[0]
else:
    found["cuda_architectures"] = module.architectures
    registered = torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")
    found["cuda_operators"] = sum(name.startswith("star_kernels::") for name in registered)
print(json.dumps(found))
"""


class Failed(Exception):
    """A step that did not do what the wheel promises, with its output."""


@dataclass(frozen=True)
class Outcome:
    """What one environment showed."""

    found: dict[str, Any]
    passed: int
    skipped: int
    seconds: float


def run(*command: str | Path, **options: Any) -> str:
    """The standard output of a command.

    Raises:
        Failed: it ended with another exit code than 0.
    """
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    if ran.returncode != 0:
        text = (ran.stdout + ran.stderr).strip()
        raise Failed(f"{' '.join(map(str, command))[:200]} ended with {ran.returncode}:\n{text[-4000:]}")
    return ran.stdout


def newest_wheel() -> Path:
    """The wheel that `make wheel` left in dist/.

    Raises:
        Failed: there is none.
    """
    found = sorted((ROOT / "dist").glob("*.whl"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise Failed("dist/ has no wheel: make wheel")
    return found[-1]


def install(wheel: Path, python: str, torch: str | None, folder: Path, reuse: bool) -> Path:
    """The interpreter of a virtual environment in ``folder`` that holds the wheel and the test tools."""
    interpreter = folder / "venv" / "bin" / "python"
    if not (reuse and interpreter.exists()):
        run(python, "-m", "venv", "--clear", folder / "venv")
    # A torch of the caller's choice may exclude other pins, and not every pin has a wheel for every Python.
    pins = [] if torch else ["-c", str(ROOT / "constraints.txt")]
    pip: list[str | Path] = [
        interpreter,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        *pins,
    ]
    run(*pip, torch or "torch", "numpy")
    run(*pip, f"star-kernels[search] @ {wheel.resolve().as_uri()}", "pytest", "hypothesis")
    run(*pip, "--force-reinstall", "--no-deps", wheel)  # also where the version is there from an earlier run
    return interpreter


def check(wheel: Path, python: str, torch: str | None, folder: Path, reuse: bool) -> Outcome:
    """Installs and tests the wheel in one environment.

    Raises:
        Failed: it could not be installed, imports from elsewhere, or a test failed.
    """
    started = time.monotonic()
    interpreter = install(wheel, python, torch, folder, reuse)
    empty = folder / "tests-alone"
    shutil.rmtree(empty, ignore_errors=True)
    shutil.copytree(ROOT / "tests", empty / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", empty)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "STAR_"))}
    environment |= {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    found = json.loads(run(interpreter, "-c", PROBE, cwd=empty, env=environment))
    if not found["package"].startswith(str(folder.resolve())):
        raise Failed(f"star_kernels is imported from {found['package']}")
    with zipfile.ZipFile(wheel) as archive:
        has_cuda = any(Path(name).name.startswith("_C_cuda") for name in archive.namelist())
    if has_cuda and found["cuda"] and "cuda_error" in found:
        raise Failed(f"_C_cuda does not load beside torch {found['torch']}: {found['cuda_error']}")
    run(interpreter.parent / "star", "--help", cwd=empty, env=environment)
    paths = [f"tests/star_kernels/{name}" for name in TESTS]
    command: list[str | Path] = [
        interpreter,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        SELECTION,
        *paths,
    ]
    summary = run(*command, cwd=empty, env=environment).splitlines()[-1]
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|skipped)", summary)}
    if counts.get("passed", 0) < 500:
        raise Failed(f"hardly a test was run: {summary}")
    return Outcome(found, counts["passed"], counts.get("skipped", 0), time.monotonic() - started)


def audits(wheel: Path) -> list[str]:
    """Facts about the file: sizes, and what abi3audit and auditwheel say."""
    with zipfile.ZipFile(wheel) as archive:
        objects = [entry for entry in archive.infolist() if entry.filename.endswith(".so")]
    sizes = ", ".join(f"`{Path(entry.filename).name}` {entry.file_size / 1e6:.1f} MB" for entry in objects)
    lines = [f"`{wheel.name}`, {wheel.stat().st_size / 1e6:.1f} MB: {sizes}."]
    audited = subprocess.run(
        [sys.executable, "-m", "abi3audit", "--strict", "--summary", wheel], capture_output=True, text=True
    )
    said = " ".join((audited.stdout + audited.stderr).split())
    counted = re.search(r"\d+ extensions scanned.*", said)
    lines.append(f"abi3audit (exit code {audited.returncode}): {counted[0] if counted else said}.")
    shown = " ".join(run(sys.executable, "-m", "auditwheel", "show", wheel).split())
    tag = re.search(r'constrains the platform tag to "(\S+)"', shown)
    lines.append(f"auditwheel: {tag[1] if tag else shown}.")
    return lines


def document(wheel: Path, outcomes: Sequence[Outcome]) -> str:
    """The whole file."""
    lines = ["# The wheel", ""]
    lines.append("Remade by `make wheel`, then `python -m benchmarks.wheel PYTHON=TORCH ... --write`.")
    for fact in audits(wheel):
        lines += ["", fact]
    lines += [
        "",
        "The same file in virtual environments of its own, the tests in an empty folder (symbols, operators, "
        "decode steps, layers, `star --help`), on a machine without a GPU. `_C_cuda` is imported by name: "
        "operators are those that it registers for CUDA with that torch.",
        "",
        '| Python | torch | its CUDA | passed | skipped | `_C_cuda` | why `backend="cuda"` is missing |',
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for outcome in outcomes:
        found = outcome.found
        loaded = f"loads, {found['cuda_operators']} operators" if "cuda_operators" in found else "not loaded"
        cells = [
            found["python"],
            found["torch"],
            found["cuda"] or "–",
            outcome.passed,
            outcome.skipped,
            loaded,
        ]
        lines.append(f"| {' | '.join(map(str, cells))} | {found['sentence']} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.wheel", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("environments", nargs="+", metavar="ENVIRONMENT", help="PYTHON or PYTHON=REQUIREMENT")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "build" / "test-wheel", help="where they are made"
    )
    parser.add_argument("--wheel", type=Path, help="the file; the newest in dist/ if not given")
    parser.add_argument("--reuse", action="store_true", help="keep an environment that is there already")
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.relative_to(ROOT)}")
    options = parser.parse_args(arguments)
    outcomes = []
    try:
        wheel = options.wheel or newest_wheel()
        for environment in options.environments:
            python, _, torch = environment.partition("=")
            folder = options.folder.resolve() / re.sub(r"[^\w.]+", "-", f"{Path(python).name}-{torch}").strip(
                "-"
            )
            outcomes.append(outcome := check(wheel, python, torch or None, folder, options.reuse))
            print(
                f"{wheel.name}: Python {outcome.found['python']}, torch {outcome.found['torch']}: "
                f"{outcome.passed} passed, {outcome.skipped} skipped in {outcome.seconds:.0f} s",
                flush=True,
            )
    except Failed as reason:
        print(f"wheel: {reason}", file=sys.stderr)
        return 1
    if options.write:
        RESULT.write_text(document(wheel, outcomes), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
