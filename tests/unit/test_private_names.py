"""The private names of Celery, kombu and billiard that the worker uses: each is still there, with what it takes.

A new release may rename them without a word, so both are pinned to a minor version. After raising the pin, what fails
here is what to look at.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import worker

CHECKOUT = Path(__file__).parents[2]
LIBRARIES = ("billiard", "celery", "kombu")

#: Of an attribute, which takes nothing.
ATTRIBUTE = None

#: By the module, or the module and class, that defines them. Of a function, the names of its parameters.
PRIVATE_NAMES: dict[str, dict[str, str | None]] = {
    # The pool: what BasePool tells of itself, and the timers' callbacks when the event loop turns no longer.
    "celery.concurrency.base:BasePool": {"_get_info": "self"},
    "celery.concurrency.prefork": {"_run_ready_callbacks": "hub"},
    # A request that drops its decoded payload, and that is revoked once its job has ended.
    "celery.worker.request:Request": {
        "_Request__payload": ATTRIBUTE,
        "_already_revoked": ATTRIBUTE,
        "_announce_revoked": "self reason terminated signum expired",
        "_apply_result": ATTRIBUTE,
        "_args": ATTRIBUTE,
        "_argsrepr": ATTRIBUTE,
        "_body": ATTRIBUTE,
        "_content_encoding": ATTRIBUTE,
        "_content_type": ATTRIBUTE,
        "_context": ATTRIBUTE,
        "_decoded": ATTRIBUTE,
        "_delivery_info": ATTRIBUTE,
        "_kwargs": ATTRIBUTE,
        "_kwargsrepr": ATTRIBUTE,
        "_payload": ATTRIBUTE,
    },
    # Tracebacks whose code is copied once.
    "billiard.process:BaseProcess": {"_name": ATTRIBUTE},
    "billiard.einfo": {"_Code": "code", "_Frame": "frame"},
    # The consumer: a job that cannot be handed over gives its place back; events are sent together.
    "celery.worker.worker:WorkController": {"_process_task": "self req", "_quick_release": ATTRIBUTE},
    "celery.worker.consumer.consumer:Consumer": {"_flush_events": "self"},
    # A message whose payload is decoded once.
    "kombu.message:Message": {"_decoded_cache": ATTRIBUTE},
    "kombu.transport.virtual.base:Message": {"_raw": ATTRIBUTE},
    # What the model process publishes, with the patience of the process.
    "celery.app.amqp:AMQP": {"_create_task_sender": "self", "_producer_pool": ATTRIBUTE},
    # The result backend's record, and the rest of a failed chain.
    "celery.backends.base:Backend": {
        "_fail_chain": "self chain exc traceback store_result state",
        "_get_result_meta": "self result state traceback request format_date encode",
    },
    # The transport: the script in the place of BRPOP, and who answers for a message.
    "kombu.transport": {"_transport_cache": ATTRIBUTE},
    "kombu.transport.redis:Channel": {
        "_brpop_read": "self options",
        "_brpop_sent_at": ATTRIBUTE,
        "_brpop_start": "self timeout",
        "_create_client": "self asynchronous",
        "_fanout_queues": ATTRIBUTE,
        "_flush_brpop_reauth": "self",
        "_in_poll": ATTRIBUTE,
        "_on_connection_disconnect": "self connection",
        "_q_for_pri": "self queue pri",
        "_purge": "self queue",
        "_queue_bind": "self exchange routing_key pattern queue",
        "_queue_cycle": ATTRIBUTE,
        "_receive_one": "self c",
    },
    "kombu.transport.redis:MultiChannelPoller": {"_channels": ATTRIBUTE},
    "kombu.transport.redis:QoS": {
        "_remove_from_indices": "self delivery_tag pipe",
        "_vrestore_count": ATTRIBUTE,
    },
    "kombu.transport.virtual.base:Channel": {
        "_get_message_priority": "self message reverse",
        "_lookup": "self exchange routing_key default",
    },
    "kombu.transport.virtual.base:QoS": {"_delivered": ATTRIBUTE, "_dirty": ATTRIBUTE},
    "kombu.transport.virtual.base:Transport": {"_deliver": "self message queue"},
}

#: Without an underscore, and in no documentation.
UNDOCUMENTED: dict[str, dict[str, str | None]] = {
    "celery.app.trace": {
        "fast_trace_task": "task uuid request body content_type content_encoding loads _loc hostname _"
    },
    "celery.concurrency.prefork": {"process_initializer": "app hostname"},
    "celery.worker.state": {
        "maybe_shutdown": "",
        "reserved_requests": ATTRIBUTE,
        "revoked": ATTRIBUTE,
        "scheduled_requests": ATTRIBUTE,
        "should_stop": ATTRIBUTE,
        "should_terminate": ATTRIBUTE,
        "task_ready": (
            "request successful remove_request discard_active_request discard_reserved_request "
            "discard_scheduled_request"
        ),
    },
    "kombu.asynchronous.semaphore:LaxBoundedSemaphore": {"grow": "self n", "release": "self"},
    "kombu.asynchronous.hub:Hub": {
        "add_reader": "self fds callback args",
        "add_writer": "self fds callback args",
        "call_repeatedly": "self delay callback args",
        "fire_timers": "self min_delay max_delay max_timers propagate",
        "remove": "self fd",
        "remove_writer": "self fd",
    },
}

TABLE = [
    pytest.param(owner, name, parameters, id=f"{owner}.{name}")
    for names in (PRIVATE_NAMES, UNDOCUMENTED)
    for owner, known in names.items()
    for name, parameters in known.items()
]
ALL_PRIVATE = {name for known in PRIVATE_NAMES.values() for name in known}


@pytest.mark.parametrize(("owner", "name", "parameters"), TABLE)
def test_a_name_that_we_use_is_still_there(owner: str, name: str, parameters: str | None) -> None:
    place = _place(owner)
    if parameters is ATTRIBUTE:
        assert hasattr(place, name) or re.search(rf"\bself\.{_written(name)}\b", inspect.getsource(place))
    else:
        assert list(inspect.signature(getattr(place, name)).parameters) == parameters.split()


def test_celery_gives_the_pool_its_semaphore() -> None:
    from celery.worker.components import Pool

    assert "semaphore=semaphore" in inspect.getsource(Pool.create)


def test_no_class_of_ours_has_a_private_name_of_its_base_by_chance() -> None:
    """A release may add one that is ours already, and then calls what it does not know."""
    unknown = {
        f"{ours.__module__}.{ours.__qualname__}.{name}"
        for ours, bases in _classes_on_theirs()
        for name in _private_names(ours)
        if name not in ALL_PRIVATE and any(_mentions(base, name) for base in bases)
    }
    assert not unknown


def test_every_private_name_of_theirs_that_we_use_is_in_the_table() -> None:
    trees = [ast.parse(path.read_text()) for path in (CHECKOUT / "worker").rglob("*.py")]
    ours = {name for tree in trees for name in _defined(tree)}
    used = {name for tree in trees for name in _used(tree)}
    assert used - ours - ALL_PRIVATE <= {
        "_exit",  # os
        "_fields",  # ast, of the traced code
        "_replace",  # a NamedTuple's
    }


def test_the_table_names_nothing_that_is_not_used() -> None:
    sources = "\n".join(path.read_text() for path in (CHECKOUT / "worker").rglob("*.py"))
    assert not {name for name in ALL_PRIVATE if not re.search(rf"\b{name}\b", sources)}


def _place(owner: str) -> Any:
    module, _, name = owner.partition(":")
    place = importlib.import_module(module)
    return getattr(place, name) if name else place


def _written(name: str) -> str:
    """As its class writes it."""
    return name.removeprefix("_Request") if name.startswith("_Request__") else name


def _classes_on_theirs() -> Iterator[tuple[type, list[type]]]:
    """Our classes, each with its bases in the libraries. Not those that need torch."""
    for found in pkgutil.walk_packages(worker.__path__, "worker."):
        if found.name.split(".")[1] in ("demo", "engine", "model_process", "models"):
            continue
        module = importlib.import_module(found.name)
        for ours in vars(module).values():
            if isinstance(ours, type) and ours.__module__ == module.__name__:
                bases = [base for base in ours.__mro__ if base.__module__.split(".")[0] in LIBRARIES]
                if bases:
                    yield ours, bases


def _private_names(ours: type) -> set[str]:
    """Those that a class defines, or that its methods read or set on itself."""
    mentioned = set(re.findall(r"\bself\.(_[a-z]\w*)", _source(ours)))
    return mentioned | {name for name in vars(ours) if re.match("_[a-z]", name)}


def _mentions(base: type, name: str) -> bool:
    return hasattr(base, name) or bool(re.search(rf"\bself\.{name}\b", _source(base)))


@functools.cache
def _source(cls: type) -> str:
    try:
        return inspect.getsource(cls)
    except OSError:
        # Celery makes a class of each bootstep, which is in no file.
        return ""


def _defined(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
            yield node.attr


def _used(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and re.match("_[a-zA-Z]", node.attr):
            yield node.attr
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in LIBRARIES:
            yield from (alias.name for alias in node.names if alias.name.startswith("_"))


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"
