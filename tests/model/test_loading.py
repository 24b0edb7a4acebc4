"""Checkpoints load from safetensors alone, in the precision asked for, and a broken one is refused with its cure."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import IdeficsForVisionText2Text
from transformers.integrations import accelerate

from config.settings import Settings
from tests.model.checkpoints import random_checkpoint
from worker.engine.continuous import ContinuousModel
from worker.engine.engine import Engine
from worker.engine.scheduler import Limits
from worker.jobs.service import Service
from worker.models import BUNDLED, DEMO, checkpoint_folder, loading
from worker.models.loading import NOT_QUANTIZED, SetupFailed, load


def _checked(settings: Settings) -> ContinuousModel:
    model = load(settings)
    engine = Engine(model, Limits(8, 10_000))
    engine.start()
    try:
        Service(settings, model.info, model.codec, engine).check_golden(checkpoint_folder(settings))
    finally:
        engine.stop()
    assert isinstance(model, ContinuousModel)
    return model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "family"), [("demo", "idefics"), ("demo-smolvlm", "idefics3")])
def test_a_bundled_checkpoint_passes_its_golden_check(name: str, family: str, dtype: str) -> None:
    model = _checked(Settings(model=name, dtype=dtype))
    assert model.info.dtype == dtype
    assert model.info.family == family


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
@pytest.mark.parametrize("name", BUNDLED)
def test_a_bundled_checkpoint_answers_quantized(name: str, quantization: str) -> None:
    model = _checked(Settings(model=name, quantization=quantization))
    assert model.info.quantization == quantization
    kinds = {name: type(module).__name__ for name, module in model.stock.adapter.model.named_modules()}
    quantized = [name for name, kind in kinds.items() if kind in ("Linear4bit", "Linear8bitLt")]
    assert quantized
    assert not [name for name in quantized if any(name.startswith(skipped) for skipped in NOT_QUANTIZED)]


def test_a_folder_without_golden_pictures_is_checked_for_any_answer(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / "checkpoint", use_resampler=True)
    _checked(Settings(model=str(folder)))


@pytest.mark.parametrize(("seed", "dtype"), [(0, "float32"), (1, "bfloat16"), (2, "float32")])
def test_a_model_with_a_twentieth_of_its_weights_negated_does_not_serve(tmp_path: Path, dtype: str, seed: int) -> None:
    folder = shutil.copytree(DEMO, tmp_path / "checkpoint")
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    for name, weight in weights.items():
        signs = torch.rand(weight.shape, generator=generator).lt(0.05)
        weights[name] = torch.where(signs, -weight, weight)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SetupFailed, match="golden check failed"):
        _checked(Settings(model=str(folder), dtype=dtype))  # type: ignore[arg-type]


def test_a_model_that_answers_its_golden_picture_wrongly_does_not_serve(tmp_path: Path) -> None:
    folder = shutil.copytree(DEMO, tmp_path / "checkpoint")
    golden = folder / "golden.json"
    golden.write_text(golden.read_text().replace('"text": "', '"text": "not '))
    with pytest.raises(RuntimeError, match=r"golden check failed: .*; 9 of 13 answers are wrong"):
        _checked(Settings(model=str(folder)))


def test_a_model_that_computes_no_numbers_does_not_serve(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / "checkpoint", use_resampler=True)
    settings = Settings(model=str(folder))
    model = load(settings)
    assert isinstance(model, ContinuousModel)
    with torch.no_grad():
        model.stock.adapter.model.lm_head.weight.fill_(float("nan"))
    engine = Engine(model, Limits(8, 10_000))
    engine.start()
    with pytest.raises(RuntimeError, match="computes no answer"):
        Service(settings, model.info, model.codec, engine).check_golden(folder)
    engine.stop()


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(DEMO, tmp_path / "checkpoint")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(SetupFailed, match="safetensors"):
        load(Settings(model=str(folder)))


def test_another_family_is_named_in_the_error_with_those_that_are_served(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(SetupFailed, match=r"gpt2.*idefics, idefics2, idefics3"):
        load(Settings(model=str(tmp_path)))


def test_a_missing_model_tells_what_the_setting_takes(tmp_path: Path) -> None:
    with pytest.raises(SetupFailed, match="IDEFICS_MODEL"):
        load(Settings(model=str(tmp_path)))


def test_a_checkpoints_own_modules_are_not_run(tmp_path: Path) -> None:
    folder = shutil.copytree(DEMO, tmp_path / "checkpoint")
    trace = tmp_path / "trace"
    (folder / "evil.py").write_text(f"open({str(trace)!r}, 'w').close()\nclass Evil: pass\n")
    for file, kinds in {
        "config.json": ("AutoConfig", "AutoModel", "AutoModelForImageTextToText"),
        "processor_config.json": ("AutoProcessor",),
        "preprocessor_config.json": ("AutoImageProcessor",),
    }.items():
        written = json.loads((folder / file).read_text())
        written["auto_map"] = dict.fromkeys(kinds, "evil.Evil")
        (folder / file).write_text(json.dumps(written))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    try:
        load(Settings(model=str(folder)))
    except SetupFailed as refused:
        assert "remote" in str(refused) or "trust" in str(refused)  # noqa: PT017 - either end is a good one
    assert not trace.exists()


def test_a_family_that_comes_with_its_own_code_is_refused(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    (tmp_path / "evil.py").write_text(f"open({str(trace)!r}, 'w').close()\nclass Evil: pass\n")
    (tmp_path / "config.json").write_text('{"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}')
    with pytest.raises(SetupFailed):
        load(Settings(model=str(tmp_path)))
    assert not trace.exists()


def _changed(folder: Path, file: str, **changes: Any) -> None:
    content = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    (folder / file).write_text(json.dumps({**content, **changes}))


@pytest.fixture
def demo_copy(tmp_path: Path) -> Path:
    return shutil.copytree(DEMO, tmp_path / "checkpoint")


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("config.json", {"attn_implementation": "someone/kernel"}),
        ("config.json", {"_attn_implementation": "someone/kernel"}),
        ("config.json", {"_attn_implementation_internal": "someone/kernel"}),
        ("config.json", {"attn_implementation": {"vision_config": "someone/kernel@v1"}}),
        ("config.json", {"vision_config": {"attn_implementation": "flash_attention_2"}}),
        ("config.json", {"vision_config": [["attn_implementation", "someone/kernel"]]}),
        ("config.json", {"experts_implementation": "someone/kernel"}),
        ("config.json", {"attribute_map": {"note": "_attn_implementation"}, "note": "someone/kernel"}),
        ("config.json", {"transformers_weights": "../other.safetensors"}),
        ("config.json", {"quantization_config": {"quant_method": "gptq", "bits": 4}}),
        ("config.json", {"quantization_config": {"quant_method": "mxfp4"}}),
        ("config.json", {"quantization_config": {"bits": 4}}),
        ("config.json", {"quantization_config": "gptq"}),
        ("config.json", {"text_config": {"model_type": "timm_backbone"}}),
        ("config.json", {"backbone": "resnet18", "use_pretrained_backbone": True}),
        ("config.json", {"dtype": "load"}),
        ("config.json", {"torch_dtype": ["float16"]}),
        ("config.json", {"fusion_config": {"patch_embeddings": True}}),
        ("config.json", {"processor_class": "WhisperProcessor"}),
        ("config.json", {"tokenizer_class": "TapasTokenizer"}),
        ("generation_config.json", {"cache_implementation": "quantized"}),
        ("generation_config.json", {"custom_generate": "someone/generate"}),
        ("processor_config.json", {"processor_class": "WhisperProcessor"}),
        ("processor_config.json", {"image_processor": {"image_processor_type": "TimmWrapperImageProcessor"}}),
        ("processor_config.json", {"audio_tokenizer": {"audio_tokenizer_name_or_path": "someone/model"}}),
        ("preprocessor_config.json", {"image_processor_type": "ViTImageProcessor"}),
        ("tokenizer_config.json", {"tokenizer_class": "MistralCommonBackend"}),
        ("tokenizer_config.json", {"fast_tokenizer_files": ["tokenizer.../../x.json"]}),
        ("tokenizer_config.json", {"gguf_file": "../x.gguf"}),
        ("audio_tokenizer_config.json", {"audio_tokenizer_name_or_path": "someone/model"}),
        ("adapter_config.json", {"base_model_name_or_path": "someone/model"}),
        ("model.safetensors.index.json", {"weight_map": {"lm_head.weight": "../x.safetensors"}, "metadata": {}}),
        ("model.safetensors.index.json", {"weight_map": {"lm_head.weight": "x.bin"}, "metadata": {}}),
        ("shard-00001-model-00001-of-00001.safetensors", {}),
    ],
)
def test_what_would_fetch_import_or_name_other_files_is_refused_by_name(
    demo_copy: Path, file: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # What transformers would make of it is not to be tried here.
    monkeypatch.setattr(loading.AutoConfig, "from_pretrained", lambda *_, **__: pytest.fail("read by transformers"))
    _changed(demo_copy, file, **changes)
    with pytest.raises(SetupFailed, match=r"^The checkpoint") as refused:
        load(Settings(model=str(demo_copy)))
    assert "someone" not in str(refused.value)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", "{"),
        ("config.json", "[" * 100_000),
        ("config.json", "[]"),
        ("config.json", '{"model_type": ["idefics"]}'),
        ("config.json", '{"model_type": "idefics", "hidden_size": "large"}'),
        ("config.json", '{"model_type": "idefics", "hidden_size": 7}'),
        ("config.json", '{"model_type": "idefics", "vision_config": {"num_attention_heads": 0}}'),
        ("config.json", '{"model_type": "idefics", "hidden_act": "none such"}'),
        ("config.json", '{"model_type": "idefics", "vocab_size": -5}'),
        ("generation_config.json", "{"),
        ("generation_config.json", '{"eos_token_id": {"a": 1}}'),
        ("preprocessor_config.json", "null"),
        ("processor_config.json", '{"processor_class": "IdeficsProcessor", "image_processor": 7}'),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "\0" * 50),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": 7}}'),
        ("model.safetensors", ""),
        ("model.safetensors", "\xff" * 100),
        ("model.safetensors.index.json", '{"weight_map": 7}'),
    ],
)
def test_every_broken_file_ends_in_setup_failed(demo_copy: Path, file: str, content: str) -> None:
    if file.endswith("index.json"):
        (demo_copy / "model.safetensors").unlink()
    (demo_copy / file).write_text(content)
    with pytest.raises(SetupFailed):
        _checked(Settings(model=str(demo_copy)))


class Panic(BaseException):
    """As Rust's are, in Python."""


def test_weights_that_do_not_fit_are_told_with_their_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(IdeficsForVisionText2Text, "from_pretrained", fail)
    with pytest.raises(SetupFailed, match="do not fit on the device: set IDEFICS_QUANTIZATION"):
        load(Settings(model="demo"))


@pytest.mark.parametrize("error", [MemoryError(), KeyError("x"), RuntimeError("x"), Panic("x"), AssertionError()])
def test_no_error_while_loading_is_another_than_setup_failed(error: BaseException, monkeypatch: Any) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(loading.AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(SetupFailed, match="Cannot load demo"):
        load(Settings(model="demo"))


@pytest.mark.parametrize(
    "changes",
    [
        {"image": "../secret.png"},
        {"image": "{secret}"},
        {"image": "link.png"},
        {"image": "folder/golden.png"},
        {"image": "none.png"},
        {"image": "config.json"},
        {"image": ["golden.png"]},
        {"image": "golden\0.png"},
        {"task": "idefics.none"},
        {"task": ["idefics.caption"]},
        {"arguments": {"prompt": "<image>"}},
        {"arguments": {"max_new_tokens": 10**6}},
        {"arguments": [1]},
        {"text": None},
    ],
)
def test_a_golden_file_names_files_beside_itself_and_nothing_else(demo_copy: Path, changes: dict[str, Any]) -> None:
    secret = demo_copy.parent / "secret.png"
    shutil.copy(DEMO / "golden.png", secret)
    (demo_copy / "link.png").symlink_to(secret)
    (demo_copy / "folder").mkdir()
    shutil.copy(DEMO / "golden.png", demo_copy / "folder")
    if changes.get("image") == "{secret}":
        changes = {"image": str(secret)}
    _changed(demo_copy, "golden.json", **changes)
    with pytest.raises(SetupFailed):
        _checked(Settings(model=str(demo_copy)))


@pytest.mark.parametrize("content", ["", "[]", "[" * 100_000, "7", '{"image": "golden.png"}'])
def test_a_broken_golden_file_is_setup_failed(demo_copy: Path, content: str) -> None:
    (demo_copy / "golden.json").write_text(content)
    with pytest.raises(SetupFailed, match=r"golden\.json"):
        _checked(Settings(model=str(demo_copy)))


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache with the bundled checkpoint as `some/model`, whose main branch is COMMIT."""
    repository = tmp_path / "models--some--model"
    shutil.copytree(DEMO, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    # As worker/model_process.py does by the environment, before the hub's library is imported.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def test_offline_a_pinned_model_comes_from_the_cache(hub_cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = load(Settings(model="some/model", model_revision=COMMIT, offline=True))
    assert model.info.revision == COMMIT
    assert "not pinned" not in caplog.text


def test_an_unpinned_model_is_named_with_the_commit_that_pins_it(
    hub_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load(Settings(model="some/model", model_revision="main", offline=True))
    assert model.info.revision == COMMIT
    assert f"IDEFICS_MODEL_REVISION, now {COMMIT}" in caplog.text


def test_a_repository_without_safetensors_is_refused_and_no_bots_pull_request_is_taken(
    hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers.modeling_utils, "auto_conversion", lambda *_, **__: pytest.fail("was taken"))
    # As online, where transformers would ask the bot.
    monkeypatch.setattr(transformers.modeling_utils, "is_offline_mode", lambda: False)
    monkeypatch.delenv("DISABLE_SAFETENSORS_CONVERSION", raising=False)
    (hub_cache / "models--some--model" / "snapshots" / COMMIT / "model.safetensors").unlink()
    with pytest.raises(SetupFailed, match=r"neither model\.safetensors nor .* IDEFICS_MODEL_REVISION"):
        load(Settings(model="some/model", model_revision="main", offline=True))
    monkeypatch.setattr(loading, "require_safetensors", lambda *_, **__: None)
    with pytest.raises(SetupFailed, match="Cannot load"):
        load(Settings(model="some/model", model_revision="main", offline=True))


@pytest.mark.parametrize("named", [{"model": "some/other"}, {"model": "some/model", "model_revision": "f" * 40}])
def test_offline_what_is_not_in_the_cache_is_refused_at_once(hub_cache: Path, named: dict[str, str]) -> None:
    started = time.monotonic()
    with pytest.raises(SetupFailed, match="IDEFICS_OFFLINE"):
        load(Settings(offline=True, **named))
    assert time.monotonic() - started < 5


def test_a_model_that_fits_on_the_first_gpu_is_not_spread_over_all(monkeypatch: pytest.MonkeyPatch) -> None:
    room = {0: 10**9, 1: 10**9, "cpu": 10**9}
    monkeypatch.setattr(accelerate, "get_max_memory", lambda *_: dict(room))
    model, chosen = IdeficsForVisionText2Text.from_pretrained(DEMO), loading.device_map_of(Settings())
    assert chosen != "auto", "which spreads it over all"

    def placed() -> set[Any]:
        return set(accelerate._get_device_map(model, chosen, None, None).values())

    assert placed() == {0}
    room[0] = 4 * 10**6
    assert placed() == {0, 1}
    assert loading.device_map_of(Settings(device_map="cuda:1")) == "cuda:1"
