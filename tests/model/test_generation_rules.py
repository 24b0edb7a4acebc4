"""A checkpoint's generation_config.json counts on every path as it does in stock `generate`, whatever the batch."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    Idefics2ForConditionalGeneration,
    IdeficsForVisionText2Text,
    PreTrainedModel,
)
from transformers.generation.logits_process import (
    EncoderNoRepeatNGramLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
)

from config.settings import Settings
from tasks.payloads import parse
from tests.model.checkpoints import later_checkpoint, random_checkpoint
from tests.model.conftest import noise
from tests.model.jobs import mixed_jobs, parts_of, row_of
from tests.support.waiting import PATIENCE_S
from worker.engine.engine import Engine
from worker.engine.generation_rules import UNSUPPORTED
from worker.engine.interfaces import Model
from worker.engine.logits_processors import NGRAM_RULES, NGramBan, RowRules
from worker.engine.row import Row, Sampling, Tokens
from worker.engine.scheduler import Limits
from worker.jobs.runs import JobContext
from worker.jobs.service import Service
from worker.models import DEMO
from worker.models.loading import SetupFailed, load

#: Tokens of the prompts below, and the end: what a random model hardly says by itself.
PROMPTS_WORDS = AutoTokenizer.from_pretrained(DEMO)(
    "User: Assistant: Question Answer: Story: image of", add_special_tokens=False
).input_ids
LIKES_PROMPTS = {"sequence_bias": [[[token], 20.0] for token in sorted(set(PROMPTS_WORDS))]}
LIKES_ENDS = {"sequence_bias": [[[2], 25.0]]}
IMAGES = {f"{n}.png": noise(n) for n in range(6)}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

#: Of an answer. Each rule has an effect within so many.
MOST_TOKENS = 14

RULES: dict[str, dict[str, Any]] = {
    "repetition_penalty": {"repetition_penalty": 3.0},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 2.0},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "min_length": {"min_length": 60},
    "min_new_tokens": {"min_new_tokens": 9, "min_length": 3},
    "forced_eos_token_id": {"forced_eos_token_id": 2},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": [2, 1.9]},
    "suppress_tokens": {"suppress_tokens": list(range(100, 400))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(3, 500))},
    "sequence_bias": {"sequence_bias": [[[150], 9.0], [[150, 151], -20.0]]},
    "together": {"repetition_penalty": 1.5, "min_new_tokens": 4, "suppress_tokens": [5, 6, 7], "length_penalty": 0.2},
}

#: What the rule is compared with, where a plain checkpoint would not feel it.
WITHOUT = {
    "encoder_no_repeat_ngram_size": LIKES_PROMPTS,
    "encoder_repetition_penalty": LIKES_PROMPTS,
    "min_length": LIKES_ENDS,
    "min_new_tokens": LIKES_ENDS,
}


def checkpoint(folder: Path, family: str, rules: dict[str, Any]) -> Path:
    if family == "idefics":
        random_checkpoint(folder, use_resampler=True)
    else:
        later_checkpoint(folder, family, None)
    (folder / "generation_config.json").write_text(json.dumps({**SPECIAL, **rules}))
    return folder


def model_of(folder: Path) -> Model:
    return load(Settings(model=str(folder), dtype="float32"))


def stock_network(folder: Path) -> PreTrainedModel:
    network = Idefics2ForConditionalGeneration if "idefics2" in str(folder) else IdeficsForVisionText2Text
    return network.from_pretrained(folder, dtype=torch.float32).eval()


@torch.inference_mode()
def stock_answer(
    model: PreTrainedModel, row: Row, inputs: dict[str, torch.Tensor], bad_words: list[list[int]]
) -> list[int]:
    """What stock `generate` says, with the checkpoint's own generation config."""
    ids = model.generate(
        **inputs,
        do_sample=False,
        num_beams=row.sampling.num_beams,
        max_new_tokens=row.sampling.max_new_tokens,
        eos_token_id=sorted(row.sampling.eos_ids),
        bad_words_ids=[*bad_words, *(model.generation_config.bad_words_ids or [])],
    )[0, inputs["input_ids"].shape[1] :].tolist()
    end = next((n for n, token in enumerate(ids) if token in row.sampling.eos_ids), len(ids))
    return list(ids[:end])


def answers_of(model: Model, rows: Sequence[Row]) -> list[list[int]]:
    """What a model answers to rows that run together."""
    engine = Engine(model, Limits(rows=32, tokens=10_000))
    for row in rows:
        engine.submit(row)
    engine.start()
    try:
        return [list(row.output.result(PATIENCE_S).ids) for row in rows]
    finally:
        engine.stop()


#: What a checkpoint of a family with these rules answers to rows. All tests ask the same, which is computed once.
Plain = Callable[[str, dict[str, Any], Sequence[Row]], list[list[int]]]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Plain:
    known: dict[str, list[list[int]]] = {}

    def answers(family: str, rules: dict[str, Any], rows: Sequence[Row]) -> list[list[int]]:
        name = f"{family} {json.dumps(rules)}"
        if name not in known:
            model = model_of(checkpoint(tmp_path_factory.mktemp("plain") / family, family, rules))
            known[name] = answers_of(model, [Row(row.tokens, row.sampling) for row in rows])
        return known[name]

    return answers


@pytest.mark.parametrize("family", ["idefics", "idefics2"])
@pytest.mark.parametrize("name", RULES)
def test_a_rule_of_the_checkpoint_counts_for_greedy_rows_and_beams_in_any_company(
    tmp_path: Path, family: str, name: str, plain: Plain
) -> None:
    without_it = WITHOUT.get(name, {})
    folder = checkpoint(tmp_path / f"{family} checkpoint", family, {**without_it, **RULES[name]})
    model, processor = model_of(folder), AutoProcessor.from_pretrained(folder)
    jobs = [
        job.model_copy(update={"max_new_tokens": min(job.max_new_tokens or MOST_TOKENS, MOST_TOKENS)})
        for job in mixed_jobs(9, sorted(IMAGES), seed=4)
        if job.task not in ("idefics.chat", "idefics.complete")
    ]
    jobs += [job.model_copy(update={"num_beams": 2, "max_new_tokens": 8}) for job in jobs[:3]]
    prompts = [parts_of(job, IMAGES) for job in jobs]
    rows = [row_of(model, job, parts) for job, parts in zip(jobs, prompts, strict=True)]
    answers = answers_of(model, rows)
    inputs = [_stock_inputs(processor, parts, family) for parts in prompts]
    stock = stock_network(folder)
    assert answers == [
        stock_answer(stock, row, each, model.codec.bad_words_ids) for row, each in zip(rows, inputs, strict=True)
    ]
    # The rule is one that these answers feel.
    assert answers != plain(family, without_it, rows)


def _stock_inputs(processor: Any, parts: list[Any], family: str) -> dict[str, torch.Tensor]:
    if family == "idefics":
        return dict(processor(text=[parts], return_tensors="pt", add_end_of_utterance_token=False))
    text = "".join(part if isinstance(part, str) else "<image>" for part in parts)
    images = [part for part in parts if not isinstance(part, str)]
    return dict(processor(text=[text], images=[images], return_tensors="pt"))


def test_bad_words_of_several_tokens_are_never_said(tmp_path: Path) -> None:
    plain = model_of(checkpoint(tmp_path / "plain idefics", "idefics", {}))

    def said(model: Model) -> list[int]:
        row = Row(model.codec.prepare(["This is"]), Sampling(12, eos_ids=model.codec.eos_ids))
        model.run([row], lambda: None, lambda running: ())
        return list(row.output.result().ids)

    first = said(plain)
    forbidden = model_of(checkpoint(tmp_path / "idefics", "idefics", {"bad_words_ids": [first[2:4]]}))
    found = said(forbidden)
    assert found[:3] == first[:3]
    assert found[3] != first[3]
    assert first[2:4] not in [found[n : n + 2] for n in range(len(found))]


def test_a_sampled_row_takes_the_checkpoints_cuts_where_it_names_none(tmp_path: Path) -> None:
    model = model_of(checkpoint(tmp_path / "idefics", "idefics", {"top_k": 1}))
    service_of(model, {"temperature": 5.0, "seed": 1})
    greedy = service_of(model, {})
    assert service_of(model, {"temperature": 5.0, "seed": 1})[0] == greedy[0]
    free, rules = service_of(model, {"temperature": 5.0, "seed": 1, "top_k": 0})
    assert free != greedy[0]
    assert rules == {"temperature": 5.0, "top_k": 0}
    assert service_of(model, {"temperature": 5.0, "seed": 1})[1] == {"temperature": 5.0, "top_k": 1}
    assert greedy[1] == {}


def service_of(model: Model, fields: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """A job's text, and the rules that its result names."""
    engine = Engine(model, Limits(8, 10_000))
    engine.start()
    service = Service(Settings(model="demo"), model.info, model.codec, engine, rules=model.rules)
    result = service.run(
        parse("idefics.complete", {"prompt": ["This is"], "max_new_tokens": 12, **fields}), JobContext("job")
    )
    engine.stop()
    return result.text, result.generation


def test_a_result_names_the_rules_that_applied(tmp_path: Path) -> None:
    rules = {"repetition_penalty": 1.3, "length_penalty": 2.0, "suppress_tokens": list(range(1000))}
    model = model_of(checkpoint(tmp_path / "idefics", "idefics", rules))
    assert service_of(model, {})[1] == {"repetition_penalty": 1.3, "suppress_tokens": "1,000 entries"}
    assert service_of(model, {"num_beams": 2})[1] == {
        "repetition_penalty": 1.3,
        "suppress_tokens": "1,000 entries",
        "length_penalty": 2.0,
        "num_beams": 2,
    }


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_another_way_to_decode_is_refused_at_load(tmp_path: Path, name: str) -> None:
    value = {"stop_strings": ["."], "watermarking_config": {"bias": 2.0}, "token_healing": True}.get(name, 3)
    folder = checkpoint(tmp_path / "idefics", "idefics", {name: value})
    with pytest.raises(SetupFailed, match=name):
        load(Settings(model=str(folder), dtype="float32"))


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("name", NGRAM_RULES)
def test_a_ban_of_ngrams_is_that_of_transformers_at_each_step(name: str, size: int) -> None:
    torch.manual_seed(size)
    prompt, new = torch.randint(0, 4, (3,)).tolist(), torch.randint(0, 4, (40,)).tolist()
    ban = NGramBan(prompt, size, counts_new=NGRAM_RULES[name])
    stock = (
        NoRepeatNGramLogitsProcessor(size)
        if name == "no_repeat_ngram_size"
        else EncoderNoRepeatNGramLogitsProcessor(size, torch.tensor([prompt]))
    )
    banned = 0
    # Several tokens may be new, as after a row was preempted.
    for length in (0, 1, 2, 3, 7, *range(8, 40)):
        scores = torch.randn(1, 4)
        found = ban.apply(new[:length], scores)
        assert torch.equal(found, stock(torch.tensor([[*prompt, *new[:length]]]), scores))
        banned += int(found.isinf().sum())
    assert banned or size == 5


def test_a_prompts_padding_is_no_part_of_a_rule() -> None:
    # Stock `generate` counts a batch's padding towards `min_length`: here a row's own tokens count.
    row = Row(Tokens((5, 6, 7)), Sampling(9, eos_ids=frozenset({2})))
    rules = RowRules(row, {"min_length": 5}, torch.device("cpu"))
    scores = torch.zeros(4)
    assert rules.apply([], scores)[2] == -torch.inf
    assert rules.apply([1, 1], scores)[2] == 0
