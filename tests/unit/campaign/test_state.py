"""A campaign's state file: what is stored, what is left, and what is refused."""

from __future__ import annotations

import os
import signal
import sqlite3
from pathlib import Path

import pytest

from tasks import Complete, ImageUnreachable, Internal, JobCanceled, Result
from tasks.campaign import state as module
from tasks.campaign.errors import CampaignError
from tasks.campaign.state import About, CampaignState, StoredAnswer, state_path, stored
from tasks.outcomes import Outcome
from tasks.testing import canned

ABOUT = About(id="0" * 32, name="n", plan={"task": "caption"}, input="in.csv", output="out.csv", created=1.0)
GOOD = canned("a cat", Complete(prompt=["Hello"]))


def answer(row: int, outcome: Outcome = GOOD, host: str | None = None) -> StoredAnswer:
    return stored(row, bytes(8), f"job-{row}", host, outcome, 2.0)


def unreachable(row: int, host: str) -> StoredAnswer:
    return answer(row, ImageUnreachable("It is away.", detail="timeout"), host)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "out.csv.campaign"


@pytest.fixture
def state(path: Path) -> CampaignState:
    return CampaignState.begin(path, ABOUT)


def test_a_state_is_made_once_and_found_again(path: Path) -> None:
    with CampaignState.begin(path, ABOUT) as state:
        state.update(sent=7, rows=9, retrying=["internal"])
    other = About(id="1" * 32, name="m", plan={}, input="-", output="-", created=3.0)
    with CampaignState.begin(path, other) as state:
        assert (state.about.id, state.about.plan) == (ABOUT.id, ABOUT.plan)
        assert (state.about.sent, state.about.rows, state.about.retrying) == (7, 9, ["internal"])


def test_answers_come_back_as_they_were_in_the_rows_order(
    state: CampaignState, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", 2)
    state.store([answer(3), answer(1), unreachable(5, "a.example"), answer(2, JobCanceled()), answer(4)])
    found = list(state.answers())
    assert [each.row for each in found] == [1, 2, 3, 4, 5]
    assert [row for row, *_ in state.digests()] == [1, 2, 3, 4, 5]
    assert found[0].outcome == GOOD
    assert isinstance(found[1].outcome, JobCanceled)
    error = found[4].outcome
    assert isinstance(error, ImageUnreachable)
    assert (str(error), error.detail) == ("It is away.", "timeout")


def test_a_result_takes_little_room_and_loses_nothing(state: CampaignState) -> None:
    state.store([answer(1)])
    (found,) = state.answers()
    assert "null" not in found.answer
    assert Result.model_validate_json(found.answer) == GOOD


def test_half_a_character_in_an_error_is_stored(state: CampaignState) -> None:
    state.store([answer(1, Internal("half \ud800"))])
    assert str(next(state.answers()).outcome) == "half \ud800"


def test_failures_are_counted_by_code_and_host(state: CampaignState) -> None:
    state.store([answer(1), answer(2, Internal()), unreachable(3, "a"), unreachable(4, "b"), unreachable(5, "b")])
    counts = state.counts()
    assert (counts.done, counts.failed) == (5, 4)
    assert list(counts.by_code.items()) == [("image_unreachable", 3), ("internal", 1)]
    assert list(counts.by_host.items()) == [("b", 2), ("a", 1)]
    assert [each.row for each in state.failures(["image_unreachable"], 2)] == [3, 4]
    assert [each.row for each in state.failures()] == [2, 3, 4, 5]


def test_failed_rows_run_again_by_code_and_under_new_jobs(state: CampaignState) -> None:
    state.store([answer(1), answer(2, Internal()), unreachable(3, "a")])
    state.update(sent=3)
    assert state.retry(["image_unreachable"]) == 1
    assert (state.about.sent, state.about.retrying, list(state.retries())) == (0, ["image_unreachable"], [(3, 1)])
    state.store([unreachable(3, "a")])
    assert state.retry() == 2
    assert list(state.retries()) == [(2, 1), (3, 2)]
    assert [row for row, *_ in state.digests()] == [1]


def test_a_shorter_input_cuts_what_is_after_its_end(state: CampaignState) -> None:
    state.store([answer(1), answer(2), answer(3)])
    state.leave_out([4])
    state.cut(2)
    assert [each.row for each in state.answers()] == [1, 2]
    assert list(state.left_out()) == []


def test_a_transaction_that_fails_changes_nothing(state: CampaignState) -> None:
    def fail() -> None:
        with state.transaction():
            state.store([answer(1)])
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert state.counts().done == 0


def test_others_read_while_a_campaign_runs(state: CampaignState, path: Path) -> None:
    with CampaignState.read(path) as reader:
        state.store([answer(1)])
        assert reader.counts().done == 1
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            reader.store([answer(2)])


def test_what_a_killed_process_has_committed_is_there(path: Path) -> None:
    if (child := os.fork()) == 0:
        try:
            state = CampaignState.begin(path, ABOUT)
            with state.transaction():
                state.store([answer(1), answer(2)])
            with state.transaction():
                state.store([answer(3)])
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    with CampaignState.begin(path, ABOUT) as state:
        assert [each.row for each in state.answers()] == [1, 2]


def test_a_file_that_was_killed_while_it_was_made_is_made_anew(path: Path) -> None:
    path.touch()
    with CampaignState.begin(path, ABOUT) as state:
        assert state.about == ABOUT


@pytest.mark.parametrize("content", [b"my diary, which is longer than a header of SQLite is, by far" * 9, None])
def test_a_file_of_another_kind_is_left_alone(path: Path, content: bytes | None) -> None:
    if content:
        path.write_bytes(content)
    else:
        with sqlite3.connect(path) as other:
            other.execute("CREATE TABLE diary (day)")
        other.close()
    before = path.read_bytes()
    for call in (CampaignState.read, lambda path: CampaignState.begin(path, ABOUT)):
        with pytest.raises(CampaignError, match="not a campaign's state"):
            call(path)
    assert path.read_bytes() == before


def test_a_missing_state_and_a_newer_one_are_told(state: CampaignState, path: Path) -> None:
    with pytest.raises(CampaignError, match="Cannot open"):
        CampaignState.read(path.with_name("none"))
    with sqlite3.connect(path) as other:
        other.execute("PRAGMA user_version = 99")
    with pytest.raises(CampaignError, match="another version"):
        CampaignState.read(path)


@pytest.mark.parametrize(
    ("output", "path"),
    [("a/b.csv", "a/b.csv.campaign"), ("s3://bucket/x/out.parquet", "out.parquet.campaign")],
)
def test_the_state_is_beside_the_output(output: str, path: str) -> None:
    assert state_path(output) == Path(path)
