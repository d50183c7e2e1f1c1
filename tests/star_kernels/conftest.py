from __future__ import annotations

import importlib.util
import os

import torch

from tests.star_kernels import interpreter

torch.set_num_threads(1)

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    interpreter.prepare_once()
