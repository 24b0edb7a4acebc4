"""`make demo MODEL=smolvlm`: the seven tasks on the second bundled model, through a real worker."""

from __future__ import annotations

from pathlib import Path

import pytest

from worker.demo import __main__ as demo


def test_the_demo_answers_the_seven_tasks_on_the_second_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "PAGE", tmp_path / "demo.html")
    said: list[str] = []
    assert demo.run("smolvlm", said.append), said
    page = demo.PAGE.read_text()
    assert "<code>demo-smolvlm</code>" in page
    # The prompts are in the form of its chat template, unlike those of the first family.
    assert "<pre>User:[" in page
    for question in demo.questions(demo.pictures()):
        assert f"<h2>{question.task}</h2>" in page
    assert page.count("<h2>batch inference</h2>") == len(demo.pictures())
