"""The jobs that the contenders run, as our payloads."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.pictures import PictureBook
from tasks import Answer, Caption, CaptionExample, Classify, Complete, Job, Write

THINGS = ["cat", "dog", "apple", "car", "tree", "guitar", "house", "hammer", "moon", "boot"]


@dataclass(frozen=True)
class Workload:
    """Named jobs. `compares_texts` is off where the stock engine does another thing (classification); `part` is less
    than one where a job is long work."""

    name: str
    make: Callable[[int, PictureBook], Sequence[Job]]
    compares_texts: bool = True
    part: float = 1.0


def _plain(count: int, book: PictureBook) -> list[Job]:
    return [Caption(image=book.new(), prompt="This is an image of", max_new_tokens=20) for _ in range(count)]


def _few_shot(count: int, book: PictureBook) -> list[Job]:
    texts = ("I see a cat.", "I see two dogs.", "I see an apple.")
    examples = [CaptionExample(image=book.new(), text=text) for text in texts]
    return [Caption(image=book.new(), examples=examples, max_new_tokens=20) for _ in range(count)]


def _mixed_length(count: int, book: PictureBook) -> list[Job]:
    rng = random.Random(count)
    long = set(rng.sample(range(count), count // 5))
    return [
        Write(images=[book.new()], max_new_tokens=60) if n in long else Caption(image=book.new(), max_new_tokens=10)
        for n in range(count)
    ]


def _questions(count: int, book: PictureBook) -> list[Job]:
    asked = ["What is this?", "What is in the image?", "What colour is the background?", "Which category is it?"]
    asked += [f"Is this a {thing}?" for thing in THINGS] + ["How many things are there?", "What can you see?"]
    jobs: list[Job] = []
    while len(jobs) < count:
        picture = book.new()
        jobs += [Answer(image=picture, question=question, max_new_tokens=10) for question in asked]
    return jobs[:count]


def _classification(labels: int) -> Callable[[int, PictureBook], list[Job]]:
    names = THINGS if labels == len(THINGS) else [f"{thing} {n}" for n in range(labels // 10) for thing in THINGS]

    def make(count: int, book: PictureBook) -> list[Job]:
        return [Classify(image=book.new(), labels=names, max_new_tokens=10) for _ in range(count)]

    return make


def _text_heavy(count: int, book: PictureBook) -> list[Job]:
    rng = random.Random(count)
    jobs: list[Job] = []
    for _ in range(count):
        parts: list[object] = []
        for _ in range(rng.choice((1, 1, 1, 2, 4, 8))):
            parts += [{"image": book.new()}, {"text": "Question: What is this? Answer: A thing. " * rng.randint(1, 6)}]
        jobs.append(Complete.model_validate({"prompt": [*parts, "Describe all of them."], "max_new_tokens": 20}))
    return jobs


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("plain", _plain),
        Workload("few-shot", _few_shot),
        Workload("mixed length", _mixed_length),
        Workload("16 questions", _questions),
        Workload("10 labels", _classification(10), compares_texts=False),
        Workload("50 labels", _classification(50), compares_texts=False),
        Workload("text-heavy", _text_heavy, part=0.25),
    )
}
