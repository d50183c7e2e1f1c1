"""The plot of a certificate."""

from __future__ import annotations

import math

from star.report.fidelity import NORMAL
from star.report.figures import THEME, draw, new_figure
from star.report.plots import Plot
from star.report.summary import RunSummary

__all__ = ["fidelity_plots"]


def fidelity_plots(run: RunSummary) -> list[Plot]:
    """Quality under the proxy against that after longer training, with intervals of 95 %."""
    certificate = run.certificate
    if certificate is None or len(certificate.ranked) < 2:
        return []
    errors = certificate.standard_error
    with draw():
        figure, axes = new_figure()
        for on_front, colour, label in ((False, THEME["soft"], "others"), (True, THEME["accent"], "front")):
            items = [item for item in certificate.ranked if item.on_front == on_front]
            if not items:
                continue
            means = [item.mean or 0.0 for item in items]
            widths = [0.0 if math.isnan(errors[item.id]) else NORMAL * errors[item.id] for item in items]
            axes.errorbar(
                [item.proxy for item in items],
                means,
                yerr=widths,
                fmt="o",
                markersize=5,
                color=colour,
                elinewidth=1.0,
                capsize=2,
                label=label,
                zorder=2 + on_front,
            )
        axes.set_xlabel("held-out bits per byte under the proxy")
        axes.set_ylabel(f"after {certificate.settings.budget} times as many steps")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    tau = f" Kendall's tau is {certificate.tau.value:.2f}." if certificate.tau.defined else ""
    return [
        Plot(
            "fidelity",
            "fidelity",
            "Quality in the search and after longer training",
            f"A mark a retrained candidate; bars are intervals of 95 % from the noise between seeds.{tau}",
            figure,
        )
    ]
