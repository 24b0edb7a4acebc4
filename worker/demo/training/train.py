"""Builds a bundled checkpoint and all that ships beside it: `python -m worker.demo.training.train --model demo`.

Art, tokenizer, two stages of training, checkpoint, pictures and figures. Stopped, it goes on where it was;
`.train/` holds its state. Needs npm, and `pip install resvg_py sentencepiece`.
"""

import argparse
import math
import os
import sys

import torch
from transformers import AutoTokenizer, PreTrainedModel, logging

from worker.demo.dialogue import KINDS
from worker.demo.training import art
from worker.demo.training.evaluate import accuracies, load, save_figures
from worker.demo.training.export import save_checkpoint, save_pictures
from worker.demo.training.families import FAMILIES
from worker.demo.training.family import Family
from worker.demo.training.learn import Learner
from worker.demo.training.shards import compose_shards
from worker.demo.training.sight import learn_to_see
from worker.demo.world import TRAIN_STYLES
from worker.models import DEMO

SHARDS = 30
THREADS = 2


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=FAMILIES, default="demo")
    parser.add_argument("--steps", type=int, help="of the second stage")
    parser.add_argument("--minutes", type=float, default=math.inf, help="end the second stage after this time at most")
    asked = parser.parse_args()
    family = FAMILIES[asked.model]
    os.nice(5)
    torch.set_num_threads(THREADS)
    logging.set_verbosity_error()
    train(family, asked.steps or family.steps[1], asked.minutes * 60)
    if family.checkpoint == DEMO:
        passed_over = save_pictures(load(family, "float32"), DEMO.with_name("pictures"))
        print(f"pictures passed over: {passed_over}")
    save_figures(family, count=500)


def train(family: Family, steps: int, seconds: float) -> None:
    """From nothing, or from where it was stopped, to the checkpoint."""
    art.prepare()
    pictures, work = art.WORK / "pictures", family.work
    if not (work / "tokenizer").exists():
        family.save_tokenizer(work / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    compose_shards(SHARDS, pictures)
    if not (work / "learner.pt").exists():
        learn_to_see(family, tokenizer, pictures, work / "sight.pt")
    learner = Learner(family, tokenizer, work / "sight.pt", work / "learner.pt", steps, seconds)
    learner.learn(pictures, lambda model, step: _check(family, model, step))
    save_checkpoint(family, learner.average, work / "tokenizer")


def _check(family: Family, model: PreTrainedModel, step: int) -> None:
    """Refresh the checkpoint and log how good it is."""
    save_checkpoint(family, model, family.work / "tokenizer")
    row = accuracies(load(family, "float32"), 50, TRAIN_STYLES, seed=f"step {step}", kinds=KINDS)
    print(f"check {step} " + " ".join(f"{kind} {part:.0%}" for kind, part in row.items()), flush=True, file=sys.stdout)


if __name__ == "__main__":
    main()
