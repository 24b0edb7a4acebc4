"""`idefics-jobs review ls` and `export`: what waits for a person, and decisions as truth for evaluations."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import click

from ..campaign.errors import TableError
from ..campaign.tables import open_writer
from ..payloads import Classify
from ..review import Decision, ReviewItem, ReviewList
from .console import CommandError, echo, echo_json, echo_rows, json_option

#: Characters of a question and of an answer in the listing.
_SHOWN_CHARS = 60


@click.command("ls")
@click.option("--limit", type=click.IntRange(1, 10_000), default=100, show_default=True, help="Most lines.")
@json_option
@click.pass_obj
def list_reviews(source: Any, limit: int, as_json: bool) -> None:
    """List the answers that wait for a person, the oldest first.

    Their number follows on standard error.

    \b
    idefics-jobs review ls
    """
    reviews = review_list(source)
    items = reviews.waiting(limit)
    if as_json:
        for item in items:
            echo_json(asdict(item), on_one_line=True)
    else:
        echo_rows(("since", "id", "task", "asked", "answer", "confidence", "wanted", "pictures"), map(_row, items))
    echo(f"{reviews.count():,} answers wait", err=True)


@click.command("export")
@click.argument("file")
@click.option("--task", help="Of this task only, as idefics.classify.")
@json_option
@click.pass_obj
def export_decisions(source: Any, file: str, task: str | None, as_json: bool) -> None:
    """Write the decisions to FILE: .csv, .tsv, .jsonl or .parquet.

    The column `truth` has the person's answer; it is empty where no answer was right. `confidence` is the model's own,
    before calibration. `eval` and `calibrate` read the file.

    \b
    idefics-jobs review export decided.csv
    idefics-jobs eval decided.csv --truth truth
    """
    decided = [each for each in review_list(source).decisions() if task in (None, each[0].task)]
    kinds = Counter(item.task for item, _ in decided)
    if Classify.task in kinds and len(kinds) > 1:
        tasks = ", ".join(f"{name} ({count})" for name, count in sorted(kinds.items()))
        raise CommandError(f"Labels and texts are evaluated apart: choose with --task: {tasks}.")
    answer = "label" if Classify.task in kinds else "text"
    columns = ("id", "task", "asked", answer, "confidence", "truth", "scores", "metadata", "model_id", "model_revision")
    try:
        with open_writer(file, columns, types={"confidence": float}) as writer:
            for row in rows(decided, answer):
                writer.write(row)
    except TableError as error:
        raise CommandError(str(error)) from None
    if as_json:
        echo_json({"decisions": len(decided), "file": file}, on_one_line=True)
    else:
        echo(f"{len(decided):,} decisions written to {file}")


def rows(decided: Iterable[tuple[ReviewItem, Decision]], answer: str) -> Iterator[dict[str, Any]]:
    """A row for each decision, with the model's own answer in the column `answer`."""
    for item, decision in decided:
        yield {
            "id": item.id,
            "task": item.task,
            "asked": item.asked,
            answer: item.answer,
            "confidence": item.confidence if item.raw_confidence is None else item.raw_confidence,
            "truth": _truth(decision.answer),
            "scores": {each.text: each.confidence for each in item.answers},
            "metadata": item.metadata,
            "model_id": item.model,
            "model_revision": item.revision,
        }


def review_list(source: Any) -> ReviewList:
    """The review list of a client that `source` makes."""
    return ReviewList(source().app)


def _truth(answer: str | None) -> str | None:
    # A cell that is a JSON list is read as several right answers.
    return json.dumps([answer]) if answer and answer.lstrip().startswith("[") else answer


def _row(item: ReviewItem) -> tuple[str, ...]:
    return (
        datetime.fromtimestamp(item.created, UTC).isoformat(timespec="seconds"),
        item.id,
        item.task,
        _shown(item.asked),
        _shown(item.answer),
        f"{item.confidence:.2f}",
        f"{item.min_confidence:.2f}",
        str(item.pictures),
    )


def _shown(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN_CHARS else f"{text[: _SHOWN_CHARS - 3]}..."
