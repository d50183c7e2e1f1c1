"""What a search shows while it runs: a live picture in a terminal, one line an event elsewhere."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

from recorded_runs import evaluation, failed, genomes, record, small_settings
from rich.console import Console

from star.commands.progress import SearchProgress, training_progress
from star.proxy import Progress
from star.search.events import (
    CandidateFinished,
    CandidateStarted,
    CorpusOpened,
    Event,
    GenerationFinished,
    GenerationStarted,
    RunStarted,
    WorkerLost,
)

# True colours as in every other test that draws: rich keeps a style's codes from its first rendering.
OPTIONS: dict[str, Any] = {"width": 100, "height": 30, "highlight": False, "color_system": "truecolor"}


def events(directory: Path, stored: int = 0) -> list[Event]:
    first, second, third = genomes(3)
    good = evaluation(1, first, 0)
    bad = failed(2, second, 0, "diverged: \x1b[31mloss is nan")
    reference = replace(evaluation(0, third, None), origin="reference:LFM2")
    return [
        RunStarted(directory, small_settings(), stored, 15),
        CorpusOpened("some text", "ab" * 32),
        GenerationStarted(0, 3),
        CandidateStarted(0, str(third), 0),
        CandidateFinished(reference, (), 1, 15),
        CandidateStarted(1, str(first), 0),
        WorkerLost(1, "it was killed by SIGKILL", retried=True),
        CandidateFinished(good, (1,), 2, 15),
        CandidateFinished(bad, (1,), 3, 15),
        GenerationFinished(0, (good.key,), (1,), 1.21, 5.0, 0.01, replayed=False),
    ]


def shown(happened: list[Event], *, terminal: bool) -> str:
    console = Console(file=io.StringIO(), **OPTIONS, force_terminal=terminal)
    progress = SearchProgress(console)
    with progress:
        for event in happened:
            progress(event)
        if terminal:
            progress._live.refresh()
    assert progress.started
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_plain_lines(tmp_path: Path) -> None:
    lines = shown(events(tmp_path), terminal=False).splitlines()
    assert lines[0].startswith(f"Searching in {tmp_path}: 6 LIVs of width 16 for quality, size")
    assert lines[1] == "Text: some text (abababababab)"
    assert lines[2].startswith("1/15 candidate 0 (LFM2): quality ")
    assert "it is tried again" in lines[3]
    assert lines[4].endswith("on the front")
    assert lines[5] == "3/15 candidate 2 failed: diverged: \N{REPLACEMENT CHARACTER}[31mloss is nan"
    assert lines[6] == "Generation 1 of 3 took 5.0 s: 1 candidate on the front, hypervolume 1.2100"
    assert len(lines) == 7


def test_stopped_candidates_are_no_failures(tmp_path: Path) -> None:
    *before, last = events(tmp_path)
    reason = "behind the survivors at step 30 of 120: 3.1000 bits per byte at best"
    stopped = evaluation(3, genomes(4)[3], 1, status="stopped", reason=reason)
    happened = [*before, CandidateFinished(stopped, (1,), 4, 15), last]
    assert shown(happened, terminal=False).splitlines()[6] == f"4/15 candidate 3 stopped: {reason}"
    text = shown(happened, terminal=True)
    assert "1 failed" in text
    assert "1 stopped early" in text


def test_live_picture(tmp_path: Path) -> None:
    text = shown(events(tmp_path), terminal=True)
    assert "3 of at most 15" in text
    assert "1 failed" in text
    assert "star resume goes on" in text
    assert "bits per byte" in text
    assert "\x1b[31mloss" not in text


def test_a_resumed_run_knows_what_was_there(tmp_path: Path) -> None:
    rows = [evaluation(id, genome, 0) for id, genome in enumerate(genomes(2))]
    directory = record(tmp_path / "run", rows)
    started = RunStarted(directory, small_settings(), 2, 15)
    finished = GenerationFinished(0, (), (0, 1), 1.0, 0.1, 0.0, replayed=True)
    text = shown([started, finished], terminal=True)
    assert "2 of at most 15" in text
    assert "was there already" in text


def test_training_lines() -> None:
    console = Console(file=io.StringIO(), force_terminal=False, width=100)
    with training_progress(console, "training") as progress:
        for step in range(1, 11):
            progress(Progress(step, 10, 3.0, 2.5 if step == 10 else None))
    file = console.file
    assert isinstance(file, io.StringIO)
    assert file.getvalue().splitlines() == [
        "training …",
        "step 1 of 10: training 3.0000 bits per byte",
        "step 10 of 10: training 3.0000, held-out 2.5000 bits per byte",
    ]


def test_training_bar() -> None:
    console = Console(file=io.StringIO(), **{**OPTIONS, "width": 120}, force_terminal=True)
    with training_progress(console, "training") as progress:
        progress(Progress(10, 10, 3.0, 2.5))
    file = console.file
    assert isinstance(file, io.StringIO)
    assert "10/10" in file.getvalue()
