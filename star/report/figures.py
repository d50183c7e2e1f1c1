"""Matplotlib figures as pictures: PNG files in light colours, and inline SVG whose colours the page decides.

A figure is drawn once, in the colours of `THEME`. In the SVG each of these becomes a CSS variable, so one
drawing serves the light and the dark page. Text stays text: it can be selected and read aloud. Nothing is
random and nothing names a time or a version, so equal runs give equal bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["THEME", "draw", "generation_colour", "new_figure", "png", "svg"]

# Light colours of the page. Their names are the page's CSS variables.
THEME = {
    "ink": "#1c2530",
    "muted": "#64707d",
    "line": "#dde3e9",
    "soft": "#b4bfcb",
    "accent": "#1f6feb",
    "warm": "#c2410c",
    "page": "#fefefe",
}

# Colours that `star.draw` uses for pictures on white; on a dark page they must turn as well.
DRAWING_THEME = {
    "#1f2937": "ink",
    "#9ca3af": "muted",
    "#1f4e9c": "group-1",
    "#b3361b": "group-2",
    "#0f7a5a": "group-3",
    "#7b3fa0": "group-4",
    "#8a6a00": "group-5",
    "#b0276f": "group-6",
}

_EARLY, _MIDDLE, _LATE = (170, 180, 191), (47, 158, 158), (31, 94, 214)
_DOTS_PER_INCH = 160
_WIDTH, _HEIGHT = 5.4, 3.5

_STYLE: Any = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9.0,
    "axes.edgecolor": THEME["soft"],
    "axes.labelcolor": THEME["muted"],
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": THEME["line"],
    "grid.linewidth": 0.7,
    "xtick.color": THEME["muted"],
    "ytick.color": THEME["muted"],
    "text.color": THEME["ink"],
    "text.parse_math": False,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "legend.labelcolor": THEME["ink"],
    "figure.facecolor": THEME["page"],
    "axes.facecolor": "none",
    "savefig.facecolor": "auto",
    "svg.fonttype": "none",
}
_ID = re.compile(r'\bid="([^"]+)"')
_LOCAL_REFERENCE = re.compile(r'(xlink:href="#|url\(#)')
_HEAD = re.compile(r"^.*?(?=<svg)", re.DOTALL)
_METADATA = re.compile(r"<metadata>.*?</metadata>", re.DOTALL)
_SIZE = re.compile(r'(<svg[^>]*?) (?:width|height)="[^"]*"')
_BACKGROUND = re.compile(r'<g id="patch_1">.*?</g>', re.DOTALL)


@contextmanager
def draw() -> Iterator[None]:
    """The style of all figures, for drawing and for saving."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        yield


def new_figure(height: float = _HEIGHT, width: float = _WIDTH) -> tuple[Figure, Axes]:
    """An empty figure of the page's width, in inches, without any window or global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=_DOTS_PER_INCH)
    return figure, figure.add_subplot()


def generation_colour(generation: int, generations: int) -> str:
    """From pale (the first generation) to strong (the last)."""
    place = generation / max(1, generations - 1)
    first, second = (_EARLY, _MIDDLE) if place < 0.5 else (_MIDDLE, _LATE)
    share = 2 * place if place < 0.5 else 2 * place - 1
    parts = (round(a + (b - a) * share) for a, b in zip(first, second, strict=True))
    return "#" + "".join(f"{part:02x}" for part in parts)


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    data = io.BytesIO()
    with draw():
        figure.savefig(data, format="png", metadata={"Software": None})
    return data.getvalue()


def svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an inline SVG element.

    Args:
        name: makes the ids inside it its own; letters, digits and hyphens.
        description: for those who can not see it; plain text, which is escaped here.
    """
    import matplotlib

    data = io.StringIO()
    with draw(), matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(data, format="svg", metadata={"Date": None, "Creator": None})
    text = _METADATA.sub("", _HEAD.sub("", data.getvalue()))
    text = _BACKGROUND.sub("", text, count=1)
    for _ in range(2):
        text = _SIZE.sub(r"\1", text, count=1)
    text = _ID.sub(rf'id="{name}-\1"', text)
    text = _LOCAL_REFERENCE.sub(rf"\g<1>{name}-", text)
    # Links to a place on the page, which the line before has renamed with the rest.
    text = text.replace(f'xlink:href="#{name}-candidate-', 'href="#candidate-')
    for name_of_colour, colour in THEME.items():
        text = text.replace(colour, f"var(--{name_of_colour})")
    for colour, variable in DRAWING_THEME.items():
        text = text.replace(colour, f"var(--{variable})")
    return text.strip().replace("<svg", f'<svg role="img" aria-label="{_escape(description)}"', 1)


def _escape(text: str) -> str:
    from html import escape

    return escape(text, quote=True)
