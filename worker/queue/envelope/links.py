"""Links: the callbacks, error links, chain and chord of a job, with all signatures nested in them.

They are checked as strictly as the job, because the worker publishes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from worker.queue.envelope.bounds import MAX_LINKS, is_plain
from worker.queue.envelope.errors import NO_BODY, MessageRefused, require, shown
from worker.queue.envelope.fields import is_flag, is_index, is_label
from worker.queue.envelope.headers import NESTED, OPTIONS, is_names

#: Entries of a body beside the arguments.
_EMBEDDED = {"callbacks", "errbacks", "chain", "chord"}
_SIGNATURE = {"task", "args", "kwargs", "options", "subtask_type", "immutable", "chord_size"}
#: Canvases that Celery takes apart when it sends them. The tasks of their names never run.
_CANVASES = {"chain": "celery.chain", "group": "celery.group", "chord": "celery.chord"}


def check_embed(embed: Any) -> None:
    """Raises MessageRefused for links that the worker must not publish."""
    # Celery lets these entries replace the headers, which have been checked.
    require(isinstance(embed, dict) and embed.keys() <= _EMBEDDED, NO_BODY)
    if any(value is not None for value in embed.values()):
        _check_signatures(_signatures(embed, ("callbacks", "errbacks", "chain"), ("chord",)))


def _check_signatures(signatures: Iterator[Any]) -> None:
    waiting = list(signatures)
    count = 0
    while waiting:
        count += 1
        require(count + len(waiting) <= MAX_LINKS + 1, f"The job has more than {MAX_LINKS} links: send fewer.")
        waiting += _checked_signature(waiting.pop())


def _signatures(options: dict[str, Any], lists: tuple[str, ...], singles: tuple[str, ...]) -> Iterator[Any]:
    """The signatures under these names. A string is refused: Celery would read each character as a link."""
    for name in lists:
        value = options.get(name)
        require(value is None or isinstance(value, list), f"{name} must be a list of signatures, or null.")
        yield from value or ()
    yield from (options[name] for name in singles if options.get(name) is not None)


def _checked_signature(signature: Any) -> Iterator[Any]:
    """The signatures that are nested in a signature. Raises MessageRefused."""
    why = "A link is not a signature: make it with app.signature(...)."
    require(isinstance(signature, dict) and signature.keys() <= _SIGNATURE, why)
    task, kind = signature.get("task"), signature.get("subtask_type")
    args, kwargs, options = (signature.get(name) for name in ("args", "kwargs", "options"))
    require(is_label(task) and task != "", why)
    require(isinstance(args, list) and isinstance(kwargs, dict) and isinstance(options, dict), why)
    require(signature.get("immutable") is None or is_flag(signature["immutable"]), why)
    require(signature.get("chord_size") is None or is_index(signature["chord_size"]), why)
    _check_options(options)
    once = {**options}
    for name in ("link", "link_error"):
        # A single link may stand without a list.
        once[name] = [once[name]] if isinstance(once.get(name), dict) else once.get(name)
    yield from _signatures(once, ("link", "link_error", "chain"), ("chord",))
    if kind:
        yield from _members(task, kind, kwargs)
    else:
        built_in = (
            "A link names one of Celery's built-in tasks, which no worker runs for others: link a task of your own."
        )
        require(not task.startswith("celery."), built_in)


def _members(task: str, kind: Any, kwargs: dict[str, Any]) -> Iterator[Any]:
    """The signatures in a canvas. Raises MessageRefused."""
    why = "A link is a map, starmap, chunks or an unknown canvas: link a task, a chain, a group or a chord."
    require(isinstance(kind, str) and _CANVASES.get(kind) == task, why)
    if kind == "chord":
        header, body = kwargs.get("header"), kwargs.get("body")
        why = "A link is a chord without a header or a body: make it with chord(header, body)."
        require(kwargs.keys() <= {"header", "body", "kwargs"} and isinstance(kwargs.get("kwargs", {}), dict), why)
        require(isinstance(header, list | dict) and isinstance(body, dict), why)
        yield from header if isinstance(header, list) else [header]
        yield body
    else:
        why = f"A link is a {kind} without tasks: make it with {kind}(...)."
        members = kwargs.get("tasks")
        require(kwargs.keys() == {"tasks"} and isinstance(members, list) and bool(members), why)
        yield from cast(list[Any], members)


def _check_options(options: dict[str, Any]) -> None:
    stamps = options.get("stamped_headers")
    own: set[str] = set(stamps or ()) if is_names(stamps) else set()
    for name, value in options.items():
        if name in NESTED or value is None:
            continue
        if name in own:
            require(is_plain(value), "A link's stamp is too large: stamp it with less.")
            continue
        form = OPTIONS.get(name)
        if form is None:
            raise MessageRefused(f"A link has the option {shown(name)}, which no link may have: leave it out.")
        require(form.holds(value), f"A link's option {name} must be {form.words}.")
    require(own <= options.keys(), "A stamped header of a link has no stamp: stamp it.")
