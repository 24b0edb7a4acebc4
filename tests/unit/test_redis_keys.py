"""The table of Redis keys: nothing else names keys, and each user's rights in Redis are those that the table says."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from config.settings import Settings
from tasks.protocol import CALLBACK_QUEUE, QUEUE
from tasks.redis_keys import (
    BINDING,
    EVENT_QUEUE,
    MAILBOX_REPLY,
    PERMANENT_BINDING,
    PRIORITY_LIST,
    QUEUE_LIST,
    REDIS_KEYS,
    SEPARATOR,
    RedisKey,
    is_no_queue,
)
from worker.demo.stack import CHECKOUT

USERS = ("producer", "worker", "callbacks", "monitor", "exporter")
#: Keys of kombu's whose names say which app they belong to: rights name some of them.
_PER_APP = (QUEUE_LIST, PRIORITY_LIST, BINDING, PERMANENT_BINDING, MAILBOX_REPLY, EVENT_QUEUE)
ids = {key: key.pattern for key in REDIS_KEYS}.get


# Names


#: How the names of keys begin: ours, Celery's and kombu's. `unacked_restore_...` are options.
_KEY = re.compile(r"idefics:|celery-task|_kombu\.|celeryev|unacked(_index|_mutex)?$|.*\.pidbox")


def _literals(path: Path) -> Iterator[tuple[int, str]]:
    tree = ast.parse(path.read_text())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value) for node in ast.walk(tree) if isinstance(node, documented) and _has_docstring(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value


def _has_docstring(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return bool(node.body) and isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant)


def test_no_other_module_spells_out_a_key() -> None:
    found = [
        f"{path.relative_to(CHECKOUT)}:{line}: {text[:60]!r}"
        for folder in ("tasks", "worker", "config")
        for path in sorted((CHECKOUT / folder).rglob("*.py"))
        if path != CHECKOUT / "tasks" / "redis_keys.py"
        for line, text in _literals(path)
        if _KEY.search(text)
    ]
    assert not found, f"take these names from tasks/redis_keys.py: {found}"


def test_a_key_is_named_once() -> None:
    patterns = [key.pattern for key in REDIS_KEYS]
    assert len(patterns) == len(set(patterns)) > 30


@pytest.mark.parametrize("key", REDIS_KEYS, ids=ids)
def test_a_name_is_recognized_by_its_pattern(key: RedisKey) -> None:
    name = key.named("jobs.large", "\x06\x16", "3")
    assert key.matches(name)
    assert name.startswith(key.prefix)
    assert "{" not in name


@pytest.mark.parametrize("key", REDIS_KEYS, ids=ids)
def test_a_keys_ttl_is_a_number_or_an_existing_setting(key: RedisKey) -> None:
    settings = {f"IDEFICS_{name.upper()}" for name in Settings.model_fields}
    if key.ttl is None:
        assert re.search(r"Permanent[:,]", key.meaning), "say why it has no TTL"
    else:
        named = set(re.findall(r"IDEFICS_\w+", key.ttl))
        assert named <= settings
        assert named or re.match(r"\d", key.ttl) or key.pattern == "unacked_mutex"


@pytest.mark.parametrize("key", [key for key in REDIS_KEYS if key not in (QUEUE_LIST, PRIORITY_LIST)], ids=ids)
def test_no_link_is_sent_into_a_key_that_is_no_queue(key: RedisKey) -> None:
    # Names that begin otherwise than with a letter or a digit are refused before.
    name = key.named("x", "y")
    assert is_no_queue(name) or not name[0].isalnum()


# Rights: config/redis/users.acl.template


def _rights() -> dict[str, tuple[str, ...]]:
    """The patterns of keys that each user has some right to."""
    text = (CHECKOUT / "config" / "redis" / "users.acl.template").read_text()
    lines = " ".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    users = re.split(r"\buser ", lines)[1:]
    return {user.split()[0]: tuple(re.findall(r"~([^\s)]+)", user)) for user in users}


RIGHTS = _rights()


def _examples(key: RedisKey) -> list[str]:
    """Names that are ours, of a kind whose other keys belong to other apps."""
    if key is QUEUE_LIST:
        return [QUEUE, CALLBACK_QUEUE]
    if key is PRIORITY_LIST:
        return [key.named(queue, SEPARATOR, "3") for queue in (QUEUE, CALLBACK_QUEUE)]
    if key in (BINDING, PERMANENT_BINDING):
        return [key.named(QUEUE), key.named("celeryev")]
    if key is MAILBOX_REPLY:
        return [key.named("x", "celery"), key.named("x", CALLBACK_QUEUE)]
    return [key.named("x")]


def _may_reach(user: str, key: RedisKey) -> bool:
    return any(fnmatchcase(name, pattern) for name in _examples(key) for pattern in RIGHTS[user])


def test_the_template_has_the_tables_users() -> None:
    assert RIGHTS.keys() == {"default", *USERS}
    assert RIGHTS["default"] == ()


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("key", REDIS_KEYS, ids=ids)
def test_a_user_reaches_the_keys_that_it_writes_or_reads_and_no_others(key: RedisKey, user: str) -> None:
    assert _may_reach(user, key) == (user in key.writers + key.readers)


@pytest.mark.parametrize(("user", "pattern"), [(user, pattern) for user in USERS for pattern in RIGHTS[user]], ids=str)
def test_a_right_is_for_a_key_of_the_table(user: str, pattern: str) -> None:
    queues = ("celery", "celery\x06\x163", "idefics:3")
    names = [*queues, *(name for key in REDIS_KEYS for name in _examples(key))]
    assert any(fnmatchcase(name, pattern) for name in names)
