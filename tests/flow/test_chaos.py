"""A short campaign (`make chaos` runs the long one): every kind of fault once, and all ledgers agree."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.chaos.campaign import run
from benchmarks.chaos.checker import figures, problems
from benchmarks.chaos.faults import KINDS


@pytest.mark.timeout(420)
def test_no_job_is_lost_or_ends_twice_when_any_part_dies(tmp_path: Path) -> None:
    ledgers = run(jobs=800, faults=len(KINDS), seed=1, folder=tmp_path, pause_s=2.5, longest_s=3.0)
    assert problems(ledgers) == {}
    found = figures(ledgers)
    assert found["jobs"] == 800
    assert set(found["faults_by_kind"]) == {*KINDS, "poison job"}
    # A strike that catches nobody would test nothing.
    assert found["caught_jobs_s"]["count"] > 20
