"""What the commands print on a terminal, and in pipes: tables, errors, progress, JSON."""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import pty
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import click
import pytest
from click.testing import CliRunner

import idefics_jobs_celery
from tasks.batch_lines import Fingerprints
from tasks.cli import console, main, progress
from tasks.cli.failed import failed
from tests.support.hostile_text import HOSTILE, is_clean
from worker.demo.stack import CHECKOUT

MARKUP = "[red]not markup[/red] [link=https://example.com]x[/link] :smile: [bold"
ROWS = [("job-1", "failed", MARKUP), ("job-2", "succeeded", "-")]
COLUMNS = ("id", "status", "message")


@pytest.fixture
def on_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "is_terminal", lambda stream: True)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")


def without_styles(text: str) -> str:
    return click.unstyle(text)


# Tables


def test_rows_are_lines_with_tabs_where_no_person_looks(capsys: pytest.CaptureFixture[str]) -> None:
    console.echo_rows(COLUMNS, ROWS)
    assert capsys.readouterr().out == f"job-1\tfailed\t{MARKUP}\njob-2\tsucceeded\t-\n"


@pytest.mark.usefixtures("on_terminal")
def test_rows_are_a_table_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    console.echo_rows(COLUMNS, ROWS)
    shown = capsys.readouterr().out
    lines = without_styles(shown).splitlines()
    assert [line.split() for line in lines if "id" in line] == [list(COLUMNS)]
    assert "\x1b[31mfailed" in shown
    assert any(line.split() == ["job-2", "succeeded", "-"] for line in lines)


@pytest.mark.usefixtures("on_terminal")
def test_markup_in_a_cell_is_shown_as_it_came(capsys: pytest.CaptureFixture[str]) -> None:
    console.echo_rows(COLUMNS, ROWS)
    assert MARKUP in without_styles(capsys.readouterr().out)


@pytest.mark.usefixtures("on_terminal")
def test_a_hostile_cell_moves_no_cursor_and_begins_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    console.echo_rows(COLUMNS, [(HOSTILE, HOSTILE, HOSTILE)])
    assert all(map(is_clean, without_styles(capsys.readouterr().out).split("\n")))


@pytest.mark.usefixtures("on_terminal")
def test_an_id_stays_on_one_line_of_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    id = "8f14e45f-ceea-4672-a9b5-0a2f9d7c2c1f"
    console.echo_rows(COLUMNS, [(id, "failed", "word " * 60)])
    assert id in without_styles(capsys.readouterr().out)


@pytest.mark.usefixtures("on_terminal")
def test_a_long_id_is_folded_and_not_cut(capsys: pytest.CaptureFixture[str]) -> None:
    console.echo_rows(("id", "status"), [("x" * 500, "failed")])
    assert without_styles(capsys.readouterr().out).count("x") == 500


@pytest.mark.parametrize(
    ("is_a_tty", "environment", "is_for_a_person"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"NO_COLOR": ""}, True),
        (True, {"TERM": "dumb"}, False),
    ],
)
def test_a_terminal_without_no_color_is_for_a_person(
    is_a_tty: bool, environment: dict[str, str], is_for_a_person: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    stream: Any = SimpleNamespace(isatty=lambda: is_a_tty)
    assert console.is_terminal(stream) is is_for_a_person


# Errors


def test_an_error_is_one_plain_line(capsys: pytest.CaptureFixture[str]) -> None:
    console.CommandError(f"It failed:\n{MARKUP}").show()
    assert capsys.readouterr().err == f"Error: It failed:\\n{MARKUP}\n"


@pytest.mark.usefixtures("on_terminal")
def test_an_errors_label_is_red_on_a_terminal_and_its_text_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    console.echo_error(f"{MARKUP} {HOSTILE}", "worker_lost: ")
    shown = capsys.readouterr().err
    assert shown.startswith("\x1b[1;31mworker_lost: \x1b[0m")
    plain = without_styles(shown).removesuffix("\n")
    assert plain.startswith(f"worker_lost: {MARKUP} a")
    assert is_clean(plain)


# Progress


class _Lines:
    share = 0.5


def told(trouble: str = "") -> tuple[Any, Any, Any]:
    return SimpleNamespace(done=Fingerprints(), failed=0), _Lines(), SimpleNamespace(in_flight=3, trouble=trouble)


def test_progress_is_plain_lines_where_no_person_looks(capsys: pytest.CaptureFixture[str]) -> None:
    bar = progress.ProgressDisplay(0)
    bar.tell(*told())
    bar.tell(*told(f"full\n{MARKUP}"))
    bar.note(HOSTILE)
    bar.close()
    captured = capsys.readouterr()
    first, note = captured.err.splitlines()
    assert captured.out == ""
    assert first == f"0 lines done, 0 failed, 3 in flight, 0.0/s; waiting: full\\n{MARKUP}"
    assert is_clean(note)


@pytest.mark.usefixtures("on_terminal")
def test_progress_is_a_bar_on_a_terminal_and_leaves_standard_output_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    bar = progress.ProgressDisplay(0)
    bar.tell(*told(f"full\n{MARKUP}"))
    bar.note("No worker takes from the queue.")
    bar.close()
    captured = capsys.readouterr()
    assert captured.out == ""
    shown = without_styles(captured.err)
    assert f"0 lines done, 0 failed, 3 in flight, 0.0/s; waiting: full\\n{MARKUP}" in shown
    assert "No worker takes from the queue.\n" in shown
    assert captured.err.rindex("\x1b[?25h") > captured.err.rindex("\x1b[?25l"), "the cursor is shown"


# JSON


@pytest.mark.parametrize(("on_one_line", "lines"), [(True, 1), (False, 3)])
def test_json_is_on_one_line_for_programs(on_one_line: bool, lines: int, capsys: pytest.CaptureFixture[str]) -> None:
    console.echo_json({"text": "\u202e\n"}, on_one_line=on_one_line)
    shown = capsys.readouterr().out
    assert json.loads(shown) == {"text": "\u202e\n"}
    assert len(shown.splitlines()) == lines
    assert is_clean(shown.replace("\n", ""))


def commands(group: click.Group, path: tuple[str, ...] = ()) -> list[tuple[str, click.Command]]:
    found: list[tuple[str, click.Command]] = []
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            found += commands(command, (*path, name))
        else:
            found.append((" ".join((*path, name)), command))
    return found


@pytest.mark.parametrize(("name", "command"), commands(main), ids=[name for name, _ in commands(main)])
def test_every_command_has_an_example_and_prints_json(name: str, command: click.Command) -> None:
    assert "\b\n" in (command.help or "")
    example = (command.help or "").partition("\b\n")[2].strip()
    assert example.startswith("idefics-jobs ")
    assert f" {name}" in example
    # It prints nothing.
    if name != "deliveries enable":
        assert "--json" in [option for parameter in command.params for option in parameter.opts]


@pytest.mark.parametrize("name", ["submit", "result"])
def test_the_time_limit_shows_its_default(name: str) -> None:
    help_text = main.commands[name].get_help(click.Context(main.commands[name]))
    assert "[default: (no limit)]" in " ".join(help_text.split())


# The whole program


def test_a_real_terminal_gets_a_table_and_a_pipe_does_not(tmp_path: Any) -> None:
    program = (
        "from tasks.cli.console import echo_rows, echo_error\n"
        "echo_rows(('id', 'status'), [('job-1', 'failed')])\n"
        "echo_error('It failed.', 'Error: ')\n"
    )
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    environment.pop("NO_COLOR", None)
    command = [sys.executable, "-c", program]
    piped = subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, check=True)
    assert (piped.stdout, piped.stderr) == ("job-1\tfailed\n", "Error: It failed.\n")
    ours, theirs = pty.openpty()
    subprocess.run(command, cwd=CHECKOUT, env=environment, stdout=theirs, stderr=theirs, check=True)
    os.close(theirs)
    shown = _read(ours)
    assert "\x1b[31mfailed" in shown
    assert "\x1b[1;31mError: " in shown


def _read(descriptor: int) -> str:
    """What was written to a terminal whose other end is closed."""
    whole = io.BytesIO()
    try:
        while chunk := os.read(descriptor, 4096):
            whole.write(chunk)
    except OSError:
        # How Linux says that it is closed.
        pass
    finally:
        os.close(descriptor)
    return whole.getvalue().decode()


def test_rich_is_not_loaded_for_producers_and_celerys_processes() -> None:
    program = "import sys, tasks, tasks.cli; sys.exit('rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=CHECKOUT, check=False).returncode == 0


def test_celery_imports_the_package_only_when_its_command_is_used() -> None:
    program = "import sys, idefics_jobs_celery; sys.exit(bool({'idefics_jobs', 'tasks'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], cwd=CHECKOUT, check=False).returncode == 0
    celery = click.Group(commands=[idefics_jobs_celery.failed])
    assert "send them again" in CliRunner().invoke(celery, ["--help"]).output
    shown = CliRunner().invoke(celery, ["failed", "drop", "--help"])
    assert "--older-than" in shown.output, shown.output


def test_the_command_for_celery_keeps_its_former_name() -> None:
    former = importlib.metadata.EntryPoint("failed", "tasks.failed:failed", "celery.commands")
    assert former.load() is failed
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        importlib.metadata.EntryPoint("other", "tasks.failed:other", "celery.commands").load()
