"""A campaign with the fake client: what is run, what a second run does, and what the output holds."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from redis.exceptions import ResponseError

from tasks import Complete, ImageUnreachable, Job, campaign, job_window
from tasks.campaign import CampaignError, Limits, Options, Plan, PlanError, Summary, Watch
from tasks.campaign.lock import locked
from tasks.campaign.state import About, CampaignState
from tasks.cli import connection, main
from tasks.testing import FakeClient

ABOUT = About(id="", name="", plan={}, input="", output="", created=0.0)
PLAN = Plan(task="complete", set={"prompt": '["{ask}"]'}, id="id")


class SlowClient(FakeClient):
    """Its jobs are answered while `is_open`; it notes the options of each."""

    def __init__(self, answer: Callable[[Job], str]) -> None:
        super().__init__(lambda job: self.answer(job))
        self.answer = answer
        self.is_open = True
        self.options: list[dict[str, Any]] = []
        self.forgotten: list[str] = []

    def submit(self, job: Job, **options: Any) -> Any:
        self.options.append(options)
        return super().submit(job, **options)

    def outcomes(self, ids: Iterable[str]) -> Any:
        return super().outcomes(ids) if self.is_open else {}

    def forget(self, ids: Iterable[str]) -> None:
        self.forgotten += ids
        super().forget(ids)

    @property
    def ids(self) -> list[str]:
        return [options["task_id"] for options in self.options]


def say(job: Job) -> str:
    assert isinstance(job, Complete)
    text = str(job.prompt[0].text)  # type: ignore[union-attr]
    if text.startswith("fails"):
        raise ImageUnreachable("It is away.", detail="timeout")
    return text.upper()


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TROUBLE_PAUSE_S", "FIRST_PAUSE_S", "LAST_PAUSE_S"):
        monkeypatch.setattr(job_window, name, 0.001)


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> SlowClient:
    client = SlowClient(say)
    monkeypatch.setattr(connection, "Client", lambda *args, **options: client)
    return client


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write(*(f"ask {number}" for number in range(6)))
    return tmp_path


def write(*texts: str) -> None:
    rows = "".join(f"r{number},{text}\n" for number, text in enumerate(texts))
    Path("in.csv").write_text(f"id,ask\n{rows}")


def run(client: FakeClient, plan: Plan = PLAN, watch: Watch | None = None, **options: Any) -> Summary:
    return campaign.run(client, "in.csv", "out.csv", plan, Options(**options), watch)


def output(path: str = "out.csv") -> list[dict[str, str]]:
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


def column(name: str) -> list[str]:
    return [row[name] for row in output()]


def interrupted(turns: int) -> Watch:
    """A run that ends at its nth turn."""
    left = iter(range(turns - 1))
    return Watch(is_interrupted=lambda: next(left, None) is None)


def test_the_output_has_the_inputs_rows_in_order_with_their_answers(client: SlowClient, folder: Path) -> None:
    summary = run(client)
    assert (summary.end, summary.done, summary.failed, summary.not_run) == ("finished", 6, 0, 0)
    assert column("id") == [f"r{number}" for number in range(6)]
    assert column("text") == [f"ASK {number}" for number in range(6)]
    assert sorted(path.name for path in folder.iterdir()) == ["in.csv", "out.csv", "out.csv.campaign"]
    assert {options["priority"] for options in client.options} == {9}
    assert sorted(client.forgotten) == sorted(client.ids)


def test_failed_and_refused_rows_fail_alone_and_have_their_error(client: SlowClient, folder: Path) -> None:
    write("good", "fails", "", "good")
    summary = run(client)
    assert (summary.done, summary.failed, summary.by_code) == (4, 2, {"image_unreachable": 1, "invalid_request": 1})
    assert column("error_code") == ["", "image_unreachable", "invalid_request", ""]
    assert "'ask'" in column("error")[2]
    assert len(client.submitted) == 3


def test_a_second_run_of_a_finished_campaign_does_nothing_and_says_so(client: SlowClient, folder: Path) -> None:
    run(client)
    before = Path("out.csv").stat().st_mtime_ns
    assert run(client).had_finished
    assert len(client.submitted) == 6
    assert Path("out.csv").stat().st_mtime_ns == before


def test_a_removed_output_is_written_again_without_a_job(client: SlowClient, folder: Path) -> None:
    run(client)
    Path("out.csv").unlink()
    assert run(client).end == "finished"
    assert (len(output()), len(client.submitted)) == (6, 6)


def test_an_interrupted_run_goes_on_and_finds_the_results_of_jobs_in_flight(client: SlowClient, folder: Path) -> None:
    client.is_open = False
    assert run(client, watch=interrupted(2), window=4).end == "interrupted"
    assert not Path("out.csv").exists()
    client.is_open = True
    assert run(client, window=4).end == "finished"
    assert column("text") == [f"ASK {number}" for number in range(6)]
    assert len(client.ids) == len(set(client.ids)) == 6, "each job was sent once"


def test_an_answer_is_committed_before_its_result_is_deleted(
    client: SlowClient, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def forget(ids: Iterable[str]) -> None:
        with CampaignState.read(Path("out.csv.campaign")) as state:
            seen.append({*ids} <= {answer.job for answer in state.answers()})

    monkeypatch.setattr(client, "forget", forget)
    run(client, window=2)
    assert seen
    assert all(seen)


def test_a_job_that_was_sent_and_not_noted_is_sent_again_under_the_same_id(client: SlowClient, folder: Path) -> None:
    client.is_open = False
    run(client, watch=interrupted(2))
    with CampaignState.begin(Path("out.csv.campaign"), ABOUT) as state:
        state.update(sent=0)
    client.is_open = True
    assert run(client).done == 6
    assert len(client.ids) == 12
    assert len(set(client.ids)) == 6


def test_rows_whose_text_was_corrected_run_again_and_others_do_not(client: SlowClient, folder: Path) -> None:
    notes: list[str] = []
    run(client)
    write("ask 0", "other", "ask 2", "ask 3")
    summary = run(client, watch=Watch(on_note=notes.append))
    assert (summary.done, column("text")) == (4, ["ASK 0", "OTHER", "ASK 2", "ASK 3"])
    assert (len(client.submitted), len(notes)) == (7, 1)
    assert "row 2" in notes[0]


def test_jobs_that_redis_has_lost_are_sent_again(
    client: SlowClient, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []

    def note(text: str) -> None:
        notes.append(text)
        client.is_open = True

    monkeypatch.setattr(job_window, "LOST_S", 0.02)
    monkeypatch.setattr(client, "job", lambda _: type("Job", (), {"status": "starting"}))
    client.is_open = False
    assert run(client, watch=Watch(on_note=note)).done == 6
    assert notes[0].startswith("6 jobs have neither an answer nor a place in the queue")
    assert len(client.ids) == 12
    assert len(set(client.ids)) == 6


# Failed rows again


def test_failed_rows_run_again_by_code_as_other_jobs(client: SlowClient, folder: Path) -> None:
    write("good", "fails", "")
    run(client)
    client.answer = lambda job: "mended"
    assert run(client, retry_failed=["internal"]).had_finished
    assert run(client, retry_failed=["image_unreachable"]).failed == 1
    assert (column("text"), len(set(client.ids))) == (["GOOD", "mended", ""], 3)
    assert run(client, retry_failed=[]).failed == 1
    assert len(client.submitted) == 3


def test_an_interrupted_retry_goes_on_and_runs_no_row_a_third_time(client: SlowClient, folder: Path) -> None:
    write("fails 1", "fails 2", "good")
    run(client)
    assert run(client, watch=interrupted(1), window=1, retry_failed=[]).end == "interrupted"
    assert run(client, window=1, retry_failed=[]).failed == 2
    assert len(client.submitted) == 5


# Only new rows


def test_rows_that_an_earlier_output_has_answers_for_are_left_out(client: SlowClient, folder: Path) -> None:
    write("old", "fails")
    run(client)
    Path("out.csv").rename("earlier.csv")
    Path("out.csv.campaign").unlink()
    write("old", "mended", "new")
    summary = run(client, only_new=["earlier.csv"], watch=interrupted(1))
    Path("earlier.csv").write_text("id,error_code\n")
    summary = run(client, only_new=["earlier.csv"])
    assert (summary.left_out, summary.done, summary.not_run) == (1, 2, 0)
    assert column("id") == ["r1", "r2"]
    with pytest.raises(CampaignError, match="another only_new"):
        run(client)


def test_an_earlier_output_without_the_columns_is_refused(client: SlowClient, folder: Path) -> None:
    Path("earlier.csv").write_text("sku,error_code\n")
    with pytest.raises(CampaignError, match="no column 'id'"):
        run(client, only_new=["earlier.csv"])
    assert client.submitted == []


# Limits


def test_a_share_of_failures_stops_after_a_hundred_answers(client: SlowClient, folder: Path) -> None:
    write(*("fails" if number % 10 == 0 else "good" for number in range(200)))
    summary = run(client, window=10, limits=Limits(max_failures="5%"))
    assert summary.end == "limit"
    assert 100 <= summary.done <= 120
    assert summary.not_run == 200 - summary.done
    assert "--max-failures 5%" in summary.reason
    assert column("error_code").count("not_run") == summary.not_run
    assert column("id") == [f"r{number}" for number in range(200)]
    assert run(client, limits=Limits(max_failures="20%")).end == "finished"
    assert len(client.submitted) == 200


def test_a_budget_of_tokens_counts_earlier_runs(client: SlowClient, folder: Path) -> None:
    first = run(client, window=1, limits=Limits(tokens=20))
    assert (first.end, first.done) == ("limit", 2), "each answer has 10 tokens and more"
    assert run(client, window=1, limits=Limits(tokens=20)).done <= 3
    assert run(client, window=1).tokens == 6 * 12


def test_a_budget_of_hours_awaits_jobs_in_flight(client: SlowClient, folder: Path) -> None:
    def open_up(_: str) -> None:
        client.is_open = True

    client.is_open = False
    summary = run(client, window=2, limits=Limits(hours=0.0), watch=Watch(on_note=open_up))
    assert (summary.end, summary.done, len(client.submitted)) == ("limit", 2, 2)


@pytest.mark.parametrize("given", ["many", "5 %%", "-1", "nan"])
def test_a_limit_that_is_no_number_is_refused(given: str) -> None:
    with pytest.raises(CampaignError, match="write a number"):
        Limits(max_failures=given)


# What is refused


def test_another_plan_or_input_for_the_same_output_is_refused_with_the_cure(client: SlowClient, folder: Path) -> None:
    run(client)
    with pytest.raises(CampaignError, match=r"another set: .* name another output, or delete .*out\.csv\.campaign"):
        run(client, Plan(task="complete", set={"prompt": '["{id}"]'}, id="id"))
    Path("other.csv").write_text("id,ask\n")
    with pytest.raises(CampaignError, match="another input"):
        campaign.run(client, "other.csv", "out.csv", PLAN)
    assert len(client.submitted) == 6


def test_nothing_is_sent_or_written_where_the_plan_does_not_fit(client: SlowClient, folder: Path) -> None:
    with pytest.raises(PlanError, match="Did you mean 'ask'"):
        run(client, Plan(task="complete", set={"prompt": '["{aks}"]'}))
    assert [path.name for path in folder.iterdir()] == ["in.csv"]


def test_a_file_that_is_no_output_of_a_campaign_and_the_input_are_left_alone(client: SlowClient, folder: Path) -> None:
    Path("out.csv").write_text("my diary")
    with pytest.raises(CampaignError, match="exists already"):
        run(client)
    with pytest.raises(CampaignError, match="same file"):
        campaign.run(client, "in.csv", str(folder / "in.csv"), PLAN)
    assert Path("out.csv").read_text() == "my diary"


def test_two_runs_do_not_write_to_one_output(client: SlowClient, folder: Path) -> None:
    with locked(Path("out.csv.campaign-lock")), pytest.raises(CampaignError, match="Another run writes"):
        run(client)
    assert run(client).end == "finished"


# The command


def command(*options: str) -> Result:
    words = ["run", "in.csv", "out.csv", "--task", "complete", "--set", 'prompt=["{ask}"]', "--id", "id", *options]
    return CliRunner().invoke(main, words)


def test_the_command_runs_a_campaign_and_says_what_has_come_of_it(client: SlowClient, folder: Path) -> None:
    write("good", "fails")
    outcome = command("--json")
    assert outcome.exit_code == 0, outcome.output
    assert outcome.stderr == (
        "Finished: 2 rows done, 1 of them failed (image_unreachable 1). The output is out.csv. "
        "--retry-failed runs the failed rows again.\n"
    )
    assert json.loads(outcome.stdout)["by_code"] == {"image_unreachable": 1}
    again = command()
    assert (again.exit_code, again.stderr.split(":")[0]) == (0, "Finished already")


def test_the_command_stops_at_a_limit_with_its_own_exit_code(client: SlowClient, folder: Path) -> None:
    write("fails", "good", "good")
    outcome = command("--max-failures", "0", "--window", "1")
    assert outcome.exit_code == 3
    assert "Stopped: 1 rows done, 1 of them failed (image_unreachable 1); 2 rows have not run." in outcome.stderr
    assert "--retry-failed, or with a higher limit" in outcome.stderr
    client.answer = lambda job: "mended"
    assert command("--max-failures", "0", "--retry-failed", "--code", "image_unreachable").exit_code == 0


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--code", "internal"], "--code chooses among the rows of --retry-failed"),
        (["--max-failures", "many"], "campaign: max_failures is 'many'"),
        (["--column", "a=text", "--column", "a=label"], "--column a is given more than once"),
        (["--set", "question"], "plan: --set 'question' is not NAME=VALUE"),
        (["--only-new", "none.csv"], "table: There is no file none.csv"),
    ],
)
def test_the_command_refuses_wrong_options(client: SlowClient, folder: Path, options: list[str], told: str) -> None:
    outcome = command(*options)
    assert outcome.exit_code in (1, 2)
    assert told in outcome.stderr
    assert client.submitted == []


def test_a_redis_that_refuses_is_told(client: SlowClient, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(ids: Iterable[str]) -> Any:
        raise ResponseError("no")

    monkeypatch.setattr(client, "outcomes", refuse)
    outcome = command()
    assert (outcome.exit_code, outcome.stderr) == (1, "Error: Redis refuses: no\n")
