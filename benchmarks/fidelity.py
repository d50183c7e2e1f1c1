"""Which short training predicts long ones best, for its time: proxies against 800 steps with three seeds.

    python -m benchmarks.fidelity --records runs/fidelity.jsonl --workers 2
    python -m benchmarks.fidelity --report-only --records benchmarks/data/fidelity.csv

Every training is a line that is appended to the first of the records; the same command goes on where it
stopped. The proxies stop when they have used --minutes of processor time; --quick is for the tests.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

from benchmarks.fidelity_plan import TRUTH, Plan, Training, full_plan, quick_plan
from benchmarks.fidelity_records import Key, Record, RecordError, from_line, read, to_line, write_csv
from star.data import Corpus, DataError, open_corpus
from star.genome import Genome
from star.proxy import Outcome, Progress, train_candidate

REPORT = Path("benchmarks/results/fidelity.md")
TABLE = Path("benchmarks/data/fidelity.csv")

Job = tuple[Training, Genome, int]


def main(arguments: list[str] | None = None) -> int:
    chosen = _arguments(arguments)
    try:
        plan = quick_plan() if chosen.quick else full_plan()
        if chosen.report_only and (missing := [path for path in chosen.records if not path.exists()]):
            raise RecordError(f"{missing[0]} does not exist, --report-only takes records that do")
        records = read(chosen.records, plan)
        if not chosen.report_only:
            train(plan, records, chosen)
        from benchmarks.fidelity_report import report

        text = report(plan, records, chosen.minutes, rounds=100 if chosen.quick else 2000)
        chosen.table.parent.mkdir(parents=True, exist_ok=True)
        write_csv(records.values(), chosen.table)
        chosen.report.parent.mkdir(parents=True, exist_ok=True)
        chosen.report.write_text(text, encoding="utf-8")
    except (RecordError, DataError, OSError) as error:
        print(f"benchmarks.fidelity: {error}", file=sys.stderr)
        return 2
    print(text)
    return 0


def train(plan: Plan, records: dict[Key, Record], chosen: argparse.Namespace) -> None:
    """Everything of the plan that no record has, as far as it is asked for and the time reaches.

    New records are added to `records` and appended to the first of the files.
    """
    jobs = [job for job in _jobs(plan, chosen.only) if (job[0].name, str(job[1]), job[2]) not in records]
    out: Path = chosen.records[0]
    if out.suffix == ".csv":
        raise RecordError(f"the first of the records is {out}, takes a file of JSON lines to append to")
    # Opened here first, and not by all workers at the same time: it may have to be read from its source.
    corpus = _corpus(tuple(chosen.data))
    if corpus.vocab_size != plan.truth.config.vocab_size:
        raise RecordError(f"the text has {corpus.vocab_size} token ids, takes {plan.truth.config.vocab_size}")
    if any(record.corpus != corpus.key for record in records.values()):
        raise RecordError("the records are of another text")
    out.parent.mkdir(parents=True, exist_ok=True)
    _drop_half_line(out)
    with open(out, "a", encoding="utf-8") as file:
        for number, line in enumerate(_results(jobs, records, chosen), start=1):
            file.write(line)
            file.flush()
            record = from_line(line, plan)
            records[record.key] = record
            what = f"{record.training}, seed {record.seed}, {record.genome[:40]}"
            print(f"{number} of {len(jobs)}: {what}: {record.status}", flush=True)


def _jobs(plan: Plan, only: str) -> Iterator[Job]:
    for name, training in plan.trainings.items():
        if only == "all" or (name == TRUTH) == (only == TRUTH):
            yield from training.jobs()


def _results(jobs: list[Job], records: dict[Key, Record], chosen: argparse.Namespace) -> Iterator[str]:
    """A line for every job that there is time for, in the order in which they are done."""
    if chosen.workers == 1:
        for only in jobs:
            if _in_time(only, records, chosen.minutes):
                yield run_job(only, tuple(chosen.data))
        return
    context = multiprocessing.get_context("spawn")
    waiting: set[Future[str]] = set()
    remaining = iter(jobs)
    with ProcessPoolExecutor(chosen.workers, mp_context=context) as pool:
        while True:
            while len(waiting) < chosen.workers and (job := next(remaining, None)) is not None:
                if _in_time(job, records, chosen.minutes):
                    waiting.add(pool.submit(run_job, job, tuple(chosen.data)))
            if not waiting:
                return
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()


def _in_time(job: Job, records: dict[Key, Record], minutes: float) -> bool:
    """Whether the job is of the truth, or the proxies have used less processor time than they may."""
    spent = sum(record.processor_seconds for record in records.values() if record.training != TRUTH)
    return job[0].name == TRUTH or spent < 60 * minutes


def run_job(job: Job, data: tuple[str, ...]) -> str:
    """Train one genome; its line. Runs in a worker."""
    training, genome, seed = job
    corpus = _corpus(data)
    settings = replace(training.settings, seed=seed)
    times = [time.process_time()]

    def progress(_: Progress) -> None:
        times.append(time.process_time())

    outcome = train_candidate(genome, training.config, settings, corpus, progress=progress)
    clock = _clock(times, outcome) if outcome.ok else {}
    return to_line(training, str(genome), settings, corpus.key, outcome, clock)


def _clock(times: list[float], outcome: Outcome) -> dict[str, float]:
    """Where the processor time went, from the times at the beginning and after every step."""
    evaluated = {point.step for point in outcome.curve if point.validation is not None}
    spent = [after - before for before, after in pairwise(times)]
    # The first step is left out: it comes with building the model.
    later = {step: seconds for step, seconds in enumerate(spent, start=1) if step > 1}
    plain = [seconds for step, seconds in later.items() if step not in evaluated]
    step_seconds = statistics.fmean(plain or later.values() or spent)
    evaluation = [max(0.0, seconds - step_seconds) for step, seconds in later.items() if step in evaluated]
    return {
        "build_seconds": max(0.0, spent[0] - step_seconds),
        "step_seconds": step_seconds,
        "evaluation_seconds": statistics.fmean(evaluation or [0.0]),
    }


@cache
def _corpus(data: tuple[str, ...]) -> Corpus:
    return open_corpus(list(data) or None)


def _drop_half_line(path: Path) -> None:
    """A killed run may have left half a line, which the next one would be glued to."""
    if path.exists():
        data = path.read_bytes()
        if not data.endswith(b"\n"):
            with open(path, "r+b") as file:
                file.truncate(data.rfind(b"\n") + 1)


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fidelity", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--records",
        type=Path,
        nargs="+",
        default=[Path("runs/fidelity.jsonl")],
        help="JSON lines or CSV; the first is appended to",
    )
    parser.add_argument("--only", choices=("all", "proxies", TRUTH), default="all")
    parser.add_argument("--minutes", type=float, default=25.0, help="processor time for all proxies together")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--data", nargs="*", default=[], help="text, as for star search")
    parser.add_argument("--report", type=Path, help=f"by default {REPORT}")
    parser.add_argument("--table", type=Path, help=f"by default {TABLE}")
    parser.add_argument("--report-only", action="store_true")
    parser.add_argument("--quick", action="store_true", help="tiny, written beside the records by default")
    chosen = parser.parse_args(arguments)
    beside = chosen.records[0].parent
    chosen.report = chosen.report or (beside / "fidelity.md" if chosen.quick else REPORT)
    chosen.table = chosen.table or (beside / "fidelity.csv" if chosen.quick else TABLE)
    if chosen.workers < 1 or not chosen.minutes >= 0:
        parser.error("--workers takes at least 1, --minutes at least 0")
    return chosen


if __name__ == "__main__":
    sys.exit(main())
