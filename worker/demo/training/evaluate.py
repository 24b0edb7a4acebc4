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
from transformers import AutoProcessor, BitsAndBytesConfig, PreTrainedModel, ProcessorMixin

from tasks.payloads import Classify
from tasks.protocol import END_OF_UTTERANCE
from worker.demo.dialogue import KINDS, Dialogue, a_dialogue, index_of
from worker.demo.training import art
from worker.demo.training.families import FAMILIES
from worker.demo.training.family import Family
from worker.demo.training.shards import sprite
from worker.demo.world import HELD_OUT_STYLE, TRAIN_STYLES, any_picture, compose
from worker.models.loading import NOT_QUANTIZED
from worker.models.tokenizer import FAKE, IMAGE

#: Dialogues about one set of pictures; their examples come from the same set.
SET_SIZE = 50
MAX_NEW_TOKENS = 96


@dataclass(frozen=True)
class Case:
    """A dialogue and the images that its job names by index."""

    dialogue: Dialogue
    images: Sequence[Image.Image]

    def prompt(self, family: Family) -> list[str | Image.Image]:
        """Texts and images, in the family's form."""
        parts = family.prompt(self.dialogue.job)
        return [part if isinstance(part, str) else self.images[index_of(part.source)] for part in parts]


class Speaker:
    """A model with its processor, asked in batches."""

    def __init__(self, family: Family, model: PreTrainedModel, processor: ProcessorMixin) -> None:
        self.family, self.model, self.processor = family, model.eval(), processor
        tokenizer = processor.tokenizer
        self._utterance_id = tokenizer.convert_tokens_to_ids(END_OF_UTTERANCE)
        self._bad_words = [[tokenizer.convert_tokens_to_ids(token)] for token in (FAKE, IMAGE)]

    @torch.inference_mode()
    def say(self, cases: Sequence[Case]) -> list[str]:
        """Generate greedily. Returns the texts without outer blanks and without a final end of utterance."""
        inputs = self.family.inputs(self.processor, [case.prompt(self.family) for case in cases])
        ends = [self.processor.tokenizer.eos_token_id, self._utterance_id]
        generated = self.model.generate(
            **inputs,
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            bad_words_ids=self._bad_words,
            eos_token_id=ends,
            pad_token_id=self.processor.tokenizer.pad_token_id,
        )
        new = generated[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.batch_decode(new, skip_special_tokens=True)]

    @torch.inference_mode()
    def choose(self, case: Case) -> str:
        """The label that the worker's `classify` gives: the likeliest, each scored with its newline."""
        job = case.dialogue.job
        assert isinstance(job, Classify), "only classify has labels"
        *head, last = case.prompt(self.family)
        inputs = self.family.inputs(
            self.processor, [[*head, f"{last} {label}{self.family.label_end}"] for label in job.labels]
        )
        scores = self.model(**inputs, use_cache=False).logits.float().log_softmax(-1)
        start = self.family.inputs(self.processor, [case.prompt(self.family)])["attention_mask"].sum().item()
        return job.labels[_likeliest(scores, inputs["input_ids"], inputs["attention_mask"], start)]


def _likeliest(scores: torch.Tensor, ids: torch.Tensor, attention: torch.Tensor, start: int) -> int:
    """The row whose tokens from `start` on (padding not counted) are the likeliest together."""
    said = scores[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    counted = attention.cumsum(-1)[:, 1:] > start
    return int((said * counted).sum(-1).argmax())


def fresh_cases(family: Family, kind: str, count: int, styles: Sequence[str], seed: str) -> list[Case]:
    """Dialogues about pictures that no training saw: places, sizes and tilts are drawn anew."""
    rng = random.Random(f"evaluate {seed} {kind}")
    cases: list[Case] = []
    while len(cases) < count:
        pictures = [any_picture(rng) for _ in range(SET_SIZE)]
        images = [compose(each, _art(rng.choice(styles)), rng) for each in pictures]
        cases += [Case(a_dialogue(kind, pictures, index, rng, family.reply), images) for index in range(SET_SIZE)]
    return cases[:count]


def _art(style: str) -> Callable[[str], Image.Image]:
    return partial(sprite, style, side=art.SPRITE_SIDE)


def is_right(case: Case, said: str) -> bool:
    """Word for word."""
    return said == case.dialogue.text.removesuffix(END_OF_UTTERANCE).strip()


def said_by(speaker: Speaker, cases: Sequence[Case]) -> Iterator[tuple[Case, str]]:
    """Every case with what the model says to it, alike lengths together."""
    ordered = sorted(cases, key=lambda case: len(case.prompt(speaker.family)))
    for start in range(0, len(ordered), SET_SIZE):
        batch = ordered[start : start + SET_SIZE]
        yield from zip(batch, speaker.say(batch), strict=True)


def accuracies(
    speaker: Speaker, count: int, styles: Sequence[str], seed: str = "final", kinds: Sequence[str] = KINDS
) -> dict[str, float]:
    """Part of the answers that are right word for word, per task, of `count` dialogues each."""
    right: dict[str, list[bool]] = defaultdict(list)
    for kind in kinds:
        cases = fresh_cases(speaker.family, kind, count, styles, seed)
        for case, said in said_by(speaker, cases):
            right[case.dialogue.kind].append(is_right(case, said))
        if kind == "classify":
            chosen = [speaker.choose(case) == case.dialogue.text.strip() for case in cases]
            right["classify by likelihood"] += chosen
    return {kind: round(sum(each) / len(each), 4) for kind, each in right.items()}


def load(family: Family, form: str, folder: Path | None = None) -> Speaker:
    """The family's checkpoint, or the one in `folder`, as float32, bfloat16, 8bit or 4bit."""
    options: dict[str, object] = {"dtype": torch.float32}
    if form == "bfloat16":
        options = {"dtype": torch.bfloat16}
    elif form in ("8bit", "4bit"):
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=form == "8bit",
            load_in_4bit=form == "4bit",
            bnb_4bit_quant_type="nf4",
            llm_int8_skip_modules=NOT_QUANTIZED,
        )
    folder = folder or family.checkpoint
    model = family.network.from_pretrained(folder, **options)
    return Speaker(family, model, AutoProcessor.from_pretrained(folder))


def evaluate(family: Family, count: int, few: int) -> dict[str, dict[str, float]]:
    """All figures: per task in each form, and in the art style that was kept out of training."""
    # The forms differ little, and the quantised ones are slow without a GPU.
    runs = [("float32", count, TRAIN_STYLES), *[(form, few, TRAIN_STYLES) for form in ("bfloat16", "8bit", "4bit")]]
    figures: dict[str, dict[str, float]] = {}
    for form, asked, styles in [*runs, ("float32", few, (HELD_OUT_STYLE,))]:
        name = form if styles == TRAIN_STYLES else f"{form}, held-out style ({HELD_OUT_STYLE})"
        right = accuracies(load(family, form), asked, styles)
        figures[name] = {"dialogues per task": asked, **right}
        print(f"{name} ({asked} each)  " + "  ".join(f"{kind} {part:.1%}" for kind, part in right.items()), flush=True)
    return figures


def save_figures(family: Family, count: int, few: int = 200) -> None:
    """Evaluate the family's checkpoint, and write what comes out beside it."""
    name = family.checkpoint.name.replace("checkpoint", "figures")
    figures = evaluate(family, count, few)
    family.checkpoint.with_name(f"{name}.json").write_text(json.dumps(figures, indent=2) + "\n")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=500, help="dialogues per task")
    parser.add_argument("--few", type=int, default=200, help="dialogues per task in other precisions and styles")
    parser.add_argument("--model", choices=FAMILIES, default="demo")
    asked = parser.parse_args()
    # bitsandbytes says at every layer and step that it casts.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    art.prepare()
    save_figures(FAMILIES[asked.model], asked.count, asked.few)


if __name__ == "__main__":
    main()
