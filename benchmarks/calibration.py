"""How far the bundled model's confidences are off, before and after `idefics-jobs calibrate`.

`python -m benchmarks.calibration` fits on fresh pictures in the art styles that the model was trained on, and measures
on others in these styles and in the one that was kept out of training, which is the hard case: there a fit on known
styles need not hold. So it is also fitted on half of the new style's pictures and measured on the other half. Needs the
extras `train` and `evaluate`, and npm, which fetches the art.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.measures import RESULTS
from config.settings import Settings
from tasks import Caption, Classify, Image, Job
from tasks.calibration import Fit
from tasks.campaign.evaluation.calibrating import Example, calibrated, expected_error, fit
from tasks.campaign.evaluation.intervals import Estimate
from worker.demo.sayings import expected_caption
from worker.demo.training import art
from worker.demo.training.shards import sprite
from worker.demo.world import HELD_OUT_STYLE, THINGS, TRAIN_STYLES, Scene, any_picture, compose
from worker.engine.engine import Engine
from worker.engine.scheduler import Limits
from worker.jobs.runs import JobContext
from worker.jobs.service import Service
from worker.models.loading import load

#: Jobs that run together.
COMPANY = 32
#: By name: the job about a picture, and the right answer.
TASKS: dict[str, tuple[Callable[[str], Job], Callable[[Scene], str]]] = {
    "classify": (lambda image: Classify(image=image, labels=sorted(THINGS)), lambda scene: scene.thing),
    "caption": (lambda image: Caption(image=image), expected_caption),
}


def pictures(styles: Sequence[str], count: int, seed: str) -> Iterator[tuple[Scene, str]]:
    """Scenes and their pictures as data: URIs, drawn anew."""
    rng = random.Random(f"calibration {seed}")
    for _ in range(count):
        scene, style = any_picture(rng), rng.choice(styles)
        file = io.BytesIO()
        compose(scene, functools.partial(sprite, style, side=art.SPRITE_SIDE), rng).save(file, "PNG")
        yield scene, Image.from_bytes(file.getvalue())


def examples(service: Service, task: str, shown: Sequence[tuple[Scene, str]]) -> list[Example]:
    """The model's answers about pictures."""
    job, right = TASKS[task]

    def example(number: int) -> Example:
        scene, image = shown[number]
        result = service.run(job(image), JobContext(f"{task} {number}"))
        assert result.confidence is not None
        return Example(result.confidence, result.text.strip() == right(scene).strip(), result.label)

    with ThreadPoolExecutor(COMPANY) as threads:
        return list(threads.map(example, range(len(shown))))


def figures(tested: Sequence[Example], by: Fit) -> dict[str, Any]:
    """The error of answers before and after a fit on others."""
    before, after = expected_error(tested), expected_error(calibrated(tested, by))
    return {
        "pictures": len(tested),
        "right": round(sum(example.is_right for example in tested) / len(tested), 4),
        "mean confidence": round(sum(example.confidence for example in tested) / len(tested), 4),
        "error before": _told(before),
        "error after": _told(after),
        "fit": by.curve.model_dump(),
    }


def _told(estimate: Estimate) -> list[float | None]:
    """The number and its 95 % interval."""
    return [None if each is None else round(each, 4) for each in (estimate.value, estimate.low, estimate.high)]


def measure(service: Service, count: int) -> dict[str, Any]:
    """All figures, by task and by what was measured on what."""
    sets = {
        name: list(pictures(styles, count, name))
        for name, styles in (("fit", TRAIN_STYLES), ("known", TRAIN_STYLES), ("new", (HELD_OUT_STYLE,)))
    }
    found: dict[str, Any] = {}
    for task in TASKS:
        answers = {name: examples(service, task, shown) for name, shown in sets.items()}
        on_known, half = fit(answers["fit"], per_class=False), count // 2
        found[task] = {
            "known styles": figures(answers["known"], on_known),
            f"new style ({HELD_OUT_STYLE}), fitted on known ones": figures(answers["new"], on_known),
            f"new style ({HELD_OUT_STYLE}), fitted on it": figures(
                answers["new"][half:], fit(answers["new"][:half], per_class=False)
            ),
        }
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=600, help="pictures of each set")
    asked = parser.parse_args()
    art.prepare()
    settings = Settings(model="demo", dtype="float32")
    model = load(settings)
    engine = Engine(model, Limits(COMPANY, settings.max_batch_tokens))
    service = Service(settings, model.info, model.codec, engine, rules=model.rules)
    engine.start()
    try:
        found = measure(service, asked.count)
    finally:
        engine.stop()
    print(json.dumps(found, indent=2))
    (RESULTS / "calibration.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
