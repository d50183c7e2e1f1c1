"""The options of `python -m benchmarks.paper`, and the plan that they describe."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.paper_plan import Plan
from star.measure.settings import MeasureSettings
from star.search import SearchSettings, preset
from star.targets import model_config

__all__ = ["parser", "plan_of"]

# A size whose table takes a CPU seconds; contexts as the cache is counted.
_MEASURED = MeasureSettings(
    width=256, device="cpu", contexts=(4096,), decode_steps=32, repetitions=1, every=0
)

_QUICK: dict[str, Any] = {"best": 2, "longer": 2, "seeds": 2, "drifts": 20}


def plan_of(chosen: argparse.Namespace, recorded: Plan | None = None) -> Plan:
    """The plan; what no option names is that of the plan that was begun, or else of `Plan`, of the preset, or
    of --quick.

    Raises:
        ValueError: an option that no experiment can have.
    """
    if recorded is not None:
        if chosen.quick and not recorded.quick:
            raise ValueError("--quick is given, and the experiment was begun without it")
        plan = recorded
        # The recorded preset is what it was then; a preset of the same name may have changed.
        named = None if chosen.preset == recorded.preset else chosen.preset
    else:
        search = Plan().search
        plan = Plan(search=replace(search, measure=_MEASURED, proxy=replace(search.proxy, device="cpu")))
        named = chosen.preset
    if named is not None:
        found = preset(named)
        proxy = replace(found.proxy, device=plan.search.proxy.device)
        plan = replace(plan, preset=named, search=replace(plan.search, model=found.model, proxy=proxy))
    if chosen.quick and recorded is None:
        on_cpu = chosen.device in (None, "cpu")  # in this process, so that no other has to start
        plan = replace(plan, search=_quick(plan.search), cpu_time=on_cpu, quick=True, **_QUICK)
    numbers = {name: getattr(chosen, name) for name in ("best", "longer", "seeds", "drifts")}
    given: dict[str, Any] = {name: number for name, number in numbers.items() if number is not None}
    cpu_time = plan.cpu_time or chosen.cpu_time
    return replace(plan, search=_search(plan.search, chosen, cpu_time), cpu_time=cpu_time, **given)


def _search(settings: SearchSettings, chosen: argparse.Namespace, cpu_time: bool) -> SearchSettings:
    """The settings with what the options say; at another width, the learning rate in proportion to 1 / width,
    as the presets have it."""
    model = settings.model if chosen.width is None else model_config(chosen.width, base=settings.model)
    proxy, measure = settings.proxy, settings.measure
    if model.width != settings.model.width:
        proxy = replace(proxy, learning_rate=proxy.learning_rate * settings.model.width / model.width)
    if chosen.steps is not None and chosen.steps != proxy.steps:
        proxy = replace(proxy, steps=chosen.steps, warmup_steps=max(1, chosen.steps // 10))
    for name in ("learning_rate", "batch_size", "device"):
        if getattr(chosen, name) is not None:
            proxy = replace(proxy, **{name: getattr(chosen, name)})
    if chosen.device is not None:
        measure = replace(measure, device=chosen.device)
    if chosen.target_width is not None:
        measure = replace(measure, width=chosen.target_width)
    if cpu_time:
        measure = replace(measure, threads=1)
    data = settings.data
    if chosen.text is not None:
        data = replace(data, source=tuple(chosen.text)).absolute()
    changes = {name: getattr(chosen, name) for name in ("population", "generations", "depth", "seed")}
    given = {name: value for name, value in changes.items() if value is not None}
    return replace(settings, model=model, proxy=proxy, measure=measure, data=data, **given)


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


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options. None of the experiment's own has a default: what is not given is taken from the plan."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.paper",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--out", type=Path, required=True, help="folder of the experiment; the report is written there")
    add("--report-only", action="store_true", help="write the report of what has finished")
    add("--publish", action="store_true", help="also into benchmarks/results and benchmarks/data")
    add("--quick", action="store_true", help="tiny sizes")
    add("--preset", help="model and proxy of star search: demo, laptop or paper")
    for name in ("population", "generations", "depth", "seed", "width", "steps", "batch-size"):
        add(f"--{name}", type=int)
    add("--learning-rate", type=float, help="at another --width: in proportion to 1 / width")
    add("--best", type=int, help="candidates of each search that are trained longer")
    add("--longer", type=int, help="how many times as many steps")
    add("--seeds", type=int, help="longer trainings of each")
    add("--drifts", type=int, help="evolutions for a neutral fitness, for each number of objectives")
    add("--device", help="cpu, auto, cuda or cuda:N; cpu where nothing is recorded")
    add("--target-width", type=int, help="of the models that the device is measured with")
    add("--cpu-time", action="store_true", help="device table in processor seconds")
    add("--text", nargs="+", help="files, folders or a dataset's name")
    add("--workers", type=int, help="processes; one a core")
    add("--workers-per-gpu", type=int, help="processes that share each GPU")
    return made
