"""Models measured on the device at hand, at the size that they are meant for: latency, throughput, memory.

quantities.py  what is measured and how it is named
settings.py    at which size, context and precision
device.py      the clock and the memory gauge of a device
whole.py       a whole model
process.py     the same in a process of its own
"""

from star.measure.errors import MeasurementError
from star.measure.settings import MeasureSettings

__all__ = ["MeasureSettings", "MeasurementError"]
