"""The plots of a report, each a function from a run's summary to a matplotlib figure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from star.draw import family_colour
from star.genome import Genome, GenomeError
from star.report.figures import THEME, draw, generation_colour, new_figure
from star.report.numbers import axis, sign, slug, spoken
from star.report.summary import LARGEST, RunSummary
from star.search.budgets import judged
from star.search.front import candidates, non_dominated
from star.search.store import Evaluation
from star.sharing import LivPlan, resolve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Plot", "plots"]

_MARKERS = {"Transformer++": "s", "StripedMamba": "D", "LFM2": "^"}
_REFERENCE_STYLES = {"Transformer++": "-", "StripedMamba": "--", "LFM2": ":"}
_COLUMNS_AT_MOST = 40
_CURVES_AT_MOST = 300
_NAMED_POINTS = 12


@dataclass(frozen=True)
class Plot:
    """A figure with its place in the report.

    Attributes:
        name: of the PNG file and of the ids inside the SVG: letters, digits and hyphens.
        section: "front", "fidelity", "progress", "evolution" or "device".
        title, caption: plain text.
    """

    name: str
    section: str
    title: str
    caption: str
    figure: Figure


def plots(run: RunSummary) -> list[Plot]:
    """All plots that the run has data for."""
    with draw():
        made = [*_fronts(run), _hypervolume(run), *_scores(run), _curves(run), _classes(run), _sharing(run)]
    return [plot for plot in made if plot is not None]


# ---- the front ---------------------------------------------------------------------------------------


def objective_pairs(run: RunSummary) -> list[tuple[str, str]]:
    """(x, y) of each front plot: quality against each other objective where there is quality."""
    successes = candidates(run.evaluations)
    measured = [
        name
        for name in ("quality", "size", "cache", "flops")
        if successes and all(name in item.objectives for item in successes)
    ]
    searched = list(run.settings.objectives)
    if "quality" not in measured:
        return [(searched[0], name) for name in searched[1:]]
    others = [name for name in searched if name != "quality"]
    if not others:  # only quality was searched: size is what people ask for next
        others = [name for name in measured if name != "quality"][:1]
    return [(name, "quality") for name in others]


def _fronts(run: RunSummary) -> list[Plot]:
    return [_front(run, x, y) for x, y in objective_pairs(run)]


def _front(run: RunSummary, x: str, y: str) -> Plot:
    figure, axes = new_figure(height=4.0)
    within = candidates(judged(run.evaluations, run.settings.budgets))
    for evaluation in within:
        generation = evaluation.generation or 0
        axes.scatter(
            evaluation.objectives[x],
            evaluation.objectives[y],
            s=26,
            color=generation_colour(generation, run.generations),
            edgecolors="none",
            zorder=2,
        )
    over = [item.objectives for item in run.over_budget]
    if over:
        axes.scatter(
            [item[x] for item in over],
            [item[y] for item in over],
            s=16,
            marker="x",
            color=THEME["soft"],
            linewidths=0.9,
            label="over budget",
            zorder=1,
        )
    _limits(axes, run, x, y)
    points = sorted((item.objectives[x], item.objectives[y], item.id) for item in run.front)
    _staircase(axes, [(a, b) for a, b, _ in points], (sign(x), sign(y)))
    for a, b, id in points:
        mark = axes.scatter(
            a, b, s=62, facecolors="none", edgecolors=THEME["accent"], linewidths=1.4, zorder=4
        )
        mark.set_urls([f"#candidate-{id}"])
        if len(points) <= _NAMED_POINTS:
            axes.annotate(
                str(id), (a, b), (4, 4), textcoords="offset points", fontsize=7, color=THEME["accent"]
            )
    for name, reference in run.references.items():
        if reference.ok and x in reference.objectives and y in reference.objectives:
            axes.scatter(
                reference.objectives[x],
                reference.objectives[y],
                s=52,
                marker=_MARKERS.get(name, "P"),
                color=THEME["warm"],
                edgecolors=THEME["page"],
                linewidths=0.8,
                label=name,
                zorder=5,
            )
    axes.set_xlabel(axis(x))
    axes.set_ylabel(axis(y))
    _engineering(axes, x, y)
    _best_at_origin(axes, x, y)
    _generation_key(axes, run.generations)
    searched = x in run.settings.objectives and y in run.settings.objectives
    note = "" if searched else f" {spoken(x)} was measured, and not searched for."
    return Plot(
        f"front-{slug(x)}-{slug(y)}",
        "front",
        f"{spoken(y)} against {spoken(x, capital=False)}",
        "Every candidate, pale in the first generation and strong in the last; rings mark the front, "
        f"down and left is better. Squares, diamonds and triangles are layouts that people designed.{note}",
        figure,
    )


def _staircase(
    axes: Axes, points: Sequence[tuple[float, float]], signs: tuple[float, float] = (1.0, 1.0)
) -> None:
    """The border of what the points dominate in these two objectives; a sign of -1: more is better."""
    if len(points) < 2:
        return
    minimised = [(a * signs[0], b * signs[1]) for a, b in points]
    ordered = sorted(minimised[index] for index in non_dominated(minimised))
    best = [(a * signs[0], b * signs[1]) for a, b in ordered]
    axes.step(
        [a for a, _ in best],
        [b for _, b in best],
        where="post",
        color=THEME["accent"],
        linewidth=1.2,
        alpha=0.55,
        zorder=3,
    )


def _limits(axes: Axes, run: RunSummary, x: str, y: str) -> None:
    """Lines at the budgets."""
    for name, limit in run.settings.budgets.items():
        if name == x:
            axes.axvline(limit, color=THEME["warm"], linewidth=0.9, linestyle=":", label="budget")
        if name == y:
            axes.axhline(limit, color=THEME["warm"], linewidth=0.9, linestyle=":", label="budget")


def _best_at_origin(axes: Axes, x: str, y: str) -> None:
    """Turns the axis of what is better the more of it there is, so that down and left is better."""
    if sign(x) < 0:
        axes.invert_xaxis()
    if sign(y) < 0:
        axes.invert_yaxis()


def _generation_key(axes: Axes, generations: int) -> None:
    """Legend of the references and of the first and the last generation."""
    shown = sorted({0, max(0, generations - 1)})
    for generation in shown:
        colour = generation_colour(generation, generations)
        axes.scatter([], [], s=26, color=colour, label=f"generation {generation + 1}")
    axes.scatter([], [], s=62, facecolors="none", edgecolors=THEME["accent"], linewidths=1.4, label="front")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, handletextpad=0.3)


def _engineering(axes: Axes, x: str, y: str) -> None:
    """Large counts with M and G."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(6))
    for name, side in ((x, axes.xaxis), (y, axes.yaxis)):
        if name != "quality":
            side.set_major_formatter(EngFormatter(sep=" "))


# ---- progress ----------------------------------------------------------------------------------------


def _hypervolume(run: RunSummary) -> Plot | None:
    known = [(index + 1, volume) for index, volume in enumerate(run.hypervolumes) if volume is not None]
    if not known:
        return None
    figure, axes = new_figure()
    xs, ys = [x for x, _ in known], [y for _, y in known]
    axes.plot(xs, ys, color=THEME["accent"], linewidth=1.8, marker="o", markersize=4)
    axes.fill_between(xs, ys, min(ys), color=THEME["accent"], alpha=0.08, linewidth=0)
    _generation_axis(axes, run)
    axes.set_ylabel("hypervolume")
    objectives = ", ".join(run.settings.objectives)
    return Plot(
        "hypervolume",
        "progress",
        "Hypervolume by generation",
        f"Of everything found so far, in {objectives}, each scaled by the first generation's best and worst "
        "(reference point 1.1). It can only grow.",
        figure,
    )


def _scores(run: RunSummary) -> list[Plot]:
    """The distribution of each objective by generation: the searched ones, and quality where it is known."""
    members = candidates(run.evaluations)
    names = list(run.settings.objectives)
    if "quality" not in names and members and all("quality" in item.objectives for item in members):
        names.append("quality")
    return [_score(run, members, name) for name in names] if members else []


def _score(run: RunSummary, members: Sequence[Evaluation], name: str) -> Plot:
    from matplotlib.ticker import EngFormatter

    figure, axes = new_figure()
    best = math.inf
    side = sign(name)
    medians: list[tuple[int, float]] = []
    bests: list[tuple[int, float]] = []
    for generation in range(run.generations):
        values = [(item.objectives[name], item.id) for item in members if item.generation == generation]
        if not values:
            continue
        colour = generation_colour(generation, run.generations)
        # Spread sideways by id, so that equal values stay apart, the same way every time.
        places = [generation + 1 + 0.22 * math.sin(2.4 * id) for _, id in values]
        axes.scatter(places, [value for value, _ in values], s=16, color=colour, edgecolors="none", zorder=2)
        ordered = sorted(value for value, _ in values)
        middle = len(ordered) // 2
        median = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
        best = min(best, *(side * item for item in ordered))
        medians.append((generation + 1, median))
        bests.append((generation + 1, side * best))
    axes.plot(*zip(*medians, strict=True), color=THEME["muted"], linewidth=1.4, label="median")
    axes.plot(
        *zip(*bests, strict=True),
        color=THEME["accent"],
        linewidth=1.6,
        drawstyle="steps-post",
        label="best so far",
    )
    for reference_name, reference in run.references.items():
        if reference.ok and name in reference.objectives:
            axes.axhline(
                reference.objectives[name],
                color=THEME["warm"],
                linewidth=1.0,
                linestyle=_REFERENCE_STYLES.get(reference_name, "-."),
                label=reference_name,
            )
    _generation_axis(axes, run)
    axes.set_ylabel(axis(name))
    if name != "quality":
        axes.yaxis.set_major_formatter(EngFormatter(sep=" "))
    if side < 0:
        axes.invert_yaxis()
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, handlelength=1.4)
    return Plot(
        f"scores-{slug(name)}",
        "progress",
        f"{spoken(name)} by generation",
        "Every candidate where it was first trained, their median, and the best so far. Lower is better.",
        figure,
    )


def _curves(run: RunSummary) -> Plot | None:
    """Learning curves: all pale, the front and the references strong."""
    drawn = [(item, curve_points(item)) for item in run.evaluations]
    drawn = [(item, points) for item, points in drawn if len(points) > 1]
    if not drawn:
        return None
    front_ids = {item.id for item in run.front}
    references = {item.id: name for name, item in run.references.items()}
    important = [pair for pair in drawn if pair[0].id in front_ids or pair[0].id in references]
    others = [pair for pair in drawn if pair not in important]
    figure, axes = new_figure(height=3.8)
    for item, points in others[-_CURVES_AT_MOST:]:
        _curve(axes, points, THEME["warm"] if item.failed else THEME["soft"], 0.7, "-", 0.55)
    for item, points in important:
        if item.id in front_ids:
            _curve(axes, points, THEME["accent"], 1.2, "-", 0.9)
        if item.id in references:
            style = _REFERENCE_STYLES.get(references[item.id], "-.")
            _curve(axes, points, THEME["warm"], 1.4, style, 1.0)
    steps = max(points[-1][0] for _, points in drawn)
    # The fall of the first steps would flatten the rest.
    late = [loss for _, points in drawn for step, loss, _ in points if step >= 0.3 * steps]
    if late and max(late) > min(late):
        room = 0.06 * (max(late) - min(late))
        axes.set_ylim(min(late) - room, max(late) + room)
    for text, colour, style in (("front", THEME["accent"], "-"), ("other candidates", THEME["soft"], "-")):
        axes.plot([], [], color=colour, linestyle=style, label=text)
    for name in references.values():
        style = _REFERENCE_STYLES.get(name, "-.")
        axes.plot([], [], color=THEME["warm"], linestyle=style, label=name)
    axes.set_xlabel("step")
    axes.set_ylabel("bits per byte in training")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3, handlelength=1.4)
    return Plot(
        "curves",
        "progress",
        "Learning curves",
        "Training loss of every candidate on the same text in the same order; dots are held-out loss. The "
        "first steps may lie above the frame.",
        figure,
    )


def _curve(
    axes: Axes,
    points: Sequence[tuple[float, float, float | None]],
    colour: str,
    width: float,
    style: str,
    opacity: float,
) -> None:
    steps = [step for step, _, _ in points]
    losses = [loss for _, loss, _ in points]
    axes.plot(steps, losses, color=colour, linewidth=width, linestyle=style, alpha=opacity)
    held_out = [(step, value) for step, _, value in points if value is not None]
    if held_out and width > 1:
        axes.scatter([s for s, _ in held_out], [v for _, v in held_out], s=9, color=colour, zorder=4)


def curve_points(evaluation: Evaluation) -> list[tuple[float, float, float | None]]:
    """(step, training loss, held-out loss or None) of a learning curve; other rows are left out."""
    points = []
    for row in evaluation.curve:
        if not isinstance(row, (list, tuple)) or len(row) != 3:
            continue
        step, loss, held_out = row
        if _is_number(step) and _is_number(loss) and (held_out is None or _is_number(held_out)):
            points.append((step, loss, held_out))
    return points


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LARGEST


# ---- evolution ---------------------------------------------------------------------------------------


def _classes(run: RunSummary) -> Plot | None:
    """A table of cells: a class a row, a generation a column, the stronger the more common."""
    columns = _sampled(run)
    counts = [Counter(plan.entry for plans in members for plan in plans) for _, members in columns]
    entries = sorted({entry for count in counts for entry in count}, key=lambda entry: entry.id)
    if not entries:
        return None
    shares = [{entry: count[entry] / max(1, count.total()) for entry in entries} for count in counts]
    most = max(max(share.values()) for share in shares)
    figure, axes = new_figure(height=1.3 + 0.22 * len(entries))
    for column, share in enumerate(shares):
        for row, entry in enumerate(entries):
            strength = share[entry] / most
            if strength > 0:
                axes.bar(
                    column,
                    0.92,
                    width=0.94,
                    bottom=row - 0.46,
                    color=family_colour(entry.family),
                    alpha=0.12 + 0.88 * strength,
                    linewidth=0,
                )
    axes.set_yticks(range(len(entries)), [entry.name for entry in entries])
    axes.set_ylim(len(entries) - 0.5, -0.5)
    every = max(1, len(columns) // 10)
    axes.set_xticks(range(0, len(columns), every), [str(g + 1) for g, _ in columns[::every]])
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_xlabel("generation")
    axes.grid(False)
    axes.tick_params(length=0)
    return Plot(
        "classes",
        "evolution",
        "LIV classes of the survivors",
        f"Share of each class among all LIVs of a generation's survivors; the strongest cell is {most:.0%}.",
        figure,
    )


def _sharing(run: RunSummary) -> Plot | None:
    """How many LIVs of a backbone use others' weights or features, on average."""
    columns = [(generation, members) for generation, members in _sampled(run) if members]
    if not columns:
        return None
    figure, axes = new_figure()
    weights = [_mean(sum(p.featurizer_owner != p.index for p in plans) for plans in m) for _, m in columns]
    features = [_mean(sum(p.source is not None for p in plans) for plans in m) for _, m in columns]
    xs = [generation + 1 for generation, _ in columns]
    axes.plot(xs, weights, color=THEME["accent"], linewidth=1.8, marker="o", markersize=4, label="weights")
    axes.plot(xs, features, color=THEME["warm"], linewidth=1.8, marker="s", markersize=4, label="features")
    axes.set_ylim(bottom=0)
    _generation_axis(axes, run)
    axes.set_ylabel("LIVs of a backbone")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, handlelength=1.4)
    return Plot(
        "sharing",
        "evolution",
        "Sharing among the survivors",
        "LIVs that use another's featurizer weights, and LIVs that reuse another's features, "
        f"of {run.settings.depth} in a backbone, on average over a generation's survivors.",
        figure,
    )


def _sampled(run: RunSummary) -> list[tuple[int, list[tuple[LivPlan, ...]]]]:
    """(generation, plans of its survivors), of evenly spaced generations where there are too many to draw."""
    total = len(run.populations)
    wanted = list(range(total))
    if total > _COLUMNS_AT_MOST:
        last = _COLUMNS_AT_MOST - 1
        wanted = sorted({round(index * (total - 1) / last) for index in range(_COLUMNS_AT_MOST)})
    return [(generation, _plans(run.populations[generation])) for generation in wanted]


def _plans(keys: Iterable[str]) -> list[tuple[LivPlan, ...]]:
    plans = []
    for key in keys:
        try:
            plans.append(resolve(Genome.parse(key)))
        except GenomeError:
            continue  # a damaged record: the page says so where it lists the candidate
    return plans


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)


def _generation_axis(axes: Axes, run: RunSummary) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if run.generations <= 1:
        axes.set_xlim(0.5, 1.5)
    axes.set_xlabel("generation")
