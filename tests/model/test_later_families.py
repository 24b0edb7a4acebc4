"""Idefics2 and Idefics3: their prompts, and in float32 what a batch on the stock path answers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from config.settings import Settings
from tasks import Chat, Internal, InvalidRequest
from tasks.payloads import parse
from tests.model.checkpoints import TEMPLATE, later_checkpoint
from tests.model.conftest import Served, noise, random_model
from tests.model.jobs import Parts, mixed_jobs, prepared, row_of, stock_prefilled
from tests.support.pictures import data_uri, encoded
from worker.engine.continuous import ContinuousModel
from worker.engine.engine import Engine
from worker.engine.pauses import without_pauses
from worker.engine.row import Row, Sampling
from worker.engine.scheduler import Limits
from worker.engine.stock import StockModel
from worker.engine.stock_scoring import label_log_likelihoods
from worker.jobs.prompts import ImageRef, in_turns
from worker.jobs.runs import JobContext
from worker.jobs.service import Service
from worker.models.loading import load

IMAGES = {f"{n}.png": noise(n) for n in range(8)}


@pytest.fixture(scope="module", params=["idefics2 base", "idefics2 chat", "idefics3 base", "idefics3 chat"])
def later(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    return random_model(tmp_path_factory.mktemp("later") / "checkpoint", request.param)


def _run(model: StockModel, rows: Sequence[Row]) -> None:
    model.run(rows, lambda: None, lambda running: ())


@pytest.mark.parametrize("beams", [1, 3])
def test_a_mixed_batch_says_what_stock_generate_says_to_each_alone(later: Served, beams: int) -> None:
    jobs = [job.model_copy(update={"num_beams": beams, "max_new_tokens": 12 if beams > 1 else job.max_new_tokens})
            for job in mixed_jobs(16 if beams == 1 else 8, sorted(IMAGES), seed=beams)]  # fmt: skip
    prompts = [later.parts(job) for job in jobs]
    rows = [row_of(later.model, job, parts) for job, parts in zip(jobs, prompts, strict=True)]
    _run(later.stock, rows)
    answers = [list(row.output.result().ids) for row in rows]
    for job, parts, answer in zip(jobs, prompts, answers, strict=True):
        assert answer == later.stock_ids(job, parts), job
    assert len(set(map(tuple, answers))) > len(answers) / 2


def test_a_pictures_key_differs_with_its_shape(later: Served) -> None:
    upright, lying = (later.model.codec.picture(Image.new("RGB", size, "white")) for size in ((20, 30), (30, 20)))
    # Idefics3 cuts both into the same squares.
    assert (upright.key == lying.key) is (upright.pixels.shape == lying.pixels.shape)


@torch.inference_mode()
def test_features_are_those_of_stock_transformers_for_pictures_of_any_size(later: Served) -> None:
    pictures = [later.model.codec.picture(noise(number)) for number in range(100, 120)]
    # One whose lower half is padding, which Idefics3's own processor never leaves.
    half = pictures[-1].mask.clone()
    half[:, half.shape[1] // 2 :] = False
    pictures[-1] = replace(pictures[-1], key=b"half", mask=half)
    found = without_pauses(later.model.encode(pictures))
    assert len({picture.pixels.shape for picture in pictures}) > 1
    for picture in pictures:
        stock = later.stock.adapter.model.model.get_image_features(
            picture.normalize(picture.pixels, picture.mask)[None], picture.mask[None]
        )
        assert torch.allclose(found[picture.key], stock.pooler_output[0], atol=1e-4)


def test_answers_depend_on_the_picture(later: Served) -> None:
    rows = [Row(prepared(later.model, [image, "Say"]), Sampling(12)) for image in IMAGES.values()]
    _run(later.stock, rows)
    assert len({row.output.result().ids for row in rows}) > 1


@pytest.mark.parametrize("beams", [1, 2])
def test_a_row_whose_numbers_overflow_fails_alone(later: Served, beams: int) -> None:
    ends = later.model.codec.eos_ids

    def rows() -> list[Row]:
        parts = ([image, "Say"] for image in IMAGES.values())
        return [Row(prepared(later.model, each), Sampling(6, num_beams=beams, eos_ids=ends)) for each in parts]

    expected, found = rows(), rows()
    _run(later.stock, expected)
    (picture,) = found[0].tokens.pictures
    assert picture.pixels is not None
    broken = replace(picture, key=b"broken", pixels=picture.pixels * torch.nan)
    found[0] = Row(replace(found[0].tokens, pictures=(broken,)), found[0].sampling)
    _run(later.stock, found)
    with pytest.raises(Internal, match="overflow"):
        found[0].output.result()
    assert [row.output.result() for row in found[1:]] == [row.output.result() for row in expected[1:]]


def test_labels_score_in_a_batch_what_each_scores_alone(later: Served) -> None:
    prompts: list[Parts] = [[image, "Category:"] for image in list(IMAGES.values())[:3]]
    prompts += [["Some text before.", *IMAGES.values(), "Category:"], ["No picture. Category:"]]
    choices = [("food", "animal", "hot dog", "a b c d e"), ("x", "a somewhat longer label")]
    labels = [later.model.codec.encode_labels(["Category:"], choices[n % 2]) for n in range(len(prompts))]
    prefilled = stock_prefilled(later.model, [prepared(later.model, parts) for parts in prompts], chunk_tokens=100)
    # So few tokens at once that the labels are scored in several parts. Probabilities would hide all but the likeliest.
    scores = label_log_likelihoods(later.stock.adapter.model, prefilled, labels, 1000, lambda: None)
    for parts, own, scored in zip(prompts, labels, scores, strict=True):
        assert scored == pytest.approx([_log_likelihood(later, parts, label) for label in own], abs=1e-3)


@torch.inference_mode()
def _log_likelihood(later: Served, parts: Parts, label: tuple[int, ...]) -> float:
    inputs = dict(later.stock_inputs(parts))
    start = inputs["input_ids"].shape[1] - 1
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([label])], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    logits = later.stock.adapter.model(**inputs).logits[0].log_softmax(dim=-1)
    return sum(float(logits[start + n, token]) for n, token in enumerate(label))


def test_a_label_is_split_as_it_is_in_its_prompt_and_ends(later: Served) -> None:
    tail = "<end_of_utterance>" if later.model.codec.has_chat_template else "\n"
    lead = [later.model.codec.picture(IMAGES["0.png"]), "Category:"]
    [label] = later.model.codec.encode_labels(lead, ["hot dog"])
    whole: Parts = [IMAGES["0.png"], f"Category: hot dog{tail}"]
    assert [*later.model.codec.prepare(lead).ids, *label] == later.stock_inputs(whole)["input_ids"][0].tolist()


@pytest.mark.parametrize("later", ["idefics2 chat", "idefics3 chat"], indirect=True)
def test_a_conversation_is_what_the_chat_template_makes_of_it(later: Served) -> None:
    turns = [("user", ["1.png", "Who is this?"]), ("assistant", ["A dog."]), ("user", ["And this: ", "2.png"])]
    messages = [{"role": role, "content": list(map(_told, parts))} for role, parts in turns]
    stock = later.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    job = Chat.model_validate(
        {"messages": [{"role": role, "content": list(map(_sent, parts))} for role, parts in turns]}
    )
    parts = [IMAGES[part.source[-5:]] if isinstance(part, ImageRef) else part for part in in_turns(job)]  # type: ignore[index]
    assert list(prepared(later.model, parts).ids) == stock["input_ids"][0]


def _told(part: str) -> dict[str, Any]:
    """A part of a message as transformers takes it."""
    return {"type": "image", "image": IMAGES[part]} if part in IMAGES else {"type": "text", "text": part}


def _sent(part: str) -> dict[str, Any]:
    """The same as a producer sends it."""
    if part in IMAGES:
        return {"type": "image_url", "image_url": {"url": f"https://example.com/{part}"}}
    return {"type": "text", "text": part}


@pytest.mark.parametrize("parts", [["a <s>"], ["<fake_token_around_image>"], ["<ima", "ge>"]])
def test_texts_that_would_become_tokens_are_refused(later: Served, parts: list[str]) -> None:
    with pytest.raises(InvalidRequest, match="reserved"):
        later.model.codec.prepare(parts)


@pytest.mark.parametrize("later", ["idefics3 base"], indirect=True)
def test_a_frames_place_is_reserved_where_it_is_a_token(later: Served) -> None:
    with pytest.raises(InvalidRequest, match="<row_1_col_2>"):
        later.model.codec.prepare(["<row_1_col_2>"])


@pytest.mark.parametrize("template", ["{{ messages[0]['role'] }}: hello", "{{ raise_exception('no') }}", "{{ 1 / 0 }}"])
def test_a_template_of_another_form_leaves_prompts_plain(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, template: str
) -> None:
    folder = later_checkpoint(tmp_path / "checkpoint", "idefics3", template)
    assert not load(Settings(model=str(folder))).codec.has_chat_template
    assert "plain text" in caplog.text


def test_every_task_is_answered(later: Served) -> None:
    with _service(later) as service:
        for task, arguments in _tasks().items():
            result = service.run(parse(f"idefics.{task}", {**arguments, "max_new_tokens": 5}), JobContext(task))
            assert result.finish_reason in ("stop", "length"), task
            assert result.usage.images == str(arguments).count("data:image"), task
            assert (result.label in ("cat", "dog")) == (task == "classify"), task


#: bitsandbytes has no 4 bits on a CPU for the tests' smolvlm, whose layers are 48 wide.
PRECISIONS = [
    (family, {name: value})
    for family in ("idefics2", "idefics3", "smolvlm")
    for name, value in (("dtype", "bfloat16"), ("quantization", "8bit"), ("quantization", "4bit"))
    if (family, value) != ("smolvlm", "4bit")
]


@pytest.mark.parametrize(("family", "precision"), PRECISIONS)
def test_every_precision_answers_on_both_paths_and_pictures_are_never_quantized(
    tmp_path: Path, family: str, precision: dict[str, Any]
) -> None:
    settings = Settings(model=str(later_checkpoint(tmp_path / "checkpoint", family, TEMPLATE)), **precision)
    model = load(settings)
    assert isinstance(model, ContinuousModel)
    kinds = {name: type(module).__name__ for name, module in model.stock.adapter.model.named_modules()}
    quantized = [name for name, kind in kinds.items() if kind in ("Linear4bit", "Linear8bitLt")]
    assert bool(quantized) == ("quantization" in precision)
    assert all(name.startswith("model.text_model.") for name in quantized)
    parts: Parts = [IMAGES["0.png"], "and", IMAGES["1.png"], "Category:"]
    labels = tuple(model.codec.encode_labels(["Category:"], ["cat", "hot dog", "a b c"]))
    ours, stock = (
        [Row(prepared(model, parts), Sampling(4)), Row(prepared(model, parts), Sampling(1), labels)] for _ in range(2)
    )
    model.run(ours, lambda: None, lambda running: ())
    _run(model.stock, stock)
    (answer, scored), (_, expected) = ([row.output.result() for row in rows] for rows in (ours, stock))
    assert len(answer.ids) == 4
    assert scored.probabilities == pytest.approx(expected.probabilities, abs=0.05)


@contextlib.contextmanager
def _service(later: Served) -> Iterator[Service]:
    engine = Engine(later.model, Limits(8, 10_000))
    engine.start()
    try:
        service = Service(later.settings, later.model.info, later.model.codec, engine)
        service.check_golden(None)
        yield service
    finally:
        engine.stop()


def _tasks() -> dict[str, dict[str, Any]]:
    image, other = (data_uri(encoded(IMAGES[name])) for name in ("0.png", "1.png"))
    return {
        "caption": {"image": image, "examples": [{"image": other, "text": "A dog."}]},
        "answer": {"image": image, "question": "What is it?"},
        "classify": {"image": image, "labels": ["cat", "dog"], "examples": [{"image": other, "label": "dog"}]},
        "write": {"images": [image, other]},
        "complete": {"prompt": ["User:", image, "Hello<end_of_utterance>\nAssistant:"]},
        "chat": {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": image}}]}]},
    }
