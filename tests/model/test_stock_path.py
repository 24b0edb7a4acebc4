"""The stock path encodes a picture once and prefills prompts in bounded chunks, and answers as stock `generate`."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoProcessor

from config.settings import Settings
from tasks import Job
from tests.model.checkpoints import TEMPLATE, later_checkpoint
from tests.model.conftest import IN_SLOTS, Served, noise
from tests.model.jobs import mixed_jobs, prepared, row_of
from worker.engine.row import Row, Sampling
from worker.engine.stock import StockModel
from worker.models.loading import load

#: Tokens prefilled at a time.
CHUNK = 50
IMAGES = {f"{n}.png": noise(n) for n in range(8)}


def in_chunks(served: Served) -> StockModel:
    """The same checkpoint on the stock path, with small chunks."""
    stock = served.stock
    return StockModel(stock.adapter, stock.info, stock.max_tokens, stock.rules, CHUNK)


def run(model: StockModel, rows: Sequence[Row], heartbeat: Callable[[], None] = lambda: None) -> None:
    model.run(rows, heartbeat, lambda running: ())


def rows_of(served: Served, jobs: Sequence[Job]) -> list[Row]:
    return [row_of(served.model, job, served.parts(job)) for job in jobs]


def assert_answers_are_stocks(served: Served, jobs: Sequence[Job], rows: Sequence[Row]) -> None:
    for job, row in zip(jobs, rows, strict=True):
        assert list(row.output.result().ids) == served.stock_ids(job, served.parts(job)), job


@pytest.mark.parametrize("served", IN_SLOTS, indirect=True)
@pytest.mark.parametrize("beams", [1, 3])
def test_a_prompt_is_prefilled_once_in_bounded_chunks_with_heartbeats(
    served: Served, beams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"num_beams": beams, "max_new_tokens": 6}
    jobs = [job.model_copy(update=changes) for job in mixed_jobs(6, sorted(served.images), seed=11)]
    rows, model = rows_of(served, jobs), in_chunks(served)
    layer = model.adapter.model.get_decoder().layers[0]
    stock_forward = layer.forward
    #: Tokens of each forward pass; 0 for a heartbeat.
    events: list[int] = []

    def forward(states: Any, *arguments: Any, **named: Any) -> Any:
        events.append(states.shape[0] * states.shape[1])
        return stock_forward(states, *arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr(layer, "forward", forward)
        run(model, rows, lambda: events.append(0))
    assert_answers_are_stocks(served, jobs, rows)
    prompts = len(rows) * max(len(row.tokens.ids) for row in rows)
    assert prompts > 3 * CHUNK > 3 * max(events)
    assert sum(events) <= prompts + beams * len(rows) * 6
    assert all(0 in pair for pair in itertools.pairwise(events))


@pytest.mark.parametrize("served", IN_SLOTS, indirect=True)
@pytest.mark.parametrize("beams", [1, 2])
def test_a_picture_is_encoded_once_in_chunks_with_heartbeats(
    served: Served, beams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = [noise(2_000 + 100 * beams + n) for n in range(20)]
    sampling = Sampling(2, num_beams=beams, eos_ids=served.model.codec.eos_ids)
    rows = [Row(prepared(served.model, [image, "and", new[0], "say"]), sampling) for image in new]
    before = served.stock.metrics()["feature_misses"]
    beats: list[int] = []
    run(served.stock, rows, lambda: beats.append(served.stock.metrics()["feature_misses"] - before))
    # The first ones came while pictures were encoded.
    assert beats[0] == 0
    assert beats[-1] == 20
    # `generate` does not encode them again.
    monkeypatch.setattr(served.stock.adapter.model.model.vision_model, "forward", None)
    run(served.stock, [Row(row.tokens, sampling) for row in rows])
    assert served.stock.metrics()["feature_misses"] - before == 20


@pytest.fixture
def longrope(tmp_path: Path) -> Served:
    """A checkpoint whose rotary embedding changes if the longest row of a batch has more than 100 tokens."""
    folder = later_checkpoint(tmp_path / "checkpoint", "idefics3", TEMPLATE)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["rope_parameters"] = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "original_max_position_embeddings": 100,
        "short_factor": [1.0] * 8,
        "long_factor": [8.0] * 8,
    }
    (folder / "config.json").write_text(json.dumps(config))
    settings = Settings(model=str(folder), dtype="float32")
    return Served(settings, load(settings), AutoProcessor.from_pretrained(folder), IMAGES)  # type: ignore[arg-type]


@pytest.mark.parametrize("beams", [1, 2])
def test_a_row_that_would_change_the_others_rotary_embedding_runs_alone(longrope: Served, beams: int) -> None:
    assert isinstance(longrope.model, StockModel)
    jobs = [job.model_copy(update={"num_beams": beams, "max_new_tokens": 20}) for job in mixed_jobs(16, sorted(IMAGES))]
    rows = rows_of(longrope, jobs)
    # Some begin with more tokens, and some get there.
    assert {len(row.tokens.ids) // 80 for row in rows} >= {0, 1, 2}
    run(longrope.model, rows)
    assert_answers_are_stocks(longrope, jobs, rows)
