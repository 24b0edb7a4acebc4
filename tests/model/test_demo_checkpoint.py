"""The bundled checkpoint: complete, small, loadable as a hub checkpoint is, and right about its own pictures."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, IdeficsForVisionText2Text

from tests.conftest import PICTURES
from worker.demo.__main__ import Shown, pictures
from worker.demo.dialogue import everything
from worker.demo.sayings import expected_answer
from worker.demo.training.evaluate import CHECKPOINT, Case, Speaker, is_right, load, said_by
from worker.demo.training.rows import RowMaker
from worker.demo.world import CATEGORIES, COLORS, THINGS, TRAIN_STYLES, Scene

MAX_WEIGHT_BYTES = 10_000_000


@pytest.fixture(scope="module")
def speaker() -> Speaker:
    return load(CHECKPOINT, "float32")


def opened(shown: Shown) -> Image.Image:
    return Image.open(PICTURES / shown.file).convert("RGB")


def cases_about(shown: Shown, other: Shown) -> list[Case]:
    """One of each form about the picture, with the other as the example."""
    images = (opened(shown), opened(other))
    return [Case(dialogue, images) for dialogue in everything(shown.picture, other.picture)]


def test_the_checkpoint_has_a_hub_checkpoints_files_and_is_small() -> None:
    files = {path.name: path.stat().st_size for path in CHECKPOINT.iterdir()}
    assert {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "special_tokens_map.json", "preprocessor_config.json", "processor_config.json", "golden.json", "golden.png",
    } <= set(files)  # fmt: skip
    assert files["model.safetensors"] <= MAX_WEIGHT_BYTES


def test_the_checkpoint_loads_through_the_stock_classes_with_every_weight() -> None:
    model, report = IdeficsForVisionText2Text.from_pretrained(CHECKPOINT, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    assert model.config.vocab_size + model.config.additional_vocab_size == len(processor.tokenizer)
    assert type(processor).__name__ == "IdeficsProcessor"


@pytest.mark.parametrize(
    "text", ["One line.\nAnother\n\n", "two  blanks and a\ttab", "naïve 日本語 🐈 \u202e", '{"a": [1]}']
)
def test_any_text_survives_the_tokenizer(text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id not in ids


def test_the_pictures_show_every_category_colour_style_and_count() -> None:
    shown = pictures()
    assert len(shown) >= 24
    assert {THINGS[each.picture.thing].category for each in shown} == set(CATEGORIES)
    assert {each.picture.background for each in shown} == set(COLORS)
    assert {each.picture.count for each in shown} == {1, 2}
    assert {each.file.removesuffix(".png").rpartition("-")[2] for each in shown} == set(TRAIN_STYLES)


def test_every_answer_about_every_shipped_picture_is_right_word_for_word(speaker: Speaker) -> None:
    shown = pictures()
    others = [shown[1], *shown[:-1]]
    cases = [case for pair in zip(shown, others, strict=True) for case in cases_about(*pair)]
    wrong = [(case.dialogue.text, said) for case, said in said_by(speaker, cases) if not is_right(case, said)]
    assert not wrong


def test_the_likeliest_label_is_the_right_one(speaker: Speaker) -> None:
    shown = pictures()
    for example, each in itertools.pairwise(shown):
        for case in cases_about(each, example):
            if case.dialogue.kind == "classify":
                assert speaker.choose(case) == case.dialogue.text.strip()


def test_answers_are_the_same_alone_and_in_a_batch(speaker: Speaker) -> None:
    shown = pictures()
    cases = [case for case in cases_about(shown[0], shown[1]) if case.dialogue.kind != "chat"][::3]
    assert speaker.say(cases) == [speaker.say([case])[0] for case in cases]


def test_training_rows_are_what_the_processor_makes_of_the_prompt(speaker: Speaker) -> None:
    maker = RowMaker(speaker.processor.tokenizer)
    shown = pictures()
    for case in cases_about(shown[0], shown[1]):
        inputs = speaker.processor(text=[case.prompt()], add_end_of_utterance_token=False)
        [row] = maker.rows([case.dialogue])
        [batch] = maker.micro_batches([row])
        width = inputs["input_ids"].shape[1]
        assert row.ids[:width] == inputs["input_ids"][0].tolist()
        assert torch.equal(batch.image_mask[0, :width], inputs["image_attention_mask"][0])


@pytest.mark.parametrize("form", ["float32", "bfloat16", "8bit", "4bit"])
def test_the_golden_answer_comes_out_in_every_form(form: str) -> None:
    golden = json.loads((CHECKPOINT / "golden.json").read_text())
    question = golden["arguments"]["question"]
    assert golden["text"] == expected_answer(Scene("cat", "blue", 1), question)
    image = Image.open(CHECKPOINT / golden["image"]).convert("RGB")
    dialogue = next(each for each in everything(Scene("cat", "blue", 1), Scene("cow", "red", 2))
                    if each.kind == "answer" and question == each.job.question)  # type: ignore[attr-defined]  # fmt: skip
    assert load(CHECKPOINT, form).say([Case(dialogue, (image,))]) == [golden["text"]]


def test_expected_answers_come_without_torch() -> None:
    code = "import sys, worker.demo.dialogue; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PICTURES.parents[2], check=False).returncode == 0
