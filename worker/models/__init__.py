"""Model families: one adapter each, and a fake beside them."""

from __future__ import annotations

from pathlib import Path

from config.settings import Settings

DEMO = Path(__file__).parent.parent / "demo" / "checkpoint"


class SetupFailed(RuntimeError):
    """The model cannot be served; the message tells the cure."""


def checkpoint_folder(settings: Settings) -> Path | None:
    """The local folder of the model, where it has one."""
    path = DEMO if settings.model == "demo" else Path(settings.model)
    return path if path.is_dir() else None
