"""demo.html: the demo's pictures and answers in one file."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from worker.demo.__main__ import AnsweredQuestion

_HEAD = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>IDEFICS Jobs: the demo</title>
<style>
  body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
  article { display: flex; gap: 1.25rem; padding: 1rem 0; border-top: 1px solid #ddd; }
  .pictures { flex: 0 0 8rem; }
  img { width: 8rem; border-radius: .5rem; display: block; margin-bottom: .5rem; }
  h2 { font-size: 1rem; margin: 0; }
  pre { white-space: pre-wrap; color: #666; font-size: .8rem; margin: .25rem 0; }
  p { margin: .25rem 0; font-size: 1.1rem; }
  .wrong { color: #b00020; }
  small { color: #888; }
</style>
<h1>IDEFICS Jobs</h1>
<p>Each answer came from a job in a Redis queue, through a Celery worker, from the bundled model <code>MODEL</code>.</p>
"""


def write_page(path: Path, rows: Sequence[AnsweredQuestion], pictures: Path, model: str) -> None:
    """Write the page of a model's answers; the rows' files are read from the folder `pictures`."""
    path.write_text(_HEAD.replace("MODEL", model) + "\n".join(_article(row, pictures) for row in rows) + "\n</html>\n")


def _article(row: AnsweredQuestion, pictures: Path) -> str:
    images = "".join(_image(pictures / file) for file in row.files)
    wrong = "" if row.is_right else ' class="wrong"'
    return (
        f'<article><div class="pictures">{images}</div><div><h2>{escape(row.task)}</h2>'
        f"<pre>{escape(row.prompt)}</pre><p{wrong}>{escape(row.answer)}</p>"
        f"<small>{row.seconds:.2f} s</small></div></article>"
    )


def _image(path: Path) -> str:
    content = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(path.name)}" src="data:image/png;base64,{content}">'
