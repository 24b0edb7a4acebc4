"""`idefics-jobs eval` in a shell."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from tasks.campaign.plan import Plan
from tasks.campaign.state import About, CampaignState, state_path
from tasks.cli import main
from tests.support.pictures import png

A = """sku,truth,label,score,error_code
1,cat,cat,0.9,
2,dog,cat,0.8,
3,dog,,,image_unreachable
4,,dog,0.7,
"""
B = A.replace("2,dog,cat", "2,dog,dog")


@pytest.fixture
def a(tmp_path: Path) -> str:
    return _written(tmp_path / "a.csv", A)


@pytest.fixture
def b(tmp_path: Path) -> str:
    return _written(tmp_path / "b.csv", B)


def _written(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def _said(*arguments: str) -> str:
    outcome = CliRunner().invoke(main, ["eval", *arguments])
    assert outcome.exit_code == 0, outcome.output
    return outcome.output


def _refused(*arguments: str) -> str:
    outcome = CliRunner().invoke(main, ["eval", *arguments])
    assert outcome.exit_code == 1, outcome.output
    return outcome.output


def test_one_output_is_told_in_numbers(a: str) -> None:
    said = _said(a, "--truth", "truth")
    assert (
        "3 rows with a truth (1 without one or unreadable left out), 1 of them not answered, which counts as wrong."
        in said
    )
    assert "accuracy\t33.3 %\t" in said
    assert "accuracy, answered rows only\t50.0 %\t" in said
    assert "dog\t-\t0.0 %\t0.0 %\t2" in said
    assert "dog\t1\t0\t1" in said
    assert "2\tdog\tcat\t0.800" in said


def test_the_numbers_are_json_for_programs(a: str) -> None:
    told = json.loads(_said(a, "--truth", "truth", "--json"))
    assert (told["kind"], told["rows"], told["unanswered"], told["without_truth"]) == ("labels", 3, 1, 1)
    assert told["accuracy"]["value"] == pytest.approx(1 / 3)
    assert {"truth": "dog", "answer": None, "rows": 1} in told["confusion"]


def test_two_outputs_are_compared_with_a_verdict(a: str, b: str) -> None:
    said = _said(a, b, "--truth", "truth", "--id", "sku")
    assert "3 rows with a truth are in both" in said
    assert "accuracy\t33.3 %\t66.7 %\t+33.3\t" in said
    assert "p = 1.000 by McNemar's exact test. No difference can be told." in said
    assert "2\tdog\tcat\tdog\n" in said
    told = json.loads(_said(a, b, "--truth", "truth", "--json"))
    assert told["differences"]["accuracy"]["only_b_right"] == 1
    assert told["differences"]["accuracy"]["better"] is None


def test_texts_have_exact_and_normalised_matches(tmp_path: Path) -> None:
    rows = [{"truth": ["two", "a pair"], "text": "2."}, {"truth": "cat", "text": "cat"}]
    path = _written(tmp_path / "texts.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows))
    said = _said(path, "--truth", "truth")
    assert "exact match\t50.0 %\t" in said
    assert "normalised match\t100.0 %\t" in said


def test_hostile_text_is_escaped(tmp_path: Path) -> None:
    path = _written(tmp_path / "a.csv", 'truth,text\ncat,"\x1b[31m\u202edog"\n')
    assert "\\x1b[31m\\u202edog" in _said(path, "--truth", "truth")


def test_what_is_missing_is_said_with_the_cure(a: str, tmp_path: Path) -> None:
    assert "there is no column 'thruth'. Did you mean 'truth'?" in _refused(a, "--truth", "thruth")
    assert "Error: " in _refused(str(tmp_path / "none.csv"), "--truth", "truth")


def test_a_page_shows_the_pictures_that_are_files_beside_the_output(tmp_path: Path) -> None:
    (tmp_path / "dog.png").write_bytes(png("red"))
    path = _written(tmp_path / "c.csv", "image,truth,label\ndog.png,dog,cat\ncat.png,cat,cat\n")
    page = tmp_path / "page.html"
    said = _said(path, "--truth", "truth", "-o", str(page))
    assert "accuracy\t50.0 %" in said
    assert f"{page}: written, 1 thumbnails" in said
    assert '"thumb":"data:image/webp;base64,' in page.read_text(encoding="utf-8")
    _said(path, path, "--truth", "truth", "-o", str(page), "--thumbnails", "none")
    assert "data:image/webp" not in page.read_text(encoding="utf-8")


def test_the_campaigns_plan_tells_the_columns(tmp_path: Path) -> None:
    path = _written(tmp_path / "a.csv", "photo,truth,colour,sure\nx.png,red,red,0.9\n")
    plan = Plan(
        "classify", image="photo", set={"labels": ["red", "blue"]}, columns={"colour": "label", "sure": "score"}
    )
    about = About(id="0" * 32, name="n", plan=plan.as_dict(), input="in.csv", output=path, created=0.0)
    CampaignState.begin(state_path(path), about).close()
    told = json.loads(_said(path, "--truth", "truth", "--json"))
    assert told["accuracy"]["value"] == 1
    assert told["calibration_error"]["value"] == pytest.approx(0.1)


def test_without_its_libraries_the_extra_is_named(a: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.sparse", None)
    assert "pip install 'idefics-jobs[evaluate]'" in _refused(a, "--truth", "truth")


def test_texts_with_a_confidence_stay_texts_and_their_surest_mistakes_come_first(tmp_path: Path) -> None:
    rows = ["sku,truth,text,confidence", "1,a cat,A cat.,0.9", "2,a dog,a cat,0.4", "3,a cow,a cat,0.8"]
    table = _written(tmp_path / "texts.csv", "\n".join(rows) + "\n")
    assert json.loads(_said(table, "--truth", "truth", "--json"))["kind"] == "text"
    said = _said(table, "--truth", "truth", "--id", "sku")
    assert said.index("3\ta cow\ta cat\t0.800") < said.index("2\ta dog\ta cat\t0.400")
