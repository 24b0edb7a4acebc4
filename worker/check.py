"""`python -m worker check MODEL`: loads a model as a worker does, shows it a picture, and says what it needs."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from PIL import Image

from config.settings import Settings
from tasks.payloads import Caption
from tasks.results import Result
from worker.engine.engine import Engine
from worker.jobs.row_builder import prompt_bound
from worker.jobs.runs import JobContext
from worker.jobs.service import Service
from worker.models.start import batch_limits, load_model, model_facts

#: Seconds of work in the captions that are measured together, if each took as long as one alone.
MEASURED_S = 20.0
#: Maximum new tokens of a caption.
NEW_TOKENS = 32


def check(settings: Settings, *, measure: bool = True) -> Iterator[str]:
    """Yields each fact as a line as soon as it is known. Raises SetupFailed if a worker would not serve the model, and
    the JobError of a measured caption that fails. `measure`: whether to measure the speed."""
    started = time.monotonic()
    model, folder = load_model(settings)
    yield f"Loaded   in {time.monotonic() - started:.1f} s"
    yield from model_facts(model, settings, prompt_bound(settings, model.codec.context_tokens)[0])
    engine = Engine(model, batch_limits(model, settings))
    service = Service(settings, model.info, model.codec, engine, None, model.rules)
    engine.start()
    try:
        started = time.monotonic()
        service.check_golden(folder)
        yield f"Answer   about a picture after {time.monotonic() - started:.1f} s; golden questions, if any, are right"
        if measure:
            yield f"Speed    {_speed(service, settings.max_batch_size)}"
    finally:
        engine.stop()


def _speed(service: Service, max_rows: int) -> str:
    """The speed of captions, one alone and up to `max_rows` together, as text."""
    alone_s, _ = _captions(service, 1)
    count = max(1, min(max_rows, int(MEASURED_S / alone_s)))
    together_s, results = _captions(service, count, first=1)
    tokens = sum(result.usage.completion_tokens for result in results)
    speed = f"{count / together_s:.2f} images and {tokens / together_s:.1f} new tokens a second"
    return f"{speed}, by {count} captions of up to {NEW_TOKENS} tokens together; one alone takes {alone_s:.2f} s"


def _captions(service: Service, count: int, first: int = 0) -> tuple[float, list[Result]]:
    """Seconds that `count` captions take together, and their results. `first`: the number of the first picture."""
    jobs = [Caption(image=_picture(first + number), max_new_tokens=NEW_TOKENS) for number in range(count)]
    started = time.monotonic()
    with ThreadPoolExecutor(count) as threads:
        results = list(threads.map(lambda job: service.run(job, JobContext(str(id(job)))), jobs))
    return time.monotonic() - started, results


def _picture(number: int) -> str:
    """A JPEG picture as a data: URI; each call and number gives other pixels, so that nothing is cached."""
    file = io.BytesIO()
    Image.effect_noise((640, 480), 20 + number).convert("RGB").save(file, "JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
