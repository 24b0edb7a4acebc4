"""`idefics-jobs campaigns`, on a real Redis without a worker."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from click.testing import CliRunner
from click.testing import Result as Outcome

from tasks import ImageUnreachable, JobError
from tasks.campaign.control import CampaignControl, CampaignInfo, CampaignProgress, this_host
from tasks.campaign.record import public_id
from tasks.campaign.state import About, CampaignState, stored
from tasks.cli import main
from tasks.errors import ImageInvalid
from worker.demo.stack import Broker

ID = "0d6a0f0e5c1e4b0fa3a7f7c1c9f3a001"
INFO = CampaignInfo("shoes", "idefics.caption", "shoes.csv", "captions.parquet", "machine-1", 1_780_000_000.0)
PROGRESS = CampaignProgress(
    rows=12_000, done=4_000, failed=3, failures={"image_unreachable": 2, "image_invalid": 1}, in_flight=100, rate=12.5,
    bound="hosts", left_s=640.0,
)  # fmt: skip
#: Hosts of failed rows' images.
FAILURES: tuple[tuple[JobError, str | None], ...] = (
    (ImageUnreachable("x"), "cdn.test"), (ImageUnreachable("x"), "cdn.test"), (ImageInvalid("x"), "other.test"),
    (ImageInvalid("x"), None), (ImageUnreachable("x"), None),
)  # fmt: skip


@pytest.fixture
def run(broker: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Runs a command, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(main, ["--broker", broker.url, "campaigns", *arguments])


def json_lines(outcome: Outcome) -> list[dict[str, Any]]:
    assert outcome.exit_code == 0, outcome.output
    return [json.loads(line) for line in outcome.stdout.splitlines()]


@pytest.fixture
def control(app: Celery) -> CampaignControl:
    """Of a campaign that has reported."""
    control = CampaignControl(app, ID)
    control.register(INFO)
    control.report(PROGRESS)
    return control


def kept(path: Path) -> None:
    """Write a campaign's state file with its failures."""
    about = About(id=ID, name="shoes", plan={}, input="shoes.csv", output="captions.parquet", created=0.0)
    with CampaignState.begin(path, about) as state:
        state.store(stored(row, b"", "job", host, error, 0.0) for row, (error, host) in enumerate(FAILURES, 1))


def test_campaigns_are_listed_with_their_progress(control: CampaignControl, run: Callable[..., Outcome]) -> None:
    *cells, seen = run("ls").stdout.rstrip().split("\t")
    assert cells == [control.id, "shoes", "running", "4,000 of 12,000", "3", "12.5", "10 min 40 s", "machine-1"]
    assert seen.endswith(" ago")
    (told,) = json_lines(run("ls", "--json"))
    assert (
        told.items() >= {"id": control.id, "status": "running", "rows": 12_000, "rate": 12.5, "left_s": 640.0}.items()
    )


def test_a_campaign_is_shown_with_its_failures(control: CampaignControl, run: Callable[..., Outcome]) -> None:
    shown = dict(line.split("\t") for line in run("show", "shoes").stdout.splitlines())
    assert shown.items() >= {
        "id": control.id, "task": "idefics.caption", "input": "shoes.csv", "started": "2026-05-28T20:26:40Z",
        "in flight": "100", "limited by": "hosts", "failed": "3", "failed, image_unreachable": "2",
    }.items()  # fmt: skip
    (told,) = json_lines(run("show", control.id[:6], "--json"))
    assert told["failures"] == PROGRESS.failures


def test_a_campaign_is_paused_resumed_and_canceled(
    app: Celery, control: CampaignControl, run: Callable[..., Outcome]
) -> None:
    for order, said, status in (
        ("pause", "will pause", "paused"),
        ("resume", "will go on", "running"),
        ("cancel", "will be canceled", "canceled"),
    ):
        assert run(order, "shoes").stdout == f"shoes ({control.id}) {said}\n"
        assert json_lines(run("show", "shoes", "--json"))[0]["status"] == status
        # Its producer reads it when it asks next.
        assert CampaignControl(app, ID).state() == status


@pytest.mark.parametrize("order", ["pause", "resume", "cancel"])
@pytest.mark.parametrize(("end", "said"), [("finished", "already finished"), ("canceled", "already been canceled")])
def test_a_campaign_that_has_ended_is_left_alone(
    control: CampaignControl, run: Callable[..., Outcome], order: str, end: str, said: str
) -> None:
    control.end(end, PROGRESS)  # type: ignore[arg-type]
    assert said in run(order, "shoes").stdout
    assert json_lines(run(order, "shoes", "--json")) == [{"id": control.id, "requested": False, "status": end}]


def test_none_is_steered_if_one_is_unknown(control: CampaignControl, run: Callable[..., Outcome]) -> None:
    outcome = run("pause", "shoes", "hats")
    assert (outcome.exit_code, outcome.stdout) == (1, "")
    assert "No campaign 'hats'" in outcome.stderr
    assert control.state() == "running"


def test_texts_of_another_producer_cannot_change_the_terminal(app: Celery, run: Callable[..., Outcome]) -> None:
    hostile = "\x1b[2Jshoes\nx"
    CampaignControl(app, ID).register(CampaignInfo(hostile, hostile, hostile, hostile, hostile, 1e300))
    for command in ("ls", "show"):
        outcome = run(command, *([public_id(ID)] if command == "show" else ()))
        assert outcome.exit_code == 0
        assert "\x1b" not in outcome.stdout


# Failures


@pytest.mark.parametrize("given", ["captions.parquet", "captions.parquet.campaign", "shoes", public_id(ID)])
def test_failures_are_counted_by_code_and_host(
    control: CampaignControl, run: Callable[..., Outcome], tmp_path: Path, given: str
) -> None:
    kept(tmp_path / "captions.parquet.campaign")
    assert run("failures", given, "--by", "host").stdout == "cdn.test\t2\nother.test\t1\n-\t2\n"
    assert json_lines(run("failures", given, "--json")) == [
        {"code": "image_unreachable", "failed": 3},
        {"code": "image_invalid", "failed": 2},
    ]
    assert json_lines(run("failures", given, "--by", "host", "--json"))[-1] == {"host": None, "failed": 2}


def test_on_another_machine_failures_are_counted_by_code_alone(
    control: CampaignControl, run: Callable[..., Outcome]
) -> None:
    assert run("failures", "shoes").stdout == "image_unreachable\t2\nimage_invalid\t1\n"
    refused = run("failures", "shoes", "--by", "host")
    assert refused.exit_code == 1
    assert "captions.parquet.campaign, on the machine machine-1" in refused.stderr


def test_a_file_of_another_campaign_is_not_taken_for_this_one(
    app: Celery, run: Callable[..., Outcome], tmp_path: Path
) -> None:
    kept(tmp_path / "captions.parquet.campaign")
    CampaignControl(app, "another").register(replace(INFO, host=this_host()))
    refused = run("failures", "shoes", "--by", "host")
    assert "another folder of this machine" in refused.stderr


def test_a_campaign_without_failures_says_so(app: Celery, run: Callable[..., Outcome]) -> None:
    CampaignControl(app, ID).register(INFO)
    outcome = run("failures", "shoes")
    assert (outcome.exit_code, outcome.stdout, outcome.stderr) == (0, "", "No row has failed.\n")


@pytest.mark.parametrize("output", ["", ".", "..", "../captions.parquet", "/etc/passwd"])
def test_a_record_leads_to_no_file_outside_the_folder(app: Celery, run: Callable[..., Outcome], output: str) -> None:
    CampaignControl(app, ID).register(replace(INFO, output=output))
    refused = run("failures", "shoes", "--by", "host")
    assert refused.exit_code == 1
    assert isinstance(refused.exception, SystemExit)
