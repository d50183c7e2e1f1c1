"""The report: complete, self-contained, deterministic, and never a way for a run directory to do harm."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from recorded_runs import evaluation, failed, finished_run, genomes, record, small_settings

from star.report import read_run, write_report
from star.search.directory import RunDirectory
from star.search.errors import RunDamaged, RunError
from star.search.evolution import BASELINES

PNG = b"\x89PNG\r\n\x1a\n"
ATTACK = '</title></style><script>alert(1)</script><img src=x onerror="alert(2)">'


class Elements(HTMLParser):
    """All start tags with their attributes, ids, and where links lead."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    @property
    def ids(self) -> list[str]:
        return [attributes["id"] or "" for _, attributes in self.tags if "id" in attributes]

    @property
    def links(self) -> list[str]:
        names = ("href", "xlink:href", "src", "srcset", "data", "action")
        return [attributes[name] or "" for _, attributes in self.tags for name in names if name in attributes]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_report(finished_run(tmp_path_factory.mktemp("runs") / "first")).read_text("utf-8")


def require_harmless(text: str) -> None:
    """Nothing that runs, and nothing from anywhere else."""
    elements = Elements(text)
    tags = {tag for tag, _ in elements.tags}
    assert not tags & {"script", "iframe", "object", "embed", "link", "base", "form", "img"}
    assert not [name for _, attributes in elements.tags for name in attributes if name.startswith("on")]
    assert all(link.startswith("#") for link in elements.links), elements.links
    assert not re.search(r"url\((?!#)", text)
    assert "@import" not in text


class TestPage:
    def test_is_one_file_without_scripts_and_requests(self, page: str) -> None:
        require_harmless(page)
        assert "default-src 'none'" in page

    def test_every_id_is_its_own_and_every_link_leads_somewhere(self, page: str) -> None:
        elements = Elements(page)
        assert len(set(elements.ids)) == len(elements.ids)
        missing = {link[1:] for link in elements.links} - set(elements.ids)
        assert not missing

    @pytest.mark.parametrize(
        "text",
        [
            "The front",
            "Hypervolume by generation",
            "Quality by generation",
            "Learning curves",
            "Backbones of the front",
            "LIV classes of the survivors",
            "Sharing among the survivors",
            "Failures",
            "What these numbers do not say",
            "Transformer++",
            "StripedMamba",
            "LFM2",
            "diverged: loss is nan",
            "abab",
            "torch 2.13",
            "of the first generation&#x27;s front",
        ],
    )
    def test_shows(self, page: str, text: str) -> None:
        assert text in page

    def test_takes_its_colours_from_the_page(self, page: str) -> None:
        assert "prefers-color-scheme: dark" in page
        assert "var(--ink)" in page
        body = page[page.index("<body>") :]
        assert "#1c2530" not in body

    def test_draws_every_member_of_the_front(self, page: str, tmp_path: Path) -> None:
        run = read_run(finished_run(tmp_path / "run"))
        assert run.front
        for item in run.front:
            assert f'id="candidate-{item.id}"' in page
            assert f'href="#candidate-{item.id}"' in page

    def test_is_the_same_every_time(self, tmp_path: Path) -> None:
        directory = finished_run(tmp_path / "run")
        first = write_report(directory)
        before = {path.name: path.read_bytes() for path in first.parent.iterdir()}
        write_report(directory)
        after = {path.name: path.read_bytes() for path in first.parent.iterdir()}
        assert before == after
        pictures = {name for name in after if name.endswith(".png")}
        assert {"hypervolume.png", "curves.png", "classes.png", "sharing.png"} <= pictures
        assert {"front-size-quality.png", "scores-quality.png", "scores-size.png"} <= pictures
        assert all(after[name].startswith(PNG) for name in pictures)
        assert pictures | {"index.html"} == set(after)

    def test_removes_pictures_that_an_earlier_report_had(self, tmp_path: Path) -> None:
        directory = finished_run(tmp_path / "run")
        (directory / "report" / "front-cache-quality.png").write_bytes(b"old")
        (directory / "report" / "mine.png").write_bytes(b"mine")
        write_report(directory)
        names = {path.name for path in (directory / "report").iterdir()}
        assert "front-cache-quality.png" not in names
        assert "mine.png" in names


class TestRungs:
    def test_shows_who_was_stopped_and_what_that_saved(self, tmp_path: Path) -> None:
        proxy = replace(small_settings().proxy, steps=40, validation_batches=12)
        settings = small_settings(rungs=(0.25, 0.5), rung_rivals="front", proxy=proxy)
        members = genomes(8)
        rows = [evaluation(id, genome, id // 4) for id, genome in enumerate(members)]
        for id, step in ((5, 10), (6, 20), (7, 20)):
            rows[id] = replace(
                rows[id],
                status="stopped",
                reason=f"behind the front at step {step} of 40: 3.1 bits per byte at best",
                curve=([step, 5.0, 5.1],),
                seconds=0.5 * (step + 4),
            )
        run = read_run(record(tmp_path / "run", rows, settings=settings))
        assert not {5, 6, 7} & {item.id for item in run.front}
        assert run.failures == []
        about = run.to_json()
        assert (about["stopped"], about["failed"]) == (3, 0)
        assert about["saved_seconds"] == pytest.approx(0.5 * (30 + 20 + 20))
        text = write_report(run).read_text("utf-8")
        require_harmless(text)
        assert "stopped early" in text
        # Beside 7 s, twice 12 s, and 5 x 1.5 s.
        assert (
            "3 of 8 candidates stopped at a rung, which saved about 35 s of training (48 % of 1 min 14 s)."
        ) in text
        assert "step 10 of 40" in text
        assert "the front of the generations before" in text
        assert "No candidate failed" in text

    def test_counts_who_was_stopped_over_a_budget(self, tmp_path: Path) -> None:
        settings = small_settings(rungs=(0.5,), budgets={"cache": 1e9})
        rows = [evaluation(id, genome, id // 4) for id, genome in enumerate(genomes(6))]
        rows[5] = replace(rows[5], status="stopped", reason="over budget: cache (at step 60 of 120)")
        run = read_run(record(tmp_path / "run", rows, settings=settings))
        assert "5 of 6 candidates keep the budget (cache at most 1.00 GB at width 16)." in run.verdicts()

    def test_says_where_nobody_was_stopped(self, tmp_path: Path, page: str) -> None:
        rows = [evaluation(id, genome, 0) for id, genome in enumerate(genomes(3))]
        directory = record(tmp_path / "run", rows, settings=small_settings(rungs=(0.5,)))
        assert "No candidate was stopped at a rung" in write_report(directory).read_text("utf-8")
        assert "Rungs" not in page


class TestUnusualRuns:
    def test_empty(self, tmp_path: Path) -> None:
        text = write_report(record(tmp_path / "run", [])).read_text("utf-8")
        require_harmless(text)
        assert "No candidate has been trained yet" in text

    def test_all_failed(self, tmp_path: Path) -> None:
        rows = [failed(id, genome, 0) for id, genome in enumerate(genomes(3))]
        run = read_run(record(tmp_path / "run", rows))
        text = write_report(run).read_text("utf-8")
        require_harmless(text)
        assert run.verdicts() == ["Nothing was found: 3 candidates tried, and none succeeded."]
        assert run.champion is None
        assert run.hypervolumes == ()

    def test_unfinished(self, tmp_path: Path) -> None:
        rows = [evaluation(id, genome, 0) for id, genome in enumerate(genomes(2))]
        run = read_run(record(tmp_path / "run", rows))
        require_harmless(write_report(run).read_text("utf-8"))
        assert not run.finished
        assert "star resume" in run.status()
        assert run.verdicts()[0] == "Only the first, random generation has been trained."

    def test_only_references_so_far(self, tmp_path: Path) -> None:
        rows = [evaluation(0, BASELINES["LFM2"](6), None, origin="reference:LFM2")]
        run = read_run(record(tmp_path / "run", rows))
        require_harmless(write_report(run).read_text("utf-8"))
        assert run.comparisons[0].quality is None

    @pytest.mark.parametrize(
        "objectives",
        [("quality",), ("size",), ("size", "cache"), ("quality", "size", "cache", "flops")],
        ids="+".join,
    )
    def test_other_objectives(self, tmp_path: Path, objectives: tuple[str, ...]) -> None:
        text = write_report(finished_run(tmp_path / "run", objectives=objectives)).read_text("utf-8")
        require_harmless(text)
        assert "Hypervolume by generation" in text
        if len(objectives) == 1:
            assert "was measured, and not searched for" in text or objectives == ("size",)

    def test_one_candidate(self, tmp_path: Path) -> None:
        row = evaluation(0, genomes(1)[0], 0, curve=())
        text = write_report(record(tmp_path / "run", [row], populations=[[row.key]])).read_text("utf-8")
        require_harmless(text)
        assert "Learning curves" not in text

    def test_deep_backbones_and_many_on_the_front(self, tmp_path: Path) -> None:
        rows = [
            evaluation(id, genome, 0, objectives={"quality": 1.0 + id, "size": 100.0 - id})
            for id, genome in enumerate(genomes(30, depth=2))
        ]
        text = write_report(record(tmp_path / "run", rows)).read_text("utf-8")
        assert "The first 24 of 30 are drawn." in text


class TestVerdicts:
    def run_with(self, tmp_path: Path, ours: float, theirs: float) -> list[str]:
        layout = BASELINES["Transformer++"](6)
        size = {"size": 10.0}
        rows = [
            evaluation(
                0, layout, None, origin="reference:Transformer++", objectives={"quality": theirs} | size
            ),
            evaluation(1, genomes(2)[0], 0, objectives={"quality": 9.0, "size": 8.0}),
            evaluation(2, genomes(2)[1], 1, objectives={"quality": ours, "size": 8.0}),
        ]
        return read_run(record(tmp_path / "run", rows)).verdicts()

    def test_says_that_the_reference_is_beaten(self, tmp_path: Path) -> None:
        verdicts = self.run_with(tmp_path, ours=3.0, theirs=4.0)
        assert verdicts[0] == "The front dominates all 1 candidates of the first generation's front."
        assert verdicts[1] == (
            "The best candidate beats Transformer++: 3.0000 against 4.0000 bits per byte under the same "
            "proxy (25.0 % less; 1 of 2 candidates better, 1 of the front better or equal in every "
            "objective)."
        )
        assert verdicts[2] == (
            "At no worse quality than Transformer++, the search found 20.0 % fewer parameters (candidate 2)."
        )

    def test_says_that_it_is_not(self, tmp_path: Path) -> None:
        assert self.run_with(tmp_path, ours=4.0, theirs=3.0)[1] == (
            "No candidate beats Transformer++: the best has 4.0000 against 3.0000 bits per byte under the "
            "same proxy (33.3 % more)."
        )

    def test_says_that_they_are_equal(self, tmp_path: Path) -> None:
        assert "equals Transformer++" in self.run_with(tmp_path, ours=3.0, theirs=3.0)[1]

    def test_says_that_a_reference_failed(self, tmp_path: Path) -> None:
        reference = replace(failed(0, BASELINES["LFM2"](6), None), origin="reference:LFM2")
        rows = [reference, evaluation(1, genomes(1)[0], 0)]
        verdicts = read_run(record(tmp_path / "run", rows)).verdicts()
        assert "LFM2 failed under the proxy, so there is nothing to compare with." in verdicts


class TestHostileRuns:
    def test_texts_of_the_record_are_escaped(self, tmp_path: Path) -> None:
        best = {"quality": 1.0, "size": 1.0}
        rows = [
            evaluation(0, genomes(1)[0], 0),
            replace(evaluation(1, genomes(2)[1], 0, objectives=best), key=ATTACK, genome=ATTACK),
            failed(2, genomes(2)[1], 0, reason=ATTACK + "\x1b[31m\x00"),
        ]
        rows[2] = replace(rows[2], key=ATTACK + "2")
        settings = small_settings()
        data = {"name": ATTACK, "content_hash": ATTACK, "key": ATTACK}
        directory = record(tmp_path / "run", rows, settings=settings, data=data, populations=[[ATTACK]])
        text = write_report(directory).read_text("utf-8")
        require_harmless(text)
        assert "\x1b" not in text
        assert "&lt;script&gt;" in text

    def test_a_directory_with_markup_in_its_name(self, tmp_path: Path) -> None:
        directory = finished_run(tmp_path / '<script>alert(1)<"&')
        require_harmless(write_report(directory).read_text("utf-8"))

    def test_curves_that_are_no_curves(self, tmp_path: Path) -> None:
        curves = [
            ("x",),
            ([1], [2, "a", None]),
            ([[1, 2, 3], {"a": 1}, 5]),
            ([1, 10**300, None], [2, 1, None]),
        ]
        rows = [
            evaluation(id, genome, 0, curve=tuple(curve))
            for id, (genome, curve) in enumerate(zip(genomes(4), curves, strict=True))
        ]
        require_harmless(write_report(record(tmp_path / "run", rows)).read_text("utf-8"))

    def test_values_that_no_axis_holds(self, tmp_path: Path) -> None:
        rows = [evaluation(0, genomes(1)[0], 0, objectives={"quality": 1e300, "size": 1.0})]
        with pytest.raises(RunDamaged, match="evaluation 0"):
            read_run(record(tmp_path / "run", rows))

    def test_an_evaluation_without_its_objective(self, tmp_path: Path) -> None:
        rows = [evaluation(0, genomes(1)[0], 0, objectives={"quality": 1.0})]
        with pytest.raises(RunDamaged, match="objective size"):
            read_run(record(tmp_path / "run", rows))

    def test_no_link_is_followed_when_writing(self, tmp_path: Path) -> None:
        directory = finished_run(tmp_path / "run")
        victim = tmp_path / "victim"
        victim.write_text("mine")
        for name in ("index.html", ".index.html.partial", "curves.png"):
            (directory / "report" / name).symlink_to(victim)
        write_report(directory)
        assert victim.read_text() == "mine"
        assert not (directory / "report" / "index.html").is_symlink()

    def test_a_report_folder_that_is_a_link_is_refused(self, tmp_path: Path) -> None:
        directory = finished_run(tmp_path / "run")
        report = RunDirectory(directory).report
        report.rmdir()
        report.symlink_to(tmp_path)
        with pytest.raises(RunDamaged, match="symbolic link"):
            write_report(directory)


def test_a_report_that_can_not_be_written_is_one_line(tmp_path: Path) -> None:
    directory = finished_run(tmp_path / "run")
    (directory / "report" / "index.html").mkdir()
    with pytest.raises(RunError, match=r"index\.html"):
        write_report(directory)
