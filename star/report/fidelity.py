"""What a report says about how far the search's order of candidates can be believed: its certificate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from star.fidelity.certificate import AIM, Candidate, Certificate, Interval
from star.fidelity.document import NAME, read_certificate
from star.report.html import Html, element, join
from star.report.numbers import count, duration, spoken, value
from star.search.errors import RunDamaged
from star.search.objectives import find
from star.search.store import Evaluation

__all__ = [
    "FRONT_HEADS",
    "NORMAL",
    "fidelity_section",
    "front_rows",
    "headline",
    "judged",
    "not_certified",
    "read_own_certificate",
]

_FAILURES_AT_MOST = 5
_SURE = 0.9
NORMAL = 1.96
"""Standard errors on either side that hold 95 %."""

FRONT_HEADS = ("candidate", "proxy", "longer training", "among retrained", "among all")

Judged = list[tuple[str, "bool | None"]]


def read_own_certificate(directory: Path, evaluations: Mapping[int, Evaluation]) -> Certificate | None:
    """The certificate of a run directory; None where there is none yet.

    Args:
        directory: of the run.
        evaluations: of the run, by id.

    Raises:
        RunDamaged: the file is no certificate, or that of another run.
    """
    certificate = read_certificate(directory)
    if certificate is None:
        return None
    for item in certificate.candidates:
        own = evaluations.get(item.id)
        if own is None or own.key != item.genome or own.objectives.get("quality") != item.proxy:
            raise RunDamaged(f"{directory / NAME} is of another run: candidate {item.id} is not this run's")
    for member in certificate.front:
        own = evaluations.get(member.id)
        if own is None or own.objectives.get("quality") != member.proxy:
            raise RunDamaged(f"{directory / NAME} is of another run: it has no candidate {member.id}")
    return certificate


# ---- in sentences --------------------------------------------------------------------------------------


def not_certified(run: Path) -> str:
    """What is said where there is no certificate."""
    return f"The ranking is not certified: star fidelity {run}"


def headline(certificate: Certificate) -> Judged:
    """The one or two sentences that belong beside what was found."""
    return [*_order(certificate), *_baseline(certificate)]


def judged(certificate: Certificate, evaluations: int | None = None) -> Judged:
    """Everything that the certificate says, and whether each is what one hopes for (None: neither).

    evaluations: that the run has by now, to say whether the certificate is behind.
    """
    sentences = [*headline(certificate), *_better_half(certificate), *_noise(certificate)]
    sentences += [*_front(certificate), *_assumptions(certificate), *_failures(certificate)]
    if evaluations is not None and evaluations != certificate.evaluations:
        sentences.append(
            (f"The run has gone on since, from {certificate.evaluations} to {evaluations} evaluations.", None)
        )
    return sentences


def _order(certificate: Certificate) -> Judged:
    tau, ranked = certificate.tau, len(certificate.ranked)
    if not tau.defined:
        return [(f"No order can be compared: {count(ranked, 'candidate')} could be retrained.", False)]
    good = True if tau.value >= AIM else False if tau.high < AIM else None
    times = "as long" if certificate.settings.budget == 1 else f"{certificate.settings.budget} times as long"
    return [
        (
            f"Kendall's tau between the order under the proxy and that after training {times} is "
            f"{_interval(tau)}, over {count(ranked, 'candidate')}; the aim is {AIM}.",
            good,
        )
    ]


def _baseline(certificate: Certificate) -> Judged:
    theirs, gain = certificate.parameter_count, certificate.gain
    if not certificate.tau.defined:
        return []
    if not theirs.defined:
        return [("All retrained candidates have equally many parameters, whose count orders none.", None)]
    verb = "better" if gain.value >= 0 else "worse"
    good = True if gain.low > 0 else False if gain.high < 0 else None
    by = f"{abs(gain.value):.2f} (difference {_minus(gain.low, '+.2f')} to {_minus(gain.high, '+.2f')})"
    return [(f"Parameter count alone reaches {_interval(theirs)}: the proxy is {verb} by {by}.", good)]


def _better_half(certificate: Certificate) -> Judged:
    tau = certificate.tau_better_half
    return [(f"Among the half that the proxy prefers, tau is {_interval(tau)}.", None)] if tau.defined else []


def _noise(certificate: Certificate) -> Judged:
    noise = certificate.noise
    if math.isnan(noise.deviation):
        return [("Every candidate has one longer training at most, which says nothing about seeds.", None)]
    text = f"Seeds alone move the quality of longer training by {noise.deviation:.4f} (standard deviation)"
    if not math.isnan(noise.flips):
        text += f"; two of them put {_percent(noise.flips)} of all pairs in opposite orders"
    if not math.isnan(noise.tau):
        text += f", and one agrees with the mean of the others by a tau of {_minus(noise.tau, '.2f')}"
    return [(text + ".", None)]


def _front(certificate: Certificate) -> Judged:
    sentences: Judged = []
    for name, rivals in (("among_retrained", "the retrained"), ("among_all", "all (others predicted)")):
        known = [chance for m in certificate.front if not math.isnan(chance := getattr(m, name))]
        if known:
            sure = sum(chance >= _SURE for chance in known)
            what = "member" if len(known) == 1 else "members"
            sentences.append(
                (
                    f"{sure} of {len(known)} {what} of the front {'is' if sure == 1 else 'are'} truly "
                    f"non-dominated with at least {_percent(_SURE)} probability, among {rivals}.",
                    None,
                )
            )
    return sentences


def _assumptions(certificate: Certificate) -> Judged:
    """What the front's probabilities make of objectives beside quality that are not known exactly."""
    if not certificate.front:
        return []
    sentences = []
    drawn = [
        f"{spoken(name, capital=False)} (off by {100 * error:.1f} % in the median)"
        for name, error in certificate.prediction_errors.items()
    ]
    if drawn:
        sentences.append(f"The probabilities draw predictions with their error, too: {', '.join(drawn)}.")
    predicted = [name for name in certificate.taken_as_exact if (item := find(name)) and item.device]
    trained = [name for name in certificate.taken_as_exact if name not in predicted]
    for names, why in (
        (trained, "which one short training from one seed has measured"),
        (predicted, "a prediction whose error this run has not measured"),
    ):
        sentences += [
            f"The probabilities take {spoken(name, capital=False)} as exact, {why}." for name in names
        ]
    return [(sentence, None) for sentence in sentences]


def _failures(certificate: Certificate) -> Judged:
    failures = certificate.failures
    if not failures:
        return []
    total = sum(len(item.qualities) for item in certificate.candidates)
    named = [f"candidate {item.id}, {reason}" for item, reason in failures[:_FAILURES_AT_MOST]]
    more = len(failures) - len(named)
    listed = "; ".join(named) + (f"; and {more} more" if more else "")
    return [(f"{len(failures)} of {count(total, 'longer training')} failed: {listed}.", False)]


def _interval(tau: Interval) -> str:
    return f"{_minus(tau.value, '.2f')} (95 %: {_minus(tau.low, '.2f')} to {_minus(tau.high, '.2f')})"


def _minus(number: float, form: str) -> str:
    """The number with a typographer's minus."""
    return f"{number:{form}}".replace("-", "−")


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def front_rows(certificate: Certificate) -> list[tuple[str, ...]]:
    """Cells of the front's members under `FRONT_HEADS`, in the order of the front."""
    errors = certificate.standard_error
    known = {item.id: item for item in certificate.candidates}
    rows = []
    for member in certificate.front:
        item = known.get(member.id)
        rows.append(
            (
                str(member.id),
                value("quality", member.proxy),
                "not retrained" if item is None else _longer(item, errors),
                *(
                    "–" if math.isnan(chance) else _percent(chance)
                    for chance in (member.among_retrained, member.among_all)
                ),
            )
        )
    return rows


def _longer(item: Candidate, errors: Mapping[int, float]) -> str:
    """Mean with the half width of its interval of 95 %, where seeds tell it."""
    if item.mean is None:
        return "failed"
    error = errors[item.id]
    width = "" if math.isnan(error) else f" ± {NORMAL * error:.4f}"
    return f"{value('quality', item.mean)}{width}"


# ---- on the page ---------------------------------------------------------------------------------------


def fidelity_section(certificate: Certificate | None, evaluations: int, run: Path) -> Html:
    """What the certificate says, and the front's probabilities; or how to make it."""
    if certificate is None:
        return join(
            element(
                "p",
                "The order of the candidates is the proxy's. How far it is that of longer training has not "
                "been measured. This retrains a sample and says so:",
                class_="lead",
            ),
            element("pre", f"star fidelity {run}", class_="command"),
        )
    return join(
        element("p", _lead(certificate), class_="lead"),
        element(
            "ul",
            *(
                element("li", text, class_={True: "good", False: "bad", None: None}[good])
                for text, good in judged(certificate, evaluations)
            ),
            class_="verdicts",
        ),
        _front_table(certificate),
    )


def _lead(certificate: Certificate) -> str:
    settings = certificate.settings
    from_front = sum(item.on_front for item in certificate.candidates)
    seeds = "one new seed" if settings.seeds == 1 else f"{settings.seeds} new seeds"
    return (
        f"{count(len(certificate.candidates), 'candidate')} ({from_front} of the front, the others spread "
        f"evenly over the ranks) were trained again for {certificate.steps * settings.budget:,} steps "
        f"instead of {certificate.steps:,}, from {seeds} each, in {duration(certificate.seconds)} of "
        "training. Intervals are bootstrapped over the candidates."
    )


def _front_table(certificate: Certificate) -> Html | None:
    rows = front_rows(certificate)
    if not rows:
        return None
    head = element("tr", *(element("th", name, class_="number") for name in FRONT_HEADS))
    body = [element("tr", *(element("td", cell, class_="number") for cell in row)) for row in rows]
    note = (
        "How probably each member of the front is truly non-dominated: among the candidates that were "
        "retrained, and among all, where the quality of those that were not is predicted from the proxy's by "
        "a line through those that were, with its scatter. What follows from the genome is exact, and "
        "budgets are judged by what the search recorded."
    )
    table = element("table", element("thead", head), element("tbody", *body))
    return join(element("div", table, class_="wide"), element("p", note, class_="lead"))
