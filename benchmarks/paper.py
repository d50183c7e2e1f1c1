"""The paper's experiment at a smaller scale: three searches, the joint one, and their best trained longer.

    python -m benchmarks.paper --out runs/paper                  # hours on two cores
    python -m benchmarks.paper --out runs/paper --device cuda    # on a GPU
    python -m benchmarks.paper --out runs/paper --report-only    # the report of what has finished by now
    python -m benchmarks.paper --out runs/paper --report-only --publish    # into benchmarks/results
    python -m benchmarks.paper --out /tmp/paper --quick          # the whole path in seconds, for nothing

The same command goes on where Ctrl-C or a kill stopped it; what no option names stays as it was begun.
Searches for quality, quality and size, quality and cache (STAR, arXiv 2411.17800), and for quality, size,
cache and decoding time together, which the paper did not run; each is a run directory under --out that
`star report` takes. The best of each and the layouts of Transformer++, StripedMamba and LFM2 are trained
longer with several seeds, on text and on recall, and the structures of the final populations are compared
with evolution for a neutral fitness (benchmarks/paper_drift.py). After each stage the report is written into
--out, as paper.md and paper.json; with --publish also into benchmarks/results and benchmarks/data.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.paper_device import device_table, measure_whole, not_measured_here
from benchmarks.paper_drift import many_drifts
from benchmarks.paper_environment import environment, record_environment
from benchmarks.paper_options import parser, plan_of
from benchmarks.paper_plan import SEARCHES, Folder, Plan, append_line
from benchmarks.paper_report import write_report
from benchmarks.paper_retrain import engine_of, layouts, retrain
from benchmarks.paper_state import read_drifts, read_found
from star.measure.errors import MeasurementError
from star.measure.settings import MeasureSettings
from star.profile.table import ProfileTable
from star.search import RunError, RunStore, resume, search
from star.search.corpus import open_corpus_of
from star.search.directory import RunDirectory
from star.search.errors import SearchInterrupted
from star.search.events import CandidateFinished, Event, GenerationFinished, WorkerLost
from star.search.gpus import place, visible_gpus

RESULTS = Path(__file__).parent / "results" / "paper.md"
DATA = Path(__file__).parent / "data" / "paper.json"

Tell = Callable[[str], None]


def main(arguments: list[str] | None = None) -> int:
    """The command; its exit code: 2 for bad input, 130 when it was stopped."""
    chosen = parser(__doc__).parse_args(arguments)
    folder = Folder(chosen.out)
    try:
        recorded = folder.plan() if chosen.report_only or folder.plan_file.exists() else None
        if chosen.publish and (chosen.quick or (recorded is not None and recorded.quick)):
            raise ValueError("--publish is given, and the numbers of --quick mean nothing")
        if not chosen.report_only:
            plan = plan_of(chosen, recorded)
            folder.path.mkdir(parents=True, exist_ok=True)
            with RunDirectory(folder.path).locked():
                folder.begin(plan)
                carry_out(folder, plan, Workers(chosen.workers, chosen.workers_per_gpu), _tell)
        print(write_report(folder, *([(RESULTS, DATA)] if chosen.publish else [])))
    except (KeyboardInterrupt, SearchInterrupted):
        print("stopped; the same command goes on with it", file=sys.stderr)
        return 130
    except (ValueError, RunError, OSError, MeasurementError) as error:
        print(f"paper: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    return 0


@dataclass(frozen=True)
class Workers:
    """How many processes, as `SearchSettings` has it; may change from one start to the next."""

    workers: int | None = None
    workers_per_gpu: int | None = None


def carry_out(folder: Folder, plan: Plan, workers: Workers, tell: Tell) -> None:
    """Everything that is not done yet: the device's table, then for each search its candidates, its null and
    its longer trainings, and at last the whole models. The report is written after each stage."""
    placement = place(replace(plan.search, **vars(workers)), visible_gpus)
    corpus = open_corpus_of(plan.search)
    for difference in record_environment(folder, environment(plan, corpus)):
        tell(f"warning: not as when this was begun: {difference}")
    table = device_table(folder, plan, corpus, tell)
    lost: set[tuple[str, int]] = set()
    named = list(layouts(plan.search.depth).values())
    with closing(engine_of(folder, plan, corpus, placement)) as engine:
        for name in SEARCHES:
            run_search(folder, plan, name, table, workers, tell)
            write_report(folder)
            simulate_drifts(folder, plan, len(SEARCHES[name]), placement.workers, tell)
            write_report(folder)
            chosen = [item.key for item in read_found(folder, plan, name).chosen]
            retrain(folder, plan, [*named, *chosen], corpus, engine, tell, lost)
            write_report(folder)
            if name == "joint":
                measure_whole(folder, plan, table, [*named, *chosen], tell)


def run_search(
    folder: Folder, plan: Plan, name: str, table: ProfileTable, workers: Workers, tell: Tell
) -> None:
    """One of the searches, or the rest of it."""
    directory = folder.run(name)

    def listen(event: Event) -> None:
        if isinstance(event, CandidateFinished):
            done, seconds = f"{event.finished} of {event.planned}", f"{event.evaluation.seconds:.1f} s"
            tell(f"{name}: candidate {done}, {event.evaluation.status}, {seconds}, front {len(event.front)}")
        elif isinstance(event, GenerationFinished) and not event.replayed:
            tell(f"{name}: generation {event.generation}, hypervolume {event.hypervolume or 0.0:.4f}")
        elif isinstance(event, WorkerLost):
            tell(f"{name}: a worker died with candidate {event.candidate_id}: {event.reason}")

    def find_table(settings: MeasureSettings, classes: Collection[int], **_: object) -> ProfileTable:
        return table

    if not RunStore.begun(directory / "run.db"):
        settings = replace(plan.settings_of(name), **vars(workers))
        search(settings, directory, find_table=find_table, measure_whole=not_measured_here, on_event=listen)
        return
    with RunStore.open(directory) as store:
        finished = bool(store.events("finished"))
    if not finished:
        resume(directory, **vars(workers), measure_whole=not_measured_here, on_event=listen)


def simulate_drifts(folder: Folder, plan: Plan, objectives: int, processes: int, tell: Tell) -> None:
    """The drifts with so many objectives that are not recorded yet."""
    there = {item.number for item in read_drifts(folder).get(objectives, [])}
    missing = [number for number in range(plan.drifts) if number not in there]
    for item in many_drifts(plan.search, objectives, missing, processes):
        append_line(folder.drift_file, item._asdict())
        if (item.number + 1) % 50 == 0:
            tell(f"{objectives} objectives: drift {item.number + 1} of {plan.drifts}")


def _tell(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
