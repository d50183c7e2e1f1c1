"""What setup.py builds in which surroundings, and what it says; nothing is compiled here."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from setuptools import Distribution, Extension

SETUP = Path(__file__).resolve().parent.parent / "setup.py"


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module, in an environment without its variables."""
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "CXX", "STAR_KERNELS_CUDA", "STAR_KERNELS_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("STAR_KERNELS_CPP", raising=False)
    spec = importlib.util.spec_from_file_location("star_kernels_setup", SETUP)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def nvcc(tmp_path: Path) -> Callable[[str, str], str]:
    """Makes a program that answers as nvcc does, of a release and for a list of architectures."""

    def make(release: str, archs: str) -> str:
        program = tmp_path / "nvcc"
        program.write_text(
            "#!/bin/sh\n"
            f'if [ "$1" = --version ]; then echo "tools, release {release}, V{release}.1"; fi\n'
            f'if [ "$1" = --list-gpu-arch ]; then printf "{archs}"; fi\n'
        )
        program.chmod(0o755)
        return str(program)

    return make


def test_nvcc_is_found_where_the_variables_say(
    setup: ModuleType, nvcc: Callable[[str, str], str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(setup.Unbuildable, match="no CUDA compiler was found"):
        setup.nvcc_program()
    program = nvcc("13.0", "")
    monkeypatch.setenv("CUDACXX", program)
    assert setup.nvcc_program() == (program, (13, 0))
    monkeypatch.setenv("CUDACXX", nvcc("11.8", ""))
    with pytest.raises(setup.Unbuildable, match=r"CUDA 11\.8"):
        setup.nvcc_program()


def test_architectures(
    setup: ModuleType,
    nvcc: Callable[[str, str], str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    new = nvcc("13.0", r"compute_80\ncompute_90\ncompute_100\ncompute_120\n")
    assert setup.cuda_archs(new) == ["80", "90a", "100+PTX", "120"]
    assert capfd.readouterr().err == ""
    old = nvcc("12.4", r"compute_80\ncompute_90\n")
    assert setup.cuda_archs(old) == ["80+PTX", "90a"]
    assert capfd.readouterr().err.count("\n") == 1
    monkeypatch.setenv("STAR_KERNELS_CUDA_ARCHS", "86, 90a+PTX")
    assert setup.cuda_archs(old) == ["86", "90a+PTX"]
    assert setup.gencode(["86", "90a+PTX"]) == (
        "-gencode=arch=compute_86,code=sm_86 -gencode=arch=compute_90a,code=[sm_90a,compute_90a]"
    )
    monkeypatch.setenv("STAR_KERNELS_CUDA_ARCHS", "sm_90")
    with pytest.raises(SystemExit, match="STAR_KERNELS_CUDA_ARCHS is 'sm_90'; it takes"):
        setup.cuda_archs(old)


def build(setup: ModuleType, folder: Path, cpu_object: bool) -> list[str]:
    """Builds both extensions into ``folder`` without the parts that compile; which of them ran."""
    extensions = [Extension(f"star_kernels.{name}", [], py_limited_api=True) for name in ("_C", "_C_cuda")]
    command = setup.BuildWithNinja(Distribution({"ext_modules": extensions}))
    command.build_lib, command.build_temp = str(folder / "lib"), str(folder / "temp")
    command.ensure_finalized()
    ran = []

    def run_ninja(name: str, describe: Callable[[Path, Path], None], target: Path) -> None:
        if name == "ninja" and not cpu_object:
            raise setup.Unbuildable("there is no compiler")
        describe(folder / name, target)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
        ran.append(name)

    command.run_ninja = run_ninja
    for extension in extensions:
        command.build_extension(extension)
    assert len(list(folder.glob("lib/star_kernels/*"))) == len(ran)
    return ran


@pytest.mark.parametrize("cpu_object", [True, False])
def test_a_machine_without_nvcc_is_told_in_one_line(
    setup: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    cpu_object: bool,
) -> None:
    monkeypatch.setenv("CUDACXX", str(tmp_path / "no-nvcc"))
    assert build(setup, tmp_path, cpu_object) == (["ninja"] if cpu_object else [])
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1
    assert ("without CUDA operators" if cpu_object else "without compiled CPU operators") in said[0]


def test_cuda_operators_can_be_refused_and_insisted_on(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    stale = tmp_path / "lib" / "star_kernels" / "_C_cuda.abi3.so"
    stale.parent.mkdir(parents=True)
    stale.touch()
    monkeypatch.setenv("STAR_KERNELS_CUDA", "0")
    assert build(setup, tmp_path, True) == ["ninja"]  # and what an earlier build left is not packed
    assert "STAR_KERNELS_CUDA=0 asks for that" in capfd.readouterr().err
    monkeypatch.setenv("CUDACXX", str(tmp_path / "no-nvcc"))
    monkeypatch.setenv("STAR_KERNELS_CUDA", "1")
    with pytest.raises(SystemExit, match="STAR_KERNELS_CUDA=1, but no CUDA compiler was found"):
        build(setup, tmp_path, True)
    monkeypatch.setenv("STAR_KERNELS_CUDA", "yes")
    with pytest.raises(SystemExit, match="STAR_KERNELS_CUDA is 'yes'; it takes 0"):
        build(setup, tmp_path, True)
