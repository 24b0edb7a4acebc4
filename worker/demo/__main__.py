"""`make demo`: a broker, a worker, and one row for each task, checked. Writes demo.html; leaves nothing running.

`make demo MODEL=smolvlm` asks the second bundled model.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tasks import Answer, Caption, CaptionExample, Classify, Client, ImagePath, Job, Result, Write
from worker.demo import stack
from worker.demo.page import write_page
from worker.demo.sayings import FORMS, expected_answer, expected_caption, prompted_caption, story
from worker.demo.world import CATEGORIES, THINGS, Scene
from worker.jobs.prompts import ImageRef, Prompt, build, in_turns

PICTURES = Path(__file__).parent / "pictures"
PAGE = stack.CHECKOUT / "demo.html"

#: Seconds for one answer, on a slow and busy machine.
ANSWER_S = 120.0

PromptForm = Callable[[Job], Prompt]


class BundledModel(NamedTuple):
    """A bundled model: its name in IDEFICS_MODEL, the form of prompts that it takes, and the part of the demo's answers
    that may be wrong. The pictures were chosen for the first model only, so the second may miss some."""

    name: str
    form: PromptForm
    max_wrong: float = 0.0


#: By MODEL of `make demo`.
MODELS: Mapping[str, BundledModel] = {
    "idefics": BundledModel("demo", build),
    "smolvlm": BundledModel("demo-smolvlm", in_turns, max_wrong=0.1),
}


@dataclass(frozen=True, slots=True)
class Shown:
    """A picture of the demo: its file and its content."""

    file: str
    picture: Scene

    @property
    def path(self) -> ImagePath:
        return ImagePath(path=self.file)


@dataclass(frozen=True, slots=True)
class Question:
    """A job of one of the mission's tasks, and the right answer."""

    task: str
    job: Job
    right: str


@dataclass(frozen=True, slots=True)
class AnsweredQuestion:
    """A question with its answer. `prompt` contains the files' names in place of the pictures."""

    task: str
    files: tuple[str, ...]
    prompt: str
    answer: str
    seconds: float
    is_right: bool


def pictures() -> list[Shown]:
    """The pictures that the checkpoint ships with; it was not trained on them."""
    entries = json.loads((PICTURES / "pictures.json").read_text())
    return [Shown(entry["file"], Scene(entry["name"], entry["background"], entry["count"])) for entry in entries]


def questions(shown: Sequence[Shown]) -> list[Question]:
    """One for each task but batch inference."""
    a, b, c, d, e, f, example = (shown[n % len(shown)] for n in range(7))
    fun_fact = FORMS["fun fact"]
    few_shot = Caption(image=c.path, examples=[CaptionExample(image=example.path, text=fun_fact(example.picture))])
    colour = "What colour is the background?"
    return [
        Question("image captioning", Caption(image=a.path), expected_caption(a.picture)),
        Question(
            "prompted captioning",
            Caption(image=b.path, prompt="This is an image of"),
            prompted_caption(b.picture),
        ),
        Question("few-shot prompting", few_shot, fun_fact(c.picture)),
        Question(
            "visual question answering", Answer(image=d.path, question=colour), expected_answer(d.picture, colour)
        ),
        Question(
            "image classification",
            Classify(image=e.path, labels=list(CATEGORIES)),
            THINGS[e.picture.thing].category,
        ),
        Question("image-guided text generation", Write(images=[f.path]), story(f.picture)),
    ]


def ask(client: Client, question: Question, form: PromptForm) -> AnsweredQuestion:
    started = time.monotonic()
    result = client.submit(question.job).result(ANSWER_S)
    return _row(question, result, time.monotonic() - started, form)


def batch(client: Client, shown: Sequence[Shown], form: PromptForm) -> tuple[list[AnsweredQuestion], float]:
    """Every picture captioned at once: the rows, and the seconds for all."""
    asked = [Question("batch inference", Caption(image=each.path), expected_caption(each.picture)) for each in shown]
    started = time.monotonic()
    jobs = client.submit_many(question.job for question in asked)
    results = [job.result(ANSWER_S) for job in jobs]
    seconds = time.monotonic() - started
    return [
        _row(question, result, seconds / len(asked), form) for question, result in zip(asked, results, strict=True)
    ], seconds


def _row(question: Question, result: Result, seconds: float, form: PromptForm) -> AnsweredQuestion:
    parts = form(question.job)
    files = [part.source.path for part in parts if isinstance(part, ImageRef) and isinstance(part.source, ImagePath)]
    unnamed = iter(files)
    prompt = "".join(f"[{next(unnamed)}]" if isinstance(part, ImageRef) else part for part in parts)
    text = result.text.strip()
    return AnsweredQuestion(question.task, tuple(files), prompt, text, seconds, text == question.right)


def run(model: str = "idefics", say: Callable[[str], None] = print) -> bool:
    """The whole demo with one of MODELS. True if no more answers were wrong than the model may miss."""
    shown, chosen = pictures(), MODELS[model]
    say(f"Starting a broker and a worker with the bundled {model} model ...")
    settings = {"MODEL": chosen.name, "IMAGE_ROOT": str(PICTURES)}
    with stack.broker() as broker, stack.worker(broker, settings=settings):
        client = Client(broker.url)
        rows = [ask(client, question, chosen.form) for question in questions(shown)]
        for row in rows:
            say(_line(row))
        captions, seconds = batch(client, shown, chosen.form)
    right = sum(row.is_right for row in captions)
    say(f"\nbatch inference: {len(captions)} captions in {seconds:.2f} s, {right} right")
    write_page(PAGE, [*rows, *captions], PICTURES, chosen.name)
    say(f"The pictures beside the answers: {PAGE.name}")
    wrong = [row for row in [*rows, *captions] if not row.is_right]
    for row in wrong:
        say(f"WRONG: {_line(row)}")
    return len(wrong) <= chosen.max_wrong * (len(rows) + len(captions))


def _line(row: AnsweredQuestion) -> str:
    mark = "" if row.is_right else "   <- wrong"
    return (
        f"\n{row.task}  ({', '.join(row.files)}, {row.seconds:.2f} s)\n"
        f"  prompt: {row.prompt!r}\n  answer: {row.answer!r}{mark}"
    )


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="idefics")
    return 0 if run(parser.parse_args().model) else 1


if __name__ == "__main__":
    sys.exit(main())
