"""`python -m worker check` tells what a model needs, and why a worker could not serve it, without Redis."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.model.hub import HUB
from worker import check
from worker.__main__ import main
from worker.demo.stack import CHECKOUT


def test_the_command_checks_the_bundled_checkpoint() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("IDEFICS_")}
    command = [sys.executable, "-m", "worker", "check", "demo", "--no-speed"]
    ended = subprocess.run(
        command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    facts = dict(re.split(r"\s+", line, maxsplit=1) for line in ended.stdout.splitlines())
    assert " ".join(facts) == "Loaded Model Family Engine Device Weights K/V Picture Prompt Answer"
    assert facts["Family"] == "idefics, float32"
    assert facts["Engine"].startswith("continuous batching, keys and values in slots")
    assert facts["K/V"] == "6.14 kB a token, 403 MB for IDEFICS_MAX_BATCH_TOKENS=65536"
    assert facts["Picture"] == "3 tokens wide, 3 tokens square"
    assert facts["Prompt"].startswith("at most 2,048 tokens")


def test_it_checks_a_later_family_and_measures_its_speed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = HUB["SmolVLM2-500M-Video-Instruct"].save(tmp_path / "checkpoint")
    monkeypatch.setattr(check, "MEASURED_S", 1.0)
    assert main(["check", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "Family   smolvlm, float32\n" in said
    assert "Picture  863 tokens wide, 1128 tokens square\n" in said
    assert "Prompt   at most 8,192 tokens" in said
    assert re.search(r"^Speed    \d+\.\d\d images and \d+\.\d new tokens a second", said, re.MULTILINE)


def test_blocks_are_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IDEFICS_KV_LAYOUT", "blocks")
    monkeypatch.setenv("IDEFICS_KV_BYTES", "100000000")
    assert main(["check", "demo", "--no-speed"]) == 0
    assert "K/V      6.14 kB a token, 1,017 blocks of 16 tokens, 100 MB\n" in capsys.readouterr().out


def test_a_batch_that_does_not_fit_is_told_with_its_cure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IDEFICS_MAX_BATCH_TOKENS", str(10**12))
    assert main(["check", "demo", "--no-speed"]) == 0
    assert "set IDEFICS_MAX_BATCH_TOKENS=" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("IDEFICS_MODEL", "/no/such/folder", "IDEFICS_MODEL takes a hub id or a folder"),
        ("IDEFICS_MAX_PROMPT_TOKENS", "1", "raise IDEFICS_MAX_PROMPT_TOKENS"),
        ("IDEFICS_MAX_PROMPTS", "1", "Unknown settings: IDEFICS_MAX_PROMPTS"),
        ("IDEFICS_DTYPE", "int3", "dtype"),
    ],
)
def test_what_would_keep_a_worker_from_serving_is_told_and_the_command_fails(
    name: str, value: str, told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    assert main(["check", "--no-speed"]) == 1
    assert told in capsys.readouterr().err
