"""Which errors make a device useless, by the messages of torch, CUDA and their libraries."""

from __future__ import annotations

import pytest
import torch

from tasks.errors import Internal, OutOfMemory
from worker.engine.device_errors import is_device_lost

ADVICE = (
    "\nSearch for `cudaErrorAssert' in https://docs.nvidia.com/cuda for more information.\nCompile with `TORCH_USE_"
)


@pytest.mark.parametrize(
    "text",
    [
        f"CUDA error: device-side assert triggered{ADVICE}",
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: uncorrectable ECC error encountered",
        "CUDA error: unspecified launch failure",
        "CUDA error: misaligned address",
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(handle, opa, opb)`",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR",
        "HIP error: unspecified launch failure",
        "level_zero backend failed with error: 20 (UR_RESULT_ERROR_DEVICE_LOST)",
    ],
)
def test_a_sticky_error_is_known_by_its_message_and_through_the_error_that_it_caused(text: str) -> None:
    assert is_device_lost(RuntimeError(text))
    assert is_device_lost(torch.AcceleratorError(text))
    consequence = Internal("x")
    consequence.__cause__ = RuntimeError(text)
    assert is_device_lost(consequence)


@pytest.mark.parametrize(
    "error",
    [
        None,
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: out of memory"),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasLtMatmul`"),
        RuntimeError("CUDA error: invalid configuration argument"),
        RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
        ValueError("a job wrote CUDA error: device-side assert triggered"),
        Internal("CUDA error: device-side assert triggered"),
        OutOfMemory(),
    ],
)
def test_an_error_of_one_call_or_of_a_job_is_none(error: Exception | None) -> None:
    assert not is_device_lost(error)
