"""Golden questions: a checkpoint's golden.json has questions to ask before the model serves, with the right answers.

    {"image": "golden.png", "task": "idefics.answer", "arguments": {"question": "What is this?"}, "text": "A cat.",
     "more": [{"task": "idefics.classify", "arguments": {"labels": ["cat", "dog"]}, "scores": {"cat": 1, "dog": 0}}]}

A text must match word for word. Probabilities must match within a tolerance that depends on the precision: they reveal
a change of the weights that does not change a short answer. Images are files beside golden.json; a task with one image
that names no file uses `image`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.payload_fields import ImagePath
from tasks.payloads import Classify, Job, parse
from worker.images.sources import read_below
from worker.jobs.prompts import ImageRef, build
from worker.models import SetupFailed

#: Bytes of golden.json and of each picture.
MAX_BYTES = 20_000_000
#: Questions: each delays every start.
MAX_QUESTIONS = 100
FORM = "The checkpoint's golden.json has another form than task, image, arguments, text, scores and more."


@dataclass(frozen=True, slots=True)
class GoldenQuestion:
    """A job and its right answer: a text, or for labels their probabilities."""

    job: Job
    text: str | None
    scores: Mapping[str, float] | None

    def fault(self, text: str, scores: Mapping[str, float], tolerance: float) -> str | None:
        """Describe what is wrong with an answer; None if it is right."""
        if self.text is not None and text.strip() != self.text.strip():
            return f"the model says {text!r} where {self.text!r} is right"
        for label, right in (self.scores or {}).items():
            if not abs(scores.get(label, float("nan")) - right) <= tolerance:
                return f"the model gives {label!r} {scores.get(label):.4f} where {right:.4f} is right"
        return None


@dataclass(frozen=True, slots=True)
class Golden:
    """A checkpoint's golden questions and the picture files that they show, by name."""

    questions: tuple[GoldenQuestion, ...]
    pictures: Mapping[str, bytes]


def read_golden(folder: Path) -> Golden | None:
    """Read a checkpoint's golden questions; None without any. Raises SetupFailed or a JobError.

    The checkpoint is not trusted: its file may only name files beside itself.
    """
    if not os.path.lexists(folder / "golden.json"):
        return None
    try:
        form = json.loads(read_below(folder, "golden.json", MAX_BYTES))
        asked = [form, *form.get("more", [])]
        if len(asked) > MAX_QUESTIONS:
            raise SetupFailed(f"The checkpoint's golden.json has {len(asked)} questions: {MAX_QUESTIONS} are asked.")
        questions = tuple(_question(each, form["image"]) for each in asked)
        return Golden(questions, _pictures(folder, questions))
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError):
        raise SetupFailed(FORM) from None


def _question(form: Mapping[str, Any], image: Any) -> GoldenQuestion:
    arguments = dict(form["arguments"])
    if form["task"] in ("idefics.caption", "idefics.answer", "idefics.classify"):
        arguments = {"image": {"path": image}, **arguments}
    job = parse(form["task"], arguments)
    if isinstance(job, Classify):
        return GoldenQuestion(job, None, {label: float(form["scores"][label]) for label in job.labels})
    return GoldenQuestion(job, str(form["text"]), None)


def _pictures(folder: Path, questions: tuple[GoldenQuestion, ...]) -> dict[str, bytes]:
    sources = [part.source for each in questions for part in build(each.job) if isinstance(part, ImageRef)]
    if not all(isinstance(source, ImagePath) and "/" not in source.path for source in sources):
        raise SetupFailed("The checkpoint's golden.json names a picture elsewhere: put it beside the file.")
    names = {source.path for source in sources if isinstance(source, ImagePath)}
    return {name: read_below(folder, name, MAX_BYTES) for name in sorted(names)}
