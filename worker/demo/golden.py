"""`python -m worker.demo.golden`: writes the bundled checkpoints' golden.json anew, and tries it in every precision.

Texts are the true answers about the picture; probabilities are those that the checkpoint computes in float32. Several
labels are partly right and share the probability, so that a change of the weights shows.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from config.settings import Settings
from tasks.payload_fields import ImagePath
from tasks.payloads import Answer, Caption, CaptionExample, Classify, Complete, Job, Write
from tasks.results import Result
from worker.demo.sayings import FORMS, expected_answer, expected_caption, prompted_caption, story
from worker.demo.world import Scene
from worker.engine.engine import Engine
from worker.jobs.golden import read_golden
from worker.jobs.runs import JobContext
from worker.jobs.service import Service
from worker.models import BUNDLED
from worker.models.loading import load
from worker.models.start import batch_limits

FILE = "golden.png"
SHOWN = Scene("cat", "blue", 1)
IMAGE = ImagePath(path=FILE)
PRECISIONS: Sequence[Mapping[str, str]] = (
    {"dtype": "float32"}, {"dtype": "bfloat16"}, {"quantization": "8bit"}, {"quantization": "4bit"},
)  # fmt: skip
QUESTIONS = ("What is in the image?", "What colour is the background?", "How many cats are there?", "Is this a dog?")
LABELS: Sequence[Sequence[str]] = (
    ("animal", "pet", "cat", "picture", "thing"),
    ("blue", "sky", "sea", "water", "grey", "green"),
    ("one", "two", "a few", "many"),
    ("drawing", "photograph", "painting", "icon", "logo"),
)


def texts() -> list[tuple[Job, str]]:
    """Jobs of the tasks that generate text, and the right texts."""
    fun_fact = FORMS["fun fact"]
    examples = [CaptionExample(image=IMAGE, text=fun_fact(SHOWN))]
    prompt = [{"image": IMAGE}, {"text": "This is an image of"}]
    return [
        *((Answer(image=IMAGE, question=each), expected_answer(SHOWN, each)) for each in QUESTIONS),
        (Caption(image=IMAGE), expected_caption(SHOWN)),
        (Caption(image=IMAGE, prompt="This is an image of"), prompted_caption(SHOWN)),
        (Caption(image=IMAGE, examples=examples), fun_fact(SHOWN)),
        (Write(images=[IMAGE]), story(SHOWN)),
        (Complete.model_validate({"prompt": prompt}), prompted_caption(SHOWN)),
    ]


def answers(folder: Path, jobs: Sequence[Job], precision: Mapping[str, str]) -> list[Result]:
    """The checkpoint's answers in a precision."""
    settings = Settings(model=str(folder), image_root=folder, **precision)  # type: ignore[arg-type]
    model = load(settings)
    engine = Engine(model, batch_limits(model, settings))
    engine.start()
    service = Service(settings, model.info, model.codec, engine, rules=model.rules)
    try:
        with ThreadPoolExecutor(len(jobs)) as threads:
            return list(threads.map(lambda job: service.run(job, JobContext(job.task)), jobs))
    finally:
        engine.stop()


def save(folder: Path) -> None:
    """Write a checkpoint's golden.json; its picture is there."""
    classified = [Classify(image=IMAGE, labels=list(labels)) for labels in LABELS]
    scores = [result.scores or {} for result in answers(folder, classified, {"dtype": "float32"})]
    rounded = [{label: round(score, 6) for label, score in each.items()} for each in scores]
    forms = [
        *({**_form(job), "text": text} for job, text in texts()),
        *({**_form(job), "scores": each} for job, each in zip(classified, rounded, strict=True)),
    ]
    golden = {"image": FILE, **forms[0], "more": forms[1:]}
    (folder / "golden.json").write_text(json.dumps(golden, indent=2) + "\n")


def _form(job: Job) -> dict[str, Any]:
    arguments = job.arguments()
    if arguments.get("image") == {"path": FILE}:
        del arguments["image"]
    return {"task": job.task, "arguments": arguments}


def deviations(folder: Path, precision: Mapping[str, str]) -> tuple[list[str], float]:
    """The texts that are wrong in a precision, and the largest difference of a probability."""
    golden = read_golden(folder)
    assert golden is not None
    said = answers(folder, [question.job for question in golden.questions], precision)
    wrong = [
        f"{result.text!r}, not {question.text!r}"
        for question, result in zip(golden.questions, said, strict=True)
        if question.text is not None and result.text.strip() != question.text.strip()
    ]
    off = [
        abs((result.scores or {})[label] - right)
        for question, result in zip(golden.questions, said, strict=True)
        for label, right in (question.scores or {}).items()
    ]
    return wrong, max(off)


def main() -> int:
    is_right = True
    for folder in BUNDLED.values():
        save(folder)
    for (name, folder), precision in itertools.product(BUNDLED.items(), PRECISIONS):
        wrong, off = deviations(folder, precision)
        print(
            f"{name}, {', '.join(precision.values())}: {len(wrong)} texts wrong, probabilities off by {off:.6f} at most"
        )
        for each in wrong:
            print(f"  {each}")
        is_right &= not wrong
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
