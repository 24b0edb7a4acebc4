"""A model without a network, for tests of everything around it: it answers with the end of its prompt."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Callable, Sequence

from PIL.Image import Image

from tasks.results import ModelInfo
from worker.engine.generation_rules import NO_RULES
from worker.engine.interfaces import Admit, EnginePath, PromptContent, SendHeartbeat
from worker.engine.row import Output, Picture, Row, Tokens

END = 0
#: A prompt that holds this kills the process, for tests of what happens to other jobs.
POISON = "(poison)"
#: A prompt that holds this breaks the device, as a failed assertion on a GPU does: no batch succeeds any more.
DEVICE_LOST = "(device lost)"
#: A prompt that holds this is answered with the confidence below, as by a model that is not sure.
UNSURE, UNSURE_CONFIDENCE = "(unsure)", 0.5
#: A picture of this colour kills the process while it is decoded, as a defect of an image decoder would.
POISON_COLOUR = (6, 66, 6)


def fake_model(name: str) -> FakeModel | None:
    """The model with the name `fake` or `fake:SECONDS`, the time of a step; None for any other name."""
    kind, _, step_s = name.partition(":")
    return FakeModel(float(step_s or 0)) if kind == "fake" else None


class FakeCodec:
    """Tokens are characters."""

    has_chat_template = False
    has_end_of_utterance = True
    context_tokens = 2048
    eos_ids = frozenset({END})
    vocabulary = 0x110000
    reserved_ids: frozenset[int] = frozenset()

    def picture(self, image: Image) -> Picture:
        if image.getpixel((0, 0)) == POISON_COLOUR:
            os.kill(os.getpid(), signal.SIGSEGV)
        return Picture(hashlib.blake2b(image.tobytes(), digest_size=4).digest(), None)

    def min_token_count(self, parts: PromptContent) -> int:
        return sum(len(part) for part in parts if isinstance(part, str))

    def prepare(self, parts: PromptContent) -> Tokens:
        texts = [part if isinstance(part, str) else f"<{part.key.hex()}>" for part in parts]
        return Tokens(ids=tuple(map(ord, "".join(texts))))

    def encode_labels(self, lead: PromptContent, labels: Sequence[str]) -> list[tuple[int, ...]]:
        return [tuple(map(ord, label)) for label in labels]

    def grammar_tokens(self) -> None:
        """It writes what its prompt says."""

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))

    def token_text(self, id: int) -> str:
        return chr(id)


class FakeModel:
    """Each step takes `step_s` seconds for the whole batch."""

    def __init__(self, step_s: float = 0.0) -> None:
        self.info = ModelInfo(id="fake", family="fake", dtype="float32")
        self.codec = FakeCodec()
        self.rules = NO_RULES
        self.batches: list[int] = []
        self._step_s = step_s
        self._is_device_lost = False

    def prefetch(self, pictures: Sequence[Picture], then: Callable[[int], None]) -> None:
        then(0)

    def help(self, within_s: float) -> bool:
        return False

    def path(self, row: Row) -> EnginePath:
        return "fake"

    def metrics(self) -> dict[str, int]:
        return {"batches": len(self.batches)}

    def run(self, rows: Sequence[Row], heartbeat: SendHeartbeat, admit: Admit) -> None:
        self.batches.append(len(rows))
        if any(POISON in self.codec.decode(row.tokens.ids) for row in rows):
            os.kill(os.getpid(), signal.SIGKILL)
        self._is_device_lost |= any(DEVICE_LOST in self.codec.decode(row.tokens.ids) for row in rows)
        if self._is_device_lost:
            raise RuntimeError("CUDA error: device-side assert triggered")
        for step in range(1 + max(row.max_steps for row in rows)):
            heartbeat()
            time.sleep(self._step_s)
            for row in rows:
                if not row.is_done:
                    _advance(row, step)
            if all(row.is_done for row in rows):
                return


def _advance(row: Row, step: int) -> None:
    why = row.abort_reason(time.monotonic())
    if step:
        row.new_tokens += row.tokens.ids[-row.max_steps :][step - 1 : step]
    else:
        row.new_tokens = []
    if row.labels and not why:
        first = _confidence(row)
        row.finish(Output((), "stop", (first, 1.0 - first, *[0.0] * (len(row.labels) - 2))))
    elif why or step >= row.max_steps:
        ids = tuple(row.new_tokens)
        row.finish(Output(ids, why or "length", confidence=_confidence(row) if ids else None))


def _confidence(row: Row) -> float:
    return UNSURE_CONFIDENCE if UNSURE in FakeCodec().decode(row.tokens.ids) else 1.0
