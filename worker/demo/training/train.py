"""Builds the demo checkpoint and all that ships beside it: `python -m worker.demo.training.train`.

Art, tokenizer, two stages of training, checkpoint, pictures and figures. Stopped, it goes on where it was;
`.train/` holds its state. Needs npm, and `pip install resvg_py sentencepiece`.
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, IdeficsForVisionText2Text, logging

from worker.demo.dialogue import KINDS
from worker.demo.training import art
from worker.demo.training.evaluate import CHECKPOINT, DEMO, accuracies, evaluate, load
from worker.demo.training.export import save_checkpoint, save_pictures
from worker.demo.training.learn import Learner
from worker.demo.training.shards import compose_shards
from worker.demo.training.sight import learn_to_see
from worker.demo.training.tokens import train_tokenizer
from worker.demo.world import TRAIN_STYLES

SHARDS = 30
#: On two cores a step takes two seconds.
STEPS = 2200
THREADS = 2


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS, help="of the second stage")
    parser.add_argument("--minutes", type=float, default=math.inf, help="end the second stage after this time at most")
    asked = parser.parse_args()
    os.nice(5)
    torch.set_num_threads(THREADS)
    logging.set_verbosity_error()
    train(asked.steps, asked.minutes * 60)
    passed_over = save_pictures(load(CHECKPOINT, "float32"), DEMO / "pictures")
    print(f"pictures passed over: {passed_over}")
    figures = evaluate(CHECKPOINT, count=500)
    (DEMO / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")


def train(steps: int, seconds: float) -> None:
    """From nothing, or from where it was stopped, to the checkpoint."""
    art.prepare()
    tokenizer_folder = art.WORK / "tokenizer"
    if not tokenizer_folder.exists():
        train_tokenizer(tokenizer_folder)
    compose_shards(SHARDS, art.WORK / "pictures")
    if not (art.WORK / "learner.pt").exists():
        learn_to_see(art.WORK / "pictures", art.WORK / "sight.pt")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    learner = Learner(tokenizer, art.WORK / "sight.pt", art.WORK / "learner.pt", steps, seconds)
    learner.learn(art.WORK / "pictures", lambda model, step: _check(model, step, tokenizer_folder))
    save_checkpoint(learner.average, tokenizer_folder, CHECKPOINT)


def _check(model: IdeficsForVisionText2Text, step: int, tokenizer_folder: Path) -> None:
    """Refresh the checkpoint and log how good it is."""
    save_checkpoint(model, tokenizer_folder, CHECKPOINT)
    row = accuracies(load(CHECKPOINT, "float32"), 50, TRAIN_STYLES, seed=f"step {step}", kinds=KINDS)
    print(f"check {step} " + " ".join(f"{kind} {part:.0%}" for kind, part in row.items()), flush=True, file=sys.stdout)


if __name__ == "__main__":
    main()
