"""A page that loads and runs nothing but its own script, whatever its data holds."""

from __future__ import annotations

import base64
import hashlib
import json
import re

from tasks.page import BASE_STYLES, document, inert_json, part
from tests.support.hostile_text import HOSTILE, is_clean
from worker.demo.stack import CHECKOUT

NASTY = "</script><script>alert(1)</script><!-- &amp; \u2028 \u202e \ud800"


def _page(data: object, title: str = "A page") -> str:
    return document(title, "<main></main>", {"value": data}, [part(name) for name in BASE_STYLES], ["const a = '<b>';"])


def test_the_data_comes_back_and_cannot_end_its_element() -> None:
    page = _page([NASTY, HOSTILE, None, 1.5])
    [data] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert json.loads(data) == {"value": [NASTY, HOSTILE, None, 1.5]}
    assert not set("<>&\u2028\u202e") & set(data)
    assert page.count("</script>") == 2


def test_the_page_can_be_written_as_utf_8() -> None:
    assert is_clean(inert_json({NASTY: HOSTILE}))
    inert_json({NASTY: HOSTILE}).encode()


def test_the_title_is_text() -> None:
    page = _page(None, "</title><script>\u202e")
    assert "<title>&lt;/title&gt;&lt;script&gt;\\u202e</title>" in page


def test_the_policy_admits_the_pages_own_script_and_style_alone() -> None:
    page = _page(None)
    [policy] = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    script, style = page.split("<script>")[1].split("</script>")[0], page.split("<style>")[1].split("</style>")[0]
    rules = dict(rule.strip().partition(" ")[::2] for rule in policy.split(";"))
    assert rules.pop("img-src") == "data:"
    assert rules.pop("script-src") == _hash(script)
    assert rules.pop("style-src") == _hash(style)
    assert rules.pop("default-src") == rules.pop("base-uri") == rules.pop("form-action") == "'none'"
    assert not rules


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def test_no_script_reads_html() -> None:
    reads_html = re.compile(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function")
    scripts = list((CHECKOUT / "tasks").rglob("*.js"))
    assert scripts
    assert [script.name for script in scripts if reads_html.search(script.read_text())] == []
