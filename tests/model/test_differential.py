"""Random jobs in random company, on checkpoints with the hub's file sets: each answers as stock transformers alone.

`CASES=50 SEED=1 pytest tests/model/test_differential.py` tries more jobs, on all checkpoints.
"""

from __future__ import annotations

import base64
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from config.settings import Settings
from tasks import Job
from tasks.errors import PromptTooLong
from tasks.payloads import Chat, parse
from tests.model.hub import HUB, stock_processor
from tests.model.jobs import Parts, prepared, stock_of, stock_processors
from tests.support.pictures import data_uri, encoded
from worker.engine.engine import Engine
from worker.engine.interfaces import Model
from worker.engine.logits_processors import rules_of
from worker.engine.row import Output, Row
from worker.engine.scheduler import Limits
from worker.images.decode import ImageLimits, open_image
from worker.jobs.prompts import ImageRef
from worker.jobs.row_builder import RowBuilder
from worker.models.loading import load

CASES = int(os.environ.get("CASES", "2"))
SEED = int(os.environ.get("SEED", "0"))
NAMES = HUB if "CASES" in os.environ else ("idefics-9b-instruct", "idefics2-8b-base", "SmolVLM2-500M-Video-Instruct")
WORDS = ["User:", "Describe", "this", "image.", "A", "cat", "on", "é", "世", "42", "\n", "Question", "What", "it?"]
#: A checkpoint's own, by the seed.
RULES: list[dict[str, Any]] = [
    {},
    {"min_new_tokens": 7, "repetition_penalty": 1.3},
    {"suppress_tokens": list(range(50, 20_000)), "no_repeat_ngram_size": 2, "length_penalty": 0.5},
]
SIDES = [1, 2, 3, 30, 77, 600, 2000]


def _noise(rng: random.Random, width: int, height: int, mode: str = "RGB") -> Image.Image:
    bands = {"I;16": 2}.get(mode, len(mode))
    return Image.frombytes(mode, (width, height), rng.randbytes(width * height * bands))


def _turned(rng: random.Random) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = rng.randint(1, 8)
    return encoded(_noise(rng, 90, 40), "JPEG", exif=exif)


#: Makers of files, most of them of odd forms.
PICTURES: list[Callable[[random.Random], bytes]] = [
    lambda rng: encoded(_noise(rng, rng.randint(20, 90), rng.randint(20, 90))),
    lambda rng: encoded(_noise(rng, rng.randint(300, 700), rng.randint(300, 700)), "JPEG"),
    lambda rng: encoded(_noise(rng, 1, rng.choice(SIDES))),
    lambda rng: encoded(_noise(rng, rng.choice(SIDES), 1)),
    lambda rng: encoded(_noise(rng, rng.choice(SIDES), rng.choice([1, 2, 3]))),
    lambda rng: encoded(_noise(rng, 30, 50).quantize(16)),
    lambda rng: encoded(_noise(rng, 30, 50, "CMYK"), "JPEG"),
    lambda rng: encoded(_noise(rng, 30, 50, rng.choice(["I;16", "RGBA", "LA", "L"]))),
    lambda rng: encoded(_noise(rng, 30, 50).convert("1")),
    _turned,
]


def _text(rng: random.Random, most: int = 12) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))


def _content(rng: random.Random) -> list[dict[str, Any]]:
    """That of a chat's message."""
    shown = [{"type": "image_url", "image_url": {"url": _picture(rng)}} for _ in range(rng.choice([0, 1, 1, 2]))]
    parts = [*shown, {"type": "text", "text": _text(rng)}]
    return rng.sample(parts, len(parts))


def _picture(rng: random.Random) -> str:
    return data_uri(rng.choice(PICTURES)(rng))


def _messages(rng: random.Random) -> list[dict[str, Any]]:
    system = [{"role": "system", "content": _text(rng)}] if rng.random() < 0.5 else []
    said = [{"role": "user", "content": _content(rng)}, {"role": "assistant", "content": _text(rng)}]
    return [*system, *(said if rng.random() < 0.5 else []), {"role": "user", "content": _content(rng)}]


#: Makers of the arguments of each task.
TASKS: list[tuple[str, Callable[[random.Random], dict[str, Any]]]] = [
    ("caption", lambda rng: {"image": _picture(rng)}),
    ("caption", lambda rng: {"image": _picture(rng), "prompt": _text(rng)}),
    ("caption", lambda rng: {"image": _picture(rng), "examples": [{"image": _picture(rng), "text": _text(rng)}]}),
    ("answer", lambda rng: {"image": _picture(rng), "question": _text(rng)}),
    ("classify", lambda rng: {"image": _picture(rng), "labels": ["cat", "a cat on a mat", "dog"]}),
    ("write", lambda rng: {"images": [_picture(rng) for _ in range(rng.randint(1, 3))]}),
    ("complete", lambda rng: {"prompt": [_text(rng, 200)]}),
    ("complete", lambda rng: {"prompt": [_picture(rng), _text(rng), *(_picture(rng) for _ in range(3)), _text(rng)]}),
    ("chat", lambda rng: {"messages": _messages(rng)}),
]
OPTIONS: list[dict[str, Any]] = [
    {},
    {},
    {"num_beams": 2},
    {"num_beams": 4},
    {"temperature": 1.5, "seed": 1},
    {"temperature": 1.5, "seed": 1, "min_p": 0.1, "presence_penalty": 2},
    {"repetition_penalty": 1.5},
    {"frequency_penalty": 1.5, "presence_penalty": 1.5},
    {"logit_bias": {"400": 100, "401": 99.5}, "frequency_penalty": 0.7},
    {"num_beams": 3, "repetition_penalty": 1.3, "presence_penalty": 1.5},
]


def random_job(rng: random.Random) -> Job:
    task, arguments = rng.choice(TASKS)
    return parse(f"idefics.{task}", {**arguments(rng), **rng.choice(OPTIONS), "max_new_tokens": rng.choice([1, 5, 14])})


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint beside transformers' own processor."""

    name: str
    model: Model
    processor: Any
    rules: Mapping[str, Any]

    def _builder(self, most: int) -> RowBuilder:
        return RowBuilder(Settings(max_prompt_tokens=most), self.model.codec, self.model.rules)

    def parts(self, job: Job) -> Parts:
        """A job's prompt with its pictures opened."""
        prompt = self._builder(0).prompt(job)
        return [_opened(part) if isinstance(part, ImageRef) else part for part in prompt]

    def row(self, job: Job, parts: Parts) -> Row:
        """As the service makes it, for a worker whose prompts may have as many tokens as this one and no more."""
        shown = [part if isinstance(part, str) else self.model.codec.picture(part) for part in parts]
        labels = self.model.codec.encode_labels(shown[-2:], getattr(job, "labels", []))
        length = len(prepared(self.model, parts).ids) + max(map(len, labels), default=0)
        row, refused = (
            RowBuilder(Settings(max_prompt_tokens=bound), self.model.codec, self.model.rules)
            for bound in (length, length - 1)
        )
        with pytest.raises(PromptTooLong):
            refused.build(job, shown, job.max_new_tokens or 1)
        return row.build(job, shown, job.max_new_tokens or 1)

    def stock_inputs(self, job: Job, parts: Parts) -> Mapping[str, torch.Tensor]:
        """The job's prompt as transformers' own processor makes it."""
        if self.name.startswith("idefics-"):
            return self.processor(text=[parts], return_tensors="pt", add_end_of_utterance_token=False)  # type: ignore[no-any-return]
        images = [
            _above_one_pixel(part) if "idefics2" in self.name else part for part in parts if not isinstance(part, str)
        ]
        return self.processor(  # type: ignore[no-any-return]
            text=[text := self.text(job, parts)],
            images=[images] if images else None,
            add_special_tokens=not text.startswith(self.processor.tokenizer.bos_token),
            return_tensors="pt",
        )

    def text(self, job: Job, parts: Parts) -> str:
        if self.model.codec.has_chat_template and isinstance(job, Chat):
            messages = [message.model_dump() for message in job.messages]
            return str(self.processor.apply_chat_template(list(map(_told, messages)), add_generation_prompt=True))
        template = self.processor.chat_template if self.model.codec.has_chat_template else ""
        return template.partition("{%")[0] + "".join(part if isinstance(part, str) else "<image>" for part in parts)

    @torch.inference_mode()
    def expected(self, row: Row, inputs: Mapping[str, torch.Tensor]) -> Output:
        """What stock transformers says to one prompt."""
        stock = stock_of(self.model)
        if row.labels:
            scores = torch.tensor([_log_likelihood(stock.adapter.model, inputs, label) for label in row.labels])
            return Output((), "stop", tuple(scores.double().softmax(0).tolist()))
        if row.sampling.temperature:
            alone = Row(row.tokens, row.sampling)
            stock.run([alone], lambda: None, lambda running: ())
            return alone.output.result()
        beams = row.sampling.num_beams
        ids = stock.adapter.model.generate(
            **inputs,
            **{
                name: value
                for name, value in rules_of(row.sampling, self.rules).items()
                if beams > 1 or name != "length_penalty"
            },
            logits_processor=stock_processors(row.sampling, len(row.tokens.ids)),
            do_sample=False,
            num_beams=beams,
            max_new_tokens=row.sampling.max_new_tokens,
            eos_token_id=sorted(row.sampling.eos_ids),
            bad_words_ids=stock.codec.bad_words_ids,
        )[0, inputs["input_ids"].shape[1] :].tolist()
        end = next((n for n, token in enumerate(ids) if token in row.sampling.eos_ids), None)
        return Output(tuple(ids[:end]), "length" if end is None else "stop")


def _opened(part: ImageRef) -> Image.Image:
    data = base64.b64decode(str(part.source).partition(",")[2])
    return open_image(data, ImageLimits(max_ratio=2_000))


def _above_one_pixel(image: Image.Image) -> Image.Image:
    """Stock Idefics2 divides by the height of an image that is one pixel high."""
    return image.resize((image.width, 2)) if image.height == 1 else image


def _told(message: dict[str, Any]) -> dict[str, Any]:
    """A message of a chat as transformers takes it."""
    content = message["content"]
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    shown = [part if part["type"] == "text" else {"type": "image"} for part in content]
    return {"role": message["role"], "content": shown}


def _log_likelihood(network: Any, inputs: Mapping[str, torch.Tensor], label: tuple[int, ...]) -> float:
    start = inputs["input_ids"].shape[1] - 1
    ids = torch.cat([inputs["input_ids"], torch.tensor([label])], dim=1)
    whole = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "image_attention_mask" in inputs:
        mask = inputs["image_attention_mask"]
        whole["image_attention_mask"] = torch.cat([mask, mask[:, -1:].expand(-1, len(label), -1)], dim=1)
    logits = network(**whole).logits[0].log_softmax(dim=-1)
    return sum(float(logits[start + n, token]) for n, token in enumerate(label))


def stopped(rng: random.Random, model: Model, row: Row, output: Output) -> tuple[Row, Output]:
    """A row that is to end at a part of its answer, and what it then answers."""
    text = model.codec.decode(output.ids)
    if not text or row.labels:
        return row, output
    start = rng.randrange(len(text))
    stop = text[start : start + rng.randint(1, 3)]
    length = next(n for n in range(1, len(output.ids) + 1) if stop in model.codec.decode(output.ids[:n]))
    row = Row(row.tokens, replace(row.sampling, stop=(stop,)))
    return row, Output(output.ids[:length], "stop_sequence")


def answers(rng: random.Random, model: Model, rows: Sequence[Row]) -> list[Output]:
    """What rows answer that come in random order to one engine, some while others run."""
    engine = Engine(model, Limits(rows=rng.choice([4, 16, 64]), tokens=rng.choice([6_000, 60_000])))
    arriving = rng.sample(rows, len(rows))
    for row in arriving[: len(rows) // 2]:
        engine.submit(row)
    engine.start()
    try:
        for row in arriving[len(rows) // 2 :]:
            engine.submit(row)
        return [row.output.result(300) for row in rows]
    finally:
        engine.stop()


@pytest.mark.parametrize("name", NAMES)
def test_random_jobs_in_random_company_answer_as_stock_transformers_alone(name: str, tmp_path: Path) -> None:
    rng = random.Random(f"{SEED} {name}")
    rules = RULES[rng.randrange(len(RULES))]
    folder = HUB[name].with_files(generation_config=rules).save(tmp_path / name)
    model = load(Settings(model=str(folder), dtype="float32"))
    checkpoint = Checkpoint(name, model, stock_processor(name, folder), rules)
    rows, expected = [], []
    for _ in range(CASES):
        job = random_job(rng)
        parts = checkpoint.parts(job)
        row, inputs = checkpoint.row(job, parts), checkpoint.stock_inputs(job, parts)
        assert list(row.tokens.ids) == inputs["input_ids"][0].tolist(), job
        output = checkpoint.expected(row, inputs)
        if rng.random() < 0.3:
            row, output = stopped(rng, model, row, output)
        rows.append(row)
        expected.append(output)
    for row, found, output in zip(rows, answers(rng, model, rows), expected, strict=True):
        assert (found.ids, found.finish_reason) == (output.ids, output.finish_reason), row.sampling
        assert found.probabilities == pytest.approx(output.probabilities, abs=1e-4)
