"""The tables of `benchmarks.fidelity`: rank correlations, their time, and rates at several widths."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.fidelity_plan import TRUTH, Choice, Plan, transfer_name
from benchmarks.fidelity_records import Key, Record
from star.cost import parameters
from star.extrapolation import evaluation_steps, quality_of
from star.fidelity.statistics import bootstrap_interval, kendall_tau, pooled_deviation
from star.genome import Genome
from star.proxy import ProxySettings
from star.search import preset

BY_SIZE = "parameter count alone (more is better)"

Records = Mapping[Key, Record]
Values = dict[str, float]


@dataclass(frozen=True)
class Rating:
    """How well one proxy orders the genomes.

    `mutants`: tau of the layouts' mutants alone, `behind`: tau of the best choice minus this one's; NaN where
    unknown. `best`: whether it is that choice. `default`: whether `star search` trains so.
    """

    name: str
    genomes: int
    seconds: float
    tau: float
    interval: tuple[float, float]
    mutants: float
    behind: float
    behind_interval: tuple[float, float]
    best: bool = False
    default: bool = False

    @property
    def per_second(self) -> float:
        return self.tau / self.seconds if self.seconds else math.nan

    @property
    def standard_error(self) -> float:
        """Of tau, from its interval."""
        return (self.interval[1] - self.interval[0]) / (2 * 1.96)


def report(plan: Plan, records: Records, minutes: float, rounds: int = 2000) -> str:
    """Markdown. Says what is missing where not all has been trained. `rounds`: of the bootstrap."""
    truth = true_quality(plan, records)
    lines = ["# Which short training predicts long ones", "", *_circumstances(plan, records, minutes), ""]
    ratings = rate(plan, records, truth, rounds) if len(truth) > 1 else []
    if ratings:
        lines += [*_ratings_table(plan, ratings, records), ""]
        lines += [*_conclusion(ratings), ""]
    else:
        lines += ["Not enough has been trained yet for a rank correlation.", ""]
    lines += [*_noise(plan, records), "", *_transfer_table(plan, records), ""]
    lines.append("`python -m benchmarks.fidelity --report-only --records benchmarks/data/fidelity.csv`")
    return "\n".join([*lines, ""])


# What the trainings say


def true_quality(plan: Plan, records: Records) -> Values:
    """Genome -> mean held-out loss over the seeds of the truth that there are; none where all failed."""
    values: dict[str, list[float]] = {}
    for record in records.values():
        if record.training == TRUTH and record.ok:
            quality, _ = quality_of(record.curve, plan.truth.settings)
            values.setdefault(record.genome, []).append(quality)
    return {
        genome: statistics.fmean(values[genome])
        for genome in map(str, plan.truth.genomes)
        if genome in values
    }


def proxy_quality(choice: Choice, plan: Plan, records: Records) -> Values:
    """Genome -> what the proxy says; a failed training is worse than all others."""
    training = plan.trainings[choice.training]
    found = [record for record in records.values() if record.training == choice.training]
    if choice.halving:
        return _halved({record.genome: record for record in found}, _rungs(training.settings))
    values = {record.genome: _read(record, choice.settings) for record in found}
    worst = max((value for value in values.values() if math.isfinite(value)), default=0.0)
    return {genome: value if math.isfinite(value) else worst + 1 for genome, value in values.items()}


def _read(record: Record, settings: ProxySettings) -> float:
    """Quality under settings that may stop before the recorded training did; infinite where it failed."""
    curve = [point for point in record.curve if point.step <= settings.steps]
    if not curve or curve[-1].step < settings.steps or curve[-1].validation is None:
        return math.inf
    return quality_of(curve, settings)[0]


def _rungs(settings: ProxySettings) -> list[int]:
    """Half of the training, half of that, and so on while the curve has an evaluation there."""
    rungs = [settings.steps]
    while rungs[0] % 2 == 0 and (rungs[0] // 2) % settings.evaluate_every == 0:
        rungs.insert(0, rungs[0] // 2)
    return rungs


def _halved(found: Mapping[str, Record], rungs: list[int]) -> Values:
    """Successive halving: at each rung the better half goes on; those that stop earlier are worse."""
    alive, scores = list(found), dict.fromkeys(found, math.inf)
    for place, rung in enumerate(rungs):
        losses = {
            genome: next((p.validation for p in found[genome].curve if p.step == rung), None)
            for genome in alive
        }
        known = {genome: math.inf if loss is None else loss for genome, loss in losses.items()}
        # No loss is above 100 bits per byte, so a later rung always counts for more.
        scores |= {g: min(loss, 100.0) + 100.0 * (len(rungs) - place) for g, loss in known.items()}
        alive = sorted(alive, key=lambda genome: known[genome])[: max(1, len(alive) // 2)]
    return scores


# What they cost


def costs(choice: Choice, plan: Plan, records: Records) -> Values:
    """Genome -> processor seconds of the proxy.

    Equal steps of a genome cost equally much, whatever the machine did at the time: the unit costs are
    medians over all trainings with this batch size and width.
    """
    settings, config = choice.settings, plan.trainings[choice.training].config
    same = [
        name
        for name, item in plan.trainings.items()
        if name != TRUTH and item.settings.batch_size == settings.batch_size and item.config == config
    ]
    units: dict[str, list[Record]] = {}
    for record in records.values():
        if record.training in same and record.ok and not math.isnan(record.step_seconds):
            units.setdefault(record.genome, []).append(record)
    steps, evaluations = float(settings.steps), float(_evaluations(settings))
    if choice.halving:
        rungs = _rungs(settings)
        shares = [0.5**place for place in range(len(rungs))]
        evaluations = sum(shares)
        steps = sum(s * (b - a) for s, a, b in zip(shares, [0, *rungs], rungs, strict=False))
    return {
        genome: statistics.median(r.build_seconds for r in found)
        + steps * statistics.median(r.step_seconds for r in found)
        + evaluations * statistics.median(r.evaluation_seconds for r in found)
        for genome, found in units.items()
    }


def _evaluations(settings: ProxySettings) -> int:
    """How often a training has to be evaluated for its quality."""
    if settings.extrapolate_to > settings.steps and settings.evaluate_every:
        return math.ceil(settings.steps / settings.evaluate_every)
    return len(evaluation_steps(settings))


# Rank correlation


def rate(plan: Plan, records: Records, truth: Values, rounds: int = 2000) -> list[Rating]:
    """Parameter count alone and every choice that has been trained, in the plan's order."""
    config = plan.truth.config
    sizes = {genome: -float(parameters(Genome.parse(genome), config)) for genome in truth}
    known = {choice: proxy_quality(choice, plan, records) for choice in plan.choices}
    known = {choice: values for choice, values in known.items() if len(set(values) & set(truth)) > 1}
    # Those that lack genomes have an easier or a harder task than the others.
    most = max((len(set(values) & set(truth)) for values in known.values()), default=0)
    complete = [choice for choice, values in known.items() if len(set(values) & set(truth)) == most]
    best = max(complete, key=lambda choice: _tau_of(list(truth), truth, known[choice]), default=None)
    against = known[best] if best else {}
    count = len(plan.truth.genomes) // 2
    mutants = frozenset(map(str, plan.truth.genomes[count:]))
    ratings = [_rating(BY_SIZE, sizes, truth, against, 0.0, mutants, rounds)]
    for choice, values in known.items():
        spent = costs(choice, plan, records)
        mean = statistics.fmean(spent.values()) if spent else math.nan
        rating = _rating(choice.name, values, truth, against, mean, mutants, rounds)
        ratings.append(replace(rating, best=choice == best, default=is_default(choice)))
    return ratings


def is_default(choice: Choice) -> bool:
    """Whether the smallest preset of `star search` trains so; when it looks on the way is left open."""
    default = replace(preset("demo").proxy, dtype="float32", device="cpu")
    return not choice.halving and default == replace(
        choice.settings, evaluate_every=default.evaluate_every, seed=default.seed
    )


def _tau_of(genomes: list[str], truth: Values, values: Values) -> float:
    both = [genome for genome in genomes if genome in values]
    return kendall_tau([truth[g] for g in both], [values[g] for g in both])


def _rating(
    name: str,
    values: Values,
    truth: Values,
    best: Values,
    seconds: float,
    mutants: frozenset[str],
    rounds: int,
) -> Rating:
    def difference(true: object, ours: object, other: object) -> float:
        return kendall_tau(true, other) - kendall_tau(true, ours)  # type: ignore[arg-type]

    both = [genome for genome in truth if genome in values]
    true, ours = (np.array([column[genome] for genome in both]) for column in (truth, values))
    three = [genome for genome in both if genome in best]
    columns = [np.array([column[genome] for genome in three]) for column in (truth, values, best)]
    compared = len(three) > 1
    return Rating(
        name,
        len(both),
        seconds,
        kendall_tau(true, ours),
        bootstrap_interval(kendall_tau, true, ours, rounds=rounds),
        _tau_of([genome for genome in both if genome in mutants], truth, values),
        difference(*columns) if compared else math.nan,
        bootstrap_interval(difference, *columns, rounds=rounds) if compared else (math.nan, math.nan),
    )


def on_front(ratings: Iterable[Rating]) -> set[str]:
    """Names of those that no other beats in time and in tau."""
    known = [item for item in ratings if not math.isnan(item.tau + item.seconds)]
    return {
        item.name
        for item in known
        if not any(
            (other.seconds <= item.seconds and other.tau > item.tau)
            or (other.seconds < item.seconds and other.tau >= item.tau)
            for other in known
        )
    }


# Markdown


def _circumstances(plan: Plan, records: Records, minutes: float) -> list[str]:
    truth = plan.truth
    config, settings = truth.config, truth.settings
    trained = sum(key[0] == TRUTH for key in records)
    wanted = len(truth.genomes) * len(truth.seeds)
    failed = sum(not record.ok for record in records.values())
    spent = sum(record.processor_seconds for key, record in records.items() if key[0] != TRUTH)
    layouts, half = 3, len(truth.genomes) // 2
    return [
        f"{len(truth.genomes)} genomes of {truth.genomes[0].depth} LIVs at width {config.width}: {layouts} "
        f"layouts, {half - layouts} random ones, {len(truth.genomes) - half} mutants of the layouts. The "
        f"truth is the held-out loss after {settings.steps} steps of {settings.batch_size} x "
        f"{settings.length} bytes, mean of {len(truth.seeds)} seeds. Every proxy is trained once, with a "
        "seed that the truth does not have.",
        "",
        f"Trained: {trained} of {wanted} of the truth's trainings, {failed} failures. All proxies together "
        f"took {spent / 60:.1f} minutes of one core, of {minutes:g} that they may. Seconds are the "
        "processor's, one thread, of one candidate: building it, training, evaluation.",
    ]


def _ratings_table(plan: Plan, ratings: list[Rating], records: Records) -> list[str]:
    front, most = on_front(ratings), max(item.genomes for item in ratings)
    lines = [
        "Kendall's tau between proxy and truth, with 95 % intervals (bootstrap over genomes). In bold: no "
        "other choice is both faster and better.",
        "",
        "| proxy | seconds | tau | 95 % | of the mutants | tau a second | behind the highest, 95 % |",
        "|---|---|---|---|---|---|---|",
    ]
    for item in ratings:
        name = f"**{item.name}**" if item.name in front else item.name
        if item.genomes < most:
            name += f" ({item.genomes} genomes)"
        if item.default:
            name += " ← `star search`"
        low, high = item.behind_interval
        behind = (
            "–" if item.best or math.isnan(item.behind) else f"{item.behind:.2f} ({low:.2f} to {high:.2f})"
        )
        lines.append(
            f"| {name} | {item.seconds:.2f} | {item.tau:.3f} | {item.interval[0]:.2f} to "
            f"{item.interval[1]:.2f} | {_number(item.mutants)} | {_number(item.per_second)} | {behind} |"
        )
    missing = [item.name for item in plan.choices if item.name not in {rating.name for rating in ratings}]
    if missing:
        lines += ["", f"Not trained: {'; '.join(missing)}."]
    return lines


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"


def _conclusion(ratings: list[Rating]) -> list[str]:
    """What follows from the table."""
    most = max(item.genomes for item in ratings)
    trained = [item for item in ratings if item.seconds > 0 and item.genomes == most]
    if not trained:
        return []
    best = next(item for item in trained if item.best)
    quickest = max(trained, key=lambda item: item.per_second)
    enough = [item for item in trained if item.tau >= best.tau - best.standard_error]
    winner = min(enough, key=lambda item: (round(item.seconds, 2), -item.tau))
    untold = min((item for item in trained if item.behind_interval[0] <= 0), key=lambda item: item.seconds)
    default = next((item for item in ratings if item.default), None)
    lines = [
        "The winner is the cheapest choice within one standard error of the highest tau (the rule of Breiman "
        "et al., Classification and Regression Trees, 1984), of equal cost that with the higher tau; `star "
        f"search` trains so by default. By other rules: most tau a second, {quickest.name} "
        f"({quickest.per_second:.3f}), as the shortest training always has; the cheapest that these genomes "
        f"do not tell from the best with 95 % confidence, {untold.name} ({untold.tau:.3f}), which fewer "
        "genomes would make cheaper still.",
        "",
        f"Highest tau: {best.name} ({best.tau:.3f}). **Winner: {winner.name}** ({winner.tau:.3f}).",
    ]
    if default is not None and default is not winner:
        lines[-1] += f" The default is another: {default.name} ({default.tau:.3f})."
    lines += [
        "",
        "Not rows of their own: maximal-update parametrisation, which is the standard one at its base width "
        "(below is what it does at others), and bfloat16, which only CPUs with matrix units for it use, from "
        "width 512 on.",
    ]
    return lines


def _noise(plan: Plan, records: Records) -> list[str]:
    """How well the truth agrees with itself: what no proxy can be expected to exceed by much."""
    by_seed: dict[int, Values] = {}
    for record in records.values():
        if record.training == TRUTH and record.ok:
            quality, _ = quality_of(record.curve, plan.truth.settings)
            by_seed.setdefault(record.seed, {})[record.genome] = quality
    taus, spreads = [], []
    seeds = sorted(by_seed)
    for place, first in enumerate(seeds):
        for second in seeds[place + 1 :]:
            both = sorted(by_seed[first].keys() & by_seed[second].keys())
            if 2 * len(both) >= len(plan.truth.genomes):
                columns = [[by_seed[seed][genome] for genome in both] for seed in (first, second)]
                taus.append(kendall_tau(*columns))
    for genome in map(str, plan.truth.genomes):
        values = [by_seed[seed][genome] for seed in seeds if genome in by_seed[seed]]
        if len(values) > 1:
            spreads.append(values)
    if not taus or not spreads:
        return ["Seed noise of the truth: needs a second seed of half of the genomes."]
    all_values = list(true_quality(plan, records).values())
    return [
        f"Seed noise of the truth: two single seeds agree with tau {min(taus):.3f} to {max(taus):.3f}; a "
        f"seed's standard deviation is {pooled_deviation(spreads)[0]:.4f} bits per byte, that "
        f"between genomes {statistics.stdev(all_values):.4f}."
    ]


def _transfer_table(plan: Plan, records: Records) -> list[str]:
    """Mean loss of the layouts by width and rate."""
    widths = sorted({plan.trainings[name].config.width for name in plan.transfer})
    first = plan.trainings[plan.transfer[0]]
    base = first.settings.base_width
    lines = [
        "## Learning rates across widths",
        "",
        f"Mean held-out loss of the {len(first.genomes)} layouts after {first.settings.steps} steps, one "
        f'seed, heads of {first.config.head_dim}. The best rate of a row is bold; `parametrization="mup"` '
        f"with `base_width={base}` is to keep it where it is at width {base}.",
        "",
        "| parametrization | width | " + " | ".join(f"{rate:g}" for rate in plan.rates) + " |",
        "|---|---|" + "---|" * len(plan.rates),
    ]
    for kind in ("standard", "mup"):
        for width in widths:
            shown = "both" if width == base else kind
            if width == base and kind == "mup":
                continue
            losses = [_mean_loss(plan, records, transfer_name(kind, width, rate)) for rate in plan.rates]
            best = min((loss for loss in losses if loss is not None), default=None)
            cells = ["–" if v is None else f"**{v:.3f}**" if v == best else f"{v:.3f}" for v in losses]
            lines.append(f"| {shown} | {width} | " + " | ".join(cells) + " |")
    return lines


def _mean_loss(plan: Plan, records: Records, name: str) -> float | None:
    """None where not all genomes have been trained, or one failed."""
    training = plan.trainings[name]
    found = [r for r in records.values() if r.training == name and r.ok]
    if len(found) < len(training.genomes):
        return None
    return statistics.fmean(quality_of(record.curve, training.settings)[0] for record in found)
