"""Each row of SECURITY.md's tables names tests that exist."""

from __future__ import annotations

import ast
import functools
import re

from worker.demo.stack import CHECKOUT

ROW = re.compile(r"\| (can|cannot) \| (.+) \| (`.+`) \|")
TEST = re.compile(r"`(tests/[a-z0-9_/]+\.py)::(test_[a-z0-9_]+)`")


def section() -> str:
    text = (CHECKOUT / "SECURITY.md").read_text()
    return text.partition("## Who is trusted with what\n")[2].partition("\nAn id of a job")[0]


@functools.cache
def names_in(path: str) -> set[str]:
    tree = ast.parse((CHECKOUT / path).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_row_names_tests_that_exist() -> None:
    rows = [line for line in section().splitlines() if line.startswith("| c")]
    assert len(rows) > 40
    for row in rows:
        match = ROW.fullmatch(row)
        assert match, row
        named = match[3].split("<br>")
        for each in named:
            test = TEST.fullmatch(each)
            assert test, each
            assert test[2] in names_in(test[1]), each


def test_every_party_has_a_row() -> None:
    parts = re.split(r"^\*\*(.+)\*\*$", section(), flags=re.MULTILINE)[1:]
    parties = dict(zip(parts[::2], parts[1::2], strict=True))
    assert len(parties) == 11
    assert all("\n| c" in rows for rows in parties.values())
