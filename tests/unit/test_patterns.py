"""Regular expressions that read strangers' text take linear time, each on the worst text of its kind.

All of them are found in the source: a new one needs its worst text here.
"""

from __future__ import annotations

import ast
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from click.testing import CliRunner

from tasks.cli import main
from tasks.cli.redaction import redacted
from tasks.failed import FailedJob, FailedJobs
from worker.demo import stack
from worker.demo.stack import CHECKOUT

CHARS = 200_000
#: Seconds. Linear ones take some milliseconds, quadratic ones minutes.
MOST_S = 0.5

#: Texts that are repeated to 200,000 characters, some between a beginning and an end.
WORST: dict[str, list[tuple[str, str, str]]] = {
    "tasks/apps.py:_PLACE": [("", "a", "!"), ("a:", "1", "!"), ("", "a.", "!"), ("", "localhost", "")],
    "tasks/availability.py:_REFUSAL": [
        ("ERR Error running script (call to ", "a", ""),
        ("ERR Error running script (call to a): @user_script: ", " ", ""),
        ("ERR Error running script (call to a): @user_script: ", "1", ""),
    ],
    "tasks/campaign/evaluation/matching.py:_COMMA_IN_NUMBER": [("", "1,", ""), ("", ",", "")],
    "tasks/campaign/evaluation/matching.py:_PERIOD_OF_TEXT": [("", "1.", ""), ("", ".", "")],
    "tasks/campaign/picture_cells.py:_URL": [("", " ", ""), ("", "a", ""), ("", "a:/", "")],
    "tasks/campaign/tables/files.py:_URL": [("", "a", ""), ("", "a:", "/")],
    "tasks/campaign/tables/jsonl_table.py:_ESCAPED_SURROGATE": [("", "\\u", ""), ("", "\\ud", "")],
    "tasks/campaign/tables/patterns.py:_BRACES": [("", "{", ""), ("{", "a", ""), ("{", ",", ""), ("", "{1..", "")],
    "tasks/cli/failed.py:_AGE": [("", "9", "x"), ("9.", "9", "x")],
    "tasks/cli/redaction.py:_DATA_URI": [
        ("", "data:", ""),
        ("data:a", ";a", ""),
        ("", "data:a;", " "),
        ("", "data:a;a=data", ""),
    ],
    "tasks/cli/redaction.py:_SECRET_NAME": [("", "api", ""), ("", "pas", ""), ("", "credentia", "")],
    "tasks/cli/redaction.py:_URL": [
        ("", "a.", ""),
        ("", "a://", ""),
        ("", "a:/", ""),
        ("", "://a ", ""),
        ("://", "a", " "),
    ],
    "tasks/image_sources.py:_BARE_BASE64": [("iVBORw0KGgo", "A", "!"), ("iVBORw0KGgo", " ", "!"), ("", "/9j/", "")],
    "tasks/image_sources.py:_DATA_IMAGE": [("", "data:image", "")],
    "tasks/image_sources.py:_DATA_TYPE": [("data:image/", "a", ""), ("", "data:image/a", "")],
    "tasks/image_sources.py:_HOST": [("http://", "a", ""), ("", "http:/", "")],
    "tasks/image_sources.py:_PICTURE_NAME": [("", ".jpe", ""), ("", ".png", "a")],
    "tasks/image_sources.py:_SCHEME": [("", "a", ""), ("", "a:", "")],
    "tasks/image_sources.py:_WEB": [("", "http:/", "")],
    "tasks/payload_fields.py:_CONTROL": [("", "\x1b", ""), ("", "a", "\x1b")],
    "tasks/payload_fields.py:_LINE_OR_CONTROL": [("", "\x1b", ""), ("", "a", "\x1b")],
    "tasks/validation.py:_NAME": [("", "a", "!")],
    "tasks/queue_state.py:_SENT_AT": [("", '"idefics_submitted_at": 1', ""), ('"idefics_submitted_at": ', "1", "")],
    "tasks/queue_state.py:_TAG": [("", '"delivery_tag": "', ""), ("", '"delivery_tag": "a', "")],
    "tasks/redis_keys.py:_NOT_QUEUES": [("", "pidbo", ""), ("", "a", ""), ("", "celery-task", "")],
    "tasks/redis_keys.py:_PLACEHOLDER": [("", "{", ""), ("{", "a", "")],
    "tasks/printable.py:_UNPRINTABLE": [("", "\x1b", ""), ("", "a", "\x1b")],
    "tasks/printable.py:_UNPRINTABLE_IN_JSON": [("", "\u202e", ""), ("", "a", "\u202e")],
    "tasks/urls.py:_HOST_NAME": [("", "a", ""), ("", "a.", "!"), ("", "a" * 63 + ".", "!")],
    "tasks/picture_forms.py:_PICTURE": [("", "RIFF", ""), ("", "\xff\xd8", "")],
    "tasks/urls.py:_PLAIN_URL": [("http://", "a", " "), ("http://a/", "/", " ")],
    "worker/images/metadata.py:_EXIF_START": [("", "Exif\0\0", ""), ("", "Exif\0", "")],
    "tasks/picture_forms.py:_FOREIGN": [
        ("", "<", ""),
        ("", " ", ""),
        ("<?xml ", "a", ""),
        ("<!--", "-", ""),
        ("", "\0", ""),
    ],
    "tasks/picture_forms.py:_HEIF": [("", "a", ""), ("aaaaftyp", "m", "")],
    "worker/images/metadata.py:_HEADER_MARKER": [("", "\xff", ""), ("", "\xff\xc8", "")],
    "worker/images/metadata.py:_SCAN_MARKER": [("", "\xff", ""), ("", "\xff\xd0", "")],
    "worker/images/metadata.py:_XMP_ORIENTATION": [("", "tiff:Orientation=", ""), ("", "tiff:Orientatio", "")],
    "worker/models/checkpoint.py:NAMES": [("Idefics", "a", " "), ("siglip", "a", " "), ("", "Idefics", " ")],
    "worker/models/checkpoint.py:_SHARD": [("", "a.safetensors", " "), ("", ".", "")],
    "worker/models/checkpoint.py:_SHARD_OF_A_CLUSTER": [("shard-", "1", ""), ("shard-1-model-", "a", "\n")],
    "worker/queue/envelope/fields.py:_PRINTABLE_ASCII": [("", "a", "\n")],
    "worker/queue/envelope/fields.py:_QUEUE": [("", "a", "")],
    "worker/models/tokenizer.py:_MARKUP": [("", "<", ""), ("<", ">", "<")],
    "worker/models/loading.py:_COMMIT": [("", "a", "")],
    "worker/queue/result_backend.py:_HEAD": [("", " ", ""), ("{", " ", ""), ('{"status":"', "a", "")],
}


@dataclass
class Pattern:
    """A module's name for a compiled expression, or for several, and the methods that are called on it there."""

    name: str
    compiled: list[re.Pattern[Any]]
    methods: set[str] = field(default_factory=set)


METHODS = {"match", "fullmatch", "search", "sub", "finditer"}


def _calls(tree: ast.AST, *names: str) -> list[ast.Call]:
    """Of functions of `re`."""
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "re"
        and node.func.attr in names
    ]


def _patterns() -> Iterator[Pattern]:
    # The settings are the operator's, and the demo's page and its training read our own texts.
    for folder in ("tasks", "worker"):
        for path in sorted((CHECKOUT / folder).rglob("*.py")):
            place = str(path.relative_to(CHECKOUT))
            if not place.startswith("worker/demo/"):
                yield from _patterns_of(place, ast.parse(path.read_text()))


def _patterns_of(place: str, tree: ast.Module) -> Iterator[Pattern]:
    found: dict[str, Pattern] = {}
    values: dict[str, Any] = {"re": re}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name, calls = node.targets[0].id, _calls(node.value, "compile")
            if calls:
                found[name] = Pattern(f"{place}:{name}", [_evaluated(call, values) for call in calls])
            elif isinstance(node.value, ast.Constant):
                values[name] = node.value.value
    compiled = sum(len(pattern.compiled) for pattern in found.values())
    inline = _calls(tree, "split", "findall", *METHODS)
    assert len(_calls(tree, "compile")) == compiled, f"{place}: compile each pattern at the top of its module"
    assert not inline, f"{place}: compile each pattern at the top of its module, where it is found from here"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in found:
            found[node.value.id].methods.add(node.attr)
    yield from found.values()


def _evaluated(call: ast.Call, values: dict[str, Any]) -> re.Pattern[Any]:
    compiled = eval(compile(ast.Expression(call), "source", "eval"), values)
    assert isinstance(compiled, re.Pattern)
    return compiled


PATTERNS = {pattern.name: pattern for pattern in _patterns()}


def test_every_pattern_has_its_worst_text() -> None:
    assert set(PATTERNS) == set(WORST)


@pytest.mark.parametrize(
    ("name", "worst"), [(name, worst) for name in sorted(WORST) for worst in WORST[name]], ids=ascii
)
def test_a_pattern_takes_linear_time_on_its_worst_text(name: str, worst: tuple[str, str, str]) -> None:
    pattern = PATTERNS[name]
    start, repeated, end = worst
    whole = start + repeated * (CHARS // len(repeated)) + end
    for compiled in pattern.compiled:
        text: Any = whole.encode("latin-1") if isinstance(compiled.pattern, bytes) else whole
        # What is not called by its name, as one of a dictionary's or of two, may be called by any.
        for method in (pattern.methods & METHODS) or METHODS:
            arguments = (text[:0], text) if method == "sub" else (text,)
            began = time.thread_time()
            outcome = getattr(compiled, method)(*arguments)
            list(outcome) if method == "finditer" else outcome
            assert time.thread_time() - began < MOST_S, (compiled, method)


def test_pydantics_patterns_are_rusts_which_take_linear_time() -> None:
    sources = [path.read_text() for folder in ("tasks", "config") for path in (CHECKOUT / folder).glob("*.py")]
    assert not [source for source in sources if "python-re" in source]


@pytest.mark.parametrize("text", ["a." * 100_000, "a://" * 50_000, "data:" * 40_000, ";a=b" * 50_000, "a:/" * 66_666])
def test_show_is_fast_for_any_prompt(text: str, broker: stack.Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    job = FailedJob(
        id="a",
        task="idefics.complete",
        code="internal",
        message=text,
        host="h",
        attempts=1,
        submitted_at=None,
        failed_at=1,
    )
    monkeypatch.setattr(FailedJobs, "get", lambda *_: job)
    monkeypatch.setattr(FailedJobs, "signature", lambda *_: {"kwargs": {"prompt": [text]}})
    began = time.thread_time()
    outcome = CliRunner().invoke(main, ["--broker", broker.url, "failed", "show", "a"])
    assert outcome.exit_code == 0, outcome.output
    assert time.thread_time() - began < 4 * MOST_S


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("see https://user:pass@host/a?b=c#d now", "see https://****@host/a?**** now"),
        ("redis://:pass@host/0", "redis://****@host/0"),
        (f"{'a' * 90}://user:pass@host", f"{'a' * 90}://****@host"),
        ("1http://u:p@h", "1http://****@h"),
        ("no url", "no url"),
    ],
)
def test_a_urls_secrets_are_hidden_behind_any_scheme(text: str, shown: str) -> None:
    assert redacted(text) == shown
