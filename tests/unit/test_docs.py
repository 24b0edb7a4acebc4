"""The documentation: it builds without a network, names files that exist, and leaves no key or setting out."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from config.settings import PREFIX, Settings
from tasks.errors import ERRORS
from tasks.redis_keys import REDIS_KEYS
from worker.demo.stack import CHECKOUT
from worker.observability.metrics import CALLBACKS, DEFINITIONS, WORKER

DOCS = CHECKOUT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
#: Where paths are written in backticks.
WITH_PATHS = [*PAGES, *(CHECKOUT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md"))]
PATH = re.compile(r"`((?:benchmarks|config|docs|examples|tasks|tests|worker)/[\w./-]*)(?:::\w+)?`")
#: To a file, not to an address or to a heading of the same page.
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")


@pytest.fixture
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_site_builds_and_its_pages_load_nothing_from_other_servers(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="`make setup` installs MkDocs")
    # Not --quiet: warnings that are not printed are not counted.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > len(PAGES)
    for page in pages:
        text = page.read_text()
        assert "<!-- generated" not in text
        assert "```" not in text
        assert re.findall(r'<(?:script|link|img|iframe)\b[^>]*(?:src|href)="(?:https?:)?//[^"]*', text) == []
        # The theme would fetch a script to draw it.
        assert 'class="mermaid"' not in text


@pytest.mark.parametrize("page", WITH_PATHS, ids=lambda page: page.name)
def test_a_page_names_files_that_exist(page: Path) -> None:
    paths = PATH.findall(page.read_text())
    assert [path for path in paths if not (CHECKOUT / path).exists()] == []


@pytest.mark.parametrize("page", WITH_PATHS, ids=lambda page: page.name)
def test_a_page_links_to_files_that_exist(page: Path) -> None:
    links = LINK.findall(page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_page_is_in_the_navigation() -> None:
    navigation = (CHECKOUT / "mkdocs.yml").read_text()
    assert [page.name for page in PAGES if f": {page.relative_to(DOCS)}" not in navigation] == []


def test_every_mark_in_a_page_names_a_generated_part(generate: ModuleType) -> None:
    marks = [name for page in PAGES for name in generate.MARK.findall(page.read_text())]
    assert sorted(marks) == sorted(generate.PARTS)


def test_the_settings_page_has_every_setting_and_every_group(generate: ModuleType) -> None:
    page = generate.settings()
    assert [name for name in Settings.model_fields if f"| `{PREFIX}{name.upper()}` |" not in page] == []
    assert [name for name in generate.GROUPS.values() if f"## {name}" not in page] == []


def test_the_errors_page_has_every_code(generate: ModuleType) -> None:
    assert [code for code in ERRORS if f"| `{code}` |" not in generate.errors()] == []


def test_the_page_of_metrics_has_every_metric(generate: ModuleType) -> None:
    for registry, part in ((WORKER, generate.worker_metrics), (CALLBACKS, generate.callbacks_metrics)):
        assert [each.name for each in DEFINITIONS[registry] if f"| `{each.name}` |" not in part()] == []


def test_no_table_has_an_empty_description(generate: ModuleType) -> None:
    for part in (
        generate.settings,
        generate.fields,
        generate.result,
        generate.errors,
        generate.client_errors,
        generate.redis_keys,
        generate.queue_metrics,
    ):
        assert [line for line in part().splitlines() if re.search(r"` \|[^|]*\|\s+\|$", line)] == []


def test_the_table_of_keys_has_every_key(generate: ModuleType) -> None:
    assert [key.pattern for key in REDIS_KEYS if f"| `{key.pattern}` |" not in generate.redis_keys()] == []
