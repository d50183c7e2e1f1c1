"""What the compiled objects need of others: LibTorch's stable ABI, the limited Python API, C and C++.

One build serves every Python >= 3.10 and torch >= 2.10 only as long as these tests hold.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import star_kernels

FOLDER = Path(star_kernels.__file__).parent
OBJECTS = {name: FOLDER / f"{name}.abi3.so" for name in ("_C", "_C_cuda")}
TORCH_LIBRARIES = Path(torch.__file__).parent / "lib"

# Of the limited API, from 3.10 on.
PYTHON = {"PyModule_Create2", "PyModule_AddIntConstant", "PyModule_AddStringConstant", "_Py_Dealloc"}
LINKERS = {"__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__cxa_finalize"}
TORCH_CONSTANTS = re.compile(r"aoti_torch_(dtype|device_type|layout|memory_format)_\w+")
# Functions of LibTorch's C interface that torch 2.10 has. What is added here must be there: see
# benchmarks/results/wheel.md for the runs that show it.
TORCH = {
    "aoti_torch_abi_version",
    "aoti_torch_aten_narrow",
    "aoti_torch_aten_pad",
    "aoti_torch_delete_library_object",
    "aoti_torch_delete_tensor_object",
    "aoti_torch_empty_strided",
    "aoti_torch_get_data_ptr",
    "aoti_torch_get_device_index",
    "aoti_torch_get_device_type",
    "aoti_torch_get_dim",
    "aoti_torch_get_dtype",
    "aoti_torch_get_numel",
    "aoti_torch_get_size",
    "aoti_torch_get_sizes",
    "aoti_torch_get_stride",
    "aoti_torch_is_contiguous",
    "aoti_torch_library_def",
    "aoti_torch_library_init_def",
    "aoti_torch_library_init_impl",
    "aoti_torch_new_tensor_handle",
    "aoti_torch_new_uninitialized_tensor",
    "torch_call_dispatcher",
    "torch_library_impl",
    "torch_parallel_for",
}
# Those that only a torch with CUDA has: _C_cuda alone may use them.
TORCH_CUDA = {
    "aoti_torch_get_current_cuda_stream",
    "aoti_torch_create_cuda_guard",
    "aoti_torch_delete_cuda_guard",
    "aoti_torch_cuda_guard_set_index",
}
SYSTEM = re.compile(r"\S+@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+")
LIBRARIES = {"libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1", "libtorch_cpu.so"}
# What the CUDA runtime inside _C_cuda needs of the system.
CUDA_LIBRARIES = {"libtorch_cuda.so", "libdl.so.2", "librt.so.1", "libpthread.so.0"}
# The newest versions that manylinux_2_28 stands for.
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 25), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}
ARCHITECTURES = {"sm_80", "sm_90a", "sm_100", "sm_120"}

reads_elf = pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("nm") or not shutil.which("objdump"),
    reason="reads ELF with nm and objdump",
)


@pytest.fixture(params=OBJECTS)
def library(request: pytest.FixtureRequest) -> Path:
    """Each compiled object; skipped where this installation was built without it."""
    path = OBJECTS[request.param]
    if not path.exists():
        pytest.skip(f"this installation has no {path.name}")
    return path


def output(*command: str | Path, **options: object) -> str:
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)  # type: ignore[call-overload]
    assert ran.returncode == 0, f"{command}: {ran.stderr or ran.stdout}"
    return str(ran.stdout)


def imported(library: Path) -> list[str]:
    """Names that the loader must find elsewhere, with their versions where they have one."""
    listing = output("nm", "-D", "--undefined-only", "--with-symbol-versions", library)
    return [line.split()[-1].replace("@@", "@") for line in listing.splitlines()]


@reads_elf
def test_nothing_but_stable_symbols_is_imported(library: Path) -> None:
    names = imported(library)
    assert len(names) > 40
    known = PYTHON | LINKERS | TORCH | (TORCH_CUDA if library.stem.startswith("_C_cuda") else set())
    strange = [
        name
        for name in names
        if name not in known and not TORCH_CONSTANTS.fullmatch(name) and not SYSTEM.fullmatch(name)
    ]
    assert strange == []


@reads_elf
def test_nothing_but_the_modules_entry_is_exported(library: Path) -> None:
    listing = output("nm", "-D", "--defined-only", library)
    assert [line.split()[-1] for line in listing.splitlines()] == [f"PyInit_{library.name.split('.')[0]}"]


@reads_elf
def test_other_libraries(library: Path) -> None:
    """No libcudart and no libcuda: the CUDA runtime is inside, and finds the driver itself."""
    needed = set(re.findall(r"NEEDED\s+(\S+)", output("objdump", "-p", library)))
    needed = {name for name in needed if not name.startswith("ld-linux")}
    assert needed <= LIBRARIES | (CUDA_LIBRARIES if library.stem.startswith("_C_cuda") else set())
    assert "libtorch_cpu.so" in needed


@reads_elf
def test_no_newer_system_than_torchs_own_wheels_need(library: Path) -> None:
    versions = [name.split("@")[1].split("_") for name in imported(library) if "@" in name]
    newer = [
        f"{kind}_{version}"
        for kind, version in versions
        if tuple(map(int, version.split("."))) > NEWEST[kind]
    ]
    if {"GLIBCXX", "CXXABI"} >= {name.split("_")[0] for name in newer} and newer and newest_compiler() > 12:
        pytest.skip(f"GCC {newest_compiler()} itself asks for {', '.join(sorted(set(newer)))}")
    assert newer == []


def newest_compiler() -> int:
    """The major version of the C++ compiler, 0 where there is none."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    return int(output(compiler, "-dumpversion").split(".")[0]) if compiler else 0


def test_abi3audit_finds_no_violation(library: Path) -> None:
    if importlib.util.find_spec("abi3audit") is None:
        pytest.skip("abi3audit is not installed")
    output(sys.executable, "-m", "abi3audit", "--strict", library)


def interpreters() -> list[str]:
    """Every Python >= 3.10 on PATH and of pyenv, one a minor version, this one's included."""
    found = {sys.version_info[:2]: sys.executable}
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for minor in range(10, 20):
        candidates = [shutil.which(f"python3.{minor}"), *sorted(versions.glob(f"3.{minor}*/bin/python"))]
        for candidate in candidates:
            # A shim that stands for no installed version is on PATH, too, and fails.
            if candidate and subprocess.run([candidate, "-c", ""], capture_output=True).returncode == 0:
                found.setdefault((3, minor), str(candidate))
    return [found[version] for version in sorted(found)]


LOADS = """
import importlib.machinery, importlib.util, os, sys
name, path = sys.argv[1:]
sys.setdlopenflags(os.RTLD_LAZY)
loader = importlib.machinery.ExtensionFileLoader(name, path)
module = importlib.util.module_from_spec(importlib.util.spec_from_file_location(name, path, loader=loader))
print(module.__name__, getattr(module, "architectures", ""))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="names torch's libraries with LD_LIBRARY_PATH")
@pytest.mark.parametrize("python", interpreters())
def test_loads_under_every_python(library: Path, python: str, tmp_path: Path) -> None:
    """Without torch's Python package: the object needs its library alone."""
    folders = [str(TORCH_LIBRARIES)]
    if library.stem.startswith("_C_cuda") and not (TORCH_LIBRARIES / "libtorch_cuda.so").exists():
        folders.append(str(empty_torch_cuda(library, tmp_path)))
    environment = {**os.environ, "LD_LIBRARY_PATH": ":".join(folders), "PYTHONNOUSERSITE": "1"}
    name = f"star_kernels.{library.name.split('.')[0]}"
    printed = output(python, "-S", "-c", LOADS, name, library, env=environment)
    assert printed.split()[0] == name
    if name.endswith("cuda"):
        assert set(printed.split()[1].split(";")) == {"80", "90a", "100+PTX", "120"}


def empty_torch_cuda(library: Path, folder: Path) -> Path:
    """A libtorch_cuda.so with the functions that ``library`` wants of it, which do nothing."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        pytest.skip("needs a C compiler, in the place of a torch with CUDA")
    names = TORCH_CUDA & set(imported(library))
    source = "".join(f"int {name}(void) {{ return 1; }}\n" for name in sorted(names))
    (folder / "stub.c").write_text(source)
    target = folder / "libtorch_cuda.so"
    output(compiler, "-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so", folder / "stub.c", "-o", target)
    return folder


def cuobjdump() -> str:
    """The program that reads GPU code, of a CUDA toolkit or of Triton; skips where there is none."""
    found = shutil.which("cuobjdump")
    triton = Path(sysconfig.get_path("purelib")) / "triton" / "backends" / "nvidia" / "bin" / "cuobjdump"
    if found is None and not triton.exists():
        pytest.skip("needs cuobjdump")
    return found or str(triton)


def test_gpu_code_of_every_architecture() -> None:
    if not OBJECTS["_C_cuda"].exists():
        pytest.skip("this installation has no _C_cuda.abi3.so")
    listing = output(cuobjdump(), "--list-elf", OBJECTS["_C_cuda"])
    # Releases before 13 leave the letter out.
    found = {arch.replace("sm_90a", "sm_90") for arch in re.findall(r"\.(sm_\w+)\.cubin", listing)}
    assert found == {arch.replace("sm_90a", "sm_90") for arch in ARCHITECTURES}
    listing = output(cuobjdump(), "--list-ptx", OBJECTS["_C_cuda"])
    assert set(re.findall(r"\.(sm_\w+)\.ptx", listing)) == {"sm_100"}
