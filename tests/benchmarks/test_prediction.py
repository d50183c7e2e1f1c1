"""The results file of the predictions' benchmark: a section for each size and device."""

from __future__ import annotations

from benchmarks.prediction import TITLE, with_section

NARROW = "## Width 256, wall time\n\n| quantity |\n|---|\n\n`command`\n"
WIDE = "## Width 768, wall time\n\n| quantity |\n"


def test_sections_are_added_and_replaced() -> None:
    first = with_section("", NARROW)
    assert first == f"{TITLE}\n\n{NARROW}"
    both = with_section(first, WIDE)
    assert both == f"{TITLE}\n\n{NARROW}\n{WIDE}"
    changed = NARROW.replace("command", "another")
    assert with_section(both, changed) == f"{TITLE}\n\n{changed}\n{WIDE}"
    assert with_section(both, WIDE) == both
