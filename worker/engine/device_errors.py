"""Recognises errors after which a device is useless to this process. Pure; does not import torch.

What follows: `_end_without_device` in `worker/model_process.py` ends the process, `worker/pool/supervisor.py` starts
another one.
"""

from __future__ import annotations

#: Texts in torch's errors of the device or its libraries.
_OF_DEVICE = (
    "CUDA error",
    "HIP error",
    "cuDNN error",
    "CUBLAS_STATUS_",
    "CUDNN_STATUS_",
    "HIPBLAS_STATUS_",
    "DEVICE_LOST",
)
#: The type of such errors since torch 2.8.
_ACCELERATOR_ERROR = "AcceleratorError"
#: Texts in errors of a single call, after which the next one may succeed.
_OF_ONE_CALL = (
    "out of memory",
    "ALLOC_FAILED",
    "invalid argument",
    "invalid configuration argument",
    "too many resources requested",
    "no kernel image",
    "not supported",
    "STATUS_INVALID_VALUE",
    "STATUS_BAD_PARAM",
    "STATUS_NOT_SUPPORTED",
    "STATUS_ARCH_MISMATCH",
)


def is_device_lost(error: BaseException | None) -> bool:
    """Whether an error, or an error that led to it, leaves the device useless until the process ends.

    CUDA calls such errors sticky: a failed assertion on the device, an illegal address, an uncorrectable memory error.
    """
    while error is not None:
        if _is_sticky(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _is_sticky(error: BaseException) -> bool:
    # Only RuntimeErrors, as torch raises, count: the texts of other errors may quote a job.
    if not isinstance(error, RuntimeError):
        return False
    text = str(error)
    is_of_device = type(error).__name__ == _ACCELERATOR_ERROR or any(sign in text for sign in _OF_DEVICE)
    return is_of_device and not any(sign in text for sign in _OF_ONE_CALL)
