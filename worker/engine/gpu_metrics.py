"""Metrics of the GPUs that this process uses."""

from __future__ import annotations

import functools
import logging

import torch

from worker.observability.metrics import GPU_MEMORY, GPU_UTILIZATION

logger = logging.getLogger(__name__)


def watch_gpus() -> None:
    """Read the metrics of each visible GPU whenever they are collected. Without a GPU there are none."""
    for gpu in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        for kind in ("used", "total"):
            GPU_MEMORY.labels(str(gpu), kind).set_function(functools.partial(_memory, gpu, kind))
        try:
            torch.cuda.utilization(gpu)
        except Exception as error:
            logger.warning("The utilization of GPU %d cannot be measured: %s", gpu, error)
        else:
            GPU_UTILIZATION.labels(str(gpu)).set_function(functools.partial(_utilization, gpu))


def _memory(gpu: int, kind: str) -> int:
    """Bytes; those in use by other processes count, too."""
    free, total = torch.cuda.mem_get_info(gpu)
    return total if kind == "total" else total - free


def _utilization(gpu: int) -> float:
    return torch.cuda.utilization(gpu) / 100
