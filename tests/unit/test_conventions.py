"""Conventions of the tree that no linter knows."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.test_private_names import PRIVATE_NAMES
from worker.demo.stack import CHECKOUT

#: Lines of a module and of a class; settings are one class, with a description below each field.
MAX_MODULE_LINES, MAX_CLASS_LINES = 400, 200
LONG_CLASSES = {"config/settings.py:Settings"}
#: Attributes of ours with a leading underscore that tests use. Lower it when there are fewer.
MOST_PRIVATE_REACHES = 16
#: Private names of libraries, which have a test of their own, and `os._exit`.
OF_LIBRARIES = {name for names in PRIVATE_NAMES.values() for name in names} | {"_exit"}


def _private_reaches(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if (
            isinstance(node, ast.Attribute)
            and node.attr.startswith("_")
            and not node.attr.startswith("__")
            and node.attr not in OF_LIBRARIES
            and ast.unparse(node.value) not in ("self", "cls")
        ):
            yield f"{path.relative_to(CHECKOUT)}:{node.lineno} {ast.unparse(node)}"


def test_tests_use_public_names_but_for_a_few() -> None:
    reaches = [found for path in sorted((CHECKOUT / "tests").rglob("*.py")) for found in _private_reaches(path)]
    assert len(reaches) <= MOST_PRIVATE_REACHES, "\n".join(reaches)


@pytest.mark.skipif(not (CHECKOUT / ".git").exists(), reason="no checkout of git")
def test_no_ignored_file_is_part_of_the_tree() -> None:
    # Checking such a file out replaces what lies there, such as a virtual environment.
    command = ["git", "ls-files", "--cached", "--ignored", "--exclude-standard"]
    run = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=20, check=True)
    assert run.stdout == ""


def _modules() -> Iterator[tuple[str, str]]:
    for folder in ("config", "tasks", "worker", "benchmarks"):
        for path in sorted((CHECKOUT / folder).rglob("*.py")):
            yield str(path.relative_to(CHECKOUT)), path.read_text()


def test_no_module_is_longer_than_400_lines() -> None:
    assert [name for name, source in _modules() if source.count("\n") > MAX_MODULE_LINES] == []


def test_no_class_but_the_settings_is_longer_than_200_lines() -> None:
    long = {
        f"{name}:{node.name}"
        for name, source in _modules()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ClassDef) and (node.end_lineno or 0) - node.lineno >= MAX_CLASS_LINES
    }
    assert long == LONG_CLASSES
