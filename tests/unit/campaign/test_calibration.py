"""Confidences that mean what they say: fitted on labelled answers, kept in a file, applied by that model's worker."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
from click.testing import CliRunner

from config.settings import Settings
from tasks.calibration import Calibration, CalibrationError, Curve, Fit, logit, read_calibration
from tasks.campaign.evaluation.calibrating import Example, calibrated, expected_error, fit
from tasks.campaign.plan import Plan
from tasks.campaign.state import About, CampaignState, state_path, stored
from tasks.cli import main
from tasks.payloads import Answer, Classify
from tasks.results import ModelInfo, Receipt
from tasks.testing import canned
from tests.support.rows import row
from worker.engine.engine import Engine
from worker.engine.generation_rules import NO_RULES
from worker.engine.row import Output
from worker.engine.scheduler import Limits
from worker.jobs.result_builder import ResultBuilder
from worker.jobs.service import Service
from worker.models import SetupFailed
from worker.models.fake import FakeCodec, FakeModel

MODEL = ModelInfo(id="fake", revision="abc", family="fake", dtype="float32")
TIMING = canned("", Answer(image="https://a.example/1.png", question="?")).timing
RECEIPT = Receipt(model="fake", dtype="float32", prompt="0", output="0")
#: Halves the logit.
HALF = Fit(curve=Curve(temperature=2.0, offset=0.0), rows=100)


def examples(count: int, temperature: float, offset: float = 0.0, label: str | None = None) -> list[Example]:
    """Answers whose confidence is off by a known curve."""
    rng = random.Random(f"{temperature} {label}")
    found = []
    for _ in range(count):
        confidence = rng.uniform(0.3, 0.999)
        truth = Curve(temperature=temperature, offset=offset).calibrated(confidence)
        found.append(Example(confidence, rng.random() < truth, label))
    return found


def test_a_curve_keeps_the_order_and_both_ends() -> None:
    curve = Curve(temperature=2.0, offset=-0.5)
    values = [curve.calibrated(confidence) for confidence in (0.0, 0.1, 0.5, 0.9, 1.0)]
    assert values == sorted(values)
    assert all(0 < value < 1 for value in values)
    assert Curve(temperature=1.0, offset=0.0).calibrated(0.7) == pytest.approx(0.7)
    assert logit(1.0) == pytest.approx(-logit(0.0))


def test_a_fit_finds_the_temperature_and_the_offset_that_the_answers_have() -> None:
    found = fit(examples(20_000, 2.5, -0.4), per_class=True)
    assert found.curve.temperature == pytest.approx(2.5, rel=0.1)
    assert found.curve.offset == pytest.approx(-0.4, abs=0.1)
    assert not found.classes


def test_a_fit_makes_confidences_hold_on_other_rows() -> None:
    known, new = examples(2_000, 4.0), examples(4_000, 4.0, label=None)[2_000:]
    before = expected_error(new).value
    after = expected_error(calibrated(new, fit(known, per_class=False))).value
    assert before is not None
    assert after is not None
    assert before > 0.1
    assert after < 0.05


def test_labels_with_enough_answers_get_curves_of_their_own() -> None:
    rows = [*examples(3_000, 0.8, label="cat"), *examples(3_000, 5.0, label="dog"), *examples(10, 1.0, label="rare")]
    found = fit(rows, per_class=True)
    assert set(found.classes) == {"cat", "dog"}
    assert found.classes["cat"].temperature < 1 < found.classes["dog"].temperature
    assert found.calibrated(0.9, "rare") == found.curve.calibrated(0.9)
    assert found.calibrated(0.9, "dog") == found.classes["dog"].calibrated(0.9)


def test_answers_that_are_all_right_give_no_infinite_curve() -> None:
    found = fit([Example(0.6, is_right=True)] * 50, per_class=False)
    assert 0.9 < found.curve.calibrated(0.6) < 0.999


# The file


def written(folder: Path, calibration: Calibration) -> Path:
    path = folder / "calibration.json"
    path.write_text(calibration.model_dump_json())
    return path


@pytest.mark.parametrize("text", ["", "{}", '{"model_id": "a", "labels": {"curve": {"temperature": 0, "offset": 0}}}'])
def test_a_file_that_is_no_calibration_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(text)
    with pytest.raises(CalibrationError, match=r"calibration\.json"):
        read_calibration(path)


@pytest.mark.parametrize(
    ("id", "revision", "is_right"),
    [("fake", None, True), ("fake", "abc", False), ("other", None, False)],
)
def test_a_worker_starts_only_with_its_own_models_calibration(
    tmp_path: Path, id: str, revision: str | None, is_right: bool
) -> None:
    path = written(tmp_path, Calibration(model_id=id, model_revision=revision, text=HALF))
    model = FakeModel()
    settings = Settings(model="fake", calibration=path)
    engine = Engine(model, Limits(rows=1, tokens=100))
    if is_right:
        Service(settings, model.info, model.codec, engine)
        return
    with pytest.raises(SetupFailed, match=r"IDEFICS_CALIBRATION.*serves fake"):
        Service(settings, model.info, model.codec, engine)


def test_a_result_has_the_calibrated_confidence_and_the_models_own() -> None:
    builder = ResultBuilder(MODEL, FakeCodec(), NO_RULES, Calibration(model_id="fake", labels=HALF))
    job = Classify(image="https://a.example/1.png", labels=["cat", "dog"])
    result = builder.build(job, row(), Output((), "stop", (0.9, 0.1)), TIMING, RECEIPT)
    assert result.raw_confidence == 0.9
    assert result.confidence == pytest.approx(0.75)
    assert result.scores == {"cat": 0.9, "dog": 0.1}
    # No fit of texts.
    asked = Answer(image="https://a.example/1.png", question="?")
    text = builder.build(asked, row(), Output((65,), "stop", confidence=0.9), TIMING, RECEIPT)
    assert (text.confidence, text.raw_confidence) == (0.9, None)
    assert "raw_confidence" not in text.model_dump(mode="json")


def test_each_of_several_answers_is_calibrated() -> None:
    builder = ResultBuilder(MODEL, FakeCodec(), NO_RULES, Calibration(model_id="fake", text=HALF))
    job = Answer(image="https://a.example/1.png", question="?", n=2, temperature=1)
    output = Output((65,), "stop", confidence=0.9, others=(Output((66, 67), "length", confidence=0.5),))
    result = builder.build(job, row(), output, TIMING, RECEIPT)
    assert result.choices
    assert [choice.text for choice in result.choices] == ["A", "BC"]
    assert [choice.confidence for choice in result.choices] == pytest.approx([0.75, 0.5])
    assert [choice.raw_confidence for choice in result.choices] == [0.9, 0.5]
    assert result.usage.completion_tokens == 3


# The command


def table(folder: Path, column: str = "score", answer: str = "label") -> Path:
    path = folder / "out.csv"
    lines = [f"truth,{answer},{column},error_code"]
    lines += [f"{'cat' if each.is_right else 'dog'},cat,{each.confidence:.4f}," for each in examples(1_000, 3.0)]
    path.write_text("\n".join(lines) + "\n")
    return path


def run(*arguments: str) -> str:
    outcome = CliRunner().invoke(main, ["calibrate", *arguments])
    assert outcome.exit_code == 0, outcome.output
    return outcome.output


def test_the_command_tells_the_error_before_and_after_and_writes_the_file(tmp_path: Path) -> None:
    output, save = table(tmp_path), tmp_path / "calibration.json"
    arguments = [str(output), "--truth", "truth", "--save", str(save), "--for", "fake", "--revision", "abc"]
    assert "expected calibration error before" in run(*arguments)
    told = json.loads(run(*arguments, "--json"))
    assert told["after"]["value"] < 0.06 < told["before"]["value"]
    kept = read_calibration(save)
    assert kept.labels
    assert kept.labels.curve.temperature == pytest.approx(told["fit"]["curve"]["temperature"])
    # A text's confidence goes into the same file, beside the labels'.
    run(str(table(tmp_path, "confidence", "text")), *arguments[1:])
    both = read_calibration(save)
    assert both.labels == kept.labels
    assert both.text
    refused = CliRunner().invoke(main, ["calibrate", *arguments[:-4], "--for", "other"])
    assert refused.exit_code == 1
    assert "another model's" in refused.output


def test_the_model_is_known_from_the_campaigns_file(tmp_path: Path) -> None:
    output, save = table(tmp_path), tmp_path / "calibration.json"
    asked = ["calibrate", str(output), "--truth", "truth", "--save", str(save)]
    refused = CliRunner().invoke(main, asked)
    assert refused.exit_code == 1
    assert "--for" in refused.output
    plan = Plan("classify", image="truth", set={"labels": ["cat", "dog"]})
    about = About(id="0" * 32, name="n", plan=plan.as_dict(), input="in.csv", output=str(output), created=0.0)
    job = Classify(image="https://a.example/1.png", labels=["cat", "dog"])
    result = canned("cat", job).model_copy(update={"model": MODEL})
    with CampaignState.begin(state_path(str(output)), about) as state:
        state.store([stored(1, b"12345678", "j", None, result, 1.0)])
    run(*asked[1:])
    kept = read_calibration(save)
    assert (kept.model_id, kept.model_revision) == ("fake", "abc")


def test_too_few_rows_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    path.write_text("truth,label,score\ncat,cat,0.9\n")
    outcome = CliRunner().invoke(main, ["calibrate", str(path), "--truth", "truth"])
    assert outcome.exit_code == 1
    assert "Only 1 rows" in outcome.output
    assert math.isfinite(HALF.calibrated(1.0, None))
