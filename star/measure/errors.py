"""What can go wrong on a device, each as one line."""

from __future__ import annotations

__all__ = ["MeasurementError"]


class MeasurementError(RuntimeError):
    """A model can not be measured on this device (no memory for it, or its process died)."""
