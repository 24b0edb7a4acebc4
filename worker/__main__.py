"""The command `python -m worker check [MODEL]`, which loads a model as a worker does and says what it needs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pydantic import ValidationError

from config import settings
from tasks.errors import JobError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit status, 1 if a worker could not serve the model."""
    parser = argparse.ArgumentParser(prog="python -m worker")
    command = parser.add_subparsers(required=True, metavar="COMMAND").add_parser(
        "check",
        help="load a model as a worker does, show it a picture, and say what it needs and how fast it is",
        description="Load a model as a worker does, with the IDEFICS_ settings of the environment, show it a picture, "
        "and say what it needs and how fast it is. Needs no Redis.",
    )
    command.add_argument("model", nargs="?", metavar="MODEL", help="hub id, folder or demo; default: IDEFICS_MODEL")
    command.add_argument("--revision", help="commit of the hub's repository; default: IDEFICS_MODEL_REVISION")
    command.add_argument("--no-speed", action="store_true", help="do not measure the speed")
    asked = parser.parse_args(arguments)
    changes = {"model": asked.model, "model_revision": asked.revision}
    try:
        found = settings.load().model_copy(update={name: value for name, value in changes.items() if value})
        # Imported here: importing torch takes seconds, and --help does not need it.
        from worker.check import check

        for line in check(found, measure=not asked.no_speed):
            print(line, flush=True)
    except (ValidationError, ValueError, RuntimeError, JobError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
