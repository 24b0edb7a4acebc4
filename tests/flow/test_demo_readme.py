"""The code blocks of README and documentation run as they stand, in the checkout; only the broker's address differs."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import os
import re
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from tasks import Caption, Client, Image, ImageUnreachable
from tasks.review import ReviewList
from worker.demo.stack import CHECKOUT, Broker

PAGES = [CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w+)( gpu| docker)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
#: (page, language, what it needs, code); what stands on two pages is there once.
BLOCKS = list({found[2]: (page.stem, *found) for page in PAGES for found in BLOCK.findall(page.read_text())}.values())
PYTHON = [(page, code) for page, language, _, code in BLOCKS if language == "python"]
SHELL = [code for _, language, needs, code in BLOCKS if language == "bash" and not needs]
DOCKER = [code for _, _, needs, code in BLOCKS if needs == " docker"]


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CHECKOUT)


def _placed(code: str, broker: Broker) -> str:
    return code.replace("redis://localhost:6379/0", broker.url).replace("redis://localhost:6379/1", broker.results)


def _run(code: str) -> tuple[dict[str, Any], list[str]]:
    namespace: dict[str, Any] = {"__name__": "readme"}
    output = io.StringIO()
    with redirect_stdout(output):
        exec(compile(code, "README.md", "exec", dont_inherit=True), namespace)
    return namespace, output.getvalue().splitlines()


def test_no_block_names_a_host_that_is_not_there() -> None:
    hosts = set(re.findall(r"https?://(\w[\w.-]*)", "".join(code for *_, code in BLOCKS)))
    # The receiver of callbacks is the reader's own.
    assert hosts <= {"shop.example"}


@pytest.mark.parametrize("code", [pytest.param(code, id=f"{page}-{code.splitlines()[0]}") for page, code in PYTHON])
def test_a_python_block_prints_what_its_comments_say(code: str, demo_broker: Broker, tmp_path: Path) -> None:
    code = _placed(code, demo_broker).replace("captions.jsonl", f"{tmp_path}/captions.jsonl")
    promised = re.findall(r"^print\(.*\)  # (.*)$", code, re.MULTILINE)
    _, printed = _run(code)
    assert [line.strip() for line in printed] == promised


def test_the_fastapi_block_serves_a_caption(demo_broker: Broker, pictures_url: str) -> None:
    [code] = [code for _, code in PYTHON if '@api.post("/captions")' in code]
    namespace, _ = _run(_placed(code, demo_broker))

    async def use() -> dict[str, Any]:
        created = await namespace["create"](image=f"{pictures_url}/cat.png")
        for _ in range(600):
            answer = await namespace["read"](created["id"])
            if answer["status"] == "succeeded":
                return dict(answer)
            await asyncio.sleep(0.1)
        raise TimeoutError

    assert asyncio.run(use())["text"].strip() == "A cat on a blue background."


def test_the_shell_blocks_name_make_targets_that_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (CHECKOUT / "Makefile").read_text(), re.MULTILINE))
    named = {line.split()[1] for code in SHELL for line in code.splitlines() if line.startswith("make ")}
    assert named == {"demo", "test", "up"}
    assert named <= targets


def test_the_shell_blocks_of_the_command_line_print_results(demo_broker: Broker) -> None:
    [code] = [code for code in SHELL if "idefics-jobs submit" in code]
    texts = [json.loads(said)["text"].strip() for said in _said(_placed(code, demo_broker), demo_broker)]
    assert texts == ["A cat on a blue background.", "animal"]


def test_the_shell_block_of_jobs_by_their_ids_shows_and_cancels_them(demo_broker: Broker) -> None:
    [code] = [code for code in SHELL if "idefics-jobs status" in code]
    client = Client(demo_broker.url)
    job = client.submit(Caption(image=Image.from_file(CHECKOUT / "examples/pictures/cat.png")))
    job.result(timeout=120)
    status, result, canceled, queue = _said(code.replace("JOB_ID", job.id), demo_broker)
    assert status == f"{job.id}\tsucceeded\t-\t-\n"
    assert json.loads(result)["text"].strip() == "A cat on a blue background."
    assert canceled == f"{job.id} has already succeeded\n"
    assert f"workers\t{len(client.workers())}\n" in queue


def test_the_shell_block_of_the_containers_prints_a_result(demo_broker: Broker) -> None:
    [code] = DOCKER
    code = code.replace("docker compose run --rm client", "idefics-jobs")
    [said] = _said(_placed(code, demo_broker), demo_broker)
    assert json.loads(said)["text"].strip() == "A cat on a blue background."


def test_the_shell_block_of_bulk_jobs_answers_the_shipped_lines(demo_broker: Broker, tmp_path: Path) -> None:
    [code] = [code for code in SHELL if "idefics-jobs batch" in code]
    _said(code.replace("answers", f"{tmp_path}/answers"), demo_broker)
    answers = map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines())
    told = {answer["custom_id"]: answer for answer in answers}
    assert told["caption"]["result"]["text"].strip() == "A cat on a blue background."
    assert told["label"]["result"]["label"] == "animal"
    message = told["chat"]["response"]["body"]["choices"][0]["message"]
    assert message["content"].strip() == "The image shows a cat."


def test_the_shell_block_of_a_campaign_captions_the_shipped_pictures(demo_broker: Broker, tmp_path: Path) -> None:
    [code] = [code for code in SHELL if "idefics-jobs run examples/pictures captions.csv" in code]
    _said(code.replace("captions.csv", f"{tmp_path}/captions.csv"), demo_broker)
    with (tmp_path / "captions.csv").open(newline="") as file:
        texts = {row["file"]: row["text"].strip() for row in csv.DictReader(file)}
    assert texts["cat.png"] == "A cat on a blue background."
    assert [*texts] == sorted(texts)
    assert (tmp_path / "captions.html").read_text().count("data:image/webp;base64,") == len(texts)


def test_the_shell_block_of_attributes_writes_them_into_columns(demo_broker: Broker, tmp_path: Path) -> None:
    [code] = [code for code in SHELL if "subjects.csv" in code]
    _said(code.replace("subjects.csv", f"{tmp_path}/subjects.csv"), demo_broker)
    with (tmp_path / "subjects.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    for row in rows:
        assert row["finish_reason"] == "stop"
        assert row["subject"] in ("animal", "car", "food", "plant", "other")
        assert row["count"] in set("123456789")
        assert json.loads(row["text"]) == {"subject": row["subject"], "count": int(row["count"])}


def test_the_shell_blocks_of_a_review_go_from_pictures_to_an_evaluation(demo_broker: Broker, tmp_path: Path) -> None:
    [asked] = [code for code in SHELL if "products.csv" in code]
    [decided] = [code for code in SHELL if "reviewed.csv" in code]
    reviews = ReviewList(Client(demo_broker.url).app)
    _, listed = _said(asked.replace("products.csv", f"{tmp_path}/products.csv"), demo_broker)
    with (tmp_path / "products.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    doubtful = {row["file"]: row for row in rows if row["abstained"] == "true"}
    assert 0 < len(doubtful) < len(rows) == 6
    assert all((float(row["confidence"]) < 0.95) == (row["file"] in doubtful) for row in rows)

    waiting = {item.metadata.get("file"): item for item in reviews.waiting()}
    assert waiting.keys() >= doubtful.keys()
    for name, row in doubtful.items():
        item = waiting[name]
        assert item.id in listed
        assert (item.answers[0].text, item.pictures) == (row["text"], 1)
        assert reviews.decide(item.id, '{"subject": "plant", "count": 1}')
    _, evaluated = _said(decided.replace("reviewed.csv", f"{tmp_path}/reviewed.csv"), demo_broker)
    with (tmp_path / "reviewed.csv").open(newline="") as file:
        exported = {json.loads(row["metadata"])["file"]: row for row in csv.DictReader(file)}
    assert {name: row["text"] for name, row in exported.items()} == {
        name: row["text"] for name, row in doubtful.items()
    }
    assert "normalised match\t0.0 %\t" in evaluated


def test_the_shell_block_of_one_table_goes_from_its_rows_to_a_comparison(demo_broker: Broker, tmp_path: Path) -> None:
    [code] = [code for code in SHELL if "examples/campaign/pictures.csv" in code]
    said = _said(re.sub(r"\b(first|second|mistakes|both)\.", rf"{tmp_path}/\1.", code), demo_broker)
    # Another processor's rounding may change an answer.
    assert re.search(r"normalised match\t[234]\d\.\d %\t", said[-3])
    assert re.search(r"normalised match\t[234]\d\.\d %\t(100\.0|9\d\.\d) %\t", said[-1])
    assert "B is better." in said[-1]
    for page in ("first", "mistakes", "both"):
        assert "data:image/webp;base64," in (tmp_path / f"{page}.html").read_text()


def test_the_shell_block_of_failed_jobs_lists_and_sends_again(demo_broker: Broker, pictures_url: str) -> None:
    [code] = [code for code in SHELL if "idefics-jobs failed" in code]
    # Nobody listens there.
    away = pictures_url.replace("127.0.0.1", "127.0.0.2")
    job = Client(demo_broker.url).submit(Caption(image=f"{away}/cat.png"))
    with pytest.raises(ImageUnreachable):
        job.result(timeout=120)
    listed, sent, dropped = _said(code, demo_broker)
    assert job.id in listed
    assert sent == "1 jobs sent again\n"
    assert dropped == "0 jobs dropped\n"


def _said(code: str, broker: Broker) -> list[str]:
    """What each line of a shell block prints."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "IDEFICS_BROKER_URL": broker.url,
        "IDEFICS_RESULT_BACKEND": broker.results,
    }
    said = []
    for line in code.replace("\\\n", " ").splitlines():
        done = subprocess.run(
            line, shell=True, cwd=CHECKOUT, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    return said


def test_the_shell_block_of_the_probe_tells_a_workers_state(demo_broker: Broker) -> None:
    [code] = [code for code in SHELL if code.strip() == "python -m worker.health"]
    [said] = _said(code, demo_broker)
    assert ": READY" in said


def test_the_shell_block_of_the_settings_prints_them() -> None:
    assert any(code.strip() == "python -m config" for code in SHELL)
    done = subprocess.run([sys.executable, "-m", "config"], cwd=CHECKOUT, capture_output=True, text=True)
    assert "IDEFICS_MODEL=demo" in done.stdout


def test_the_shell_block_of_the_screen_and_the_queue_shows_both(demo_broker: Broker) -> None:
    [code] = [code for code in SHELL if "idefics-jobs top" in code]
    screen, queue = _said(code, demo_broker)
    assert "queue\tidefics\t" in screen
    assert "\tdemo\t" in screen
    assert "waiting\t" in queue


def test_the_shell_block_of_celerys_inspect_shows_the_worker(demo_broker: Broker) -> None:
    [code] = [code for code in SHELL if "celery -A worker.app inspect" in code]
    stats, queues = _said(code, demo_broker)
    assert "InferencePool" in stats
    assert "'name': 'idefics'" in queues


def test_every_shell_block_is_covered() -> None:
    covered = (
        "make demo",
        "make up",
        "idefics-jobs",
        "celery -A worker.app worker",
        "celery -A worker.app inspect",
        "celery -A worker.callbacks worker",
        # tests/flow/test_queue_views.py
        "celery -A worker.monitor flower",
        "python -m worker.observability.queue",
        "python -m config",
        "python -m worker.health",
    )
    assert all(any(start in code for start in covered) for code in SHELL)
