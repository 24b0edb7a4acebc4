"""The benchmarks run, so that they can be trusted to run where their figures are wanted."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoProcessor

from benchmarks import divergence, gpu
from benchmarks.checkpoints import CHECKPOINTS
from benchmarks.contenders import StockLoop, request_of
from benchmarks.pictures import PICTURES, Drawings
from benchmarks.stock import Stock
from benchmarks.workloads import WORKLOADS
from tests.model.checkpoints import random_checkpoint


def test_the_gpu_benchmark_measures_steps_and_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "ROWS", (1, 2))
    monkeypatch.setattr(gpu, "STEPS", 4)
    figures = gpu.measure(gpu.new_model(gpu.tiny(), "cpu"), "cpu")
    assert all(milliseconds > 0 for milliseconds in figures["step_ms"].values())
    assert set(figures["step_ms"]) == set(figures["stock_step_ms"]) == {1, 2}


def test_divergence_is_none_in_float32(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / "checkpoint", use_resampler=True)
    figures = divergence.measure(folder, "float32", 3)
    assert (figures["jobs"], figures["labeled_jobs"]) == (12, 3)
    assert (figures["different_texts"], figures["different_labels"], figures["tokens_alike"]) == (0, 0, 1.0)
    assert figures["largest_difference_of_a_probability"] < 1e-5


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_job_of_a_workload_shows_new_pictures_but_for_what_it_is_about(name: str, tmp_path: Path) -> None:
    book = Drawings(tmp_path)
    jobs = WORKLOADS[name].make(20, book)
    shown = [part["path"] for job in jobs for part in request_of(job)["prompt"] if isinstance(part, dict)]
    assert len(jobs) == 20
    contents = [(tmp_path / file).read_bytes() for file in sorted(set(shown))]
    assert len(set(contents)) == len(contents)
    if name == "16 questions":
        assert len(set(shown)) == 2
    elif name != "few-shot":
        assert len(set(shown)) == len(shown)


def test_a_picture_of_the_split_checkpoint_is_13_frames(tmp_path: Path) -> None:
    chosen = CHECKPOINTS["smolvlm-split"]
    path = Drawings(tmp_path, chosen.picture_size).new().path
    processor = AutoProcessor.from_pretrained(chosen.make(tmp_path))
    assert processor.image_processor([[Image.open(tmp_path / path)]])["pixel_values"].shape[1] == 13


@pytest.mark.parametrize("checkpoint", ["shipped", "smolvlm"])
def test_the_stock_loop_says_the_same_in_batches_of_any_size(checkpoint: str, tmp_path: Path) -> None:
    stock = Stock(str(CHECKPOINTS[checkpoint].make(tmp_path)), str(tmp_path), threads=1)
    jobs = WORKLOADS["mixed length"].make(6, Drawings(tmp_path))
    assert StockLoop(stock, 1).run(jobs).texts == StockLoop(stock, 4).run(jobs).texts


@pytest.mark.parametrize("kind", PICTURES)
def test_pictures_of_a_kind_all_differ_and_are_the_same_in_each_run(kind: str, tmp_path: Path) -> None:
    def contents(folder: Path) -> list[bytes]:
        folder.mkdir()
        book = PICTURES[kind](folder, None)
        return [(folder / book.new().path).read_bytes() for _ in range(3)]

    first = contents(tmp_path / "first")
    assert len(set(first)) == 3
    assert contents(tmp_path / "second") == first


def test_ordinary_pictures_are_png_and_jpeg_of_photographs_sizes(tmp_path: Path) -> None:
    book = PICTURES["ordinary"](tmp_path, None)
    pictures = [Image.open(tmp_path / book.new().path) for _ in range(6)]
    assert [picture.format for picture in pictures] == ["PNG", "JPEG"] * 3
    assert all(224 <= edge <= 800 for picture in pictures for edge in picture.size)
