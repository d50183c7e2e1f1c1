"""A genome in the terminal: one line a LIV, sharing as lines in the margins."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.text import Text

from star.config import ModelConfig
from star.draw.arcs import Arc, family_colour, family_order, feature_arcs, featurizer_arcs, lanes
from star.genome import Genome
from star.sharing import LivPlan, resolve

# Styles of neighbouring sharing groups, readable on dark and on light backgrounds.
_GROUP_STYLES = ("blue", "red", "green", "magenta", "yellow", "cyan")

_Cell = tuple[str, str]  # a character and its style
_ASCII = str.maketrans("╭├╰╮┤╯│─●◀■×", "++++++|-*<#x")


def terminal(genome: Genome, config: ModelConfig | None = None) -> RenderableType:
    """The backbone for a terminal, from 80 columns on for 24 LIVs.

    Args:
        genome: what to draw.
        config: with it parameters and cache are counted as well (which imports torch).

    Raises:
        GenomeError: the genome is not valid; the message names the gene.
    """
    plans = resolve(genome)
    parts: list[RenderableType] = [_Backbone(genome, plans), Text()]
    families = Counter(plan.entry.family for plan in plans)
    legend = Text("  ")
    for family in sorted(families, key=family_order):
        legend.append("■ ", family_colour(family)).append(f"{family} {families[family]}   ")
    legend.rstrip()
    parts.append(legend)
    if featurizer_arcs(plans):
        parts.append(Text("  lines on the left: LIVs that use the same featurizer weights", "dim"))
    if feature_arcs(plans):
        parts.append(Text("  lines on the right: ● computes features, ◀ reuses them", "dim"))
    if config is not None:
        parts.append(Text("  " + _costs(genome, config)))
    return _Ascii(Group(*parts))


def _costs(genome: Genome, config: ModelConfig) -> str:
    from star import cost

    parameters = cost.parameters(genome, config)
    cache = cost.cache_bytes(genome, config, length=4096)
    return (
        f"width {config.width}: {parameters:,} parameters (no embeddings, norms, biases)\n"
        f"  cache at 4,096 tokens in bfloat16: {cache:,} bytes"
    )


@dataclass(frozen=True)
class _Layout:
    """Characters that a lane of arcs takes, and whether the genes are printed."""

    pitch: int
    genes: bool


class _Backbone:
    """One line a LIV between two margins with arcs; takes the widest layout that the console has room for."""

    def __init__(self, genome: Genome, plans: Sequence[LivPlan]) -> None:
        self.texts = [str(gene) for gene in genome]
        self.plans = plans
        self.left = lanes(featurizer_arcs(plans))
        self.right = lanes(feature_arcs(plans))
        self.notes = [
            "" if plan.source is None else f"{', '.join(plan.shared)} of {plan.source + 1}" for plan in plans
        ]
        self.number_width = len(str(len(plans)))
        self.name_width = max(len(plan.entry.name) for plan in plans) + 2
        self.gene_width = max(len(text) for text in self.texts)
        self.note_width = max(len(note) for note in self.notes)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        layouts = [_Layout(pitch, genes) for genes in (True, False) for pitch in (2, 1)]
        fitting = [layout for layout in layouts if self._width(layout) <= options.max_width]
        layout = fitting[0] if fitting else layouts[-1]
        left, right = self.left, self.right
        hidden = 0
        while self._width(layout, left, right) > options.max_width and (left or right):
            # Too narrow even so: drop the outermost lane of the fuller margin, and say so.
            if len(left) > len(right):
                hidden, left = hidden + len(left[-1]), left[:-1]
            else:
                hidden, right = hidden + len(right[-1]), right[:-1]
        left_margin, right_margin = _Margin(left, layout.pitch), _Margin(right, layout.pitch)
        for row in range(len(self.plans)):
            line = Text(no_wrap=True, overflow="crop")
            for text, style in (
                *left_margin.on_the_left(row),
                *self._centre(row, layout),
                *right_margin.on_the_right(row),
            ):
                line.append(text, style)
            line.rstrip()
            yield line
        if hidden:
            yield Text(f"  {hidden} sharing groups are not drawn: the terminal is too narrow", "yellow")

    def _width(
        self, layout: _Layout, left: Sequence[object] | None = None, right: Sequence[object] | None = None
    ) -> int:
        count = len(self.left if left is None else left) + len(self.right if right is None else right)
        centre = self.number_width + 1 + self.name_width + 2 + self.note_width
        return layout.pitch * count + 4 + centre + (self.gene_width + 2 if layout.genes else 0)

    def _centre(self, row: int, layout: _Layout) -> list[_Cell]:
        entry = self.plans[row].entry
        name = f" {entry.name}".ljust(self.name_width)
        cells = [
            (f"{row + 1:>{self.number_width}} ", "dim"),
            (name, f"white on {family_colour(entry.family)}"),
            ("  ", ""),
        ]
        if layout.genes:
            cells.append((self.texts[row].ljust(self.gene_width) + "  ", "dim"))
        return [*cells, (self.notes[row].ljust(self.note_width), "")]


class _Margin:
    """Lanes of arcs beside the backbone, as characters.

    Args:
        lanes: arcs of each lane, the lane nearest to the backbone first.
        pitch: characters from lane to lane.
    """

    def __init__(self, lanes: Sequence[Sequence[Arc]], pitch: int) -> None:
        self.pitch = pitch
        # Per lane: row -> arc that passes or touches it. Per row: lane and arc of the LIV's own group.
        self.rows: list[dict[int, Arc]] = []
        self.own: dict[int, tuple[int, Arc]] = {}
        for level, lane in enumerate(lanes):
            self.rows.append({row: arc for arc in lane for row in range(arc.members[0], arc.members[-1] + 1)})
            self.own.update({row: (level, arc) for arc in lane for row in arc.members})

    def on_the_left(self, row: int) -> list[_Cell]:
        """One row, outermost lane first; the last cell touches the LIV."""
        level, own = self.own.get(row, (-1, None))
        style = _style(own)
        cells = []
        for lane in reversed(range(len(self.rows))):
            cells.append(self._lane(lane, row, "╭├╰"))
            cells.append((("─" if lane <= level else " ") * (self.pitch - 1), style))
        return [*cells, ("─" if own else " ", style)]

    def on_the_right(self, row: int) -> list[_Cell]:
        """One row, innermost lane first, after a mark of who computes and who reuses."""
        level, own = self.own.get(row, (-1, None))
        style = _style(own)
        mark = "   " if own is None else " ●─" if row == own.members[0] else " ◀─"
        cells = [(mark, style)]
        for lane in range(len(self.rows)):
            cells.append((("─" if lane <= level else " ") * (self.pitch - 1), style))
            cells.append(self._lane(lane, row, "╮┤╯"))
        return cells

    def _lane(self, lane: int, row: int, corners: str) -> _Cell:
        """A corner at a member, else the line of an arc that passes, else one that crosses the lane."""
        level, own = self.own.get(row, (-1, None))
        arc = self.rows[lane].get(row)
        if own is not None and level == lane:
            place = 0 if row == own.members[0] else 2 if row == own.members[-1] else 1
            return (corners[place], _style(own))
        if arc is not None:
            return ("│", _style(arc))
        return ("─" if lane < level else " ", _style(own))


def _style(arc: Arc | None) -> str:
    if arc is None:
        return ""
    return _GROUP_STYLES[arc.number % len(_GROUP_STYLES)]


class _Ascii:
    """A renderable in plain ASCII where the console has no other characters."""

    def __init__(self, inner: RenderableType) -> None:
        self.inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        if not options.ascii_only:
            yield self.inner
            return
        for line in console.render_lines(self.inner, options, pad=False):
            text = Text(no_wrap=True)
            for segment in line:
                text.append(segment.text.translate(_ASCII), segment.style)
            yield text
