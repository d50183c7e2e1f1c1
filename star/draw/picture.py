"""A genome as a picture: the backbone from top to bottom, sharing as arcs on its two sides."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from star.draw.arcs import Arc, family_colour, family_order, feature_arcs, featurizer_arcs
from star.genome import Genome
from star.sharing import LivPlan, resolve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_DEPTH = 400  # deeper pictures pass the 65,536 pixels that a PNG may be high

FORMATS = (".svg", ".png")

# Lines of neighbouring sharing groups, dark on white.
_GROUP_COLOURS = ("#1f4e9c", "#b3361b", "#0f7a5a", "#7b3fa0", "#8a6a00", "#b0276f")
_INK, _FAINT = "#1f2937", "#9ca3af"

# Sizes in units of one LIV's line; _INCHES each.
_INCHES = 0.3
_HALF_WIDTH = 4.4  # of a LIV's box
_HALF_HEIGHT = 0.38
_MARGIN = 6.6  # room for arcs on either side
_COMPACT_MARGIN = 3.6
_DOTS_PER_INCH = 160

# Text as outlines and fixed ids, so that the same genome gives the same bytes on every machine.
_STYLE: Any = {
    "font.family": ["DejaVu Sans"],
    "svg.fonttype": "path",
    "svg.hashsalt": "star",
    "text.parse_math": False,
}


def figure(genome: Genome, title: str | None = None, *, compact: bool = False) -> Figure:
    """The backbone as a matplotlib figure, without any window or global state.

    Args:
        genome: what to draw, at most 400 LIVs.
        title: a line above it; by default the number of LIVs.
        compact: the backbone and its arcs alone, for a page that says the rest itself.

    Raises:
        GenomeError: the genome is not valid; the message names the gene.
        ValueError: more LIVs than a picture can hold.
    """
    import matplotlib
    from matplotlib.figure import Figure

    plans = resolve(genome)
    if genome.depth > MAX_DEPTH:
        raise ValueError(f"figure: genome has {genome.depth} LIVs, a picture holds at most {MAX_DEPTH}")
    above, below = (1.9, 1.3) if compact else (2.9, 2.7)
    height = genome.depth + above + below
    margin = _COMPACT_MARGIN if compact else _MARGIN
    width = 2 * (_HALF_WIDTH + margin)
    with matplotlib.rc_context(_STYLE):
        drawing = Figure(figsize=(width * _INCHES, height * _INCHES), facecolor="white", dpi=_DOTS_PER_INCH)
        axes = drawing.add_axes((0, 0, 1, 1))
        axes.set_xlim(-width / 2, width / 2)
        axes.set_ylim(genome.depth + below, -above)
        axes.set_axis_off()
        _draw_stream(axes, genome.depth)
        for arc in featurizer_arcs(plans):
            _draw_featurizer_arc(axes, arc, genome.depth, margin)
        for arc in feature_arcs(plans):
            _draw_feature_arc(axes, arc, genome.depth, margin)
        for plan in plans:
            _draw_liv(axes, plan)
        if not compact:
            _draw_captions(axes, plans, title or _count(genome.depth, "LIV"))
    return drawing


def save(genome: Genome, path: str | os.PathLike[str], title: str | None = None) -> None:
    """Write the picture to `path`, in the format that its ending names; the same bytes every time.

    Raises:
        ValueError: neither .svg nor .png.
        GenomeError: the genome is not valid.
        OSError: the file cannot be written.
    """
    import matplotlib

    target = Path(path)
    if target.suffix.lower() not in FORMATS:
        raise ValueError(f"save: path is {str(target)!r}, takes a name that ends in {' or '.join(FORMATS)}")
    drawing = figure(genome, title)
    kind = target.suffix.lower()[1:]
    # Neither the time nor the library's version.
    metadata: dict[str, Any] = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
    with matplotlib.rc_context(_STYLE):
        drawing.savefig(target, format=kind, metadata=metadata)


def _draw_stream(axes: Axes, depth: int) -> None:
    """The residual stream behind the LIVs, from the tokens to the logits."""
    axes.annotate(
        "",
        xy=(0, depth + 0.55),
        xytext=(0, -1.0),
        arrowprops={"arrowstyle": "-|>", "color": _FAINT, "linewidth": 1.4, "shrinkA": 0, "shrinkB": 0},
        zorder=0,
    )
    axes.text(0, -1.1, "embedding", ha="center", va="bottom", fontsize=8, color=_INK)
    axes.text(0, depth + 0.6, "logits", ha="center", va="top", fontsize=8, color=_INK)


def _draw_liv(axes: Axes, plan: LivPlan) -> None:
    """One box: number, name, and the features that it reuses. Differential classes have a double bar."""
    from matplotlib.patches import FancyBboxPatch, Rectangle

    colour, y = family_colour(plan.entry.family), plan.index
    axes.add_patch(
        FancyBboxPatch(
            (-_HALF_WIDTH + 0.2, y - _HALF_HEIGHT + 0.1),
            2 * _HALF_WIDTH - 0.4,
            2 * _HALF_HEIGHT - 0.2,
            boxstyle="round,pad=0.1,rounding_size=0.22",
            mutation_aspect=1,
            facecolor=colour,
            edgecolor="white",
            linewidth=1.0,
            zorder=2,
        )
    )
    for bar in range(2 if plan.entry.differential else 1):
        axes.add_patch(
            Rectangle((-3.2 + 0.2 * bar, y - 0.2), 0.09, 0.4, facecolor="white", alpha=0.75, zorder=3)
        )
    axes.text(-3.4, y, str(plan.index + 1), ha="right", va="center", fontsize=7, color="white", zorder=3)
    axes.text(
        -2.7,
        y,
        plan.entry.name,
        ha="left",
        va="center",
        fontsize=8.5,
        fontweight="bold",
        color="white",
        zorder=3,
    )
    if plan.source is not None:
        reused = f"{', '.join(plan.shared)} of {plan.source + 1}"
        axes.text(4.02, y, reused, ha="right", va="center", fontsize=6.5, color="white", zorder=3)


def _draw_featurizer_arc(axes: Axes, arc: Arc, depth: int, margin: float) -> None:
    """Arcs on the left between neighbouring members: all use one set of weights."""
    colour = _GROUP_COLOURS[arc.number % len(_GROUP_COLOURS)]
    for upper, lower in itertools.pairwise(arc.members):
        _draw_half_ellipse(
            axes, -_HALF_WIDTH - 0.15, upper, lower, -_reach(upper, lower, depth, margin), colour
        )
    for member in arc.members:
        axes.plot(-_HALF_WIDTH - 0.15, member, "o", markersize=4.2, color=colour, zorder=4)


def _draw_feature_arc(axes: Axes, arc: Arc, depth: int, margin: float) -> None:
    """Arrows on the right from the LIV that computes the features to each that reuses them."""
    colour = _GROUP_COLOURS[arc.number % len(_GROUP_COLOURS)]
    source, *followers = arc.members
    edge = _HALF_WIDTH + 0.15
    for follower in followers:
        _draw_half_ellipse(axes, edge, source, follower, _reach(source, follower, depth, margin), colour)
        axes.plot(edge, follower, "<", markersize=5.4, color=colour, zorder=4)
    axes.plot(edge, source, "o", markersize=4.8, color=colour, zorder=4)


def _reach(upper: int, lower: int, depth: int, margin: float) -> float:
    """How far an arc leaves the backbone: more for longer ones, inside the margin for the longest."""
    return (margin - 0.9) * ((lower - upper) / max(depth - 1, 8)) ** 0.6


def _draw_half_ellipse(axes: Axes, x: float, upper: int, lower: int, reach: float, colour: str) -> None:
    """Half an ellipse from (x, upper) to (x, lower), `reach` to the right of x (negative: to the left)."""
    from matplotlib.patches import Arc as ArcPatch

    right = reach > 0
    axes.add_patch(
        ArcPatch(
            (x, (upper + lower) / 2),
            2 * abs(reach),
            lower - upper,
            theta1=-90 if right else 90,
            theta2=90 if right else 270,
            edgecolor=colour,
            linewidth=1.5,
            alpha=0.9,
            zorder=1,
        )
    )


def _draw_captions(axes: Axes, plans: Sequence[LivPlan], title: str) -> None:
    """Title, what the margins show, the families' colours, and the sign of differential classes."""
    depth = len(plans)
    axes.text(0, -2.45, title, ha="center", va="center", fontsize=11, fontweight="bold", color=_INK)
    margin = _HALF_WIDTH + _MARGIN / 2
    captions = (
        (-margin, "Same featurizer weights", featurizer_arcs(plans)),
        (margin, "Same features", feature_arcs(plans)),
    )
    for x, caption, arcs in captions:
        for y, text in ((-1.75, caption), (-1.2, _count(len(arcs), "group") if arcs else "none")):
            axes.text(x, y, text, ha="center", va="baseline", fontsize=7.5, color=_INK)
    families = Counter(plan.entry.family for plan in plans)
    names = sorted(families, key=family_order)
    differential = sum(plan.entry.differential for plan in plans)
    entries = [(f"{family} {families[family]}", "square", family_colour(family)) for family in names]
    if differential:
        entries.append((f"differential {differential}", "bars", _FAINT))
    step = 2 * (_HALF_WIDTH + _MARGIN) / len(entries)
    for place, (label, marker, colour) in enumerate(entries):
        x = (place + 0.5) * step - _HALF_WIDTH - _MARGIN
        _draw_key(axes, x - 1.6, depth + 1.95, marker, colour)
        axes.text(x - 1.2, depth + 1.95, label, va="center", fontsize=7.5, color=_INK)


def _draw_key(axes: Axes, x: float, y: float, kind: str, colour: str) -> None:
    """A legend's sign: a family's square, or the double bar of differential classes."""
    from matplotlib.patches import Rectangle

    if kind == "square":
        axes.add_patch(Rectangle((x - 0.22, y - 0.22), 0.44, 0.44, facecolor=colour))
    else:
        for bar in (0, 1):
            axes.add_patch(Rectangle((x - 0.1 + 0.2 * bar, y - 0.2), 0.09, 0.4, facecolor=colour))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
