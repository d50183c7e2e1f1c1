"""What the Triton kernels of every family share: launching, configurations, operators, packed sequences.

Imported only where a Triton kernel is asked for, so that ``import star_kernels`` needs no Triton.
"""

from star_kernels.launch.kernel import Configuration, Kernel, Launch, kernels, recording
from star_kernels.launch.operator import Operator
from star_kernels.launch.support import INTERPRETED, cdiv, chunks_of, matrix, operand_type, rising, rows

__all__ = [
    "INTERPRETED",
    "Configuration",
    "Kernel",
    "Launch",
    "Operator",
    "cdiv",
    "chunks_of",
    "kernels",
    "matrix",
    "operand_type",
    "recording",
    "rising",
    "rows",
]
