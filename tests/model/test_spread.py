"""A checkpoint that does not fit on one device runs by the stock path, and gives the same answers.

The second device is simulated: half of the weights have no room in memory, and are read from the disk at each use. To
transformers' hooks that is the same as a second GPU.
"""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from transformers.integrations import accelerate

from config.settings import Settings
from tests.model.checkpoints import later_checkpoint, random_checkpoint
from tests.model.conftest import noise
from tests.model.jobs import mixed_jobs, parts_of, prepared, row_of
from worker.__main__ import main
from worker.engine.encoder_cache import EncoderThread
from worker.engine.interfaces import Model
from worker.engine.row import Output, Row, Sampling
from worker.engine.stock import StockModel
from worker.models.loading import load
from worker.models.report import devices_of, report

IMAGES = {f"{n}.png": noise(n) for n in range(4)}


@pytest.fixture(params=["idefics", "idefics2", "idefics3", "smolvlm"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "idefics":
        return random_checkpoint(tmp_path / "checkpoint", use_resampler=True)
    return later_checkpoint(tmp_path / "checkpoint", request.param, None)


def has_room_for_half(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the memory hold half of a checkpoint's weights."""
    room = (folder / "model.safetensors").stat().st_size // 2
    monkeypatch.setattr(accelerate, "get_max_memory", lambda *_: {"cpu": room})


def outputs(model: Model) -> list[Output]:
    """Those of jobs of every form, and of one with labels."""
    rows = [row_of(model, job, parts_of(job, IMAGES)) for job in mixed_jobs(8, sorted(IMAGES))]
    labeled = Row(prepared(model, [IMAGES["0.png"], "This is"]), Sampling(1), ((5, 6, 2), (7, 2)))
    model.run(rows, lambda: None, lambda running: ())
    model.run([labeled], lambda: None, lambda running: ())
    return [row.output.result() for row in (*rows, labeled)]


def test_it_runs_by_the_stock_path_with_the_same_answers(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings(model=str(folder), dtype="float32")
    expected = outputs(load(settings))
    has_room_for_half(folder, monkeypatch)
    with caplog.at_level(logging.WARNING):
        model = load(settings)
    assert isinstance(model, StockModel)
    assert len(devices_of(model.adapter.model)) == 2
    assert "is spread over several devices" in caplog.text
    found = outputs(model)
    assert [output.ids for output in found] == [output.ids for output in expected]
    probabilities = torch.tensor([output.probabilities for output in (found[-1], expected[-1])])
    torch.testing.assert_close(probabilities[0], probabilities[1])


def test_the_report_and_the_check_say_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    has_room_for_half(folder, monkeypatch)
    assert main(["check", str(folder), "--no-speed"]) == 0
    said = capsys.readouterr().out
    assert "no prefix cache, since the weights are on several devices" in said
    assert "weights offloaded to memory or disk" in said
    assert "Answer   about a picture" in said


def test_a_whole_checkpoint_does_not_say_so(folder: Path) -> None:
    settings = Settings(model=str(folder), dtype="float32")
    assert "several devices" not in "".join(report(load(settings), settings, 100))


def test_no_second_thread_encodes_with_weights_that_are_copied_at_each_use(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []
    monkeypatch.setattr(EncoderThread, "help", lambda _, within_s: bool(asked.append(within_s)))
    settings = Settings(model=str(folder), dtype="float32")
    load(settings).help(0.1)
    assert asked == [0.1]
    has_room_for_half(folder, monkeypatch)
    load(settings).help(0.2)
    assert asked == [0.1]
