"""A job as its interleaved prompt: strings and images, in the forms of the published IDEFICS guide.

The guide is transformers' `docs/source/en/tasks/idefics.md`; the instruct form is from the model card of
`HuggingFaceM4/idefics-9b-instruct`. So the answers are the same as with the guide's code. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import singledispatch
from typing import cast

from tasks.chat_messages import ChatMessage, ChatTextPart
from tasks.payload_fields import CheckedImage, ImageSource
from tasks.payloads import Answer, Caption, Chat, Classify, Complete, Job, Write
from tasks.prompt_parts import ImagePart
from tasks.protocol import END_OF_UTTERANCE


@dataclass(frozen=True, slots=True)
class ImageRef:
    """An image's place in a prompt, with the source of its bytes."""

    source: CheckedImage


def _image(source: ImageSource) -> ImageRef:
    """A reference to a payload's image, which the payload's checks have made a text or a path."""
    return ImageRef(cast(CheckedImage, source))


Prompt = list[str | ImageRef]
#: The user's question and the assistant's answer; None for the answer to be generated.
QuestionAnswer = tuple[Prompt, str | None]

ANSWER_INSTRUCTION = "Instruction: Provide an answer to the question. Use the image to answer.\n"
CLASSIFY_INSTRUCTION = (
    "Instruction: Classify the following image into a single category from the following list: {labels}.\n"
)


@singledispatch
def build(job: Job) -> Prompt:
    """The texts and images of a job's prompt in reading order."""
    raise TypeError(f"{type(job).__name__} has no prompt form")


@build.register
def _caption(job: Caption) -> Prompt:
    if not job.examples:
        return [_image(job.image)] if job.prompt is None else [_image(job.image), job.prompt]
    prompt: Prompt = []
    for example in job.examples:
        prompt += ["User:", _image(example.image), f"{job.instruction}\nAssistant: {example.text}\n"]
    # In one text with what precedes it, since the processor strips each text.
    lead = "" if job.prompt is None else f" {job.prompt}"
    return [*prompt, "User:", _image(job.image), f"{job.instruction}\nAssistant:{lead}"]


@build.register
def _answer(job: Answer) -> Prompt:
    prompt: Prompt = [ANSWER_INSTRUCTION]
    for example in job.examples:
        prompt += [_image(example.image), f"Question: {example.question} Answer: {example.answer}\n"]
    return [*prompt, _image(job.image), f"Question: {job.question} Answer:"]


@build.register
def _classify(job: Classify) -> Prompt:
    prompt: Prompt = [CLASSIFY_INSTRUCTION.format(labels=job.spoken_labels)]
    for example in job.examples:
        prompt += [_image(example.image), f"Category: {example.label}\n"]
    return [*prompt, _image(job.image), "Category:"]


@build.register
def _write(job: Write) -> Prompt:
    images = [_image(image) for image in job.images]
    return [f"Instruction: {job.instruction} \n", *images, f"{job.lead} \n"]


@build.register
def _complete(job: Complete) -> Prompt:
    return [_image(part.image) if isinstance(part, ImagePart) else part.text for part in job.prompt]


@build.register
def _chat(job: Chat) -> Prompt:
    prompt: Prompt = []
    preface = ""
    for message in cast(Sequence[ChatMessage], job.messages):
        if message.role == "system":
            # The instruct form has two speakers only: a system message is put before the next one.
            preface += "".join(f"{text}\n" for text in _parts(message) if isinstance(text, str))
            continue
        prompt += _turn(message, preface, first=not prompt)
        preface = ""
    return [*prompt, "\nAssistant:"]


def without_ends(prompt: Prompt) -> Prompt:
    """A chat's prompt for a model without a token for the end of an utterance: each turn ends with its line."""
    return [part.replace(END_OF_UTTERANCE, "") if isinstance(part, str) else part for part in prompt]


@singledispatch
def in_turns(job: Job) -> Prompt:
    """The prompt for a checkpoint that was tuned on a chat template: the user asks, and the assistant's message begins
    with the known start of the answer. Prompts to complete are as in `build`."""
    return build(job)


@in_turns.register
def _chat_in_turns(job: Chat) -> Prompt:
    """As in `build`, but system messages have turns of their own."""
    prompt: Prompt = []
    for message in cast(Sequence[ChatMessage], job.messages):
        prompt += _turn(message, "", first=not prompt)
    return [*prompt, "\nAssistant:"]


@in_turns.register
def _caption_in_turns(job: Caption) -> Prompt:
    known: list[QuestionAnswer] = [([_image(each.image), job.instruction], each.text) for each in job.examples]
    return _turns([*known, ([_image(job.image), job.instruction], job.prompt)])


@in_turns.register
def _answer_in_turns(job: Answer) -> Prompt:
    known: list[QuestionAnswer] = [([_image(each.image), each.question], each.answer) for each in job.examples]
    return _turns([*known, ([_image(job.image), job.question], None)])


@in_turns.register
def _classify_in_turns(job: Classify) -> Prompt:
    known: list[QuestionAnswer] = [([_image(each.image)], each.label) for each in job.examples]
    exchanges: list[QuestionAnswer] = [*known, ([_image(job.image)], None)]
    (first, answer), *others = exchanges
    return _turns([([f" {CLASSIFY_INSTRUCTION.format(labels=job.spoken_labels)}", *first], answer), *others])


@in_turns.register
def _write_in_turns(job: Write) -> Prompt:
    return _turns([([*map(_image, job.images), job.instruction], job.lead)])


def _turns(exchanges: Sequence[QuestionAnswer]) -> Prompt:
    """Questions with their answers; the last answer is left open."""
    prompt: Prompt = []
    for asked, answer in exchanges:
        speaker = f"{END_OF_UTTERANCE}\nUser:" if prompt else "User:"
        reply = f"{END_OF_UTTERANCE}\nAssistant:"
        prompt += [speaker, *asked, f"{reply} {answer}" if answer else reply]
    return prompt


def _turn(message: ChatMessage, preface: str, *, first: bool) -> Iterator[str | ImageRef]:
    speaker = f"{message.role.capitalize()}:" if first else f"\n{message.role.capitalize()}:"
    text = f"{speaker} {preface}" if preface else speaker
    for part in _parts(message):
        if isinstance(part, str):
            text += f" {part}" if text == speaker else part
        else:
            yield from [text] if text else []
            yield part
            text = ""
    yield text + END_OF_UTTERANCE


def _parts(message: ChatMessage) -> Prompt:
    if isinstance(message.content, str):
        return [message.content]
    return [part.text if isinstance(part, ChatTextPart) else _image(part.image_url.url) for part in message.content]
