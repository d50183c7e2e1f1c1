"""The paper's experiment at a smaller scale: three searches, the joint one, and their best trained longer.

    python -m benchmarks.paper --out runs/paper                  # hours on two cores, minutes on a GPU
    python -m benchmarks.paper --out runs/paper --report-only    # the table of what has finished by now
    python -m benchmarks.paper --out /tmp/paper --quick          # the whole path in seconds, for nothing

The same command goes on where Ctrl-C or a kill stopped it. Searches for quality, quality and size, quality
and cache (STAR, arXiv 2411.17800), and for quality, size, cache and decoding time together, which the paper
did not run; each is a run directory under --out that `star report` takes. The best of each and the layouts of
Transformer++, StripedMamba and LFM2 are trained longer with several seeds, on text and on recall, and the
structures of the final populations are compared with evolution without selection (benchmarks/paper_drift.py).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Collection
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.paper_drift import many_drifts
from benchmarks.paper_plan import SEARCHES, Folder, Plan, append_line, read_lines
from benchmarks.paper_report import write_report
from benchmarks.paper_retrain import best, engine_of, layouts, retrain
from benchmarks.prediction import processor_timer, table_by_processor_time
from star.genome import Genome
from star.measure.process import measure_in_process, table_in_process
from star.measure.settings import MeasureSettings
from star.measure.whole import measure_genome
from star.profile.table import ProfileTable, read_table
from star.search import RunError, RunStore, SearchSettings, preset, resume, search
from star.search.corpus import CorpusRecord, open_corpus_of
from star.search.errors import SearchInterrupted
from star.search.events import CandidateFinished, Event, GenerationFinished, WorkerLost
from star.search.gpus import place, visible_gpus
from star.targets import model_config

RESULTS = Path(__file__).parent / "results" / "paper.md"
DATA = Path(__file__).parent / "data" / "paper.json"

Tell = Callable[[str], None]


def main(arguments: list[str] | None = None) -> int:
    """The command; its exit code: 2 for bad input, 130 when it was stopped."""
    chosen = _parser().parse_args(arguments)
    folder = Folder(chosen.out)
    try:
        if not chosen.report_only:
            plan = plan_of(chosen)
            folder.begin(plan)
            carry_out(folder, plan, Workers(chosen.workers, chosen.workers_per_gpu), _tell)
        print(write_report(folder, chosen.result, chosen.data))
    except (KeyboardInterrupt, SearchInterrupted):
        print("stopped; the same command goes on with it", file=sys.stderr)
        return 130
    except (ValueError, RunError, OSError) as error:
        print(f"paper: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    return 0


@dataclass(frozen=True)
class Workers:
    """How many processes, as `SearchSettings` has it; may change between two sessions."""

    workers: int | None = None
    workers_per_gpu: int | None = None


def carry_out(folder: Folder, plan: Plan, workers: Workers, tell: Tell) -> None:
    """Everything that is not done yet: the device's table, then each search and its longer trainings, and the
    drifts after the first of them."""
    placement = place(replace(plan.search, **vars(workers)), visible_gpus)
    table = device_table(folder, plan, tell)
    corpus = open_corpus_of(plan.search)
    with closing(engine_of(folder, plan, corpus, placement)) as engine:
        for name in SEARCHES:
            run_search(folder, plan, name, table, workers, tell)
            simulate_drifts(folder, plan, replace(plan.search, workers=workers.workers).worker_count(), tell)
            genomes = [*layouts(plan.search.depth).values(), *chosen_of(folder, plan, name)]
            retrain(folder, plan, genomes, corpus, engine, tell)


def device_table(folder: Folder, plan: Plan, tell: Tell) -> ProfileTable:
    """The table of the device, measured once an experiment and kept in its folder."""
    if folder.device_file.exists():
        return read_table(folder.device_file)
    corpus: CorpusRecord = open_corpus_of(plan.search)
    settings = plan.search.measure.resolved(corpus.vocab_size)
    measure = table_by_processor_time if plan.cpu_time else table_in_process
    table = measure(settings, tell=lambda text: tell(f"device: {text}"))
    table.write(folder.device_file)
    return table


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

    whole = _whole_by_processor_time if plan.cpu_time else measure_in_process
    if not RunStore.begun(directory / "run.db"):
        settings = replace(plan.settings_of(name), **vars(workers))
        search(settings, directory, find_table=find_table, measure_whole=whole, on_event=listen)
        return
    with RunStore.open(directory) as store:
        finished = bool(store.events("finished"))
    if not finished:
        resume(directory, **vars(workers), measure_whole=whole, on_event=listen)


def _whole_by_processor_time(genome: Genome, table: ProfileTable) -> dict[str, float]:
    return measure_genome(genome, table.settings.config(), table.settings, timer=processor_timer)


def chosen_of(folder: Folder, plan: Plan, name: str) -> list[str]:
    """The canonical genomes of a search's candidates that are trained longer."""
    with RunStore.open(folder.run(name)) as store:
        reference = store.references().get("Transformer++")
        chosen = best(store.evaluations(), SEARCHES[name], plan.best, reference)
    return [evaluation.key for evaluation in chosen]


def simulate_drifts(folder: Folder, plan: Plan, processes: int, tell: Tell) -> None:
    """The drifts that are not recorded yet."""
    there = {line.get("number") for line in read_lines(folder.drift_file)}
    missing = [number for number in range(plan.drifts) if number not in there]
    for number, statistics in many_drifts(plan.search, missing, processes):
        append_line(folder.drift_file, {"number": number, "statistics": statistics})
        if (number + 1) % 100 == 0:
            tell(f"drift {number + 1} of {plan.drifts}")


def _tell(text: str) -> None:
    print(text, flush=True)


# ---- the plan that the options describe ----------------------------------------------------------------


def plan_of(chosen: argparse.Namespace) -> Plan:
    """The plan; what no option names is that of `Plan`, of the preset, or of --quick.

    Raises:
        ValueError: an option that no experiment can have.
    """
    settings = replace(Plan().search, measure=_MEASURED)
    if chosen.preset is not None:
        named = preset(chosen.preset)
        settings = replace(settings, model=named.model, proxy=named.proxy)
    numbers = {"best": chosen.best, "longer": chosen.longer, "seeds": chosen.seeds, "drifts": chosen.drifts}
    given = {name: number for name, number in numbers.items() if number is not None}
    cpu_time = chosen.cpu_time
    if chosen.quick:
        settings = _quick(settings)
        given = _QUICK | given
        cpu_time = cpu_time or chosen.device == "cpu"  # in this process, so that no other has to start
    return Plan(search=_search(settings, chosen, cpu_time), cpu_time=cpu_time, **given)


# A size whose table takes a CPU seconds; contexts as the cache is counted.
_MEASURED = MeasureSettings(width=256, contexts=(4096,), decode_steps=32, repetitions=1, every=0)


def _search(settings: SearchSettings, chosen: argparse.Namespace, cpu_time: bool) -> SearchSettings:
    """The settings with what the options say; at another width, the learning rate in proportion to 1 / width,
    as the presets have it."""
    model = model_config(chosen.width, base=settings.model)
    rate = settings.proxy.learning_rate
    if model.width != settings.model.width:
        rate *= settings.model.width / model.width
    steps = chosen.steps or settings.proxy.steps
    proxy = replace(
        settings.proxy,
        steps=steps,
        warmup_steps=settings.proxy.warmup_steps if chosen.steps is None else max(1, steps // 10),
        learning_rate=chosen.learning_rate or rate,
        batch_size=chosen.batch_size or settings.proxy.batch_size,
        device=chosen.device,
    )
    changes = {name: getattr(chosen, name) for name in ("population", "generations", "depth", "seed")}
    return replace(
        settings,
        model=model,
        proxy=proxy,
        measure=replace(
            settings.measure,
            device=chosen.device,
            width=chosen.target_width or settings.measure.width,
            threads=1 if cpu_time else None,
        ),
        data=replace(settings.data, source=tuple(chosen.text)).absolute(),
        **{name: value for name, value in changes.items() if value is not None},
    )


_QUICK = {"best": 2, "longer": 2, "seeds": 2, "drifts": 20}


def _quick(settings: SearchSettings) -> SearchSettings:
    """The whole path in seconds; its numbers mean nothing."""
    proxy = replace(settings.proxy, steps=2, warmup_steps=1, batch_size=1, length=32, validation_batches=1)
    return replace(
        settings,
        population=4,
        generations=2,
        depth=4,
        model=replace(settings.model, width=16, head_dim=4),
        proxy=proxy,
        recall=replace(settings.recall, steps=2, warmup_steps=1, validation_batches=1),
        measure=replace(settings.measure, width=16, contexts=(16,), decode_steps=2),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the experiment")
    parser.add_argument("--report-only", action="store_true", help="write the table of what has finished")
    parser.add_argument("--result", type=Path, default=RESULTS, help="the table, Markdown")
    parser.add_argument("--data", type=Path, default=DATA, help="its numbers, JSON")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--preset", help="model and proxy of star search: demo, laptop or paper")
    for name in ("population", "generations", "depth", "seed", "width", "steps", "batch-size"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--learning-rate", type=float, help="at another --width: in proportion to 1 / width")
    parser.add_argument("--best", type=int, help="candidates of each search that are trained longer")
    parser.add_argument("--longer", type=int, help="how many times as many steps")
    parser.add_argument("--seeds", type=int, help="longer trainings of each")
    parser.add_argument("--drifts", type=int, help="evolutions without selection")
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--target-width", type=int, help="of the models that the device is measured with")
    parser.add_argument("--cpu-time", action="store_true", help="device table in processor seconds")
    parser.add_argument("--text", nargs="+", default=[], help="files, folders or a dataset's name")
    parser.add_argument("--workers", type=int, help="processes; one a core")
    parser.add_argument("--workers-per-gpu", type=int, help="processes that share each GPU")
    return parser


if __name__ == "__main__":
    sys.exit(main())
