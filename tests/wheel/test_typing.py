"""What the README promises passes mypy --strict in a user's project, with and without pydantic's plugin."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from worker.demo.stack import CHECKOUT

GOOD = """
import asyncio
import io
from pathlib import Path

from fastapi import FastAPI, UploadFile
from PIL import Image as Pillow
from pydantic import BaseModel

from idefics_jobs import (
    Answer, Callback, Caption, CaptionExample, Chat, ChatMessage, Classify, Client, Complete, IdeficsError, Image,
    Write,
)
from idefics_jobs.errors import ErrorBody
from idefics_jobs.testing import FakeClient


class Ask(BaseModel):
    image: Image
    question: str
    others: list[Image] = []


async def answer(client: Client, ask: Ask, upload: UploadFile) -> str:
    job = await client.asubmit(Answer(image=ask.image, question=ask.question), priority=1, countdown=2.0)
    await client.asubmit(Answer(image=upload, question="What?"))
    return (await job.aresult(timeout=1)).text


def send(client: Client | FakeClient) -> tuple[int, ErrorBody]:
    urls: list[str] = ["https://example.com/a.png"]
    client.submit(Caption(image=urls[0], examples=[CaptionExample(image=Path("a.png"), text="a")]))
    client.submit(Caption(image=Image.from_file("a.png"), callback=Callback(url="https://a.example/hook", key_id="a")))
    client.submit(Caption(image=Image.from_file(Path("a.png"), max_side=1024)))
    client.submit(Caption(image=Image.from_bytes(b"")), task_id="a", queue="large", expires=60)
    client.submit(Caption(image=Path("a.png")))
    client.submit(Caption(image=io.BytesIO()))
    client.submit(Caption(image=Pillow.new("RGB", (1, 1))))
    with open("a.png", "rb") as file:
        client.submit(Classify(image=file, labels=["a", "b"]))
    client.submit(Write(images=urls))
    client.submit(Write(images=[Path("a.png"), "https://example.com/a.png"]))
    client.submit(Complete(prompt=["https://example.com/a.png", "A picture of"]))
    client.submit(Complete(prompt=[Path("a.png"), {"text": "A picture of"}]))
    client.submit(Chat(messages=[{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]))
    client.submit(Chat(messages=[ChatMessage(role="user", content="Hello")]))
    try:
        client.submit_many(Caption(image=url) for url in urls)
    except IdeficsError as error:
        status, body = error.response()
        message: str = body["error"]["message"]
        return status, body
    raise SystemExit


def models(ask: Ask) -> list[Write]:
    return [Write(images=[*ask.others])]
"""

BAD = """
from idefics_jobs import Caption, Client

client = Client()
client.submit(Caption(image=1))  # error
client.submit(Caption(image=open("a.txt")))  # error
client.submit(Caption(image="https://example.com/a.png"), coutdown=5)  # error
client.submit_many([Caption(image="https://example.com/a.png")], task_di="a")  # error
"""


PLUGIN = "plugins = pydantic.mypy\n[pydantic-mypy]\ninit_typed = true\ninit_forbid_extra = true"


def check(folder: Path, config: str, **programs: str) -> dict[str, list[int]]:
    """The lines of a user's programs that mypy refuses, by program."""
    (folder / "site").mkdir()
    (folder / "site" / "idefics_jobs").symlink_to(CHECKOUT / "tasks")
    for name, program in programs.items():
        (folder / f"{name}.py").write_text(program)
    (folder / "mypy.ini").write_text(
        f"[mypy]\nstrict = true\nmypy_path = {folder}/site\ncache_dir = {folder}/cache\n{config}\n"
        # As for an installed package, whose own errors are nobody's.
        "[mypy-idefics_jobs.*]\nignore_errors = true\n[mypy-celery.*,kombu.*]\nignore_missing_imports = true\n"
    )
    mypy = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", *(f"{name}.py" for name in programs)]
    done = subprocess.run(mypy, cwd=folder, capture_output=True, text=True)
    assert not done.stderr, done.stderr
    print(done.stdout)
    found = re.findall(r"^(\w+)\.py:(\d+): error: ", done.stdout, re.MULTILINE)
    return {name: [int(line) for where, line in found if where == name] for name in programs}


def test_what_the_readme_promises_is_typed_and_what_cannot_work_is_refused(tmp_path: Path) -> None:
    example = (CHECKOUT / "examples" / "fastapi" / "app.py").read_text()
    wrong = [number for number, line in enumerate(BAD.splitlines(), 1) if line.endswith("# error")]
    assert check(tmp_path, "", good=GOOD, example=example, bad=BAD) == {"good": [], "example": [], "bad": wrong}


def test_pydantics_plugin_changes_nothing_in_that(tmp_path: Path) -> None:
    assert check(tmp_path, PLUGIN, good=GOOD) == {"good": []}
