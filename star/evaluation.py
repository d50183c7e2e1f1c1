"""Downstream tasks: a model before lm-eval's `simple_evaluate`, as any other model of transformers.

What is no export yet (a run's candidate, a training) is exported into a temporary folder first. Tasks may
come from local files, so that nothing is asked of the network.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from star.export import directory as exported
from star.trained import ShowTraining, Trained, open_trained

__all__ = ["Evaluation", "Score", "evaluate", "results_path", "write_results"]

PACKAGES = ("lm_eval", "transformers")


@dataclass(frozen=True)
class Score:
    """One number: `error` is its standard error, None where lm-eval gives none."""

    task: str
    metric: str
    value: float | None
    error: float | None
    samples: int | None


@dataclass(frozen=True)
class Evaluation:
    """What a model reached: `settings` decide it, beside model and tasks."""

    model: str
    tasks: tuple[str, ...]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    scores: tuple[Score, ...]

    def to_json(self) -> dict[str, Any]:
        """A plain dict."""
        return asdict(self) | {
            "tasks": list(self.tasks),
            "scores": [asdict(score) for score in self.scores],
        }


def require_packages() -> None:
    """Raises ModuleNotFoundError that names the extra unless lm-eval is installed."""
    for name in PACKAGES:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(
                f"star eval needs the package {name}, which is missing: pip install 'star-kernels[eval]'",
                name=name,
            )


def evaluate(
    directory: Path,
    tasks: Sequence[str],
    show_training: ShowTraining,
    *,
    id: int | None = None,
    include_path: Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    max_length: int = 2048,
    device: str | None = None,
    seed: int = 0,
) -> Evaluation:
    """Evaluate the model of a run, a training or an export.

    Args:
        directory, id, show_training: as `star.trained.open_trained`.
        tasks: names of lm-eval's tasks, groups and tags, or of those in `include_path`.
        include_path: folder of task files (YAML).
        shots: examples before each question; the tasks' own number by default.
        limit: questions of a task at most.
        batch_size, max_length: sequences at once, tokens of one.
        device: "cuda" where there is one, else "cpu".
        seed: of the examples' choice and of bootstrapped errors.

    Raises:
        ModuleNotFoundError: lm-eval is not installed.
        ValueError: no such task, a damaged directory, or a model without a tokenizer.
        RunError: as `open_trained`.
    """
    require_packages()
    import lm_eval

    manager, names = _tasks(tasks, include_path)
    with _as_export(directory, id, show_training) as (name, folder):
        model = _language_model(folder, batch_size, max_length, device)
        with _quiet():
            found = lm_eval.simple_evaluate(
                model=model,
                tasks=names,
                num_fewshot=shots,
                limit=limit,
                task_manager=manager,
                log_samples=False,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
    settings = {"shots": shots, "limit": limit, "max_length": max_length, "seed": seed}
    return Evaluation(name, tuple(tasks), settings, _versions(), tuple(_scores(found)))


def results_path(directory: Path, id: int | None) -> Path:
    """Where results go that were told nothing else: into the directory, a run's into its export folder."""
    if (directory / "run.db").exists():
        return directory / "export" / f"evaluation-{'best' if id is None else id}.json"
    return directory / "evaluation.json"


def write_results(evaluation: Evaluation, path: Path) -> None:
    """One JSON file, whole or not at all. Raises OSError."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(evaluation.to_json(), indent=2, allow_nan=False) + "\n", "utf-8")
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _tasks(wanted: Sequence[str], include_path: Path | None) -> tuple[Any, list[str]]:
    """lm-eval's table of tasks, and those of its names that are meant. Its own are looked through only for
    names that the local files do not have: there are thousands."""
    from lm_eval.tasks import TaskManager

    if include_path is not None and not include_path.is_dir():
        raise ValueError(f"--include-path is {include_path}; it takes a folder with task files (YAML)")
    missing = list(wanted)
    for include_defaults in ([False] if include_path is not None else []) + [True]:
        manager = TaskManager(
            include_path=None if include_path is None else str(include_path),
            include_defaults=include_defaults,
        )
        found = {name: manager.match_tasks([name]) for name in wanted}
        missing = [name for name, matches in found.items() if not matches]
        if wanted and not missing:
            return manager, sorted({match for matches in found.values() for match in matches})
    if not missing:
        raise ValueError("--tasks is empty; it takes names of tasks with commas")
    where = "in lm-eval" if include_path is None else f"in lm-eval or {include_path}"
    raise ValueError(f"--tasks has {missing[0]!r}, which is no task {where}")


@contextlib.contextmanager
def _as_export(directory: Path, id: int | None, show_training: ShowTraining) -> Iterator[tuple[str, Path]]:
    """The model's name, and a folder that transformers loads it from."""
    from star.export.write import export

    if exported.is_export(directory) and id is None:
        if not (directory / exported.TOKENIZER).is_file():
            raise ValueError(f"{directory} has no tokenizer.json, and the tasks are text")
        if exported.read_model_type(directory) == exported.MODEL_TYPE:
            exported.read_config(directory)  # its own errors say more than transformers'
        yield str(directory), directory
        return
    trained: Trained = open_trained(directory, id, show_training)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "export"
        export(trained, folder)
        yield trained.name, folder


def _language_model(folder: Path, batch_size: int, max_length: int, device: str | None) -> Any:
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import star.hf  # noqa: F401  (registers its model with the Auto classes)

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with _quiet():
        return HFLM(
            pretrained=model.to(device).eval(),
            tokenizer=tokenizer,
            backend="causal",
            batch_size=batch_size,
            max_length=max_length,
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's log, where every step is a line."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _scores(found: Mapping[str, Any]) -> Iterator[Score]:
    """The numbers of lm-eval's results, whose names are "metric,filter" beside "metric_stderr,filter"."""
    counts = found.get("n-samples") or {}
    for task, measured in found["results"].items():
        samples = counts.get(task, {}).get("effective")
        for name, value in measured.items():
            metric, _, chosen = name.partition(",")
            if not chosen or metric.endswith("_stderr"):
                continue
            error = measured.get(f"{metric}_stderr,{chosen}")
            shown = metric if chosen == "none" else f"{metric} ({chosen})"
            yield Score(task, shown, _number(value), _number(error), samples)


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("lm_eval", "transformers", "torch", "star-kernels")}
