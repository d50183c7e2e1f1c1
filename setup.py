"""Builds the compiled CPU operators, star_kernels._C, with ninja; everything else is in pyproject.toml.

One shared object serves every Python >= 3.10 (limited API) and every torch >= 2.10 (LibTorch's stable ABI).
Without a C++ compiler or torch's headers the package is built all the same, without compiled operators.
The environment: CXX and CXXFLAGS, MAX_JOBS (compilers at a time), STAR_KERNELS_CPP=0 (no compiled operators).
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
TORCH_TARGET_VERSION = "0x020a000000000000"  # 2.10, the first with everything that csrc/ uses

COMMON_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Wno-psabi",
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
]
# What lets loops vectorise without giving up NaN, infinities or the order of sums.
KERNEL_FLAGS = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fopenmp-simd"]
X86_LEVELS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c", "-mbmi2"],
    "avx512": [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
        "-mfma",
        "-mf16c",
        "-mbmi2",
        "-mprefer-vector-width=512",
    ],
}


class Unbuildable(Exception):
    """Why the compiled operators cannot be built here, in one sentence."""


def torch_folders() -> tuple[list[Path], Path]:
    """torch's header folders and its library folder."""
    try:
        import torch
    except ImportError as error:
        raise Unbuildable(f"torch is not there to build against ({error})") from error
    home = Path(torch.__file__).parent
    return [home / "include", home / "include" / "torch" / "csrc" / "api" / "include"], home / "lib"


def compiler() -> str:
    """The C++ compiler: $CXX, or the first of g++, c++ and clang++."""
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["g++", "c++", "clang++"]:
        found = shutil.which(name.split()[0])
        if found:
            return name
    raise Unbuildable(f"no C++ compiler was found (looked for {wanted or 'g++, c++ and clang++'})")


def levels() -> dict[str, list[str]]:
    """The instruction-set levels that this processor family has, with their compiler flags."""
    return X86_LEVELS if platform.machine().lower() in ("x86_64", "amd64") else {"portable": []}


def ninja_program() -> str:
    """The ninja executable: the Python package's, or the system's."""
    try:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        found = shutil.which("ninja")
        if found is None:
            raise Unbuildable("ninja is not installed (pip install ninja)") from None
        return found


def escape(path: Path | str) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def write_ninja(folder: Path, target: Path) -> None:
    """Writes build.ninja: one object a torch-side source, one a *kernels.cpp and level, one shared object."""
    includes, libraries = torch_folders()
    include_flags = " ".join(f'-isystem "{path}"' for path in [*includes, sysconfig.get_path("include")])
    level_flags = levels()
    has_levels = " -DSTAR_HAS_X86_LEVELS" if len(level_flags) > 1 else ""
    user_flags = os.environ.get("CXXFLAGS", "")
    lines = [
        f"cxx = {compiler()}",
        f"flags = {' '.join(COMMON_FLAGS)}{has_levels} {user_flags}",
        "rule compile",
        "  command = $cxx -MMD -MF $out.d $flags $extra -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $in $level",
        "rule link",
        "  command = $cxx -shared $in -o $out $link",
        "  description = link $out",
    ]
    objects = []

    def compile_one(source: Path, name: str, extra: str, level: str = "") -> None:
        output = folder / f"{name}.o"
        objects.append(escape(output))
        lines.append(f"build {escape(output)}: compile {escape(source)}")
        lines.append(f"  extra = {extra}")
        lines.append(f"  level = {level}")

    csrc = ROOT / "csrc"
    torch_side = [csrc / "ops.cpp", csrc / "common" / "level.cpp", *sorted(csrc.glob("*/*cpu.cpp"))]
    for source in torch_side:
        compile_one(source, f"{source.parent.name}_{source.stem}", include_flags)
    for source in sorted(csrc.glob("*/*kernels.cpp")):
        for level, flags in level_flags.items():
            extra = " ".join([*KERNEL_FLAGS, *flags, f"-DSTAR_LEVEL={level}"])
            compile_one(source, f"{source.parent.name}_{source.stem}_{level}", extra, f"({level})")
    lines.append(f"build {escape(target)}: link {' '.join(objects)}")
    # The default locale of symbols stays hidden; torch's library is found where `import torch` loaded it.
    undefined = "-undefined dynamic_lookup" if sys.platform == "darwin" else ""
    lines.append(f'  link = -L"{libraries}" -ltorch_cpu {undefined} {os.environ.get("LDFLAGS", "")}')
    lines.append(f"default {escape(target)}")
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join(lines) + "\n"
    ninja_file = folder / "build.ninja"
    if not ninja_file.exists() or ninja_file.read_text() != text:
        ninja_file.write_text(text)


class BuildWithNinja(build_ext):
    """Builds the one extension with ninja, so that only what changed is compiled again."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp).resolve() / "ninja"
        try:
            if os.environ.get("STAR_KERNELS_CPP") == "0":
                raise Unbuildable("STAR_KERNELS_CPP=0 asks for that")
            write_ninja(folder, target)
            jobs = os.environ.get("MAX_JOBS")
            command = [ninja_program(), "-C", str(folder), *(["-j", jobs] if jobs else [])]
            target.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run(command, check=True)
        except Unbuildable as reason:
            print(
                f"star-kernels: building without compiled CPU operators: {reason}; "
                "everything works, on slower plain-PyTorch code.",
                file=sys.stderr,
            )
            ext.optional = True


setup(
    ext_modules=[Extension("star_kernels._C", sources=[], py_limited_api=True, optional=False)],
    cmdclass={"build_ext": BuildWithNinja},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
