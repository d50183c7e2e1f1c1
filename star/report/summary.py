"""A run's record, read and judged: the values that the report shows and the sentences that it says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from star.fidelity.certificate import Certificate
from star.fidelity.document import to_json as fidelity_json
from star.report.device import DeviceReport, budget_text, device_report
from star.report.fidelity import headline, not_certified, read_own_certificate
from star.report.numbers import count, difference, value
from star.search.budgets import is_over_budget, judged
from star.search.device import read_measured
from star.search.directory import RunDirectory
from star.search.errors import RunDamaged
from star.search.front import (
    Dominance,
    candidates,
    dominates,
    dominates_first_generation,
    front,
    hypervolume_by_generation,
)
from star.search.objectives import objective_vector
from star.search.rungs import saved_seconds
from star.search.settings import SearchSettings
from star.search.store import Evaluation, RunStore, StoredEvent
from star.targets import best

__all__ = ["Comparison", "RunSummary", "read_run"]

MAIN_REFERENCE = "Transformer++"

LARGEST = 1e100
"""No measured value is larger; beyond it, axes overflow."""


@dataclass(frozen=True)
class Comparison:
    """The search beside one reference layout that was trained by the same proxy.

    Attributes:
        name: of the layout.
        reference: its evaluation.
        quality: the best candidate's quality less the reference's (negative: better); None where either has
            none.
        better: candidates of better quality, of `successes` in all.
        dominating: members of the front that are nowhere worse in the searched objectives, somewhere better.
        savings: for size, cache and flops the smallest value among candidates of at least the reference's
            quality, with its candidate; nothing where no candidate has less.
    """

    name: str
    reference: Evaluation
    quality: float | None
    better: int
    successes: int
    dominating: int
    savings: Mapping[str, tuple[float, Evaluation]]

    def sentence(self, champion: Evaluation | None) -> str:
        """Whether the best candidate beats the reference in quality, in words."""
        name = self.name
        if not self.reference.ok:
            return f"{name} failed under the proxy, so there is nothing to compare with."
        if self.quality is None or champion is None:
            return f"{name} was trained, but there is no candidate yet that it can be compared with."
        ours, theirs = champion.objectives["quality"], self.reference.objectives["quality"]
        numbers = f"{value('quality', ours)} against {value('quality', theirs)} bits per byte"
        share = f"{self.better} of {count(self.successes, 'candidate')} better"
        if self.dominating:
            share += f", {self.dominating} of the front better or equal in every objective"
        if self.quality < 0:
            relative = difference(ours, theirs)
            return f"The best candidate beats {name}: {numbers} under the same proxy ({relative}; {share})."
        if self.quality == 0:
            return f"The best candidate equals {name}: {numbers} under the same proxy."
        relative = difference(ours, theirs)
        return f"No candidate beats {name}: the best has {numbers} under the same proxy ({relative})."

    def savings_sentence(self) -> str:
        """What is saved at the reference's quality, in words; empty where nothing is."""
        parts = []
        for name, (amount, evaluation) in self.savings.items():
            relative = difference(amount, self.reference.objectives[name])
            what = {"size": "fewer parameters", "cache": "less cache", "flops": "fewer FLOPs"}[name]
            parts.append(f"{relative.replace('less', what)} (candidate {evaluation.id})")
        if not parts:
            return ""
        listed = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
        return f"At no worse quality than {self.name}, the search found {listed}."


@dataclass(frozen=True)
class RunSummary:
    """Everything about a run that its report shows.

    Attributes:
        directory: of the run.
        settings: of the search.
        facts: recorded when it began: the corpus ("data"), versions.
        evaluations: all, by id; references among them.
        references: by name.
        populations: survivors' keys of each finished generation.
        front: the best, by the first objective.
        champion: the candidate of the best quality, or None.
        dominance: of the front over the first generation's.
        hypervolumes: by generation, as far as there are candidates; None before the first success.
        comparisons: one a reference.
        events: the run's diary.
        overhead: (seconds beside training, seconds in all) of the finished generations.
        device: how the search stands to the device that it was for, or None.
        certificate: how far the order of the candidates can be believed; None where it has not been measured.
    """

    directory: Path
    settings: SearchSettings
    facts: Mapping[str, Any]
    evaluations: tuple[Evaluation, ...]
    references: Mapping[str, Evaluation]
    populations: tuple[tuple[str, ...], ...]
    front: tuple[Evaluation, ...]
    champion: Evaluation | None
    dominance: Dominance
    hypervolumes: tuple[float | None, ...]
    comparisons: tuple[Comparison, ...]
    events: tuple[StoredEvent, ...]
    overhead: tuple[float, float]
    device: DeviceReport | None = None
    certificate: Certificate | None = None

    @property
    def over_budget(self) -> list[Evaluation]:
        """Candidates that exceed a budget."""
        return [item for item in judged(self.candidates, self.settings.budgets) if is_over_budget(item)]

    @property
    def finished(self) -> bool:
        return any(event.kind == "finished" for event in self.events)

    @property
    def candidates(self) -> list[Evaluation]:
        """The evaluations that belong to a generation, failed ones among them."""
        return [evaluation for evaluation in self.evaluations if evaluation.generation is not None]

    @property
    def failures(self) -> list[Evaluation]:
        return [evaluation for evaluation in self.evaluations if evaluation.failed]

    @property
    def stopped(self) -> list[Evaluation]:
        """Candidates whose training was ended at a rung."""
        return [evaluation for evaluation in self.evaluations if evaluation.stopped]

    @property
    def generations(self) -> int:
        """Generations that have candidates, finished or not."""
        return (
            max((item.generation for item in self.candidates if item.generation is not None), default=-1) + 1
        )

    @property
    def workers(self) -> int:
        """Of the last session that wrote into the record."""
        recorded = [event.data.get("workers") for event in self.events if event.kind == "session"]
        last = recorded[-1] if recorded else None
        return last if isinstance(last, int) else self.settings.worker_count()

    @property
    def training_seconds(self) -> float:
        """What all trainings took together, whichever worker did them."""
        return sum(evaluation.seconds for evaluation in self.evaluations)

    def by_key(self) -> dict[str, Evaluation]:
        return {evaluation.key: evaluation for evaluation in self.evaluations}

    def failure_reasons(self) -> list[tuple[str, list[Evaluation]]]:
        """Failures by the kind of their reason (what stands before a colon), the most frequent first."""
        kinds: dict[str, list[Evaluation]] = {}
        for evaluation in self.failures:
            kinds.setdefault((evaluation.reason or "").partition(":")[0].strip(), []).append(evaluation)
        return sorted(kinds.items(), key=lambda item: (-len(item[1]), item[0]))

    def status(self) -> str:
        """How far the run is, in words."""
        trained = count(len(self.candidates), "candidate")
        if self.finished:
            exhausted = any(event.kind == "finished" and event.data.get("exhausted") for event in self.events)
            note = "; then no new candidate could be made" if exhausted else ""
            return f"Finished: {trained} in {count(self.generations, 'generation')}{note}."
        if not self.candidates:
            return f"No candidate has been trained yet. Begin, or go on, with: star resume {self.directory}"
        return (
            f"Unfinished: {trained}, {len(self.populations)} of {self.settings.generations} generations. "
            f"Go on with: star resume {self.directory}"
        )

    def verdicts(self) -> list[str]:
        """The conclusions in sentences: against the first generation, against every reference."""
        return [sentence for sentence, _ in self.judged()]

    def judged(self) -> list[tuple[str, bool | None]]:
        """Each conclusion, and whether it is what one hopes for (None: neither)."""
        if not candidates(self.evaluations):
            if not self.candidates:
                return [(self.status(), None)]
            failed = count(len(self.candidates), "candidate")
            return [(f"Nothing was found: {failed} tried, and none succeeded.", False)]
        judged: list[tuple[str, bool | None]] = self._budget_judged()
        if self.generations > 1:
            judged.append((str(self.dominance), self.dominance.holds if self.dominance.total else None))
        else:
            judged.append(("Only the first, random generation has been trained.", None))
        for comparison in self.comparisons:
            good = None if comparison.quality is None else comparison.quality < 0
            judged.append((comparison.sentence(self.champion), good))
            if comparison.name == MAIN_REFERENCE:
                judged += [(text, True) for text in (comparison.savings_sentence(),) if text]
        if not self.comparisons:
            judged.append(("No reference layout was trained, so there is nothing to compare with.", None))
        judged += [] if self.device is None else self.device.judged()
        if self.certificate is not None:
            return judged + headline(self.certificate)
        return judged + ([(not_certified(self.directory), None)] if self.front else [])

    def _budget_judged(self) -> list[tuple[str, bool | None]]:
        """How many candidates keep the budgets, in words."""
        if not self.settings.budgets:
            return []
        limits = " and ".join(budget_text(self.settings, name) for name in self.settings.budgets)
        total = sum(not item.failed for item in self.candidates)
        kept = total - len(self.over_budget)
        return [(f"{kept} of {count(total, 'candidate')} keep the budget ({limits}).", kept > 0)]

    def to_json(self) -> dict[str, Any]:
        """What programs want to know, as plain JSON."""
        return {
            "run": str(self.directory),
            "finished": self.finished,
            "objectives": list(self.settings.objectives),
            "evaluations": len(self.evaluations),
            "candidates": len(self.candidates),
            "failed": len(self.failures),
            "stopped": len(self.stopped),
            "saved_seconds": saved_seconds(self.stopped, self.settings),
            "generations": len(self.populations),
            "best": None if self.champion is None else self.champion.id,
            "front": [_evaluation_json(evaluation) for evaluation in self.front],
            "references": {name: _evaluation_json(item) for name, item in self.references.items()},
            "hypervolume": list(self.hypervolumes),
            "dominates_first_generation": self.dominance.holds,
            "beats": {
                item.name: None if item.quality is None else item.quality < 0 for item in self.comparisons
            },
            "verdicts": self.verdicts(),
            "budgets": dict(self.settings.budgets),
            "over_budget": len(self.over_budget),
            "fidelity": None if self.certificate is None else fidelity_json(self.certificate),
            "prediction_error": {} if self.device is None else self.device.errors,
            "measured_whole": {}
            if self.device is None
            else {str(pair.evaluation.id): dict(pair.measured) for pair in self.device.pairs},
            "overhead_seconds": self.overhead[0],
            "seconds": self.overhead[1],
        }


def read_run(directory: Path | str) -> RunSummary:
    """Read the record of a run, finished or not, while it is searching or after.

    Raises:
        RunError: there is no run.
        RunDamaged: the directory does not hold what a search writes.
    """
    run = RunDirectory(directory)
    run.check()
    with RunStore.open(run.database) as store:
        settings = store.settings()
        facts = store.facts()
        evaluations = tuple(store.evaluations())
        references = store.references()
        populations = tuple(store.populations())
        events = tuple(store.events())
        try:
            overhead = store.overhead()
        except (TypeError, ValueError) as error:
            raise RunDamaged(f"{run.database} is damaged: a generation's times are no numbers") from error
    for item in evaluations:
        if any(abs(number) > LARGEST for number in item.objectives.values()):
            raise RunDamaged(f"{run.database} is damaged: evaluation {item.id} has a value beyond {LARGEST}")
    within = judged(evaluations, settings.budgets)
    try:
        best_front = tuple(front(within, settings.objectives))
        dominance = dominates_first_generation(within, settings.objectives)
        generations = max((item.generation or 0 for item in candidates(evaluations)), default=-1) + 1
        volumes = hypervolume_by_generation(within, settings.objectives, generations)
        device = device_report(settings, best_front, evaluations, read_measured(events))
    except ValueError as error:  # an evaluation lacks what the settings ask for
        raise RunDamaged(f"{run.database} is damaged: {error}") from error
    champion = best(within)
    certificate = read_own_certificate(run.path, {item.id: item for item in evaluations})
    return RunSummary(
        directory=run.path,
        settings=settings,
        facts=facts,
        evaluations=evaluations,
        references=references,
        populations=populations,
        front=best_front,
        champion=champion,
        dominance=dominance,
        hypervolumes=tuple(volumes),
        comparisons=tuple(
            _compare(name, item, within, best_front, champion, settings.objectives)
            for name, item in references.items()
        ),
        events=events,
        overhead=overhead,
        device=device,
        certificate=certificate,
    )


def _compare(
    name: str,
    reference: Evaluation,
    evaluations: Sequence[Evaluation],
    best_front: Sequence[Evaluation],
    champion: Evaluation | None,
    objectives: Sequence[str],
) -> Comparison:
    measured = reference.objectives if reference.ok else {}
    # A reference that is a member of the population as well is not compared with itself.
    rivals = [item for item in candidates(evaluations) if item.key != reference.key]
    rated = [item for item in rivals if "quality" in item.objectives and "quality" in measured]
    better = [item for item in rated if item.objectives["quality"] < measured["quality"]]
    no_worse = [item for item in rated if item.objectives["quality"] <= measured["quality"]]
    savings: dict[str, tuple[float, Evaluation]] = {}
    for objective in ("size", "cache", "flops"):
        saving = [item for item in no_worse if objective in item.objectives and objective in measured]
        if saving:
            least = min(saving, key=lambda item: (item.objectives[objective], item.id))
            if least.objectives[objective] < measured[objective]:
                savings[objective] = (least.objectives[objective], least)
    dominating = 0
    if reference.ok and all(objective in measured for objective in objectives):
        vector = objective_vector(measured, objectives)
        dominating = sum(
            dominates(objective_vector(item.objectives, objectives), vector) for item in best_front
        )
    quality = None
    if champion is not None and "quality" in measured:
        quality = champion.objectives["quality"] - measured["quality"]
    return Comparison(name, reference, quality, len(better), len(rated), dominating, savings)


def _evaluation_json(evaluation: Evaluation) -> dict[str, Any]:
    return {
        "id": evaluation.id,
        "genome": evaluation.key,
        "generation": evaluation.generation,
        "status": evaluation.status,
        "objectives": dict(evaluation.objectives),
    }
