"""Loads the model that the settings name, in the process that runs it."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from pathlib import Path

from config.settings import Settings
from worker.engine.interfaces import Model
from worker.engine.scheduler import Limits
from worker.models import checkpoint_folder
from worker.models.fake import FakeModel, fake_model
from worker.runtime.cpu import all_cores


def load_model(settings: Settings) -> tuple[Model, Path | None]:
    """Load the model. Returns it and its local folder, if it has one. Raises SetupFailed.

    Also sets up this process: torch's threads, and environment variables that the libraries read when they are
    imported.
    """
    # The tokenizers library need not: the job threads tokenize in parallel already.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    fake = fake_model(settings.model)
    if fake is not None:
        return fake, None
    # Imported here because that takes seconds, and the fake model needs neither torch nor transformers.
    with _no_garbage_collection():
        import torch

        # On a CPU the engine thread and the encoder thread share the cores.
        torch.set_num_threads(settings.torch_threads or max(1, len(all_cores()) // 2))
        if settings.offline:
            # Read by huggingface_hub, which then does not use the network.
            os.environ["HF_HUB_OFFLINE"] = "1"
        # In a log, each state of a progress bar would be a separate line.
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        from worker.engine.gpu_metrics import watch_gpus
        from worker.models.loading import load

    watch_gpus()
    return load(settings), checkpoint_folder(settings)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """For imports: what they make stays, and to search it for garbage takes a fifth of their time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def batch_limits(model: Model, settings: Settings) -> Limits:
    """What fits into a batch of the model. In blocks, each row counts with its own length."""
    if isinstance(model, FakeModel):
        return Limits(settings.max_batch_size, settings.max_batch_tokens)
    # Imported here, since it imports torch.
    from worker.models import kv_memory

    return kv_memory.batch_limits(model, settings)


def model_facts(model: Model, settings: Settings, max_prompt_tokens: int) -> list[str]:
    """Facts about the model and what it needs, one per line (worker/models/report.py). Empty for the fake model."""
    if isinstance(model, FakeModel):
        return []
    # Imported here, since it imports transformers.
    from worker.models.report import report

    return report(model, settings, max_prompt_tokens)
