"""Model families: how a checkpoint is loaded, and what each family implements for the engine.

`FAMILIES` in `loading.py` lists the families. CONTRIBUTING.md says how to add one.

- Loading: `start.py` sets up the process and loads the model, `checkpoint.py` checks a checkpoint's files before
  transformers reads them, `loading.py` chooses precision, quantization and devices, `report.py` describes the result.
- Shared by the families: `tokenizer.py` (the base of their codecs) and `encoding.py` (pictures encoded ahead of their
  rows); for the text decoders of the fast path `layers.py` and `self_attention.py`.
- The families: `idefics1/`, whose pixels `image_processor.py` makes, and `idefics2_3/` (Idefics2, Idefics3, SmolVLM).
- `fake.py`: a model without a network, for tests.
"""

from __future__ import annotations

from pathlib import Path

from config.settings import Settings

_DEMO_FOLDER = Path(__file__).parent.parent / "demo"
#: The checkpoints that are part of this package, by their name in IDEFICS_MODEL.
BUNDLED = {"demo": _DEMO_FOLDER / "checkpoint", "demo-smolvlm": _DEMO_FOLDER / "checkpoint-smolvlm"}
DEMO = BUNDLED["demo"]


class SetupFailed(RuntimeError):
    """The model cannot be served; the message says what to do."""


def checkpoint_folder(settings: Settings) -> Path | None:
    """The local folder of the model; None if IDEFICS_MODEL is a hub id."""
    path = BUNDLED.get(settings.model) or Path(settings.model)
    return path if path.is_dir() else None
