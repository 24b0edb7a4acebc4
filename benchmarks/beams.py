"""Jobs with beams in the continuous batch against stock `generate`.

`python -m benchmarks.beams [alike] [mixed] [beside] [--save beams]`

`alike`: jobs with four beams and one length, which stock `generate` runs as one batch. `mixed`: of different numbers of
beams and lengths. `beside`: the mixed ones together with jobs without beams, which run before them where stock
`generate` runs the beams. Prompts have no pictures. Each figure is the processor time with stock `generate` divided by
that of the continuous batch, on the mid-size checkpoint, in rounds by turns.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import measures
from benchmarks.checkpoints import CHECKPOINTS
from config.settings import Settings
from worker.engine.continuous import ContinuousModel
from worker.engine.interfaces import Model
from worker.engine.row import Row, Sampling
from worker.models.loading import load

ROUNDS = 5
ALIKE = [(4, 24)] * 6
MIXED = [(2, 12), (4, 24), (3, 16), (4, 8), (2, 24), (5, 16)]
PLAIN = [(1, 8 + n % 17) for n in range(16)]


def against(wanted: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Stock `generate`'s time divided by ours. `wanted`: beams and new tokens of each job."""
    with tempfile.TemporaryDirectory() as folder:
        model = load(Settings(model=str(CHECKPOINTS["mid-size"].make(Path(folder))), dtype="float32"))
    assert isinstance(model, ContinuousModel)
    rounds = []
    for number in range(ROUNDS + 1):
        rows = {is_stock: made(model, wanted) for is_stock in (number % 2 == 0, number % 2 == 1)}
        taken = {is_stock: seconds(model, each, is_stock=is_stock) for is_stock, each in rows.items()}
        assert [row.output.result() for row in rows[True]] == [row.output.result() for row in rows[False]]
        rounds.append(taken[True] / taken[False])
    # The first round is warming up.
    return {"ratio": round(statistics.median(rounds[1:]), 2), "rounds": [round(ratio, 2) for ratio in rounds[1:]]}


def made(model: Model, wanted: Sequence[tuple[int, int]]) -> list[Row]:
    """A row for each pair of a number of beams and one of new tokens."""
    prompts = [model.codec.prepare([f"Question {n}: what is it?" + " Say more." * (n % 9)]) for n in range(len(wanted))]
    return [
        Row(prompt, Sampling(tokens, num_beams=beams, eos_ids=model.codec.eos_ids))
        for prompt, (beams, tokens) in zip(prompts, wanted, strict=True)
    ]


def seconds(model: ContinuousModel, rows: Sequence[Row], *, is_stock: bool) -> float:
    """Seconds of processor time that rows take. `is_stock`: those with beams run in stock `generate`, after others."""
    searching = [row for row in rows if row.sampling.num_beams > 1] if is_stock else []
    others = [row for row in rows if row not in searching]
    started = time.process_time()
    for runner, part in ((model, others), (model.stock, searching)):
        if part:
            runner.run(part, lambda: None, lambda running: ())
    return time.process_time() - started


def main() -> None:
    torch.set_num_threads(1)
    workloads = {"alike": ALIKE, "mixed": MIXED, "beside": [*MIXED, *PLAIN]}
    measures.run(__doc__, {name: partial(against, wanted) for name, wanted in workloads.items()})


if __name__ == "__main__":
    main()
