"""The JSON Schema of payloads, result and events: `idefics-jobs schema`, committed as docs/schema.json."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from tasks.cli import main
from tasks.payloads import PAYLOADS
from tasks.schema import schema

COMMITTED = Path(__file__).parents[2] / "docs" / "schema.json"


def test_the_committed_schema_is_what_the_command_prints() -> None:
    printed = CliRunner().invoke(main, ["schema"])
    assert printed.exit_code == 0
    assert printed.stdout == COMMITTED.read_text(), "run `idefics-jobs schema > docs/schema.json`"


def test_every_task_the_result_and_the_event_are_described() -> None:
    document = schema()
    assert set(document["properties"]) == {*PAYLOADS, "result", "event"}
    for reference in document["properties"].values():
        assert reference["$ref"].removeprefix("#/$defs/") in document["$defs"]


def test_a_prompt_to_complete_may_hold_plain_strings() -> None:
    parts = schema()["$defs"]["Complete"]["properties"]["prompt"]["items"]["anyOf"]
    assert parts[0]["type"] == "string"


def test_a_description_is_one_line() -> None:
    assert "\\n" not in json.dumps(schema())
