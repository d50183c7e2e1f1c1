"""On a GPU: what the CUDA kernels do for sizes that fill its multiprocessors, or that one block can't cover.

The rows of the other tests are small: no emulation and no small row gets there.
"""

from __future__ import annotations

import pytest
import torch

from star_kernels import dispatch
from tests.star_kernels.cases.recurrence import cells
from tests.star_kernels.test_operators import DTYPES, cast, error, run, widen

pytestmark = pytest.mark.gpu

CHANNELS_THAT_FILL_A_GPU = 24_000  # 64 for each of up to 375 multiprocessors


@pytest.mark.parametrize("dtype", dispatch.KERNEL_DTYPES)
@pytest.mark.parametrize("length", [1, 8, 37])
@pytest.mark.parametrize("cell", [0, 1], ids=["gru", "lstm"])
def test_cells_that_are_walked(cell: int, length: int, dtype: torch.dtype) -> None:
    case = cells("wide", 2, length, CHANNELS_THAT_FILL_A_GPU // 2, state=True)[cell]
    arguments = cast(case, dtype, device="cuda")
    wanted = run(case.operator, widen(arguments), "reference")
    lost = run(case.operator, arguments, "reference")
    for name, got in run(case.operator, arguments, "cuda").items():
        assert error(got, wanted[name]) < max(DTYPES[dtype], 2 * error(lost[name], wanted[name])), name
