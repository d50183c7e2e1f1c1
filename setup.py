"""Builds the compiled operators with ninja: star_kernels._C (CPU) and, where nvcc is, star_kernels._C_cuda.

Either shared object serves every Python >= 3.10 (limited API) and every torch >= 2.10 (LibTorch's stable
ABI); a torch without CUDA is enough to build both. Without a C++ compiler or torch's headers the package is
built all the same, without compiled operators; without nvcc, without those of NVIDIA GPUs.

The environment:
    CXX, CXXFLAGS, LDFLAGS     compiler and flags of C++; CUDACXX or CUDA_HOME: where nvcc is, if not on PATH
    MAX_JOBS                   compilers at a time
    STAR_KERNELS_CPP=0         no compiled operators
    STAR_KERNELS_CUDA=0|1      no CUDA operators; 1: an error where they can't be built
    STAR_KERNELS_CUDA_ARCHS    what to compile them for, as "80;90a;100+PTX;120"
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, field
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


# Machine code for every kind of NVIDIA GPU since the A100: code for X.0 runs on every X.y, code for 90a on
# 9.0 alone, and there is no other 9.x. The PTX, which drivers compile on later GPUs, is that of 100 and not
# of 120, so that it serves 11.0 as well.
CUDA_ARCHS = "80;90a;100+PTX;120"
OLDEST_NVCC = (12, 0)  # the first whose C++17 compiles torch's headers
CUDA_FLAGS = [
    "-std=c++17",
    "-O3",
    "-DUSE_CUDA",
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
    "--expt-relaxed-constexpr",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "-Xptxas=-v",
]

# By library, the functions of the static CUDA runtime whose symbol version glibc 2.34 changed, with the one
# that x86-64 had before.
BEFORE_GLIBC_2_34 = {
    "libdl.so.2": {"GLIBC_2.2.5": "dlclose dlerror dlopen dlsym dlvsym", "GLIBC_2.3.4": "dlmopen"},
    "librt.so.1": {"GLIBC_2.2.5": "shm_open shm_unlink"},
    "libpthread.so.0": {
        "GLIBC_2.2.5": "pthread_condattr_setpshared pthread_create pthread_detach pthread_getspecific "
        "pthread_join pthread_key_create pthread_key_delete pthread_kill pthread_mutex_trylock "
        "pthread_mutexattr_destroy pthread_mutexattr_init pthread_mutexattr_setpshared "
        "pthread_mutexattr_settype pthread_once pthread_rwlock_destroy pthread_rwlock_init "
        "pthread_rwlock_rdlock pthread_rwlock_timedrdlock pthread_rwlock_timedwrlock "
        "pthread_rwlock_tryrdlock pthread_rwlock_trywrlock pthread_rwlock_unlock pthread_rwlock_wrlock "
        "pthread_rwlockattr_destroy pthread_rwlockattr_init pthread_rwlockattr_setpshared "
        "pthread_setspecific pthread_spin_destroy pthread_spin_init pthread_spin_lock pthread_spin_trylock "
        "pthread_spin_unlock sem_destroy sem_init sem_post sem_timedwait sem_trywait sem_wait",
    },
}


class Unbuildable(Exception):
    """Why an object cannot be built here, in one sentence."""


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


@dataclass
class NinjaFile:
    """One build.ninja: objects are added, then linked into one shared object."""

    folder: Path
    lines: list[str]
    objects: list[str] = field(default_factory=list)

    def compile(self, rule: str, source: Path, name: str, extra: str, note: str = "") -> None:
        output = escape(self.folder / f"{name}.o")
        self.objects.append(output)
        self.lines += [f"build {output}: {rule} {escape(source)}", f"  extra = {extra}", f"  note = {note}"]

    def link(self, target: Path, flags: str, needs: list[Path]) -> None:
        implicit = " ".join(escape(path) for path in needs)
        self.lines += [
            f"build {escape(target)}: link {' '.join(self.objects)} | {implicit}",
            f"  link = {flags}",
            f"default {escape(target)}",
        ]

    def write(self) -> None:
        write_changed(self.folder / "build.ninja", "\n".join(self.lines) + "\n")


def write_changed(path: Path, text: str) -> None:
    """Writes a file unless that is what it holds, so that what depends on it stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def export_only(module: str, folder: Path) -> tuple[str, list[Path]]:
    """Linker flags that export a module's one entry point, and the files that they name.

    Templates of the C++ library that the compiler puts into the object would be exported otherwise, and
    could take the place of another library's.
    """
    if sys.platform == "darwin":
        return f"-Wl,-exported_symbol,_PyInit_{module} -undefined dynamic_lookup", []
    script = folder / "exports.map"
    write_changed(script, f"{{ global: PyInit_{module}; local: *; }};\n")
    return f'-Wl,--version-script="{script}"', [script]


def cpp_rules(extra: str = "") -> list[str]:
    """How C++ is compiled, for both objects."""
    return [
        f"cxx = {compiler()}",
        f"flags = {' '.join(COMMON_FLAGS)} {extra} {os.environ.get('CXXFLAGS', '')}",
        "rule compile",
        "  command = $cxx -MMD -MF $out.d $flags $extra -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $in$note",
    ]


def torch_side_flags() -> str:
    """Where torch's and Python's headers are."""
    return " ".join(f'-isystem "{path}"' for path in [*torch_folders()[0], sysconfig.get_path("include")])


def describe_cpu_build(folder: Path, target: Path) -> None:
    """build.ninja of _C: one object a torch-side source, one a *kernels.cpp and level, one shared object."""
    level_flags = levels()
    has_levels = "-DSTAR_HAS_X86_LEVELS" if len(level_flags) > 1 else ""
    link_rule = ["rule link", "  command = $cxx -shared $in -o $out $link", "  description = link $out"]
    ninja = NinjaFile(folder, [*cpp_rules(has_levels), *link_rule])
    csrc = ROOT / "csrc"
    include_flags = torch_side_flags()
    common = [csrc / "common" / "level.cpp", csrc / "common" / "older_libraries.cpp"]
    for source in [csrc / "ops.cpp", *common, *sorted(csrc.glob("*/*cpu.cpp"))]:
        ninja.compile("compile", source, f"{source.parent.name}_{source.stem}", include_flags)
    for source in sorted(csrc.glob("*/*kernels.cpp")):
        for level, flags in level_flags.items():
            extra = " ".join([*KERNEL_FLAGS, *flags, f"-DSTAR_LEVEL={level}"])
            ninja.compile(
                "compile", source, f"{source.parent.name}_{source.stem}_{level}", extra, f"$ ({level})"
            )
    exports, needs = export_only("_C", folder)
    # Where torch's library is when this is loaded, `import torch` has said by loading it.
    libraries = f'-L"{torch_folders()[1]}" -ltorch_cpu'
    ninja.link(target, f"{exports} {libraries} {os.environ.get('LDFLAGS', '')}", needs)
    ninja.write()


def nvcc_program() -> tuple[str, tuple[int, int]]:
    """nvcc and its release: $CUDACXX, $CUDA_HOME/bin/nvcc, or the one on PATH."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    wanted = os.environ.get("CUDACXX") or (str(Path(home) / "bin" / "nvcc") if home else "nvcc")
    found = shutil.which(wanted)
    if found is None:
        raise Unbuildable(f"no CUDA compiler was found (looked for {wanted})")
    answer = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+)\.(\d+)", answer)
    if release is None:
        raise Unbuildable(f"{found} --version names no release")
    version = int(release[1]), int(release[2])
    if version < OLDEST_NVCC:
        raise Unbuildable(f"{found} is of CUDA {version[0]}.{version[1]}, and {OLDEST_NVCC[0]} is the oldest")
    return found, version


def cuda_archs(nvcc: str) -> list[str]:
    """The architectures to compile for, each as "90a" or "100+PTX".

    Of the default ones, those that this nvcc knows.
    """
    wanted = os.environ.get("STAR_KERNELS_CUDA_ARCHS")
    archs = (wanted or CUDA_ARCHS).replace(",", ";").replace(" ", ";").split(";")
    archs = [arch for arch in archs if arch]
    if not all(re.fullmatch(r"\d+[af]?(\+PTX)?", arch) for arch in archs) or not archs:
        raise SystemExit(f'STAR_KERNELS_CUDA_ARCHS is {wanted!r}; it takes a list as "{CUDA_ARCHS}"')
    if wanted:
        return archs
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = [
        arch for arch in archs if re.search(rf"compute_{arch.removesuffix('+PTX').rstrip('a')}\b", listed)
    ]
    if len(known) < len(archs):
        newest = max((arch for arch in known if arch.isdigit()), key=int)  # code for 90a has no later GPU
        known = [arch + "+PTX" if arch == newest else arch for arch in known]
        print(
            f"star-kernels: this nvcc compiles for {', '.join(known)} of {', '.join(archs)}", file=sys.stderr
        )
    return known


def gencode(archs: list[str]) -> str:
    """nvcc's flags for the architectures: machine code, and with +PTX what drivers compile themselves."""
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX")
        code = f"sm_{number}" if number == arch else f"[sm_{number},compute_{number}]"
        flags.append(f"-gencode=arch=compute_{number},code={code}")
    return " ".join(flags)


def stub_library(folder: Path, name: str, symbols: dict[str, str]) -> None:
    """Makes a shared library to link against, of which only names matter: its own, and those of ``symbols``,
    which gives each version the functions that have it (separated by spaces).
    """
    source, script, output = folder / f"{name}.c", folder / f"{name}.map", folder / name
    functions = " ".join(symbols.values()).split()
    write_changed(source, "".join(f"void {function}(void) {{}}\n" for function in functions))
    versions = [
        f"{version} {{ global: {'; '.join(names.split())}; }};\n" for version, names in symbols.items()
    ]
    write_changed(script, "".join(versions))
    if not output.exists() or output.stat().st_mtime < max(source.stat().st_mtime, script.stat().st_mtime):
        linked = [f"-Wl,-soname,{name}", *([f"-Wl,--version-script={script}"] if symbols else [])]
        how = ["-shared", "-fPIC", "-nostdlib", "-fno-builtin", "-w", "-x", "c"]
        subprocess.run([*compiler().split(), *how, str(source), "-o", str(output), *linked], check=True)


def cuda_libraries(folder: Path, nvcc: str) -> str:
    """What _C_cuda is linked with: torch's two libraries and the static CUDA runtime with what that needs.

    For libtorch_cuda.so a stub stands in, for a torch without CUDA has none. The loader then takes the one
    that `import torch` loaded, in which other objects don't look for symbols unless they name it.

    The CUDA runtime needs libdl, libpthread and librt, which glibc 2.34 took into libc under new symbol
    versions: linked there, the object would not load beside an older glibc. Stubs with the old versions,
    which every later glibc serves too, prevent that.
    """
    stubs = folder / "stubs"
    stub_library(stubs, "libtorch_cuda.so", {})
    names = ["libtorch_cuda.so"]
    release = platform.libc_ver()[1].split(".")
    if platform.machine() == "x86_64" and len(release) > 1 and (int(release[0]), int(release[1])) >= (2, 34):
        for name, symbols in BEFORE_GLIBC_2_34.items():
            stub_library(stubs, name, symbols)
            names.append(name)
    needed = " ".join(f"-l:{name}" for name in names)
    return (
        f'-L"{torch_folders()[1]}" -ltorch_cpu -L"{stubs}" -Wl,--no-as-needed {needed} -Wl,--as-needed '
        f'-L"{cuda_library_folder(nvcc)}" -lcudart_static -ldl -lrt -lpthread'
    )


def describe_cuda_build(folder: Path, target: Path) -> None:
    """build.ninja of _C_cuda: one object a *cuda*.cu, the module, one shared object with cudart inside."""
    nvcc, version = nvcc_program()
    archs = cuda_archs(nvcc)
    cxx = os.environ.get("CXX", "")
    host = f"-ccbin={cxx}" if cxx and shutil.which(cxx) else ""  # else nvcc finds its own
    # What ptxas says of each kernel is kept beside the object, for benchmarks/cuda_compile.py.
    ptxas = "^ptxas info|^ *[0-9]* bytes stack frame"
    ninja = NinjaFile(
        folder,
        [
            *cpp_rules("-DUSE_CUDA"),
            f"nvcc = {escape(nvcc)} {host}",
            f"cuda_flags = {' '.join(CUDA_FLAGS)} {gencode(archs)}",
            "rule compile_cuda",
            "  command = $nvcc -MMD -MF $out.d $cuda_flags $extra -c $in -o $out 2> $out.log "
            f"|| {{ cat $out.log >&2; exit 1; }}; grep -vE '{ptxas}' $out.log >&2 || true",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $in",
            "rule link",
            "  command = $cxx -shared $in -o $out $link",
            "  description = link $out",
        ],
    )
    csrc = ROOT / "csrc"
    include_flags = torch_side_flags()
    module = f"{include_flags} -DSTAR_CUDA_VERSION={version[0] * 1000 + version[1] * 10}"
    ninja.compile(
        "compile",
        csrc / "cuda_module.cpp",
        "cuda_module",
        f"{module} -DSTAR_CUDA_ARCHS='\"{';'.join(archs)}\"'",
    )
    ninja.compile("compile", csrc / "common" / "older_libraries.cpp", "common_older_libraries", "")
    for source in sorted(csrc.glob("*/*cuda*.cu")):
        ninja.compile("compile_cuda", source, f"{source.parent.name}_{source.stem}", include_flags)
    exports, needs = export_only("_C_cuda", folder)
    link = f"{exports} {cuda_libraries(folder, nvcc)} {os.environ.get('LDFLAGS', '')}"
    ninja.link(target, link, needs)
    ninja.write()


def cuda_library_folder(nvcc: str) -> Path:
    """Where the static CUDA runtime that belongs to nvcc is."""
    plan = subprocess.run(
        [nvcc, "--dryrun", "-c", "none.cu"], capture_output=True, text=True, check=False
    ).stderr
    top = re.search(r"^#\$ TOP=(.*)$", plan, re.MULTILINE)
    home = Path(top[1].strip()) if top else Path(nvcc).resolve().parent.parent
    for folder in (home / "lib64", home / "lib", *sorted(home.glob("targets/*/lib"))):
        if (folder / "libcudart_static.a").exists():
            return folder
    raise Unbuildable(f"{home} has no libcudart_static.a")


class BuildWithNinja(build_ext):
    """Builds the two objects with ninja, so that only what changed is compiled again."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            if ext.name == "star_kernels._C":
                self.build_cpu(target)
            else:
                self.build_cuda(target)
        except Unbuildable as reason:
            what, instead = LEFT_OUT[ext.name]
            if str(reason) != NEEDS_CPU:  # that was said of the CPU operators already
                print(f"star-kernels: building without {what}: {reason}; {instead}.", file=sys.stderr)
            self.leave_out(ext, target)

    def build_cpu(self, target: Path) -> None:
        if os.environ.get("STAR_KERNELS_CPP") == "0":
            raise Unbuildable("STAR_KERNELS_CPP=0 asks for that")
        self.run_ninja("ninja", describe_cpu_build, target)

    def build_cuda(self, target: Path) -> None:
        wanted = os.environ.get("STAR_KERNELS_CUDA") or None
        if wanted not in (None, "0", "1"):
            raise SystemExit(f"STAR_KERNELS_CUDA is {wanted!r}; it takes 0 (leave them out) or 1 (insist)")
        if wanted == "0":
            raise Unbuildable("STAR_KERNELS_CUDA=0 asks for that")
        try:
            if not Path(self.get_ext_fullpath("star_kernels._C")).exists():
                raise Unbuildable(NEEDS_CPU)
            self.run_ninja("ninja_cuda", describe_cuda_build, target)
        except Unbuildable as reason:
            if wanted == "1":
                raise SystemExit(f"star-kernels: STAR_KERNELS_CUDA=1, but {reason}") from reason
            raise

    def run_ninja(self, name: str, describe: Callable[[Path, Path], None], target: Path) -> None:
        folder = Path(self.build_temp).resolve() / name
        describe(folder, target)
        jobs = os.environ.get("MAX_JOBS")
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([ninja_program(), "-C", str(folder), *(["-j", jobs] if jobs else [])], check=True)

    def leave_out(self, ext: Extension, target: Path) -> None:
        """Makes setuptools accept that the object is not there, and an earlier build's not be."""
        ext.optional = True
        target.unlink(missing_ok=True)


NEEDS_CPU = "they extend the compiled CPU operators, which are not built"
LEFT_OUT = {
    "star_kernels._C": ("compiled CPU operators", "everything works, on slower plain-PyTorch code"),
    "star_kernels._C_cuda": ("CUDA operators", "GPUs are served by the Triton kernels"),
}

if __name__ == "__main__":
    setup(
        ext_modules=[
            Extension("star_kernels._C", sources=[], py_limited_api=True, optional=False),
            Extension("star_kernels._C_cuda", sources=[], py_limited_api=True, optional=False),
        ],
        cmdclass={"build_ext": BuildWithNinja},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
