"""`idefics-jobs review ls` and `export`, and the commands that take the exported file."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tasks.calibration import read_calibration
from tasks.campaign.tables import open_table
from tasks.cli import main
from tasks.review import RankedAnswer, ReviewBounds, ReviewList
from tests.unit.review.listed import item, put
from worker.demo.stack import Broker


def run(broker: Broker, *arguments: str) -> Result:
    done = CliRunner().invoke(main, ["--broker", broker.url, *arguments])
    assert isinstance(done.exception, SystemExit | None), done.exception
    return done


def decided(reviews: ReviewList, count: int, **fields: Any) -> None:
    """Decisions about answers that are right seven times in ten although the model is surer."""
    rng = random.Random(1)
    wide = ReviewBounds(1_000, 10_000_000, 3_600)
    for number in range(count):
        sure = rng.uniform(0.5, 0.95)
        answers = (RankedAnswer("cat", sure), RankedAnswer("dog", 1 - sure))
        put(reviews, item(f"job-{number}", confidence=sure, answers=answers, **fields), bounds=wide)
        truth = None if number == 0 else "cat" if rng.random() < 0.7 else "dog"
        assert reviews.decide(f"job-{number}", truth)


def test_ls_shows_what_waits(reviews: ReviewList, broker: Broker) -> None:
    put(reviews, item("a", age_s=60, asked="Which\none?\x1b[2J"), item("b"))
    done = run(broker, "review", "ls")
    lines = done.stdout.splitlines()
    assert [line.split("\t")[1:3] for line in lines] == [["a", "idefics.classify"], ["b", "idefics.classify"]]
    assert lines[0].split("\t")[4:] == ["cat", "0.60", "0.80", "0"]
    assert "\x1b" not in done.stdout
    assert done.stderr == "2 answers wait\n"
    (first,) = run(broker, "review", "ls", "--limit", "1", "--json").stdout.splitlines()
    assert (json.loads(first)["id"], json.loads(first)["answers"][0]["text"]) == ("a", "cat")


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_the_export_is_read_by_eval_and_calibrate(
    reviews: ReviewList, broker: Broker, tmp_path: Path, ending: str
) -> None:
    decided(reviews, 60, revision="abc")
    file, save = str(tmp_path / f"decided.{ending}"), tmp_path / "c.json"
    assert run(broker, "review", "export", file).stdout == f"60 decisions written to {file}\n"
    evaluated = json.loads(run(broker, "eval", file, "--truth", "truth", "--json").stdout)
    # "None of these" is no truth.
    assert evaluated["without_truth"] == 1
    assert evaluated["accuracy"]["value"] == pytest.approx(0.7, abs=0.15)
    done = run(broker, "calibrate", file, "--truth", "truth", "--save", str(save))
    assert done.exit_code == 0, done.output
    kept = read_calibration(save)
    assert (kept.model_id, kept.model_revision) == ("demo", "abc")
    assert kept.labels
    assert kept.labels.rows == 59


def test_each_row_has_what_was_asked_answered_and_decided(reviews: ReviewList, broker: Broker, tmp_path: Path) -> None:
    put(reviews, item("a", metadata={"sku": "7"}, raw_confidence=0.9), item("b"))
    reviews.decide("a", "dog")
    reviews.decide("b", None)
    run(broker, "review", "export", str(tmp_path / "decided.csv"))
    first, second = csv.DictReader((tmp_path / "decided.csv").read_text().splitlines())
    assert json.loads(first.pop("scores")) == {"cat": 0.6, "dog": 0.4}
    assert json.loads(first.pop("metadata")) == {"sku": "7"}
    assert first == {
        "id": "a", "task": "idefics.classify", "asked": "Which one?", "label": "cat", "confidence": "0.9",
        "truth": "dog", "model_id": "demo", "model_revision": "",
    }  # fmt: skip
    assert (second["id"], second["truth"]) == ("b", "")


def test_texts_are_exported_apart_from_labels(reviews: ReviewList, broker: Broker, tmp_path: Path) -> None:
    file = str(tmp_path / "decided.jsonl")
    decided(reviews, 2)
    put(reviews, item("text", task="idefics.answer", answer="a cat"))
    reviews.decide("text", '["a", "cat"]')
    refused = run(broker, "review", "export", file)
    assert (refused.exit_code, "idefics.answer (1), idefics.classify (2)" in refused.stderr) == (1, True)
    exported = run(broker, "review", "export", file, "--task", "idefics.answer", "--json")
    assert json.loads(exported.stdout) == {"decisions": 1, "file": file}
    (row,) = open_table(file)
    assert isinstance(row, dict)
    assert (row["text"], json.loads(row["truth"]), "label" in row) == ("a cat", ['["a", "cat"]'], False)
    evaluated = json.loads(run(broker, "eval", file, "--truth", "truth", "--json").stdout)
    assert evaluated["without_truth"] == 0


def test_a_file_of_another_kind_is_refused(broker: Broker, tmp_path: Path) -> None:
    done = run(broker, "review", "export", str(tmp_path / "decided.xlsx"))
    assert (done.exit_code, ".csv" in done.stderr) == (1, True)


def test_the_model_of_a_table_that_names_several_is_asked_for(
    reviews: ReviewList, broker: Broker, tmp_path: Path
) -> None:
    decided(reviews, 40)
    put(reviews, item("other", model="large"))
    reviews.decide("other", "cat")
    file = str(tmp_path / "decided.csv")
    run(broker, "review", "export", file)
    arguments = ("calibrate", file, "--truth", "truth", "--save", str(tmp_path / "c.json"))
    refused = run(broker, *arguments)
    assert (refused.exit_code, "--for" in refused.stderr) == (1, True)
    assert run(broker, *arguments, "--for", "demo").exit_code == 0
