"""The committed data sets are whole, and the commands that read them can."""

from __future__ import annotations

import shutil
from pathlib import Path

from benchmarks.fidelity import TABLE
from benchmarks.fidelity_plan import TRUTH, full_plan
from benchmarks.fidelity_records import read as read_records
from star.comparison import table
from star.fidelity.document import NAME, read_certificate
from star.fidelity.statistics import kendall_tau

ROOT = Path(__file__).resolve().parents[2]


def test_genomes_with_everything_that_was_measured_of_them() -> None:
    rows = table.read(ROOT / "benchmarks" / "data" / "genomes.parquet")
    assert len({row.genome for row in rows}) >= 300
    assert len({row.seed for row in rows}) >= 3
    assert len({row.conditions for row in rows}) == 1
    wanted = {"quality", "size", "cache", "recall", "ttft", "decode_p50", "decode_p95", "peak_memory"}
    assert all(wanted <= set(row.objectives) and row.curve for row in rows)


def test_every_training_of_the_benchmark_of_proxies() -> None:
    plan = full_plan()
    records = read_records([ROOT / TABLE], plan)
    assert len(records) == sum(len(list(training.jobs())) for training in plan.trainings.values())
    assert sum(record.training == TRUTH for record in records.values()) == 3 * 48


def test_the_certificate_of_the_joint_search(tmp_path: Path) -> None:
    shutil.copy(ROOT / "benchmarks" / "data" / "certificate.json", tmp_path / NAME)
    certificate = read_certificate(tmp_path)
    assert certificate is not None
    longer = [item.mean for item in certificate.candidates]
    assert kendall_tau([item.proxy for item in certificate.candidates], longer) == certificate.tau.value
