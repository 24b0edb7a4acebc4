"""Checkpoints load from safetensors alone, in the precision asked for, and a broken one is refused with its cure."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from config.settings import Settings
from tests.model.checkpoints import random_checkpoint
from worker.engine.continuous import ContinuousModel
from worker.engine.engine import Engine
from worker.engine.scheduler import Limits
from worker.models.loading import DEMO, NOT_QUANTIZED, SetupFailed, checkpoint_folder, load
from worker.service import Service


def _checked(settings: Settings) -> ContinuousModel:
    model = load(settings)
    engine = Engine(model, Limits(8, 10_000))
    engine.start()
    try:
        Service(settings, model, engine).check_golden(checkpoint_folder(settings))
    finally:
        engine.stop()
    assert isinstance(model, ContinuousModel)
    return model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_bundled_checkpoint_passes_its_golden_check(dtype: str) -> None:
    model = _checked(Settings(model="demo", dtype=dtype))
    assert model.info.dtype == dtype
    assert model.info.family == "idefics"


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_the_bundled_checkpoint_answers_quantized(quantization: str) -> None:
    model = _checked(Settings(model="demo", quantization=quantization))
    assert model.info.quantization == quantization
    kinds = {name: type(module).__name__ for name, module in model._adapter.model.named_modules()}
    quantized = [name for name, kind in kinds.items() if kind in ("Linear4bit", "Linear8bitLt")]
    assert quantized
    assert not [name for name in quantized if any(name.startswith(skipped) for skipped in NOT_QUANTIZED)]


def test_a_folder_without_golden_pictures_is_checked_for_any_answer(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / "checkpoint", use_resampler=True)
    _checked(Settings(model=str(folder)))


def test_a_model_that_answers_its_golden_picture_wrongly_does_not_serve(tmp_path: Path) -> None:
    folder = shutil.copytree(DEMO, tmp_path / "checkpoint")
    golden = folder / "golden.json"
    golden.write_text(golden.read_text().replace('"text": "', '"text": "not '))
    with pytest.raises(RuntimeError, match="golden check failed"):
        _checked(Settings(model=str(folder)))


def test_a_model_that_computes_no_numbers_does_not_serve(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / "checkpoint", use_resampler=True)
    settings = Settings(model=str(folder))
    model = load(settings)
    assert isinstance(model, ContinuousModel)
    with torch.no_grad():
        model._adapter.model.lm_head.weight.fill_(float("nan"))
    engine = Engine(model, Limits(8, 10_000))
    engine.start()
    with pytest.raises(RuntimeError):
        Service(settings, model, engine).check_golden(folder)
    engine.stop()


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(DEMO, tmp_path / "checkpoint")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(SetupFailed, match="safetensors"):
        load(Settings(model=str(folder)))


def test_another_family_is_named_in_the_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(SetupFailed, match="gpt2"):
        load(Settings(model=str(tmp_path)))


def test_a_missing_model_tells_what_the_setting_takes(tmp_path: Path) -> None:
    with pytest.raises(SetupFailed, match="IDEFICS_MODEL"):
        load(Settings(model=str(tmp_path)))
