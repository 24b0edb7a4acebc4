"""The command `celery -A worker.app failed`.

Celery imports its plug-ins whenever a worker starts. This one stands outside of `idefics_jobs`, whose import would take
a fifth of the start, and imports it when the command is used.
"""

from __future__ import annotations

from typing import Any

import click


class _Failed(click.Command):
    def make_context(self, *arguments: Any, **more: Any) -> click.Context:
        from idefics_jobs.cli.failed import failed

        return failed.make_context(*arguments, **more)


failed = _Failed("failed", help="Jobs that failed: list them, send them again, drop them.")
