"""The plots of the device that a search was for."""

from __future__ import annotations

from star.measure.quantities import value_of
from star.report.device import DeviceReport
from star.report.figures import THEME, draw, new_figure
from star.report.numbers import axis, slug, spoken
from star.report.plots import Plot
from star.report.summary import RunSummary

__all__ = ["device_plots"]


def device_plots(run: RunSummary) -> list[Plot]:
    """Predicted against measured, of each quantity that was searched for or has a budget."""
    if run.device is None:
        return []
    with draw():
        made = [_prediction(run.device, name) for name in run.device.names]
    return [plot for plot in made if plot is not None]


def _prediction(device: DeviceReport, name: str) -> Plot | None:
    pairs = [(value_of(pair.measured, name), value_of(pair.predicted, name)) for pair in device.pairs]
    known = [(number, foretold) for number, foretold in pairs if number and foretold]
    if len(known) < 2:
        return None
    figure, axes = new_figure()
    ends = [min(map(min, known)), max(map(max, known))]
    axes.plot(ends, ends, color=THEME["muted"], linewidth=1.0, linestyle=":", label="equal")
    measured, predicted = zip(*known, strict=True)
    axes.scatter(measured, predicted, s=26, color=THEME["accent"], edgecolors="none", zorder=3)
    axes.set_xlabel(f"measured: {axis(name)}")
    axes.set_ylabel(f"predicted: {axis(name)}")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16))
    error = device.error_of(name)
    return Plot(
        f"device-{slug(name)}",
        "device",
        f"{spoken(name)}, predicted and measured",
        f"Candidates that were measured as a whole; the median error is {100 * (error or 0.0):.1f} %.",
        figure,
    )
