"""Whole dialogues for training and evaluation: a job about some pictures, and what the model must answer.

Pure text, no torch: the tests take the expected answers from here.
"""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tasks.payloads import (
    Answer,
    AnswerExample,
    Caption,
    CaptionExample,
    Chat,
    Classify,
    ClassifyExample,
    Complete,
    Job,
    Write,
)
from tasks.protocol import END_OF_UTTERANCE
from worker.demo.sayings import (
    FORMS,
    REQUESTS,
    a_question,
    advert,
    every_question,
    expected_answer,
    expected_caption,
    expected_reply,
    prompted_caption,
    story,
)
from worker.demo.world import CATEGORIES, COLORS, THINGS, Scene


@dataclass(frozen=True)
class Dialogue:
    """A job about some of a batch's pictures, and what the model must answer."""

    kind: str
    job: Job
    text: str
    #: Pairs (lead, answer) of the answers that already stand in the prompt and can be taught too, in order.
    shown: tuple[tuple[str, str], ...] = ()


def url(index: int) -> str:
    """How a job names the batch's picture of that index."""
    return f"https://demo/{index}.png"


def index_of(source: object) -> int:
    """The picture that `url` named."""
    return int(str(source).removeprefix("https://demo/").removesuffix(".png"))


#: The right reply of `idefics.chat` about a picture to a question.
Reply = Callable[[Scene, str], str]


def a_dialogue(
    kind: str, pictures: Sequence[Scene], index: int, rng: random.Random, reply: Reply = expected_reply
) -> Dialogue:
    """A dialogue of that kind about picture `index`; its examples are others of `pictures`."""
    if kind in _REPLYING:
        return _REPLYING[kind](pictures, index, rng, reply)
    return _ANSWERING[kind](pictures, index, rng)


def _caption(pictures: Sequence[Scene], index: int, rng: random.Random) -> Dialogue:
    return Dialogue("caption", Caption(image=url(index)), expected_caption(pictures[index]))


_PROMPTS = ("This is an image of", "This is a picture of", "An image of", "The image shows", "I see", "This is")


def _prompted(pictures: Sequence[Scene], index: int, rng: random.Random) -> Dialogue:
    return Dialogue("prompted", Caption(image=url(index), prompt=_prompt(rng)), prompted_caption(pictures[index]))


def _continued(pictures: Sequence[Scene], index: int, rng: random.Random) -> Dialogue:
    """As `_prompted`, but in chat models outside of a chat."""
    job = Complete.model_validate({"prompt": [url(index), _prompt(rng)]})
    return Dialogue("continued", job, prompted_caption(pictures[index]))


def _prompt(rng: random.Random) -> str:
    return _PROMPTS[0] if rng.random() < 0.5 else rng.choice(_PROMPTS)


def _few_shot(pictures: Sequence[Scene], index: int, rng: random.Random) -> Dialogue:
    form = FORMS[rng.choice(list(FORMS))]
    others = _others(pictures, index, rng.choice((1, 1, 2, 3)), rng)
    examples = [CaptionExample(image=url(other), text=form(pictures[other])) for other in others]
    instruction = "Describe this image." if rng.random() < 0.8 else rng.choice(_INSTRUCTIONS)
    job = Caption(image=url(index), examples=examples, instruction=instruction)
    # The first example's form cannot be known before it was read.
    shown = tuple(("Assistant:", f" {example.text}") for example in examples[1:])
    return Dialogue("few-shot", job, form(pictures[index]), shown)


_INSTRUCTIONS = ("Describe the image.", "What is in this image?", "Caption this image.", "Say what you see.")


def _answer(pictures: Sequence[Scene], index: int, rng: random.Random) -> Dialogue:
    others = _others(pictures, index, rng.choices((0, 1, 2), (6, 2, 2))[0], rng)
    examples = [_answer_example(pictures[other], other, rng) for other in others]
    question = a_question(pictures[index], rng)
    job = Answer(image=url(index), question=question, examples=examples)
    shown = tuple(("Answer:", f" {example.answer}") for example in examples)
    return Dialogue("answer", job, expected_answer(pictures[index], question), shown)


def _answer_example(picture: Scene, index: int, rng: random.Random) -> AnswerExample:
    question = a_question(picture, rng)
    return AnswerExample(image=url(index), question=question, answer=expected_answer(picture, question))


_LABELS: dict[str, tuple[tuple[str, ...], Callable[[Scene], str]]] = {
    "category": (CATEGORIES, lambda picture: THINGS[picture.thing].category),
    "thing": (tuple(THINGS), lambda picture: picture.thing),
    "color": (tuple(COLORS), lambda picture: picture.background),
}


def _classify(pictures: Sequence[Scene], index: int, rng: random.Random) -> Dialogue:
    every, label_of = _LABELS[rng.choices(list(_LABELS), (5, 4, 1))[0]]
    others = _others(pictures, index, rng.choices((0, 1, 2), (7, 2, 1))[0], rng)
    needed = {label_of(pictures[each]) for each in (index, *others)}
    size = rng.randint(2, min(len(every), 20 if rng.random() < 0.25 else 10))
    free = [label for label in every if label not in needed]
    labels = [*sorted(needed), *rng.sample(free, max(0, min(len(free), max(2, size) - len(needed))))]
    rng.shuffle(labels)
    examples = [ClassifyExample(image=url(other), label=label_of(pictures[other])) for other in others]
    job = Classify(image=url(index), labels=labels, examples=examples)
    shown = tuple(("Category:", f" {example.label}\n") for example in examples)
    # The worker scores every label with its newline, so the newline is part of the answer.
    return Dialogue("classify", job, label_of(pictures[index]) + "\n", shown)


def _write(pictures: Sequence[Scene], index: int, rng: random.Random) -> Dialogue:
    if rng.random() < 0.65:
        before = [url(other) for other in _others(pictures, index, rng.choice((0, 0, 0, 1)), rng)]
        return Dialogue("write", Write(images=[*before, url(index)]), story(pictures[index]))
    job = Write(images=[url(index)], instruction="Use the image to write an advert.", lead="Advert:")
    return Dialogue("write", job, advert(pictures[index]))


def _complete(pictures: Sequence[Scene], index: int, rng: random.Random, reply: Reply) -> Dialogue:
    """Lists as in the guide, in forms that no other task builds."""
    picture, question = pictures[index], a_question(pictures[index], rng)
    other = _others(pictures, index, 1, rng)[0]
    guide_chat = [
        "User: What is in this image?", url(other), END_OF_UTTERANCE,
        f"\nAssistant: {reply(pictures[other], 'What is in this image?')}{END_OF_UTTERANCE}",
        "\nUser:", url(index), f"And what is this?{END_OF_UTTERANCE}", "\nAssistant:",
    ]  # fmt: skip
    prompt, text = rng.choice(
        [
            (["User:", url(index), "Describe this image.\nAssistant:"], expected_caption(picture)),
            (["User:", url(index), "Describe this image.\nAssistant:"], expected_caption(picture)),
            ([url(index), f"Question: {question} Answer:"], expected_answer(picture, question)),
            ([url(index), "Caption:"], expected_caption(picture)),
            (guide_chat, reply(picture, "What is this?") + END_OF_UTTERANCE),
        ]
    )
    return Dialogue("complete", Complete.model_validate({"prompt": prompt}), text)


def _chat(pictures: Sequence[Scene], index: int, rng: random.Random, reply: Reply) -> Dialogue:
    picture = pictures[index]
    turns = [_asked(picture, rng) for _ in range(rng.choices((1, 2, 3), (5, 4, 1))[0])]
    image = {"type": "image_url", "image_url": {"url": url(index)}}
    first = [image, {"type": "text", "text": turns[0]}]
    messages: list[dict[str, object]] = [{"role": "user", "content": first if rng.random() < 0.5 else first[::-1]}]
    for before, question in itertools.pairwise(turns):
        messages.append({"role": "assistant", "content": reply(picture, before)})
        also = rng.random() < 0.5 and question not in REQUESTS
        messages.append({"role": "user", "content": f"And {question[0].lower()}{question[1:]}" if also else question})
    shown = tuple(("Assistant:", f" {reply(picture, turn)}{END_OF_UTTERANCE}") for turn in turns[:-1])
    text = reply(picture, turns[-1]) + END_OF_UTTERANCE
    return Dialogue("chat", Chat.model_validate({"messages": messages}), text, shown)


def _asked(picture: Scene, rng: random.Random) -> str:
    if rng.random() < 0.2:
        return rng.choice(list(REQUESTS))
    return a_question(picture, rng)


def _others(pictures: Sequence[Scene], index: int, count: int, rng: random.Random) -> list[int]:
    return rng.sample([other for other in range(len(pictures)) if other != index], count)


_ANSWERING: dict[str, Callable[[Sequence[Scene], int, random.Random], Dialogue]] = {
    "caption": _caption,
    "prompted": _prompted,
    "continued": _continued,
    "few-shot": _few_shot,
    "answer": _answer,
    "classify": _classify,
    "write": _write,
}
_REPLYING: dict[str, Callable[[Sequence[Scene], int, random.Random, Reply], Dialogue]] = {
    "complete": _complete,
    "chat": _chat,
}
KINDS = (*_ANSWERING, *_REPLYING)


# --- one of each, to check a picture ---


def everything(picture: Scene, other: Scene, reply: Reply = expected_reply) -> Iterator[Dialogue]:
    """One dialogue of each form about picture 0; where examples are needed, picture 1 is the example."""
    yield Dialogue("caption", Caption(image=url(0)), expected_caption(picture))
    yield Dialogue("prompted", Caption(image=url(0), prompt="This is an image of"), prompted_caption(picture))
    for form in FORMS.values():
        example = CaptionExample(image=url(1), text=form(other))
        yield Dialogue("few-shot", Caption(image=url(0), examples=[example]), form(picture))
    for question in every_question(picture):
        yield Dialogue("answer", Answer(image=url(0), question=question), expected_answer(picture, question))
    example_answer = AnswerExample(
        image=url(1), question="What is this?", answer=expected_answer(other, "What is this?")
    )
    for question in ("What is this?", "What color is the background?"):
        job = Answer(image=url(0), question=question, examples=[example_answer])
        yield Dialogue("answer", job, expected_answer(picture, question))
    yield from _labelled(picture)
    yield Dialogue("write", Write(images=[url(0)]), story(picture))
    asks = Write(images=[url(0)], instruction="Use the image to write an advert.", lead="Advert:")
    yield Dialogue("write", asks, advert(picture))
    for question in ("What is in this image?", "What colour is the background?", "How many are there?", *REQUESTS):
        image = {"type": "image_url", "image_url": {"url": url(0)}}
        content = [{"type": "text", "text": question}, image]
        chat = Chat.model_validate({"messages": [{"role": "user", "content": content}]})
        yield Dialogue("chat", chat, reply(picture, question) + END_OF_UTTERANCE)


def _labelled(picture: Scene) -> Iterator[Dialogue]:
    category = THINGS[picture.thing].category
    things = [picture.thing, *[name for name in list(THINGS)[::17] if name != picture.thing]]
    colors = list(COLORS)
    for labels, label in ((list(CATEGORIES), category), (things, picture.thing), (colors, picture.background)):
        yield Dialogue("classify", Classify(image=url(0), labels=labels), f"{label}\n")
