"""A dry run on a real worker: all rows checked, a sample run, nothing left behind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tasks import Client
from tasks.campaign.dry_run import PRIORITY, dry_run, fleet_of
from tasks.campaign.plan import Plan
from tasks.campaign.tables import open_table
from tasks.cli import main
from tasks.worker_status import DEFAULT_LIMITS, WorkerLimits, WorkerStatus
from tests.support.gallery import Gallery
from tests.support.stand import Stand, stand
from tests.support.waiting import eventually
from worker.demo import stack

FINE, BROKEN, EMPTY = 60, 4, 3


@pytest.fixture(scope="module")
def stood(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    log = tmp_path_factory.mktemp("dry-run") / "worker.log"
    with (
        stack.broker() as server,
        Gallery().open() as gallery,
        stand(server, gallery, log, MODEL="fake", PREFETCH="16") as stood,
    ):
        eventually(Client(server.url).workers)
        yield stood


@pytest.fixture
def table(stood: Stand, tmp_path: Path) -> Path:
    """Pictures that are there, some that never come, and rows without any."""
    urls = [stood.gallery.picture(f"fine{number}") for number in range(FINE)]
    urls += [stood.gallery.broken(f"broken{number}", 1_000) for number in range(BROKEN)]
    urls += [""] * EMPTY
    path = tmp_path / "table.csv"
    path.write_text("sku,image\n" + "".join(f"{number},{url}\n" for number, url in enumerate(urls, 1)))
    return path


def command(stood: Stand, table: Path, *options: str) -> Result:
    server = stood.producer.server
    words = ["--broker", server.url, "--results", server.results, "run", str(table), str(table.with_name("out.csv"))]
    return CliRunner().invoke(main, [*words, "--task", "caption", "--image", "image", "--dry-run", *options])


def test_a_table_is_checked_and_its_sample_shows_what_the_workers_see(stood: Stand, table: Path) -> None:
    done = command(stood, table, "--json", "--gpu-hour-price", "2")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert (told["rows"], told["invalid"]) == (FINE + BROKEN + EMPTY, EMPTY)
    assert told["kinds"] == {"column image: empty": EMPTY}
    assert [problem["row"] for problem in told["first"]] == [FINE + BROKEN + number for number in (1, 2, 3)]
    forecast = told["forecast"]
    assert (forecast["sampled"], forecast["workers"]) == (FINE + BROKEN, 1)
    assert forecast["failures"]["image_unreachable"] == {"value": BROKEN, "low": BROKEN, "high": BROKEN}
    assert [host["host"] for host in forecast["hosts"]] == ["127.0.0.1"]
    assert forecast["completion_tokens"]["value"] > 0
    assert forecast["cost"]["value"] == pytest.approx(2 * forecast["seconds"]["value"] / 3_600)


def test_nothing_of_it_stays(stood: Stand, table: Path) -> None:
    assert command(stood, table).exit_code == 0
    assert not table.with_name("out.csv").exists()
    assert list(table.parent.glob("*.campaign*")) == []
    assert stood.producer.server.connect(1).keys("celery-task-meta-*") == []
    assert stood.producer.queued() == 0


def test_people_read_it_in_words(stood: Stand, table: Path) -> None:
    done = command(stood, table, "--sample", "20")
    assert f"{FINE + BROKEN + EMPTY} rows; {EMPTY} are invalid" in done.stdout
    assert "fill it in, or leave the row out" in done.stdout
    assert "20 rows were run" in done.stdout
    assert "Most of the time it waits for " in done.stdout


def test_a_sample_that_takes_too_long_is_canceled_and_said_so(stood: Stand, tmp_path: Path) -> None:
    path = tmp_path / "slow.csv"
    urls = [stood.gallery.picture("quick"), stood.gallery.held("slow")]
    path.write_text("image\n" + "".join(f"{url}\n" for url in urls))
    client = Client(stood.producer.server.url)
    found = dry_run(client, Plan(task="caption", image="image"), open_table(str(path)), time_limit_s=2.0)
    assert found.unfinished == 1
    assert "did not end in time" in found.notes[0]
    assert found.forecast is not None
    assert found.forecast.sampled == 1
    stood.gallery.release()


def test_without_workers_rows_are_checked_and_nothing_is_sent(table: Path) -> None:
    with stack.broker() as empty:
        client = Client(empty.url)
        found = dry_run(client, Plan(task="caption", image="image"), open_table(str(table)))
        assert (found.validation.invalid, found.forecast) == (EMPTY, None)
        assert "No worker takes from the queue" in found.notes[0]
        assert client.queued() == 0


def test_a_table_without_a_valid_row_is_not_sent(stood: Stand, tmp_path: Path) -> None:
    path = tmp_path / "wrong.csv"
    path.write_text("image\nftp://example.com/a.jpg\n/a.jpg\n")
    done = command(stood, path)
    assert done.exit_code == 0
    assert "2 rows; 2 are invalid" in done.stdout
    assert "nothing was sent" in done.stdout


def test_options_of_a_dry_run_need_it(stood: Stand, table: Path) -> None:
    words = ["run", str(table), str(table.with_name("out.csv")), "--task", "caption", "--image", "image"]
    done = CliRunner().invoke(main, [*words, "--sample", "5"])
    assert done.exit_code == 2
    assert "belong to --dry-run" in done.output


def test_workers_limits_add_up() -> None:
    one = WorkerStatus(limits=WorkerLimits(host_concurrency=4, image_jobs=10, max_retries=1))
    fleet = fleet_of([one], workers=2)
    assert (fleet.workers, fleet.host_slots, fleet.downloads) == (2, 4 + 8, 10 + 64)
    assert fleet.limits.max_retries == 1
    assert fleet_of([], workers=1).limits == DEFAULT_LIMITS
    # All workers together keep to what they share.
    assert fleet_of([], workers=10).host_slots == DEFAULT_LIMITS.host_shared


def test_the_sample_runs_before_jobs_of_the_usual_priority() -> None:
    assert PRIORITY < 5
