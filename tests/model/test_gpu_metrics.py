"""Metrics of GPUs, with torch's answers made up: no GPU is here."""

from __future__ import annotations

import pytest
import torch

from worker.engine import gpu_metrics
from worker.engine.gpu_metrics import watch_gpus
from worker.observability.metrics import WORKER


def no_nvml(gpu: int) -> int:
    raise ModuleNotFoundError("pynvml does not seem to be installed")


def value(name: str, **labels: str) -> float | None:
    return WORKER.get_sample_value(f"idefics_gpu_{name}", labels)


def test_each_gpu_has_its_memory_and_its_utilization_if_it_can_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (30 + gpu, 100))
    monkeypatch.setattr(torch.cuda, "utilization", lambda gpu: 50 if gpu == 0 else no_nvml(gpu))
    watch_gpus()
    try:
        assert value("memory_bytes", gpu="0", kind="used") == 70
        assert value("memory_bytes", gpu="1", kind="used") == 69
        assert value("memory_bytes", gpu="1", kind="total") == 100
        assert value("utilization_ratio", gpu="0") == 0.5
        assert value("utilization_ratio", gpu="1") is None
    finally:
        for each in (gpu_metrics.GPU_MEMORY, gpu_metrics.GPU_UTILIZATION):
            each.clear()


def test_a_machine_without_a_gpu_has_none() -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    watch_gpus()
    assert value("memory_bytes", gpu="0", kind="total") is None
