"""Models of transformers with and without `star_kernels.integrations.transformers.enable()`.

    python -m benchmarks.transformers             # all classes, writes benchmarks/results/transformers.md
    python -m benchmarks.transformers --models mamba,lfm2 --out some.md
    python -m benchmarks.transformers --quick --out quick.md

Random weights, width 768, batch 1. Forward and forward + backward over 1024 tokens; decoding 64 tokens, one
at a time, after that prompt. "Without" are transformers' own PyTorch forms, which it takes where
causal_conv1d, mamba_ssm and fla are not installed. Samples of both take turns within one run, and switching
between them is not timed. Beside each task stands its limit: the matrix products of the linear layers and of
the experts alone, which both forms make, and which are made once more by themselves.

The whole table takes most of an hour, since some of transformers' forms take minutes a call. A run that was
stopped goes on where it was when the same command is given again.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import importlib
import inspect
import json
import logging
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.hybrid_models import MODELS, HybridModel
from star.bench.timing import LONG_CALL, threads_set
from star_kernels.integrations import transformers as integration
from star_kernels.integrations.functions import ADAPTERS
from star_kernels.integrations.patching import Patch

RESULT = Path(__file__).parent / "results" / "transformers.md"
WITHOUT, WITH, LIMIT = "without", "with", "limit"
TASKS = ("forward", "forward + backward", "decode")


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Args:
        length: tokens of the prompt.
        tokens: how many are decoded after it.
        seconds: about how long each task of each model is sampled; every form at least three times, but once
            where a call takes longer than `LONG_CALL`.
        large: the size of measurements, not that of tests.
    """

    length: int = 1024
    tokens: int = 64
    seconds: float = 10.0
    large: bool = True


QUICK = Setting(length=24, tokens=3, seconds=0.05, large=False)


@dataclass(frozen=True)
class Row:
    """One model: median seconds by task and form, and how far apart the logits are, by their norm.

    `took`: seconds of measuring it.
    """

    model: str
    layer: str
    parameters: int
    seconds: dict[str, dict[str, float]]
    difference: float
    took: float

    def ratio(self, task: str) -> float:
        """How many times faster the task is with star_kernels."""
        return self.seconds[task][WITHOUT] / self.seconds[task][WITH]

    def most(self, task: str) -> float:
        """The ratio of a form that made nothing but the matrix products."""
        return self.seconds[task][WITHOUT] / self.seconds[task][LIMIT]


def measure(hybrid: HybridModel, setting: Setting, records: Records) -> Row:
    """All tasks of one model that are not recorded yet, its two forms in turns."""
    wanted = ("logits", *TASKS, LIMIT)
    missing = [task for task in wanted if (hybrid.module, task) not in records.parts]
    if missing:
        model = hybrid.build(**(hybrid.large() if setting.large else {}))
        with _torch_forms(hybrid):
            for task in missing:
                began = time.perf_counter()
                values = _measured(task, model, setting)
                records.add(hybrid.module, task, {**values, "took": time.perf_counter() - began})
    parts = {task: records.parts[hybrid.module, task] for task in wanted}
    return Row(
        hybrid.module,
        hybrid.layer,
        int(parts["logits"]["parameters"]),
        {task: {**parts[task], LIMIT: parts[LIMIT][task]} for task in TASKS},
        parts["logits"]["difference"],
        sum(part["took"] for part in parts.values()),
    )


def _measured(task: str, model: torch.nn.Module, setting: Setting) -> dict[str, float]:
    """Seconds by form; of "logits", what `Row` has besides."""
    vocabulary = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, vocabulary, (1, setting.length), generator=generator)
    if task == "forward":
        return _in_turns(setting, lambda: lambda: _forward(model, ids))
    if task == "forward + backward":
        return _in_turns(setting, lambda: lambda: _train(model, ids))
    if task == "decode":
        return _in_turns(setting, _Decode(model, ids, setting.tokens).sample)
    if task == LIMIT:
        return _limits(model, ids, setting)
    logits = {form: _in_form(form, lambda: _forward(model, ids)) for form in (WITHOUT, WITH)}
    difference = float((logits[WITH] - logits[WITHOUT]).norm() / logits[WITHOUT].norm())
    return {"parameters": sum(p.numel() for p in model.parameters()), "difference": difference}


@contextlib.contextmanager
def _torch_forms(hybrid: HybridModel) -> Iterator[None]:
    """transformers as it is without the packages that it prefers, which may be installed here."""
    module = importlib.import_module(f"transformers.models.{hybrid.module}.modeling_{hybrid.module}")
    patch = Patch()
    for name in ADAPTERS:
        if hasattr(module, name):
            patch.replace(module, name, inspect.unwrap(getattr(module, name)))
    try:
        yield
    finally:
        patch.undo()


@torch.no_grad()
def _forward(model: torch.nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False)[0]


def _train(model: torch.nn.Module, ids: Tensor) -> None:
    model.train()
    model.zero_grad()
    logits = model(input_ids=ids, use_cache=False)[0]
    torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:] % logits.shape[-1]).backward()
    model.eval()


class _Decode:
    """Greedy decoding after a prompt: a sample starts from a copy of the model and of the prompt's cache."""

    def __init__(self, model: torch.nn.Module, ids: Tensor, tokens: int) -> None:
        self._model, self._ids, self._tokens = model, ids, tokens
        self._started: dict[bool, Any] = {}

    @torch.no_grad()
    def sample(self, tokens: int | None = None) -> Callable[[], None]:
        """Prepares a sample in the form that is on; of fewer tokens where their number is given."""
        takes = inspect.signature(self._model.forward).parameters
        name = "cache_params" if "cache_params" in takes else "past_key_values"
        enabled = integration.is_enabled()
        if enabled not in self._started:
            result = self._model(input_ids=self._ids, use_cache=True)
            # RecurrentGemma keeps its states in its layers, all others in the cache.
            self._started[enabled] = (
                self._copy(self._model),
                result.get(name),
                result[0][:, -1:].argmax(-1),
            )
        model, cache, token = self._copy(self._started[enabled])

        @torch.no_grad()
        def decode() -> None:
            new, options = token, {name: cache}
            for position in range(self._ids.shape[1], self._ids.shape[1] + (tokens or self._tokens)):
                if "position_ids" in takes:
                    options["position_ids"] = torch.tensor([[position]])
                new = model(input_ids=new, use_cache=True, **options)[0][:, -1:].argmax(-1)

        return decode

    def _copy(self, value: Any) -> Any:
        """A deep copy but for the weights, which stay the same tensors."""
        return copy.deepcopy(value, {id(parameter): parameter for parameter in self._model.parameters()})


class _Products(TorchDispatchMode):
    """Collects the matrix products that the linear layers and the experts of a model make, and makes them
    again."""

    _LINEAR = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten._grouped_mm)

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self._weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self._made: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        linear = func.overloadpacket in self._LINEAR
        if linear or (func.overloadpacket is torch.ops.aten.bmm and any(map(self._is_weight, args))):
            self._made.append((func, args, kwargs))
        return func(*args, **kwargs)

    def _is_weight(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._weights

    @torch.no_grad()
    def again(self) -> None:
        for func, args, kwargs in self._made:
            func(*args, **kwargs)

    def numbers(self) -> int:
        """Of all factors together."""
        return sum(a.numel() for _, args, _ in self._made for a in args[-2:] if isinstance(a, Tensor))


def _limits(model: torch.nn.Module, ids: Tensor, setting: Setting) -> dict[str, float]:
    """By task, median seconds of its matrix products alone, whichever form is on."""
    limits = {}
    with integration.enable():
        decode = _Decode(model, ids, setting.tokens)
        calls = {"forward": lambda: _forward(model, ids), "forward + backward": lambda: _train(model, ids)}
        for task, call in {**calls, "decode": decode.sample(1)}.items():
            with _Products(model) as products:
                call()
            times = setting.tokens if task == "decode" else 1
            samples: list[float] = []
            while len(samples) < 4 or sum(samples) < setting.seconds / 4:
                began = time.perf_counter()
                for _ in range(times):
                    products.again()
                samples.append(time.perf_counter() - began)
            limits[task] = statistics.median(samples[1:])
    return limits


def _in_form(form: str, call: Callable[[], Any]) -> Any:
    if form == WITHOUT:
        return call()
    with integration.enable():
        return call()


def _in_turns(setting: Setting, prepare: Callable[[], Callable[[], Any]]) -> dict[str, float]:
    """Median seconds of both forms, sampled in turns. The first sample warms up, unless it is a long one."""

    def sample() -> float:
        call = prepare()
        began = time.perf_counter()
        call()
        return time.perf_counter() - began

    samples: dict[str, list[float]] = {}
    for form in (WITHOUT, WITH):
        first = _in_form(form, sample)
        samples[form] = [first] if first > LONG_CALL else []
    turns = [form for form in samples if not samples[form]]
    end = time.perf_counter() + setting.seconds
    while turns and (len(samples[turns[0]]) < 3 or time.perf_counter() < end):
        for form in turns:
            samples[form].append(_in_form(form, sample))
    return {form: statistics.median(values) for form, values in samples.items()}


class Records:
    """What is measured, in a file beside the table until that is written: a stop loses one task of one model.

    Args:
        table: the file that the table will be.
        setting, threads: what was measured by others, or by other versions, is not taken up.

    Attributes:
        parts: by model and task, its numbers.
    """

    def __init__(self, table: Path, setting: Setting, threads: int) -> None:
        self._path = table.with_suffix(".partial.jsonl")
        versions = [torch.__version__, importlib.import_module("transformers").__version__, _processor()]
        self._conditions = [asdict(setting), threads, *versions]
        self.parts: dict[tuple[str, str], dict[str, float]] = {}
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        for line in lines:
            with contextlib.suppress(json.JSONDecodeError):  # the line that a kill cut off
                conditions, model, task, numbers = json.loads(line)
                if conditions == self._conditions:
                    self.parts[model, task] = numbers

    def add(self, model: str, task: str, numbers: dict[str, float]) -> None:
        self.parts[model, task] = numbers
        with open(self._path, "a") as file:
            # A line of its own, whatever a kill has left before it.
            file.write("\n" + json.dumps([self._conditions, model, task, numbers]) + "\n")

    def done(self) -> None:
        self._path.unlink(missing_ok=True)


def document(rows: Sequence[Row], setting: Setting, threads: int) -> str:
    """The whole file."""
    transformers = importlib.import_module("transformers")
    lines = [
        "# Models of transformers, with and without star_kernels",
        "",
        "Remade by `python -m benchmarks.transformers`. Random weights, float32, batch 1, "
        f"{setting.length} tokens, {setting.tokens} tokens decoded after them; medians of samples taken in "
        f"turns, {threads} threads of {_processor()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}. Measuring took {sum(row.took for row in rows):.0f} s. Without: "
        "transformers' own PyTorch forms; with: after `star_kernels.integrations.transformers.enable()`. "
        "At most: the ratio of a form that made nothing but the matrix products of the linear layers and "
        "the experts, which are the same in both forms and were timed by themselves. A form that takes more "
        f"than {LONG_CALL:.0f} s a call is called once. The last column is the norm of the logits' "
        "difference over their norm. Configurations: `benchmarks/hybrid_models.py`.",
        "",
    ]
    if not setting.large:
        lines += ["**A quick run at tiny sizes: it shows that everything runs, nothing about speed.**", ""]
    head = ["model", "layer", "parameters"]
    for task in TASKS:
        unit = f"{task} of {setting.tokens}" if task == "decode" else task
        head += [f"{unit}: without", "with", "faster", "at most"]
    head.append("difference")
    lines += [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        cells = [row.model, f"`{row.layer}`", f"{row.parameters / 1e6:.1f} M"]
        for task in TASKS:
            times = row.seconds[task]
            cells += [
                _time(times[WITHOUT]),
                _time(times[WITH]),
                f"{row.ratio(task):.1f}x",
                f"{row.most(task):.1f}x",
            ]
        cells.append(f"{row.difference:.0e}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 0, or 2 for a model that is not there."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.transformers", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--models", default="", help="their folders in transformers, by commas (all)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, help="per task of a model (10)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument(
        "--rows-only", action="store_true", help="measure and keep the rows; a later run writes the table"
    )
    options = parser.parse_args(arguments)
    names = [name for name in options.models.split(",") if name]
    unknown = set(names) - {model.module for model in MODELS}
    if unknown:
        parser.error(f"--models: no {', '.join(sorted(unknown))}; it takes {', '.join(map(str, MODELS))}")
    setting = QUICK if options.quick else Setting(seconds=options.seconds or Setting.seconds)
    warnings.filterwarnings("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    wanted = [model for model in MODELS if not names or model.module in names]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    records = Records(options.out, setting, options.threads)
    rows = []
    with threads_set(options.threads):
        for number, model in enumerate(wanted, start=1):
            print(f"{number}/{len(wanted)} {model}: measuring", end="\r", file=sys.stderr, flush=True)
            rows.append(row := measure(model, setting, records))
            gc.collect()
            ratios = (f"{task} {row.ratio(task):.1f}x of at most {row.most(task):.1f}x" for task in TASKS)
            print(f"{number}/{len(wanted)} {model}: {', '.join(ratios)}", flush=True)
    if options.rows_only:
        return 0
    options.out.write_text(document(rows, setting, options.threads))
    records.done()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
