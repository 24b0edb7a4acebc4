"""A job's updates as `idefics-jobs watch` prints them: its text on standard output, all else on standard error."""

from __future__ import annotations

import sys
from typing import Any

import click

from ..printable import escaped
from ..updates import EndUpdate, RestartedUpdate, StageUpdate, TextUpdate, Update
from .console import echo, echo_json


def show_updates(job: Any, timeout: float | None, *, as_json: bool) -> None:
    """Print a job's updates to its end. Raises the error that it ended with, and those of SubmittedJob.watch."""
    screen = _Screen()
    for update in job.watch(timeout):
        if as_json:
            echo_json({"kind": update.kind, **update.data()}, on_one_line=True)
        else:
            screen.show(update)
        if isinstance(update, EndUpdate):
            update.result()


class _Screen:
    """What a person sees of a job."""

    def __init__(self) -> None:
        self._has_text = False

    def show(self, update: Update) -> None:
        match update:
            case StageUpdate(stage, ahead):
                echo(f"[{stage}]" if ahead is None else f"[{stage}, {ahead} before it]", err=True)
            case TextUpdate(text):
                self._write(text)
            case RestartedUpdate():
                self._end_line()
                echo("[restarted]", err=True)
            case EndUpdate():
                if not self._has_text and update.status == "succeeded":
                    self._write(update.result().text)
                self._end_line()

    def _write(self, text: str) -> None:
        # Its lines stay lines.
        click.echo("\n".join(map(escaped, text.split("\n"))), nl=False)
        sys.stdout.flush()
        self._has_text = True

    def _end_line(self) -> None:
        if self._has_text:
            click.echo()
        self._has_text = False
