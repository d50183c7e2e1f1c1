"""The evaluator of real searches: costs, the proxy's verdict, weights; and a whole search on real text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from star import Genome, ModelConfig, baselines, cost
from star.proxy import ProxySettings
from star.search import RunStore, SearchInterrupted, resume, search
from star.search.corpus import open_corpus_of, open_recorded
from star.search.errors import RunError
from star.search.evaluate import evaluate
from star.search.events import CandidateFinished, CorpusOpened, Event
from star.search.rungs import Bars, Rung
from star.search.settings import DataSettings, SearchSettings


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SearchSettings]:
    """A search on 60 KB of text whose candidates train in a moment."""
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), size=rng.integers(2, 7))) for _ in range(60)]
    for number in range(6):
        (folder / f"{number}.txt").write_text(" ".join(rng.choice(words, size=2000)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STAR_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield SearchSettings(
            population=2,
            generations=2,
            depth=4,
            model=ModelConfig(width=32, head_dim=8),
            proxy=ProxySettings(steps=3, batch_size=2, length=32, validation_batches=2, threads=1),
            data=DataSettings(source=(str(folder),)),
            workers=1,
        )


@pytest.fixture(scope="module")
def given(settings: SearchSettings) -> dict[str, Any]:
    """What the evaluator gets as its settings."""
    return {**settings.to_json(), "corpus": dataclasses.asdict(open_corpus_of(settings))}


def test_all_objectives_and_the_weights(
    settings: SearchSettings, given: dict[str, Any], tmp_path: Path
) -> None:
    genome = baselines.lfm2(4)
    path = tmp_path / "5.safetensors"
    result = evaluate(str(genome), given, 5, str(path))
    assert result["status"] == "ok"
    objectives = result["objectives"]
    assert set(objectives) == {"quality", "size", "cache", "flops"}
    assert 1 < objectives["quality"] < 9
    assert objectives["size"] == cost.parameters(genome, settings.model)
    assert objectives["cache"] == cost.cache_bytes(genome, settings.model)
    assert objectives["flops"] == cost.flops(genome, settings.model, 32)
    assert path.stat().st_size > 4 * objectives["size"]
    assert len(result["curve"]) == 3
    again = evaluate(str(genome), given, 9, None)
    assert again["objectives"] == objectives
    assert again["curve"] == result["curve"]


def test_divergence_is_a_failed_candidate(settings: SearchSettings, given: dict[str, Any]) -> None:
    proxy = dataclasses.replace(settings.proxy, learning_rate=1e30, warmup_steps=0, gradient_clip=1e30)
    wild = {**given, "proxy": proxy.to_json()}
    result = evaluate(str(baselines.transformer_pp(4)), wild, 0, None)
    assert result["status"] == "failed"
    assert result["reason"].startswith("diverged")
    assert "objectives" not in result


def test_a_candidate_that_does_not_pass_is_stopped(
    settings: SearchSettings, given: dict[str, Any], tmp_path: Path
) -> None:
    """What it has read is a shorter training of its own, where the learning rate stays as it is."""
    text = str(baselines.lfm2(4))
    proxy = dataclasses.replace(settings.proxy, schedule="constant", warmup_steps=1)
    constant = {**given, "proxy": proxy.to_json()}
    hopeless = Rung(step=2, intercept=100.0, slope=1.0, mean=5.0, scatter=1.0, count=20, margin=0.1)
    path = tmp_path / "0.safetensors"
    result = evaluate(text, {**constant, "bars": Bars((hopeless,), ((1.0, 0.0),)).to_json()}, 0, str(path))
    assert result["status"] == "stopped"
    assert result["reason"].startswith("behind the survivors at step 2 of 3: 10")
    assert not path.exists()
    assert [point[0] for point in result["curve"]] == [1, 2]
    shorter = {**constant, "proxy": dataclasses.replace(proxy, steps=2).to_json()}
    alone = evaluate(text, shorter, 0, None)
    assert alone["status"] == "ok"
    assert result["objectives"] == alone["objectives"]
    assert result["curve"] == alone["curve"]
    # Who passes is what it is without any bars.
    passing = dataclasses.replace(hopeless, intercept=0.0)
    passed = evaluate(text, {**constant, "bars": Bars((passing,), ((9e9, 0.0),)).to_json()}, 0, None)
    assert passed["status"] == "ok"
    assert {**passed, "seconds": 0} == {**evaluate(text, constant, 0, None), "seconds": 0}


def test_recall_is_measured_where_it_is_searched(settings: SearchSettings, given: dict[str, Any]) -> None:
    """A mixer of tokens learns to recall in a few steps what a memoryless unit can not."""
    recall = {**given["recall"], "task": "mqar:vocab_size=8,length=8,pairs=2", "steps": 60, "warmup_steps": 6}
    searched = {**given, "objectives": ["quality", "recall"], "recall": recall}
    scores = {}
    for text in ("21111-91111", "91111-91111"):
        result = evaluate(text, searched, 0, None)
        assert result["status"] == "ok", result["reason"]
        assert 0 <= result["objectives"]["recall"] <= 1
        assert result["seconds"] > 0
        scores[text] = result["objectives"]["recall"]
        # The training on text does not notice.
        assert result["objectives"]["quality"] == evaluate(text, given, 0, None)["objectives"]["quality"]
    assert scores["21111-91111"] < scores["91111-91111"] - 0.1
    assert evaluate("21111-91111", searched, 3, None)["objectives"]["recall"] == scores["21111-91111"]
    # Whatever the proxy's learning rate is meant for, the task's is that of its own model.
    proxy = dataclasses.replace(settings.proxy, parametrization="mup", base_width=8, extrapolate_to=9)
    transferred = evaluate("21111-91111", {**searched, "proxy": proxy.to_json()}, 0, None)
    assert transferred["objectives"]["recall"] == scores["21111-91111"]


def test_recall_that_can_not_be_measured_is_a_failed_candidate(given: dict[str, Any]) -> None:
    wild = {**given["recall"], "learning_rate": 1e3, "warmup_steps": 0, "steps": 30}
    proxy = {**given["proxy"], "gradient_clip": 1e30}
    result = evaluate(
        "11111-91111", {**given, "objectives": ["recall"], "recall": wild, "proxy": proxy}, 0, None
    )
    assert result["status"] == "failed"
    assert result["reason"].startswith("recall: diverged")
    assert result["curve"]


def test_what_is_no_candidates_fault_stops_the_search(given: dict[str, Any], tmp_path: Path) -> None:
    text = str(Genome.parse("91111"))
    with pytest.raises(RunError, match="not the one that the search began with"):
        evaluate(text, {**given, "corpus": {**given["corpus"], "key": "0" * 64}}, 0, None)
    with pytest.raises(RunError, match="vocab_size"):
        evaluate(text, {**given, "model": {**given["model"], "vocab_size": 7}}, 0, None)
    with pytest.raises(RunError, match="No such file"):
        evaluate(text, given, 0, str(tmp_path / "missing" / "0.safetensors"))


def test_a_machine_without_the_token_files_makes_them(
    settings: SearchSettings, given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAR_CACHE", str(tmp_path))
    record = dataclasses.replace(open_corpus_of(settings), directory="/nowhere")
    corpus = open_recorded(settings.data, record)
    assert corpus.key == given["corpus"]["key"]
    assert tmp_path in corpus.directory.parents


def test_a_search_on_text_interrupted_and_resumed(settings: SearchSettings, tmp_path: Path) -> None:
    events: list[Event] = []
    finished = search(settings, tmp_path / "whole", on_event=events.append)
    assert finished.evaluations == 7
    assert any(isinstance(event, CorpusOpened) for event in events)

    def interrupt(event: Event) -> None:
        if isinstance(event, CandidateFinished) and event.finished == 4:
            raise KeyboardInterrupt

    with pytest.raises(SearchInterrupted):
        search(settings, tmp_path / "cut", on_event=interrupt)
    resume(tmp_path / "cut", workers=2)
    with RunStore.open(tmp_path / "whole") as whole, RunStore.open(tmp_path / "cut") as cut:
        assert whole.archive() == cut.archive()
        names = {path.name for path in (tmp_path / "whole" / "weights").iterdir()}
        assert names == {f"{id}.safetensors" for id in {0, 1, 2, *finished.front}}
        assert {item.reason for item in whole.evaluations()} == {None}


def test_a_changed_text_is_refused(settings: SearchSettings, tmp_path: Path) -> None:
    text = tmp_path / "own.txt"
    text.write_text("some words that repeat " * 3000)
    own = dataclasses.replace(
        settings, data=DataSettings(source=(str(text),)), generations=1, references=False
    )
    search(own, tmp_path / "run")
    text.write_text("other words that repeat " * 3000)
    with pytest.raises(RunError, match="is not what this run began with"):
        resume(tmp_path / "run")
