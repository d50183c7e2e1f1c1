"""The CUDA kernels on the CPU: csrc/**/*cuda*.cu compiled for the emulation of csrc/common/cuda/emulator.h.

``python -m tests.emulated_cuda FOLDER`` builds FOLDER/emulated_cuda.so with ninja and the C++ compiler. A
test process that starts with STAR_EMULATED_CUDA naming that file runs these kernels wherever it would run
the CPU's own: see tests/conftest.py.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "csrc").glob("*/*cuda*.cu"))
FLAGS = (
    "-x c++ -std=c++17 -O1 -g1 -fPIC -fvisibility=hidden -Wall -Wno-unknown-pragmas -Wno-attributes "
    "-Wno-psabi -DSTAR_EMULATE_CUDA -DTORCH_TARGET_VERSION=0x020a000000000000"
)


def operators() -> set[str]:
    """The names of the operators that have CUDA kernels, from their registrations."""
    found: set[str] = set()
    for source in SOURCES:
        found.update(re.findall(r'm\.impl\("(\w+)"', source.read_text(encoding="utf-8")))
    return found


def build(folder: Path) -> Path:
    """Compiles what changed and gives the shared object's path."""
    import ninja

    home = Path(torch.__file__).parent
    includes = f"-isystem {home}/include -isystem {home}/include/torch/csrc/api/include"
    lines = [
        f"cxx = {os.environ.get('CXX', 'g++')}",
        f"flags = {FLAGS} {includes} {os.environ.get('CXXFLAGS', '')}",
        "rule compile",
        "  command = $cxx -MMD -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx -shared $in -o $out -L{home}/lib -ltorch_cpu {os.environ.get('LDFLAGS', '')}",
    ]
    objects = []
    for source in SOURCES:
        objects.append(f"{source.parent.name}_{source.stem}.o")
        lines.append(f"build {objects[-1]}: compile {source}")
    lines.append(f"build emulated_cuda.so: link {' '.join(objects)}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    subprocess.run([str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(folder)], check=True, stdout=sys.stderr)
    return folder / "emulated_cuda.so"


if __name__ == "__main__":
    print(build(Path(sys.argv[1]).resolve()))
