"""A batch with the fake client: the window, the waiting, and what a second run does."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from click.testing import Result as Outcome
from kombu.exceptions import OperationalError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoPermissionError, ResponseError

from tasks import InvalidRequest, Job, QueueFull, WorkerLost, batch, job_window
from tasks.batch import Batch, JobsLost
from tasks.batch_lines import Fingerprints, read_line
from tasks.cli import connection, main, waiting
from tasks.cli.progress import progress
from tasks.testing import FakeClient
from tasks.worker_registry import no_worker


def ours(number: int, prompt: str = "Hello") -> str:
    return json.dumps({"custom_id": f"r{number}", "task": "complete", "arguments": {"prompt": [prompt]}})


class SlowClient(FakeClient):
    """Its jobs are answered when `is_open`; it notes how many waited at once."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.is_open = True
        self.most = 0
        self.options: list[dict[str, Any]] = []
        self.forgotten: list[str] = []
        #: What the next calls raise.
        self.refusals: list[Exception] = []

    def submit(self, job: Job, **options: Any) -> Any:
        if self.refusals:
            raise self.refusals.pop()
        self.options.append(options)
        return super().submit(job, **options)

    def outcomes(self, ids: Iterable[str]) -> Any:
        self.most = max(self.most, len(list(ids)))
        return super().outcomes(ids) if self.is_open else {}

    def forget(self, ids: Iterable[str]) -> None:
        self.forgotten += ids
        super().forget(ids)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_window, "TROUBLE_PAUSE_S", 0.01)


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> SlowClient:
    client = SlowClient(lambda job: "an answer")
    monkeypatch.setattr(connection, "Client", lambda *args, **options: client)
    return client


# run


def test_every_line_is_answered_and_then_forgotten(client: SlowClient) -> None:
    answers = list(batch.run(client, [ours(1), "\n", ours(2), "{"], priority=7))
    assert sorted(map(str, (answer["custom_id"] for answer in answers))) == ["None", "r1", "r2"]
    assert {options["priority"] for options in client.options} == {7}
    assert sorted(client.forgotten) == sorted(options["task_id"] for options in client.options)


def test_where_results_may_not_be_forgotten_lines_are_answered_all_the_same(
    client: SlowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def refuse(ids: Iterable[str]) -> None:
        asked.append(ids)
        raise NoPermissionError("no")

    monkeypatch.setattr(client, "forget", refuse)
    assert len(list(batch.run(client, map(ours, range(50)), window=8))) == 50
    assert len(asked) == 1


def test_no_more_jobs_are_in_flight_than_the_window_holds(client: SlowClient) -> None:
    assert len(list(batch.run(client, map(ours, range(100)), window=8))) == 100
    assert client.most == 8


def test_a_failed_job_and_a_repeated_custom_id_fail_their_lines_alone(client: SlowClient) -> None:
    def say(job: Any) -> str:
        if job.prompt[0].text == "fails":
            raise WorkerLost("gone")
        return "an answer"

    client._answer = say
    answers = list(batch.run(client, [ours(1, "fails"), ours(2), ours(2)]))
    codes = {answer.get("line", answer["custom_id"]): answer.get("error", {}).get("code") for answer in answers}
    assert codes == {"r1": "worker_lost", "r2": None, 3: "invalid_request"}


def test_a_job_that_cannot_be_sent_fails_its_line_alone(client: SlowClient) -> None:
    client.refusals = [InvalidRequest("Its callback may not be called.")]
    answers = list(batch.run(client, [ours(1), ours(2)]))
    assert [answer.get("error", {}).get("code") for answer in answers] == ["invalid_request", None]


@pytest.mark.parametrize("refusal", [QueueFull("no room"), RedisConnectionError("away")])
def test_a_broker_without_room_and_a_redis_that_is_away_are_waited_for(client: SlowClient, refusal: Exception) -> None:
    client.refusals = [refusal, refusal]
    run, troubles = Batch(client, map(ours, range(3))), set()
    ids = []
    for answers in run.turns():
        ids += [answer["custom_id"] for answer in answers]
        troubles.add(run.trouble)
    assert sorted(ids) == ["r0", "r1", "r2"]
    assert any(str(refusal) in trouble for trouble in troubles)
    assert run.trouble == ""


def test_lines_that_are_done_are_left_out_and_those_sent_are_only_asked_for(client: SlowClient) -> None:
    client.is_open, notes = False, []
    first = Batch(client, map(ours, range(6)), name="n", window=4, on_sent=notes.append)
    next(first.turns())
    client.is_open = True
    done = Fingerprints()
    done.add(read_line(1, ours(0)).fingerprint)
    second = Batch(client, map(ours, range(6)), name="n", done=done, sent=notes[-1])
    answers = [answer["custom_id"] for answers in second.turns() for answer in answers]
    assert notes == [1, 2, 3, 4]
    assert sorted(answers) == ["r1", "r2", "r3", "r4", "r5"]
    assert len(client.submitted) == 6, "each job was sent once"


def test_a_refused_line_whose_answer_was_not_written_is_refused_again(client: SlowClient) -> None:
    lines = [json.dumps({"custom_id": "r1", "task": "paint", "arguments": {}}), ours(2)]
    assert [answer["custom_id"] for answer in next(Batch(client, lines, sent=2).turns())] == ["r1"]


def test_jobs_of_another_batch_have_other_ids(client: SlowClient) -> None:
    for name in ("a", "b"):
        list(Batch(client, [ours(1)], name=name).turns())
    assert len({options["task_id"] for options in client.options}) == 2


def test_jobs_that_redis_has_lost_are_noticed(client: SlowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_window, "LOST_S", 0.05)
    monkeypatch.setattr(client, "job", lambda _: type("Job", (), {"status": "starting"}))
    client.is_open = False
    with pytest.raises(JobsLost, match="2 jobs"):
        list(Batch(client, map(ours, range(2))).turns())


@pytest.mark.parametrize(("status", "queued"), [("processing", 0), ("starting", 1)])
def test_jobs_that_run_or_wait_are_not_lost(
    client: SlowClient, monkeypatch: pytest.MonkeyPatch, status: str, queued: int
) -> None:
    monkeypatch.setattr(job_window, "LOST_S", 0.0)
    monkeypatch.setattr(client, "job", lambda _: type("Job", (), {"status": status}))
    monkeypatch.setattr(client, "queued", {4: queued}.__getitem__)
    client.is_open = False
    turns = Batch(client, map(ours, range(2)), priority=4).turns()
    assert [next(turns) for _ in range(4)] == [[]] * 4


def test_a_broker_that_is_away_has_lost_nothing(client: SlowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(priority: int) -> int:
        raise OperationalError("away")

    monkeypatch.setattr(job_window, "LOST_S", 0.0)
    monkeypatch.setattr(client, "job", lambda _: type("Job", (), {"status": "starting"}))
    monkeypatch.setattr(client, "queued", refuse)
    client.is_open = False
    turns = Batch(client, map(ours, range(2))).turns()
    assert [next(turns) for _ in range(4)] == [[]] * 4


def test_a_line_that_cannot_be_sent_is_answered_before_a_later_one_is_sent(client: SlowClient) -> None:
    client.refusals, notes = [InvalidRequest("Its callback may not be called.")], []
    turns = Batch(client, map(ours, range(2)), on_sent=notes.append).turns()
    assert [answer["custom_id"] for answer in next(turns)] == ["r0"]
    assert notes == []
    list(turns)
    assert notes == [2]


def test_a_line_that_was_corrected_is_another_job(client: SlowClient) -> None:
    for text in (ours(1, "wrong"), ours(1, "right"), ours(1, "right") + "\n"):
        list(Batch(client, [text], name="n").turns())
    first, second, third = (options["task_id"] for options in client.options)
    assert first != second == third


# The command


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in.jsonl").write_text("\n".join(map(ours, range(3))) + "\n")
    return tmp_path


def command(folder: Path, *options: str) -> Outcome:
    return CliRunner().invoke(main, ["batch", str(folder / "in.jsonl"), str(folder / "out.jsonl"), *options])


def test_a_batch_that_no_worker_takes_from_says_so(
    client: SlowClient, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def workers() -> list[str]:
        threading.Timer(0.2, setattr, [client, "is_open", True]).start()
        return []

    monkeypatch.setattr(waiting, "CHECK_INTERVAL_S", 0.05)
    monkeypatch.setattr(client, "workers", workers)
    monkeypatch.setattr(client, "queued", lambda priority=None: 2)
    client.is_open = False
    outcome = command(folder)
    assert outcome.exit_code == 0, outcome.output
    assert outcome.stderr.count(f"2 jobs wait. {no_worker('idefics')}\n") == 1


def written(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def ids(folder: Path) -> list[str]:
    return sorted(str(answer["custom_id"]) for answer in written(folder))


def test_the_command_writes_a_line_for_each_and_tells_how_many(client: SlowClient, folder: Path) -> None:
    outcome = command(folder)
    assert (outcome.exit_code, outcome.stdout, outcome.stderr) == (0, "", "3 lines done, 0 of them failed.\n")
    assert ids(folder) == ["r0", "r1", "r2"]
    assert sorted(path.name for path in folder.iterdir()) == ["in.jsonl", "out.jsonl"]
    assert {options["priority"] for options in client.options} == {9}


def test_the_command_tells_how_many_as_json(client: SlowClient, folder: Path) -> None:
    outcome = command(folder, "--json")
    assert json.loads(outcome.stdout) == {"done": 3, "failed": 0, "stopped": False}
    assert outcome.stderr == ""


def test_a_finished_batch_takes_new_lines(client: SlowClient, folder: Path) -> None:
    command(folder)
    with (folder / "in.jsonl").open("a") as lines:
        lines.write(ours(3))
    assert command(folder).exit_code == 0
    assert ids(folder) == ["r0", "r1", "r2", "r3"]
    assert len(client.submitted) == 4


@pytest.mark.parametrize(("prompt", "sent"), [("Hello", 3), ("right", 6)])
def test_an_unfinished_batch_goes_on_but_with_an_input_that_was_corrected_anew(
    client: SlowClient, folder: Path, monkeypatch: pytest.MonkeyPatch, prompt: str, sent: int
) -> None:
    def refuse(ids: Iterable[str]) -> Any:
        raise ResponseError("no")

    client._answer = lambda job: f"an answer to {job.prompt[0].text}"  # type: ignore[attr-defined]
    monkeypatch.setattr(client, "outcomes", refuse)
    assert "Redis refuses" in command(folder).stderr
    monkeypatch.undo()
    monkeypatch.setattr(connection, "Client", lambda *args, **options: client)
    (folder / "in.jsonl").write_text("\n".join(ours(number, prompt) for number in range(3)) + "\n")
    outcome = command(folder)
    assert outcome.exit_code == 0
    assert ("The input has changed" in outcome.stderr) == (prompt != "Hello")
    assert [answer["result"]["text"] for answer in written(folder)] == [f"an answer to {prompt}"] * 3
    assert len(client.submitted) == sent


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full device")
def test_a_full_disk_is_told(client: SlowClient, folder: Path) -> None:
    outcome = CliRunner().invoke(main, ["batch", str(folder / "in.jsonl"), "/dev/full"])
    assert outcome.exit_code == 1
    assert "Cannot write /dev/full: No space left on device." in outcome.stderr


def test_half_a_character_is_answered_as_it_came(client: SlowClient, folder: Path) -> None:
    (folder / "in.jsonl").write_text('{"custom_id": "r1", "task": "complete", "arguments": {}, "\\ud800": 1}\n')
    command(folder)
    (answer,) = written(folder)
    assert "\ud800" in answer["error"]["message"]


def test_failed_lines_run_again_when_asked_for(client: SlowClient, folder: Path) -> None:
    (folder / "in.jsonl").write_text("\n".join([ours(0), "{", ours(1, "fails"), ours(1)]))
    is_bad = True

    def say(job: Any) -> str:
        if is_bad and job.prompt[0].text == "fails":
            raise WorkerLost("gone")
        return "an answer"

    client._answer = say
    first = command(folder)
    assert (first.exit_code, first.stderr) == (1, "4 lines done, 3 of them failed: --retry-failed runs these again.\n")
    is_bad, before = False, len(client.submitted)
    assert command(folder).exit_code == 1, "they are not run again unasked"
    assert len(client.submitted) == before
    second = command(folder, "--retry-failed")
    assert (second.exit_code, second.stderr.split(":")[0]) == (1, "4 lines done, 2 of them failed")
    assert len(client.submitted) == before + 1
    assert ids(folder) == ["None", "r0", "r1", "r1"]


def test_an_unfinished_batch_is_finished_before_failed_lines_run_again(client: SlowClient, folder: Path) -> None:
    (folder / "out.jsonl.resume").touch()
    outcome = command(folder, "--retry-failed")
    assert outcome.exit_code == 2
    assert "run it to its end" in outcome.stderr


@pytest.mark.parametrize("cut", [1, 10, 390])
def test_a_half_written_last_line_is_cut_off_and_its_job_asked_for_again(
    client: SlowClient, folder: Path, cut: int
) -> None:
    command(folder)
    content = (folder / "out.jsonl").read_bytes()
    assert len(content.splitlines()[-1]) > cut
    (folder / "out.jsonl").write_bytes(content[:-cut])
    assert command(folder).exit_code == 0
    assert ids(folder) == ["r0", "r1", "r2"]
    assert len(client.submitted) == 4


@pytest.mark.parametrize("content", ["my diary\n", "my diary", '{"custom_id": "r1"}\n', "[1]\n"])
def test_a_file_that_is_no_batchs_output_is_left_alone(client: SlowClient, folder: Path, content: str) -> None:
    (folder / "out.jsonl").write_text(content)
    outcome = command(folder)
    assert outcome.exit_code == 1
    assert "Line 1 of the output is not an answer of a batch" in outcome.stderr
    assert (folder / "out.jsonl").read_text() == content


def test_the_input_is_not_taken_as_output(client: SlowClient, folder: Path) -> None:
    os.link(folder / "in.jsonl", folder / "out.jsonl")
    assert "are the same file" in command(folder).stderr


@pytest.mark.skipif(sys.platform == "win32", reason="no locks")
def test_two_runs_do_not_write_to_one_output(client: SlowClient, folder: Path) -> None:
    import fcntl

    with (folder / "out.jsonl").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "Another run writes to this output" in command(folder).stderr


def test_jobs_that_redis_has_lost_are_sent_again(
    client: SlowClient, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_window, "LOST_S", 0.05)
    monkeypatch.setattr(client, "job", lambda _: type("Job", (), {"status": "starting"}))
    lost: list[str] = []

    def outcomes(ids: Iterable[str]) -> Any:
        found = FakeClient.outcomes(client, ids)
        if len(client.submitted) == 3:
            # r1 and r2 are never answered.
            lost.extend(id for id in list(found)[1:] if id not in lost)
        return {id: outcome for id, outcome in found.items() if id not in lost or len(client.submitted) > 3}

    monkeypatch.setattr(client, "outcomes", outcomes)
    outcome = command(folder)
    assert outcome.exit_code == 0
    assert "2 jobs have neither an answer nor a place in the queue" in outcome.stderr
    assert ids(folder) == ["r0", "r1", "r2"]
    assert len(client.submitted) == 5


def test_an_unfinished_output_that_was_cut_by_hand_is_completed_within_seconds(
    client: SlowClient, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_window, "RESUMED_LOST_S", 0.05)
    monkeypatch.setattr(client, "job", lambda _: type("Job", (), {"status": "starting"}))
    submit, refusals = client.submit, [ResponseError("no")]

    def refuse_the_third(job: Job, **options: Any) -> Any:
        if len(client.submitted) == 2 and refusals:
            raise refusals.pop()
        return submit(job, **options)

    monkeypatch.setattr(client, "submit", refuse_the_third)
    assert "Redis refuses" in command(folder, "--window", "1").stderr
    assert len(client.forgotten) == 2
    kept = (folder / "out.jsonl").read_text().splitlines(keepends=True)
    (folder / "out.jsonl").write_text("".join(kept[1:]))
    assert command(folder).exit_code == 0
    assert ids(folder) == ["r0", "r1", "r2"]


def test_the_line_of_progress_tells_what_is_left() -> None:
    told = progress(1000, 3, 10.0, 0.5, 200)
    assert told == "1,000 lines done, 3 failed, 200 in flight, 10.0/s, about 2 min 20 s left"
    assert progress(0, 0, 0.0, 0.0, 5) == "0 lines done, 0 failed, 5 in flight, 0.0/s"
