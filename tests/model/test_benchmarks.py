"""The benchmarks run, so that they can be trusted to run where their figures are wanted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoProcessor

from benchmarks import divergence, gpu, gpu_models, layouts
from benchmarks.checkpoints import CHECKPOINTS
from benchmarks.contenders import StockLoop, request_of
from benchmarks.pictures import PICTURES, Drawings
from benchmarks.stock import Stock
from benchmarks.workloads import WORKLOADS
from tests.model.checkpoints import random_checkpoint


@pytest.fixture
def briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the GPU's benchmark measure as little as it can."""
    for name, value in {"ROWS": (1, 2), "STEPS": 4, "PICTURES": (1, 2), "REPEATS": 1, "PROMPT_TOKENS": 32}.items():
        monkeypatch.setattr(gpu, name, value)
    monkeypatch.setattr(gpu, "PREFILL_TOKENS", 256)


@pytest.mark.parametrize("family", ["idefics", "idefics3"])
def test_the_gpu_benchmark_measures_steps_prefills_and_encoding(
    family: str, briefly: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(gpu_models.CARDS, "cpu", gpu_models.Card(1e9, 1e12))
    figures = gpu.measure(gpu_models.Measured.new(gpu_models.TINY[family], "cpu"))
    assert [(step["rows"], step["layout"]) for step in figures["decode_steps"]] == [
        (1, "slots"), (2, "slots"), (1, "blocks"), (2, "blocks"),
    ]  # fmt: skip
    for step in figures["decode_steps"]:
        assert min(step["step_ms"], step["engine_step_ms"], step["engine_step_ms_while_encoding"]) > 0
        assert step["of_bandwidth"] == pytest.approx(step["least_ms"] / step["step_ms"], rel=0.1)
        assert step["host_gap_ms"] is None, "there is no GPU"
    assert set(figures["stock_step_ms"]) == {1, 2}
    assert all(prefill["tokens_per_s"] > 0 for prefill in figures["prefill"])
    frames = 1 if family == "idefics" else figures["encoding"][0]["frames_per_s"] / figures["encoding"][0]["per_s"]
    assert round(frames) == {"idefics": 1, "idefics3": 5}[family]


@torch.inference_mode()
def test_the_operations_of_a_prefill_are_those_that_torch_counts(briefly: None) -> None:
    measured = gpu_models.Measured.new(gpu_models.TINY["idefics3"], "cpu")
    setup = next(gpu.setups(measured))
    decoder = setup.decoder(0)
    setup.prefill(decoder, 2)
    decoder.clear()
    with FlopCounterMode(display=False) as counter:
        setup.prefill(decoder, 2)
    # torch does not count a CPU's attention.
    assert 1 < measured.prefill_flops(2, len(setup.prompt.ids)) / counter.get_total_flops() < 1.25


def test_a_step_reads_the_weights_once_and_each_rows_keys_and_values() -> None:
    measured = gpu_models.Measured.new(gpu_models.TINY["smolvlm"], "cpu")
    none, one, two = (measured.step_bytes(rows, 10) for rows in range(3))
    # 10 tokens, 4 layers, keys and values of hidden size 64, 2 bytes each.
    assert two - one == one - none == 10 * 4 * 2 * 64 * 2
    text = measured.network.model.text_model
    weights = sum(parameter.nbytes for parameter in (*text.layers.parameters(), *text.norm.parameters()))
    assert none == weights + measured.network.lm_head.weight.nbytes


def test_layouts_are_compared_by_the_same_texts() -> None:
    figures = layouts.measure("shipped", ["plain"], jobs=2, rounds=1)
    assert figures["plain"]["slots_to_blocks"] == figures["plain"]["rounds"][0] > 0


def test_a_card_is_known_by_its_name() -> None:
    known = gpu_models.card("NVIDIA H100 PCIe")
    assert known is not None
    assert known.bandwidth < gpu_models.CARDS["H100"].bandwidth
    assert gpu_models.card("cpu") is None


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
