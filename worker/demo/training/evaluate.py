"""How often the demo model is right: `python -m worker.demo.training.evaluate` prints a table and writes figures.json.

Every prompt goes the stock way, through the real processor and `generate`, on pictures composed for the occasion.
"""

import argparse
import json
import logging
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoProcessor, BitsAndBytesConfig, IdeficsForVisionText2Text, IdeficsProcessor

from tasks.payloads import Classify
from tasks.protocol import END_OF_UTTERANCE
from worker.demo.dialogue import KINDS, Dialogue, a_dialogue, index_of
from worker.demo.training import art
from worker.demo.training.shards import sprite
from worker.demo.training.tokens import ADDITIONAL_TOKENS
from worker.demo.world import HELD_OUT_STYLE, TRAIN_STYLES, any_picture, compose
from worker.jobs.prompts import build

DEMO = Path(__file__).parents[1]
CHECKPOINT = DEMO / "checkpoint"

#: Dialogues about one set of pictures; their examples come from the same set.
SET_SIZE = 50
MAX_NEW_TOKENS = 96

#: Full names: with shorter ones bitsandbytes silently skips nothing.
KEPT_WHOLE = ["model.vision_model", "model.perceiver_resampler", "lm_head"]


@dataclass(frozen=True)
class Case:
    """A dialogue and the images that its job names by index."""

    dialogue: Dialogue
    images: Sequence[Image.Image]

    def prompt(self) -> list[str | Image.Image]:
        """As the processor takes it."""
        return [
            item if isinstance(item, str) else self.images[index_of(item.source)] for item in build(self.dialogue.job)
        ]


class Speaker:
    """A model with its processor, asked in batches."""

    def __init__(self, model: IdeficsForVisionText2Text, processor: IdeficsProcessor) -> None:
        self.model, self.processor = model.eval(), processor
        tokenizer = processor.tokenizer
        self._utterance_id = tokenizer.convert_tokens_to_ids(END_OF_UTTERANCE)
        self._bad_words = [[tokenizer.convert_tokens_to_ids(token)] for token in ADDITIONAL_TOKENS[:2]]

    @torch.inference_mode()
    def say(self, cases: Sequence[Case]) -> list[str]:
        """Generate greedily. Returns the texts without outer blanks and without a final end of utterance."""
        inputs = self.processor(text=[case.prompt() for case in cases], add_end_of_utterance_token=False)
        ends = [self.processor.tokenizer.eos_token_id, self._utterance_id]
        generated = self.model.generate(
            **inputs,
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            bad_words_ids=self._bad_words,
            eos_token_id=ends,
            pad_token_id=0,
        )
        new = generated[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.batch_decode(new, skip_special_tokens=True)]

    @torch.inference_mode()
    def choose(self, case: Case) -> str:
        """The label that the worker's `classify` gives: the likeliest, each scored with its newline."""
        job = case.dialogue.job
        assert isinstance(job, Classify), "only classify has labels"
        *head, last = case.prompt()
        prompts = [[*head, f"{last} {label}\n"] for label in job.labels]
        inputs = self.processor(text=prompts, add_end_of_utterance_token=False)
        scores = self.model(**inputs, use_cache=False).logits.float().log_softmax(-1)
        start = self.processor(text=[case.prompt()], add_end_of_utterance_token=False)["attention_mask"].sum().item()
        return job.labels[_likeliest(scores, inputs["input_ids"], inputs["attention_mask"], start)]


def _likeliest(scores: torch.Tensor, ids: torch.Tensor, attention: torch.Tensor, start: int) -> int:
    """The row whose tokens from `start` on (padding not counted) are the likeliest together."""
    said = scores[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    counted = attention.cumsum(-1)[:, 1:] > start
    return int((said * counted).sum(-1).argmax())


def fresh_cases(kind: str, count: int, styles: Sequence[str], seed: str) -> list[Case]:
    """Dialogues about pictures that no training saw: places, sizes and tilts are drawn anew."""
    rng = random.Random(f"evaluate {seed} {kind}")
    cases: list[Case] = []
    while len(cases) < count:
        pictures = [any_picture(rng) for _ in range(SET_SIZE)]
        images = [compose(each, _art(rng.choice(styles)), rng) for each in pictures]
        cases += [Case(a_dialogue(kind, pictures, index, rng), images) for index in range(SET_SIZE)]
    return cases[:count]


def _art(style: str) -> Callable[[str], Image.Image]:
    return partial(sprite, style, side=art.SPRITE_SIDE)


def is_right(case: Case, said: str) -> bool:
    """Word for word."""
    return said == case.dialogue.text.removesuffix(END_OF_UTTERANCE).strip()


def said_by(speaker: Speaker, cases: Sequence[Case]) -> Iterator[tuple[Case, str]]:
    """Every case with what the model says to it, alike lengths together."""
    ordered = sorted(cases, key=lambda case: len(case.prompt()))
    for start in range(0, len(ordered), SET_SIZE):
        batch = ordered[start : start + SET_SIZE]
        yield from zip(batch, speaker.say(batch), strict=True)


def accuracies(
    speaker: Speaker, count: int, styles: Sequence[str], seed: str = "final", kinds: Sequence[str] = KINDS
) -> dict[str, float]:
    """Part of the answers that are right word for word, per task, of `count` dialogues each."""
    right: dict[str, list[bool]] = defaultdict(list)
    for kind in kinds:
        cases = fresh_cases(kind, count, styles, seed)
        for case, said in said_by(speaker, cases):
            right[case.dialogue.kind].append(is_right(case, said))
        if kind == "classify":
            chosen = [speaker.choose(case) == case.dialogue.text.strip() for case in cases]
            right["classify by likelihood"] += chosen
    return {kind: round(sum(each) / len(each), 4) for kind, each in right.items()}


def load(folder: Path, form: str) -> Speaker:
    """The checkpoint as float32, bfloat16, 8bit or 4bit."""
    options: dict[str, object] = {"dtype": torch.float32}
    if form == "bfloat16":
        options = {"dtype": torch.bfloat16}
    elif form in ("8bit", "4bit"):
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=form == "8bit",
            load_in_4bit=form == "4bit",
            bnb_4bit_quant_type="nf4",
            llm_int8_skip_modules=KEPT_WHOLE,
        )
    model = IdeficsForVisionText2Text.from_pretrained(folder, **options)
    return Speaker(model, AutoProcessor.from_pretrained(folder))


def evaluate(folder: Path, count: int) -> dict[str, dict[str, float]]:
    """All figures: per task in each form, and in the art style that was kept out of training."""
    few = min(count, 200)
    # The forms differ little, and the quantised ones are slow without a GPU.
    runs = [("float32", count, TRAIN_STYLES), *[(form, few, TRAIN_STYLES) for form in ("bfloat16", "8bit", "4bit")]]
    figures: dict[str, dict[str, float]] = {}
    for form, asked, styles in [*runs, ("float32", few, (HELD_OUT_STYLE,))]:
        name = form if styles == TRAIN_STYLES else f"{form}, held-out style ({HELD_OUT_STYLE})"
        right = accuracies(load(folder, form), asked, styles)
        figures[name] = {"dialogues per task": asked, **right}
        print(f"{name} ({asked} each)  " + "  ".join(f"{kind} {part:.1%}" for kind, part in right.items()), flush=True)
    return figures


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=500, help="dialogues per task")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    asked = parser.parse_args()
    # bitsandbytes says at every layer and step that it casts.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    art.prepare()
    figures = evaluate(asked.checkpoint, asked.count)
    (DEMO / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
