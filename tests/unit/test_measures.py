"""The command line of what is measured."""

from __future__ import annotations

import pytest

from benchmarks import measures


@pytest.mark.parametrize(("named", "said"), [([], '{"one": 1}\n{"two": 2}\n'), (["two"], '{"two": 2}\n')])
def test_named_measures_run_and_without_names_all(
    named: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["benchmarks", *named])
    measures.run(None, {"one": lambda: 1, "two": lambda: 2})
    assert capsys.readouterr().out == said
