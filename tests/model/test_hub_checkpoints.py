"""Checkpoints with the hub's file sets answer every task with default settings, as stock transformers does."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from config.settings import Settings
from tasks import InvalidRequest, Result
from tasks.payloads import Chat, parse
from tests.model.conftest import noise
from tests.model.hub import END, HUB, stock_processor
from tests.model.jobs import generated, prepared, row_of
from worker.engine.engine import Engine
from worker.engine.generation_rules import NO_RULES
from worker.engine.interfaces import Model
from worker.engine.scheduler import Limits
from worker.jobs.prompts import in_turns
from worker.jobs.runs import JobContext
from worker.jobs.service import Service
from worker.models import SetupFailed, loading
from worker.models.loading import load

IMAGES = [noise(1), noise(2)]
WITH_TEMPLATE = [name for name in HUB if name not in ("idefics-9b-instruct", "idefics2-8b-base")]


def uri(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


FIRST, SECOND = map(uri, IMAGES)
TASKS: list[tuple[str, dict[str, Any]]] = [
    ("caption", {"image": FIRST}),
    ("caption", {"image": FIRST, "prompt": "This is"}),
    ("caption", {"image": FIRST, "examples": [{"image": SECOND, "text": "A dog."}]}),
    ("answer", {"image": FIRST, "question": "What is it?"}),
    ("classify", {"image": FIRST, "labels": ["cat", "dog"], "examples": [{"image": SECOND, "label": "dog"}]}),
    ("write", {"images": [FIRST, SECOND]}),
    ("complete", {"prompt": ["Look:", FIRST, "Both:", SECOND]}),
    (
        "chat",
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": FIRST}}, {"type": "text", "text": "Who?"}],
                },
            ]
        },
    ),
]

CONTEXTS = {
    "idefics-9b-instruct": 2048,
    "idefics2-8b": 32_768,
    "idefics2-8b-base": 32_768,
    "Idefics3-8B-Llama3": 131_072,
    "SmolVLM-256M-Instruct": 8192,
    "SmolVLM-Instruct": 16_384,
    "SmolVLM2-500M-Video-Instruct": 8192,
}


@dataclass(frozen=True)
class Served:
    """A checkpoint as a worker with default settings serves it."""

    name: str
    folder: Path
    model: Model
    service: Service

    def ask(self, task: str, arguments: dict[str, Any]) -> Result:
        return self.service.run(parse(f"idefics.{task}", {"max_new_tokens": 6, **arguments}), JobContext("job"))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module", params=HUB)
def served(request: pytest.FixtureRequest, folder: Path) -> Iterator[Served]:
    path = HUB[request.param].save(folder / request.param)
    settings = Settings(model=str(path))
    model = load(settings)
    engine = Engine(model, Limits(settings.max_batch_size, settings.max_batch_tokens))
    service = Service(settings, model.info, model.codec, engine, None, model.rules)
    engine.start()
    try:
        service.check_golden(path)
        yield Served(request.param, path, model, service)
    finally:
        engine.stop()


def test_every_task_is_answered_in_a_batch_as_alone(served: Served) -> None:
    with ThreadPoolExecutor(len(TASKS)) as threads:
        together = list(threads.map(lambda asked: served.ask(*asked), TASKS))
    for (task, arguments), result in zip(TASKS, together, strict=True):
        assert result.finish_reason in ("stop", "length"), task
        assert result.usage.images == str(arguments).count("data:image"), task
        assert (result.label in ("cat", "dog")) == (task == "classify"), task
        alone = served.ask(task, arguments)
        assert (alone.text, alone.usage.completion_tokens) == (result.text, result.usage.completion_tokens), task


def told(message: dict[str, Any]) -> dict[str, Any]:
    """A message of the chat as transformers takes it."""
    if isinstance(message["content"], str):
        return {"role": message["role"], "content": [{"type": "text", "text": message["content"]}]}
    return {
        "role": message["role"],
        "content": [part if part["type"] == "text" else {"type": "image"} for part in message["content"]],
    }


@pytest.mark.parametrize("served", WITH_TEMPLATE, indirect=True)
def test_a_chat_with_a_system_message_is_what_transformers_makes_of_it(served: Served) -> None:
    arguments = TASKS[-1][1]
    processor = stock_processor(served.name, served.folder)
    text = processor.apply_chat_template([told(each) for each in arguments["messages"]], add_generation_prompt=True)
    assert "System: Be brief.<end_of_utterance>\nUser:<image>Who?" in text
    opened = bool(processor.tokenizer.bos_token) and text.startswith(processor.tokenizer.bos_token)
    stock = processor(text=[text], images=[IMAGES[:1]], add_special_tokens=not opened, return_tensors="pt")
    job = Chat.model_validate({**arguments, "max_new_tokens": 12})
    parts = [part if isinstance(part, str) else IMAGES[0] for part in in_turns(job)]
    assert list(prepared(served.model, parts).ids) == stock["input_ids"][0].tolist()
    row = row_of(served.model, job, parts)
    served.model.run([row], lambda: None, lambda running: ())
    assert list(row.output.result().ids) == generated(served.model, processor, job, stock)


def test_an_utterances_end_ends_every_tasks_answer(served: Served) -> None:
    codec = served.model.codec
    assert codec.has_end_of_utterance == (served.name != "idefics2-8b-base")
    if codec.has_end_of_utterance:
        assert codec.tokenizer.convert_tokens_to_ids(END) in codec.eos_ids


def test_a_picture_may_be_one_pixel_high_or_wide(served: Served) -> None:
    def caption(size: tuple[int, int]) -> Result:
        return served.ask("caption", {"image": uri(Image.new("RGB", size, "red"))})

    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(caption, [(50, 1), (1, 50), (1, 1), (40, 30)]))
    assert all(result.finish_reason in ("stop", "length") for result in results)


def test_no_published_rule_slows_each_step(served: Served) -> None:
    # Some forbid the image tokens, which no answer contains anyway.
    assert served.model.rules == NO_RULES


def test_a_prompt_may_be_as_long_as_the_models_context(served: Served) -> None:
    assert served.model.codec.context_tokens == CONTEXTS[served.name]


@pytest.mark.parametrize("served", ["idefics2-8b-base"], indirect=True)
def test_a_token_beyond_the_embedding_is_refused_by_name(served: Served) -> None:
    with pytest.raises(InvalidRequest, match="<end_of_utterance>, a token that this model does not know"):
        served.ask("complete", {"prompt": ["Hello<end_of_utterance>"]})


@pytest.mark.parametrize("name", ["idefics2-8b", "SmolVLM-256M-Instruct", "SmolVLM2-500M-Video-Instruct"])
def test_a_checkpoint_whose_embedding_is_too_small_for_its_tokens_is_refused(name: str, tmp_path: Path) -> None:
    text = {**HUB[name].files["config.json"]["text_config"], "vocab_size": 32_001 if name == "idefics2-8b" else 49_190}
    folder = HUB[name].with_files(config={"text_config": text}).save(tmp_path / name)
    with pytest.raises(SetupFailed, match=r"has <image> as its token .* vocab_size"):
        load(Settings(model=str(folder)))


@pytest.mark.parametrize("served", ["Idefics3-8B-Llama3"], indirect=True)
def test_a_worker_whose_prompts_hold_no_picture_does_not_serve(served: Served) -> None:
    settings = Settings(model=str(served.folder), max_prompt_tokens=2048)
    engine = Engine(served.model, Limits(8, 10_000))
    engine.start()
    try:
        with pytest.raises(SetupFailed, match=r"takes 2048: shorten it or raise IDEFICS_MAX_PROMPT_TOKENS"):
            Service(settings, served.model.info, served.model.codec, engine).check_golden(served.folder)
    finally:
        engine.stop()


def test_pixels_are_pillows_whatever_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    stock = loading.AutoImageProcessor.from_pretrained

    def spy(*arguments: Any, **named: Any) -> Any:
        asked.append(named["backend"])
        return stock(*arguments, **named)

    monkeypatch.setattr(loading.AutoImageProcessor, "from_pretrained", spy)
    for name in ("idefics-9b-instruct", "idefics2-8b", "SmolVLM2-500M-Video-Instruct"):
        load(Settings(model=str(HUB[name].save(tmp_path / name))))
    assert asked == ["pil"] * 3


def test_a_video_is_refused_by_name() -> None:
    part = {"type": "video_url", "video_url": {"url": "https://example.com/a.mp4"}}
    with pytest.raises(InvalidRequest, match="a video is not read"):
        parse("idefics.chat", {"messages": [{"role": "user", "content": [part]}]})
