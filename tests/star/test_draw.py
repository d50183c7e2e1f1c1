"""Drawings of genomes: what the terminal shows at which width, pictures that repeat byte for byte."""

from __future__ import annotations

import io
import itertools
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from star import ModelConfig, baselines, draw, pools
from star.draw.arcs import Arc, feature_arcs, featurizer_arcs, lanes
from star.genome import Genome, GenomeError
from star.sharing import resolve

EXAMPLE = Genome.parse("21211-31112-21221-32112")
# Twelve groups on either side, each inside the one before: the widest drawing that 24 LIVs can have.
NESTED = Genome(
    [(1, label, 2, label, 4) for label in range(1, 13)]
    + [(1, label, 2, label, 4) for label in range(12, 0, -1)]
)


def shown(renderable, width=80, **options) -> list[str]:
    """The lines that a terminal of this width shows, without colours."""
    file = io.StringIO()
    Console(file=file, width=width, force_terminal=False, **options).print(renderable)
    return [line.rstrip() for line in file.getvalue().splitlines()]


class TestArcs:
    def test_groups_with_an_effect(self):
        plans = resolve(Genome.parse("21211-31112-21221-32112"))
        assert featurizer_arcs(plans) == [Arc((0, 2), "", 0)]
        assert feature_arcs(plans) == [Arc((1, 3), "key", 0)]
        assert featurizer_arcs(resolve(Genome.parse("21211-31112"))) == []

    @given(
        st.lists(
            st.lists(st.integers(0, 30), min_size=2, max_size=4, unique=True).map(sorted).map(tuple),
            max_size=12,
        )
    )
    def test_lanes_hold_every_arc_once_and_none_overlap(self, members):
        arcs = [Arc(one, "", number) for number, one in enumerate(members)]
        found = lanes(arcs)
        assert sorted((arc for lane in found for arc in lane), key=lambda arc: arc.number) == arcs
        for lane in found:
            spans = sorted((arc.members[0], arc.members[-1]) for arc in lane)
            assert all(left[1] < right[0] for left, right in itertools.pairwise(spans))


class TestTerminal:
    def test_the_papers_example(self):
        assert shown(draw.terminal(EXAMPLE)) == [
            "╭──1  SA-2   21211",
            "│  2  SA-3   31112           ●──╮",
            "╰──3  SA-2   21221              │",
            "   4  SA-3   32112  key of 2 ◀──╯",
            "",
            "  ■ attention 4",
            "  lines on the left: LIVs that use the same featurizer weights",
            "  lines on the right: ● computes features, ◀ reuses them",
        ]

    def test_lines_that_cross(self):
        genome = Genome.parse("11214-92222-22111-11114-11214-92222")
        assert shown(draw.terminal(genome))[:6] == [
            "  ╭──1  SA-1       11214                  ●──╮",
            "╭─│──2  GMemless   92222                  ●──│─╮",
            "│ │  3  SA-2       22111                     │ │",
            "│ │  4  SA-1       11114  key, value of 1 ◀──┤ │",
            "│ ╰──5  SA-1       11214  key, value of 1 ◀──╯ │",
            "╰────6  GMemless   92222  gate of 2       ◀────╯",
        ]

    @given(st.integers(0, 2**32 - 1))
    def test_random_backbones_fit_80_columns(self, seed):
        genome = Genome.random(24, np.random.default_rng(seed))
        lines = shown(draw.terminal(genome))
        assert all(len(line) <= 80 for line in lines)
        for plan, gene, line in zip(resolve(genome), genome, lines, strict=False):
            assert re.search(
                rf"\b{plan.index + 1}  {re.escape(plan.entry.name)} +{re.escape(str(gene))}\b", line
            )
            if plan.source is not None:
                assert f"{', '.join(plan.shared)} of {plan.source + 1} " in line
                assert "◀" in line
        assert sum("◀" in line for line in lines[:24]) == sum(
            plan.source is not None for plan in resolve(genome)
        )

    def test_the_widest_of_24_fits_80_columns(self):
        lines = shown(draw.terminal(NESTED))
        assert all(len(line) <= 80 for line in lines)
        assert lines[0].startswith("╭──────────── 1  SA-1")
        assert lines[0].endswith("●────────────╮")
        assert lines[23].endswith("key, value of 1  ◀────────────╯")
        assert not any("not drawn" in line for line in lines)

    def test_a_narrow_terminal_says_what_it_leaves_out(self):
        lines = shown(draw.terminal(NESTED), width=50)
        assert all(len(line) <= 50 for line in lines)
        assert any("5 sharing groups are not drawn" in line for line in lines)
        assert "key, value of 1" in lines[23]

    def test_a_terminal_of_one_column(self):
        assert len(shown(draw.terminal(NESTED), width=1)) > 24

    def test_without_sharing_nothing_is_said_of_it(self):
        assert shown(draw.terminal(Genome.parse("11211-91111"))) == [
            " 1  SA-1       11211",
            " 2  GMemless   91111",
            "",
            "  ■ attention 1   ■ memoryless 1",
        ]

    def test_costs_at_a_width(self):
        lines = shown(draw.terminal(baselines.transformer_pp(24), ModelConfig(width=768)))
        assert lines[-2:] == [
            "  width 768: 84,934,656 parameters (no embeddings, norms, biases)",
            "  cache at 4,096 tokens in bfloat16: 150,994,944 bytes",
        ]

    def test_ascii_terminals(self):
        class Ascii(io.StringIO):
            encoding = "ascii"

        file = Ascii()
        Console(file=file, width=80).print(draw.terminal(NESTED))
        assert file.getvalue().isascii()
        assert "*--" in file.getvalue()

    def test_colours_tell_the_families(self):
        file = io.StringIO()
        console = Console(file=file, width=80, force_terminal=True, color_system="truecolor")
        console.print(draw.terminal(Genome.parse("11111-51111-71111-91111")))
        for colour in draw.FAMILY_COLOURS.values():
            red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
            assert f"48;2;{red};{green};{blue}" in file.getvalue()

    def test_a_thousand_livs(self):
        genome = Genome.random(1000, np.random.default_rng(0))
        assert (
            sum(bool(re.search(r"\d+  \S+", line)) for line in shown(draw.terminal(genome), width=300))
            >= 1000
        )

    def test_not_valid(self):
        with pytest.raises(GenomeError, match="gene 2 '21211'"):
            draw.terminal(Genome.parse("11211-21211"))


class TestPoolsTable:
    def test_every_class_with_all_three_levels(self):
        lines = shown(draw.pools_table())
        assert all(len(line) <= 80 for line in lines)
        text = "\n".join(lines)
        for entry in pools.all_classes():
            assert re.search(rf"{entry.id} {entry.name} +│ {entry.operator} +│ {entry.groups[0]} ", text)
        assert "key   1112 x1/4 r4" in text
        assert "key   1112 x1/8 r4 2h" in text
        assert "7 C+value  8 B+C+value" in text
        assert "4 sequentially" in text
        assert "…" not in text


class TestPicture:
    @pytest.mark.parametrize(("name", "start"), [("a.svg", b"<?xml"), ("a.PNG", b"\x89PNG\r\n")])
    def test_the_same_bytes_every_time(self, tmp_path, name, start):
        genome = Genome.random(24, np.random.default_rng(5))
        first, second = tmp_path / name, tmp_path / f"again-{name}"
        draw.save(genome, first)
        draw.save(genome, str(second))
        assert first.read_bytes().startswith(start)
        assert first.read_bytes() == second.read_bytes()

    def test_no_dates_and_no_versions(self, tmp_path):
        draw.save(EXAMPLE, tmp_path / "a.svg")
        text = (tmp_path / "a.svg").read_text(encoding="utf-8")
        assert "dc:date" not in text
        assert "matplotlib" not in text.partition("<metadata>")[2].partition("</metadata>")[0].lower()

    def test_what_the_figure_says(self):
        axes = draw.figure(EXAMPLE).axes[0]
        texts = [text.get_text() for text in axes.texts]
        assert {"4 LIVs", "SA-2", "SA-3", "key of 2", "1 group", "attention 4", "logits"} <= set(texts)
        assert "found" in [text.get_text() for text in draw.figure(EXAMPLE, title="found").axes[0].texts]

    def test_names_are_no_formulas(self):
        axes = draw.figure(EXAMPLE, title="$x$ and $").axes[0]
        assert not any(text.get_parse_math() for text in axes.texts)

    @pytest.mark.parametrize("name", ["a.pdf", "a", ".svg", "a.svg.gz", ""])
    def test_other_formats(self, tmp_path, name):
        with pytest.raises(ValueError, match=r"save: path is .*, takes a name that ends in \.svg or \.png"):
            draw.save(EXAMPLE, f"{tmp_path}/{name}")

    def test_a_missing_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            draw.save(EXAMPLE, tmp_path / "nowhere" / "a.png")

    def test_too_deep(self):
        with pytest.raises(ValueError, match="figure: genome has 401 LIVs, a picture holds at most 400"):
            draw.figure(Genome.parse("-".join(["91111"] * 401)))

    def test_not_valid(self):
        with pytest.raises(GenomeError, match="gene 2 '21211'"):
            draw.figure(Genome.parse("11211-21211"))

    def test_no_window_no_state_and_no_torch(self):
        code = (
            "import sys; from star import draw, Genome; import matplotlib as m;"
            "before = m.rcParams['font.family'];"
            "draw.figure(Genome.parse('91111'));"
            "assert m.rcParams['font.family'] == before;"
            "sys.exit(any(name in sys.modules for name in ('matplotlib.pyplot', 'torch')))"
        )
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
