"""What `benchmarks.cpu` and the pytest-benchmark suite time: cases at their sizes, and what they must reach.

The cases, their peers and what they move are those of `star bench`; here are the limits only.
"""

from __future__ import annotations

from dataclasses import dataclass

from star.bench import CASES, STEPS, Case

__all__ = [
    "COMPILED_RATIO",
    "COPY_FRACTION",
    "MODEL_RATIO",
    "ROWS",
    "STEP_LIMIT",
    "STEP_ROWS",
    "WHY_NOT",
    "Row",
    "quick",
]

COPY_FRACTION = 0.6
"""Of the bandwidth of a copy, for operators that memory limits."""

STEP_LIMIT = 3.0
"""Times an empty dispatched operator, for a decode step at batch 1."""

MODEL_RATIO = 2.0
"""Times as fast as the reference backend, for a whole training step."""

COMPILED_RATIO = 1.0
"""Times as fast as the reference backend under torch.compile."""

_CALL = (
    "the empty operator has one argument; a call with all of this step's takes most of that before it "
    "computes anything (below, all sizes 1)"
)
_MEMORY = "bound by memory: it reads and writes more than the empty operator's time moves"

WHY_NOT: dict[str, str] = {
    "linear_scan, forward, ratio": (
        "it moves its bytes at the speed of a copy; the loop, which works on 3072 numbers at a time, takes "
        "no more than twelve times as long as a copy"
    ),
    "gated_short_conv, backward, copy": (
        "a third of its time are page faults of a result whose pages the C library gives back to the system "
        "between calls; in a process where they stay mapped it takes 9.3 ms, over 70% of a copy"
    ),
    "gated_delta_rule, forward + backward, ratio": (
        "8% short here, 5.5x in an earlier run on a busier machine; its products are of 64 x 64 blocks"
    ),
    "diff_attention, forward, ratio": (
        "2% short: three products instead of four save 1.33x, the rest must come from products faster than "
        "SDPA's own"
    ),
    "diff_attention, forward + backward, ratio": (
        "6% short: fewer products save a quarter, the rest must come from products faster than SDPA's own"
    ),
    "gated_linear_attention, forward + backward, ratio": (
        "bound by arithmetic: five times as fast would be over half the machine's matrix-product rate in "
        "operations of the definition, of which chunks need more"
    ),
    "short_conv_step": _CALL,
    "gated_short_conv_step": _CALL,
    "gru_scan_step": f"{_CALL}; 2304 exponentials besides",
    "lstm_scan_step": f"{_CALL}; 3072 exponentials besides",
    "long_conv_step": f"{_MEMORY}: 12.6 MB of history and kernel",
    "gated_long_conv_step": f"{_MEMORY}: 12.6 MB of history and kernel",
    "selective_scan_step": f"{_CALL}; 12,288 exponentials and 147 KB of state and decays besides",
    "gated_linear_attention_step": f"{_CALL}; {_MEMORY}: 393 KB of state",
    "gated_delta_rule_step": f"{_CALL}; {_MEMORY}: 590 KB, the state three times",
}
"""Why a limit is not reached, by the name and the kind of limit as the table has them ("rope, forward +
backward, copy"; kinds: ratio, copy, compile; a step has no kind). Shown where it is not."""


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        case: operator and sizes.
        passes: "forward", "backward" or "both".
        ratio: at least so many times as fast as the fastest of the peers that count; None: no limit.
        against: starts of the names of the peers that count for it; all by default.
        peers: starts of the names of the peers that are timed; all by default.
        copy_fraction: at least this fraction of a copy's bandwidth; None: no limit.
    """

    case: Case
    passes: str
    ratio: float | None = None
    against: tuple[str, ...] = ("",)
    copy_fraction: float | None = None
    peers: tuple[str, ...] = ("",)

    @property
    def name(self) -> str:
        return f"{self.case.operator}, {_PASSES[self.passes]}"


_PASSES = {"forward": "forward", "backward": "backward", "both": "forward + backward"}

ROWS: tuple[Row, ...] = (
    Row(CASES["selective_scan"], "forward", 40, ("transformers",)),
    Row(CASES["selective_scan"], "both", 1000, ("transformers",)),
    Row(CASES["gated_short_conv"], "forward", 3, ("composed",), COPY_FRACTION),
    Row(CASES["gated_short_conv"], "backward", 3, ("composed",), COPY_FRACTION),
    Row(CASES["linear_scan"], "forward", 50, ("Python loop, by index",), COPY_FRACTION),
    # Without transformers' scan, which copies all states at each token of the backward pass.
    Row(CASES["linear_scan"], "both", 50, ("Python loop, by index",), COPY_FRACTION, ("Python loop",)),
    Row(CASES["gated_linear_attention"], "both", 5, ("transformers", "fla")),
    Row(CASES["gated_delta_rule"], "both", 5, ("transformers", "fla")),
    Row(CASES["gated_long_conv"], "both", 1.5, ("rfft",)),
    Row(CASES["rms_norm"], "both", copy_fraction=COPY_FRACTION),
    Row(CASES["glu"], "both", copy_fraction=COPY_FRACTION),
    Row(CASES["rope"], "both", copy_fraction=COPY_FRACTION),
    Row(CASES["diff_attention"], "forward", 1.5, ("two SDPA",)),
    Row(CASES["diff_attention"], "both", 1.5, ("two SDPA",)),
    # Without a limit, so that the table is complete.
    Row(CASES["short_conv"], "both"),
    Row(CASES["long_conv"], "both"),
    Row(CASES["gru_scan"], "both"),
    Row(CASES["lstm_scan"], "both"),
    Row(CASES["attention"], "both"),
    Row(CASES["attention_decode"], "forward"),
    Row(CASES["linear_cross_entropy"], "both"),
)

STEP_ROWS: tuple[Case, ...] = tuple(STEPS.values())

_QUICK = {"L": 128, "N": 16, "D": 128, "V": 256, "H": 2}


def quick(case: Case) -> Case:
    """The same at sizes that take milliseconds: whether everything runs, nothing about how fast."""
    return case.with_shape([min(size, _QUICK.get(name, size)) for name, size in case.sizes.items()])
