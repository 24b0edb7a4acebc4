"""Opens a campaign's state for a run: the same campaign as before, or a new one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from .errors import CampaignError
from .lock import locked
from .plan import Plan
from .record import base_name
from .state import About, CampaignState, state_path
from .tables.patterns import is_pattern, matching_files, may_match


@contextlib.contextmanager
def opened(
    input: str, output: str, plan: Plan, *, name: str = "", only_new: Sequence[str] = ()
) -> Iterator[CampaignState]:
    """The state of the campaign with this output, locked against other runs.

    Raises CampaignError if the output is another campaign's or another program's, or another run holds it.
    """
    path = state_path(output)
    asked = About(
        id=uuid.uuid4().hex,
        name=name or base_name(output),
        plan=plan.as_dict(),
        input=absolute(input),
        output=absolute(output),
        only_new=sorted(map(absolute, only_new)),
        created=time.time(),
    )
    if asked.input == asked.output:
        raise CampaignError("INPUT and OUTPUT are the same file: name another output.")
    if may_match(asked.input, asked.output):
        raise CampaignError("OUTPUT would be one of INPUT's files: name another output, or a folder of its own.")
    if not path.exists() and "://" not in output and Path(output).exists():
        raise CampaignError(f"{output} exists already and is no output of a campaign: name another, or remove it.")
    with locked(path.with_name(f"{path.name}-lock")), CampaignState.begin(path, asked) as state:
        _check_same(state.about, asked, path)
        if name:
            state.update(name=name)
        yield state


def _check_same(about: About, asked: About, path: Path) -> None:
    # As JSON: the stored plan has lists where the asked one may have tuples.
    before, now = ({**each.plan, "input": each.input, "only_new": each.only_new} for each in (about, asked))
    differing = [name for name in {**before, **now} if _listed(before.get(name)) != _listed(now.get(name))]
    if differing:
        raise CampaignError(
            f"This output belongs to a campaign with another {', '.join(differing)}: run it with the same options, "
            f"name another output, or delete {path} to begin anew."
        )


def _listed(value: object) -> object:
    return json.loads(json.dumps(value))


def take_up_failed(state: CampaignState, codes: Sequence[str] | None) -> None:
    """Delete the answers of failed rows that are to run again: with some codes, or all where there are no codes.

    None: of no failed rows, but of those that a cancellation has ended.
    """
    about = state.about
    if about.canceled:
        # The jobs that the cancellation has ended.
        state.retry(["canceled"])
        state.update(canceled=False, retrying=about.retrying)
    if codes is not None and about.retrying != sorted(set(codes)):
        # Otherwise an interrupted run has done so: what failed again in it is not run a third time.
        state.retry(sorted(set(codes)))


def is_finished(state: CampaignState) -> bool:
    """Whether all rows have their answers, the output is there, and the input is what it was."""
    about = state.about
    has_output = "://" in about.output or Path(about.output).exists()
    return bool(about.finished) and about.finished == stamp(about.input) and has_output


def absolute(path: str) -> str:
    """A path that means the same in another folder; a URL as it is."""
    return path if "://" in path else str(Path(path).absolute())


def stamp(path: str) -> str:
    """Size and time of a local file, or those of a pattern's files, by which a change is noticed.

    Empty for URLs and folders.
    """
    paths = [Path(each) for each in matching_files(path)] if is_pattern(path) else [Path(path)]
    if "://" in path or not all(each.is_file() for each in paths):
        return ""
    stats = [each.stat() for each in paths]
    of_files = " ".join(f"{about.st_size} {about.st_mtime_ns}" for about in stats)
    return of_files if len(paths) == 1 else hashlib.blake2b(of_files.encode(), digest_size=16).hexdigest()
