"""The check of a model before it serves: it answers its golden questions rightly, or any question at all."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path

from PIL import Image

from tasks.errors import Internal, JobError
from tasks.payload_fields import ImagePath
from tasks.payloads import Job, parse
from tasks.results import ModelInfo
from tasks.verification import tolerance
from worker.engine.interfaces import Codec
from worker.engine.row import Output, Picture, Row, Sampling
from worker.jobs.golden import Golden, GoldenQuestion, read_golden
from worker.jobs.prompts import ImageRef
from worker.jobs.result_builder import labels_of
from worker.jobs.row_builder import RowBuilder
from worker.models import SetupFailed

#: Pixels of the picture that is shown to a checkpoint without golden questions.
SAMPLE_SIZE = (640, 480)
NO_ANSWER = "The model computes no answer: its weights, their precision or this device is broken."


class GoldenCheck:
    """Asks a model questions through its engine."""

    def __init__(
        self,
        info: ModelInfo,
        codec: Codec,
        rows: RowBuilder,
        open_picture: Callable[[bytes], Picture],
        submit: Callable[[Row], Future[Output]],
    ) -> None:
        self._info = info
        self._codec = codec
        self._rows = rows
        self._open_picture = open_picture
        self._submit = submit

    def run(self, folder: Path | None) -> None:
        """Ask the golden questions of a checkpoint's folder. Without any, ask for any answer about a picture.

        Raises SetupFailed where an answer is wrong or missing: such a model must not serve.
        """
        try:
            golden = read_golden(folder) if folder else None
            if golden is None or not golden.pictures:
                self._check_any_answer()
            if golden is not None:
                self._check_answers(golden)
        except Internal as error:
            raise SetupFailed(f"{NO_ANSWER} {error}") from error
        except JobError as error:
            raise SetupFailed(f"The checkpoint's golden question cannot be asked: {error}") from error
        except SetupFailed:
            raise
        except Exception as error:
            # The checkpoint loads, but its parts do not fit together: a restart would not help.
            raise SetupFailed(
                f"The checkpoint cannot be asked ({type(error).__name__}: {error}): correct it."
            ) from error

    def _check_answers(self, golden: Golden) -> None:
        pictures = {name: self._open_picture(data) for name, data in golden.pictures.items()}
        # All at once, so that they share a batch as jobs do.
        outputs = [self._submit(self._row(question.job, pictures)) for question in golden.questions]
        found = [
            self._fault(question, output.result()) for question, output in zip(golden.questions, outputs, strict=True)
        ]
        faults = [fault for fault in found if fault]
        if faults:
            raise SetupFailed(
                f"The golden check failed: {faults[0]}; {len(faults)} of {len(found)} answers are wrong. "
                "The weights, their precision or this device is broken."
            )

    def _fault(self, question: GoldenQuestion, output: Output) -> str | None:
        scores = dict(zip(labels_of(question.job), output.probabilities, strict=False))
        most = tolerance(self._info.dtype, self._info.quantization)
        return question.fault(self._codec.decode(output.ids), scores, most)

    def _row(self, job: Job, pictures: Mapping[str, Picture]) -> Row:
        parts: list[str | Picture] = []
        for part in self._rows.prompt(job):
            if isinstance(part, ImageRef):
                assert isinstance(part.source, ImagePath)
                parts.append(pictures[part.source.path])
            else:
                parts.append(part)
        return self._rows.build(job, parts, self._rows.new_tokens(job))

    def _check_any_answer(self) -> None:
        """Without golden questions, check that the model says something about a picture, with finite logits."""
        text = "This is"
        parts = (self._open_picture(sample_picture()), text)
        job = parse("idefics.complete", {"prompt": [text], "max_new_tokens": 4})
        said = self._submit(self._rows.build(job, parts, 4)).result()
        scored = Row(self._codec.prepare(parts), Sampling(1), labels=tuple(self._codec.encode_labels(parts, ["a"])))
        probabilities = self._submit(scored).result().probabilities
        if not said.ids or not all(map(math.isfinite, probabilities)):
            raise SetupFailed(NO_ANSWER)


def sample_picture() -> bytes:
    """A picture of a photograph's usual shape, as a PNG file."""
    file = io.BytesIO()
    Image.linear_gradient("L").resize(SAMPLE_SIZE).convert("RGB").save(file, "PNG")
    return file.getvalue()
