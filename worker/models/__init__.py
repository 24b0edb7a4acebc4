"""Model families: what each brings to the engine, how a checkpoint is loaded, and a fake model for tests.

`FAMILIES` in `loading.py` lists them; that module also chooses precision, quantization and devices. A family with a
fast path has a decoder (`idefics1/`, `idefics2_3/`), made of the parts in `layers.py` and `self_attention.py`; any
other runs through stock `generate`. CONTRIBUTING.md says how to add one.
"""

from __future__ import annotations

from pathlib import Path

from config.settings import Settings

DEMO = Path(__file__).parent.parent / "demo" / "checkpoint"


class SetupFailed(RuntimeError):
    """The model cannot be served; the message says what to do."""


def checkpoint_folder(settings: Settings) -> Path | None:
    """The local folder of the model, where it has one."""
    path = DEMO if settings.model == "demo" else Path(settings.model)
    return path if path.is_dir() else None
