"""What can go wrong on a device, each as one line."""

from __future__ import annotations

__all__ = ["MeasurementError", "OtherDevice"]


class MeasurementError(RuntimeError):
    """A model can not be measured on this device (no memory for it, or its process died)."""


class OtherDevice(MeasurementError):
    """The device that a table was measured on is not in this machine."""
