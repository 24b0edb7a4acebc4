"""A plain Celery app that uses the models by the names of their tasks: it needs only `celery[redis]`.

Beside `make up`, in two shells:

    cd examples/celery
    celery -A app worker --hostname gallery@%h    # this app's own worker: it reads the queue `celery`
    python app.py
"""

import base64
import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

from celery import Celery, chain, chord

PICTURES = Path(__file__).parents[1] / "pictures"
SAVED = Path(os.environ.get("SAVED", "saved.jsonl"))

app = Celery(
    "gallery",
    broker=os.environ.get("BROKER_URL", "redis://localhost:6379/0"),
    backend=os.environ.get("RESULT_BACKEND", "redis://localhost:6379/1"),
)
# Celery on Redis has four priorities by default; the models' workers read all ten.
app.conf.broker_transport_options = {"priority_steps": list(range(10))}
#: 0 is first and 9 last. A job without a priority has 0 and overtakes the others. Celery's `task_default_priority`
#: applies to this app's own tasks only.
USUAL = 5


# --- This app's own tasks: its worker runs them ---------------------------------------------------


@app.task(name="gallery.save")
def save(answer, title):
    """Save a text. `answer` is the result of the task before."""
    with SAVED.open("a") as file:
        file.write(json.dumps({"title": title, "text": answer["text"].strip()}) + "\n")
    return answer["text"].strip()


@app.task(name="gallery.page")
def page(answers, titles):
    """Join the texts of a gallery."""
    return "\n".join(f"{title}: {answer['text'].strip()}" for title, answer in zip(titles, answers, strict=True))


@app.task(name="gallery.report")
def report(id):
    """Save a job's error: its arguments are a stable code, a sentence that says what to do, and often a detail."""
    code, message, *_ = app.AsyncResult(id).result.args
    with SAVED.open("a") as file:
        file.write(json.dumps({"title": code, "text": message}) + "\n")


# --- The models' tasks, by name -------------------------------------------------------------------


def picture(name):
    """A file as a `data:` URI. If the workers can reach an http(s) URL of it, use that."""
    return "data:image/png;base64," + base64.b64encode((PICTURES / name).read_bytes()).decode()


def model(task, **arguments):
    return app.signature(task, kwargs=arguments, queue="idefics", priority=USUAL, immutable=True)


def caption(image):
    return model("idefics.caption", image=image)


def answer(image, question):
    return model("idefics.answer", image=image, question=question)


# --- Canvas ---------------------------------------------------------------------------------------


def describe(name):
    """Caption, save, answer, save: a chain over two queues, `idefics` and `celery`.

    The models' tasks are immutable: they take keyword arguments only, and not the result of the task before.
    """
    image = picture(name)
    return chain(
        caption(image),
        save.s("caption"),
        answer(image, "What colour is the background?"),
        save.s("colour"),
    ).apply_async()


def gallery(names):
    """Caption all pictures at once (the workers batch them), then run one task of this app with all texts."""
    return chord(caption(picture(name)) for name in names)(page.s(names))


def later(name):
    """One job in two seconds, and one at a time of day."""
    soon = caption(picture(name)).apply_async(countdown=2)
    at = caption(picture(name)).apply_async(eta=datetime.now(UTC) + timedelta(seconds=3))
    return soon, at


def ranked(name):
    """An urgent job and one of a nightly run: if both wait, the urgent one is taken first."""
    nightly = caption(picture(name)).apply_async(priority=9)
    urgent = caption(picture(name)).apply_async(priority=0)
    return urgent, nightly


def compare(name, queues=("idefics", "idefics.large")):
    """The same job for two models that share the broker, each with its own queue and worker:

    IDEFICS_QUEUE=idefics.large IDEFICS_MODEL=HuggingFaceM4/idefics-9b celery -A worker.app worker --hostname large@%h
    """
    return [caption(picture(name)).apply_async(queue=queue) for queue in queues]


def fails():
    """A job that fails, since its image is broken; `report` is called."""
    return caption("data:image/png;base64,bm90aGluZw==").apply_async(link_error=report.s())


def main():
    print(describe("cat.png").get(timeout=60))
    print(gallery(["cat.png", "duck.png", "pizza.png"]).get(timeout=60))
    for job in (*later("cat.png"), *ranked("cat.png")):
        print(job.get(timeout=60)["text"].strip())
    print(fails().get(timeout=60, propagate=False).args[0])


if __name__ == "__main__":
    main()
