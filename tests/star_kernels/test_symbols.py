"""What the compiled operators need of others: LibTorch's stable ABI, the limited Python API, C and C++."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import pytest

_C = pytest.importorskip("star_kernels._C")

PYTHON = {"PyModule_Create2"}
LINKERS = {"__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__cxa_finalize"}
TORCH = re.compile(r"(aoti_)?torch_\w+")  # C functions with plain names; C++ names of torch start with _ZN
SYSTEM = re.compile(r"\S+@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+")


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("nm"), reason="reads ELF with nm")
def test_nothing_but_stable_symbols_is_imported() -> None:
    """One build serves every Python >= 3.10 and torch >= 2.10 only as long as this holds."""
    listing = subprocess.run(
        ["nm", "-D", "--undefined-only", _C.__file__], capture_output=True, text=True, check=True
    )
    names = [line.split()[-1] for line in listing.stdout.splitlines()]
    assert len(names) > 50
    known = PYTHON | LINKERS
    strange = [
        name
        for name in names
        if name not in known and not TORCH.fullmatch(name) and not SYSTEM.fullmatch(name)
    ]
    assert strange == []
