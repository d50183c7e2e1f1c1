from __future__ import annotations

import os

import torch

torch.set_num_threads(1)

# Without a GPU the Triton kernels are tested in Triton's interpreter, which must be chosen before the import.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
