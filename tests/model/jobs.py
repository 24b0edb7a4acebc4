"""A mixed bag of jobs with their pictures, and what stock transformers says to each of them alone."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from PIL import Image
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor, SequenceBiasLogitsProcessor

from tasks import Answer, Caption, CaptionExample, Chat, Complete, ImagePath, Job, Write
from worker.engine.continuous import ContinuousModel
from worker.engine.interfaces import Model
from worker.engine.pauses import without_pauses
from worker.engine.row import Row, Sampling, Tokens
from worker.engine.stock import StockModel
from worker.engine.stock_prefill import CHUNK_TOKENS, Prefilled, prefill
from worker.jobs.prompts import ImageRef, Prompt, build

Parts = list[str | Image.Image]


def mixed_jobs(count: int, pictures: Sequence[str], seed: int = 0, longest: int = 40) -> list[Job]:
    """Jobs of every form, over pictures named by their files; no two alike in length or wish.

    `longest`: most new tokens.
    """
    rng = random.Random(seed)
    return [_FORMS[n % len(_FORMS)](rng, pictures).model_copy(update={"max_new_tokens": rng.randint(1, longest)})
            for n in range(count)]  # fmt: skip


def _picture(rng: random.Random, pictures: Sequence[str]) -> ImagePath:
    return ImagePath(path=rng.choice(pictures))


def _few_shot(rng: random.Random, pictures: Sequence[str]) -> Job:
    texts = rng.sample(["A cat.", "Name: dog; count: 2", "a red car on white, seen from afar"], rng.randint(1, 3))
    examples = [CaptionExample(image=_picture(rng, pictures), text=text) for text in texts]
    return Caption(image=_picture(rng, pictures), examples=examples)


def _chat(rng: random.Random, pictures: Sequence[str]) -> Job:
    return Chat.model_validate({"messages": [{"role": "user", "content": "What is in this image?"}]})


_FORMS = [
    lambda rng, pictures: Caption(image=_picture(rng, pictures)),
    lambda rng, pictures: Caption(image=_picture(rng, pictures), prompt="This is an image of"),
    _few_shot,
    lambda rng, pictures: Answer(image=_picture(rng, pictures), question="What colour is the background?"),
    lambda rng, pictures: Write(images=[_picture(rng, pictures) for _ in range(rng.randint(1, 3))]),
    lambda rng, pictures: Complete.model_validate({"prompt": ["No image here, only text:"]}),
    _chat,
    lambda rng, pictures: Complete.model_validate(
        {"prompt": [{"image": _picture(rng, pictures)}, {"image": _picture(rng, pictures)}, {"text": "Both show"}]}
    ),
]


def parts_of(job: Job, images: dict[str, Image.Image], form: Callable[[Job], Prompt] = build) -> Parts:
    """A job's prompt with its pictures opened."""
    return [images[part.source.path] if isinstance(part, ImageRef) else part for part in form(job)]  # type: ignore[union-attr]


def row_of(model: Model, job: Job, parts: Parts) -> Row:
    """As the service makes it."""
    sampling = Sampling(
        max_new_tokens=job.max_new_tokens or 20,
        num_beams=job.num_beams,
        eos_ids=model.codec.eos_ids,
    )
    return Row(prepared(model, parts), sampling)


def prepared(model: Model, parts: Parts) -> Tokens:
    """As the service prepares a prompt: its images as the model takes them."""
    return model.codec.prepare([part if isinstance(part, str) else model.codec.picture(part) for part in parts])


def stock_of(model: Model) -> StockModel:
    """The model as stock `generate` runs it."""
    stock = model.stock if isinstance(model, ContinuousModel) else model
    assert isinstance(stock, StockModel)
    return stock


def stock_prefilled(model: Model, prompts: Sequence[Tokens], chunk_tokens: int = CHUNK_TOKENS) -> Prefilled:
    """Prompts after their prefill by transformers' own forward."""
    adapter = stock_of(model).adapter
    features = without_pauses(adapter.encode(picture for tokens in prompts for picture in tokens.pictures))
    return prefill(adapter.model, adapter.padded(prompts, features), lambda: None, chunk_tokens)


class OpenAIPenalties(LogitsProcessor):  # type: ignore[misc]
    """Frequency and presence penalties by their definition, for prompts of one length."""

    def __init__(self, prompt_length: int, frequency: float, presence: float) -> None:
        self._prompt_length = prompt_length
        # In single precision, as vLLM has it.
        self._frequency = torch.tensor(frequency)
        self._presence = presence

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        changed = scores.clone()
        for row, ids in enumerate(input_ids[:, self._prompt_length :].tolist()):
            for id, count in Counter(ids).items():
                changed[row, id] = scores[row, id] - self._frequency * count - self._presence
        return changed


def stock_processors(sampling: Sampling, prompt_length: int) -> LogitsProcessorList:
    """What transformers has for a row's bias and penalties, and OpenAI's penalties."""
    processors = LogitsProcessorList()
    if sampling.logit_bias:
        processors.append(SequenceBiasLogitsProcessor({(id,): bias for id, bias in sampling.logit_bias}))
    if sampling.repetition_penalty is not None:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    processors.append(OpenAIPenalties(prompt_length, sampling.frequency_penalty, sampling.presence_penalty))
    return processors


@torch.inference_mode()
def generated(model: Model, processor: object, job: Job, inputs: Mapping[str, torch.Tensor]) -> list[int]:
    """What stock `generate` says to a processor's inputs for one job, up to its end."""
    ends = model.codec.eos_ids
    ids = (
        stock_of(model)
        .adapter.model.generate(
            **inputs,
            do_sample=False,
            num_beams=job.num_beams,
            max_new_tokens=job.max_new_tokens or 20,
            eos_token_id=sorted(ends),
            bad_words_ids=processor.tokenizer(  # type: ignore[attr-defined]
                ["<image>", "<fake_token_around_image>"], add_special_tokens=False
            ).input_ids,
        )[0, inputs["input_ids"].shape[1] :]
        .tolist()
    )
    end = next((n for n, token in enumerate(ids) if token in ends), len(ids))
    return ids[:end]  # type: ignore[no-any-return]
