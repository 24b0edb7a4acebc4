"""How often the other jobs in a batch change an answer, by precision: each job runs alone, then all run together.

Sums in a batch are computed in another order than those of a single row, so the last bits of a token's score differ. In
float32 that changes an answer only if the two best tokens are almost equal; with fewer bits it happens more often.
Both answers are right in that precision.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from benchmarks.checkpoints import CHECKPOINTS
from benchmarks.measures import RESULTS
from benchmarks.pictures import Drawings
from benchmarks.workloads import WORKLOADS
from config.settings import Settings
from tasks import Job, Result
from worker.engine.engine import Engine
from worker.engine.interfaces import Model
from worker.engine.scheduler import Limits
from worker.jobs.runs import JobContext
from worker.jobs.service import Service
from worker.models.loading import load

#: By name, the settings that choose it.
PRECISIONS: dict[str, dict[str, str]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "8bit": {"dtype": "float32", "quantization": "8bit"},
    "4bit": {"dtype": "float32", "quantization": "4bit"},
}
GENERATED = ("plain", "few-shot", "mixed length", "16 questions")
LABELED = "10 labels"
#: Jobs that run together.
COMPANY = 32


def answers(model: Model, settings: Settings, jobs: Sequence[Job], rows: int) -> list[Result]:
    """The jobs' answers, with at most this number of rows at once."""
    engine = Engine(model, Limits(rows, settings.max_batch_tokens))
    engine.start()
    service = Service(settings, model.info, model.codec, engine, rules=model.rules)
    try:
        with ThreadPoolExecutor(rows) as threads:
            return list(threads.map(lambda pair: service.run(pair[1], JobContext(str(pair[0]))), enumerate(jobs)))
    finally:
        engine.stop()


def tokens_before_divergence(model: Model, alone: Result, together: Result) -> tuple[int, int]:
    """How many of the tokens of one answer the other one begins with, and how many it has."""
    codec = model.codec
    first, second = (codec.prepare([result.text]).ids for result in (alone, together))
    same = next((n for n, pair in enumerate(zip_longest(first, second)) if pair[0] != pair[1]), len(first))
    return same, len(first)


def measure(folder: Path, precision: str, count: int) -> dict[str, Any]:
    """Rates over this number of jobs of each workload."""
    # It says for each product that it converts its inputs.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="idefics-divergence-") as pictures:
        settings = Settings(model=str(folder), image_root=Path(pictures), **PRECISIONS[precision])  # type: ignore[arg-type]
        book = Drawings(Path(pictures))
        generated = [job for name in GENERATED for job in WORKLOADS[name].make(count, book)]
        jobs = [*generated, *WORKLOADS[LABELED].make(count, book)]
        # Each way with a model of its own, whose caches know nothing yet.
        model = load(settings)
        both = list(
            zip(answers(model, settings, jobs, 1), answers(load(settings), settings, jobs, COMPANY), strict=True)
        )
        pairs, labeled = both[: len(generated)], both[len(generated) :]
        different = [pair for pair in pairs if pair[0].text != pair[1].text]
        agreed = [tokens_before_divergence(model, *pair) for pair in pairs]
        return {
            "jobs": len(pairs),
            "different_texts": len(different),
            "rate": round(len(different) / len(pairs), 4),
            "tokens_alike": round(sum(same for same, _ in agreed) / max(1, sum(most for _, most in agreed)), 4),
            "labeled_jobs": len(labeled),
            "different_labels": sum(alone.label != together.label for alone, together in labeled),
            "largest_difference_of_a_probability": max(_difference(*pair) for pair in labeled),
        }


def _difference(alone: Result, together: Result) -> float:
    first, second = alone.scores or {}, together.scores or {}
    return max(abs(first[label] - second[label]) for label in first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", nargs="?", default="shipped", help=f"{', '.join(CHECKPOINTS)}, or a folder")
    parser.add_argument("--precisions", nargs="*", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--jobs", type=int, default=64, help="of each workload")
    parser.add_argument("--save", help="the name of the file in results/, where other checkpoints' figures stay")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="idefics-checkpoint-") as root:
        known_one = CHECKPOINTS.get(asked.checkpoint)
        folder = known_one.make(Path(root)) if known_one else Path(asked.checkpoint)
        figures = {name: measure(folder, name, asked.jobs) for name in asked.precisions}
    print(json.dumps({asked.checkpoint: figures}, indent=2))
    if asked.save:
        path = RESULTS / f"{asked.save}.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(known | {asked.checkpoint: figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
