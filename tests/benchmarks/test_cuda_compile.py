"""The account of the CUDA kernels' registers, and that none of them spills any."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import cuda_compile

LOG = """\
ptxas info    : 28 bytes gmem
ptxas info    : Compiling entry function '_ZN4star4stepIfLi4EEEvNS_4CallE' for 'sm_90a'
ptxas info    : Function properties for _ZN4star4stepIfLi4EEEvNS_4CallE
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 2048 bytes smem, 552 bytes cmem[0]
ptxas info    : Compile time = 98.145 ms
ptxas info    : Compiling entry function '_ZN4star4stepIdLi4EEEvNS_4CallE' for 'sm_90a'
ptxas info    : Function properties for _ZN4star4stepIdLi4EEEvNS_4CallE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers
"""


def test_what_ptxas_says_is_read() -> None:
    first, second = cuda_compile.parse("norm/cuda.cu", LOG)
    assert (first.architecture, first.registers, first.spilled, first.stack, first.shared) == (
        "sm_90a",
        255,
        20,
        16,
        2048,
    )
    assert (second.registers, second.spilled, second.stack, second.shared) == (8, 0, 0, 0)
    text = cuda_compile.document([first, second], "nvcc 13.0.88")
    assert "| norm/cuda.cu | step | 2 | – | 255 / 20 / 16 / 2 | – | – |" in text
    assert "Kernels that spill: 1." in text


def test_other_words_of_ptxas_are_refused() -> None:
    with pytest.raises(ValueError, match="not understood"):
        list(cuda_compile.parse("norm/cuda.cu", LOG.replace("spill loads", "spilled loads")))


def test_no_kernel_spills() -> None:
    """Also: each is compiled for every architecture, and none is missing from the committed table."""
    try:
        found = cuda_compile.usages(cuda_compile.build_folder())
    except FileNotFoundError as reason:
        pytest.skip(str(reason))
    spilling = sorted({(usage.kernel, usage.architecture) for usage in found if usage.spilled})
    assert spilling == []
    for name, group in cuda_compile.grouped(found).items():
        assert {usage.architecture for usage in group} == set(cuda_compile.ARCHITECTURES), name
        assert f"| {name[0]} | {name[1]} |" in cuda_compile.RESULT.read_text(encoding="utf-8"), (
            f"{name[1]} is not in the table: make compile-cuda"
        )


def test_a_tree_that_was_not_built_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cuda_compile, "ROOT", tmp_path)
    assert cuda_compile.main(["--out", str(tmp_path / "out.md")]) == 2
