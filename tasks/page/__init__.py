"""One HTML page: inert data, a script and a style sheet known by their hashes.

The data stands in the page as JSON, which no browser runs; the script builds the page from it with `textContent` alone.
The page's policy (CSP) admits that one script and that one style sheet, and no sources but those that are named: none,
for a self-contained page. So even a text that got into the page as HTML could run and load nothing.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from ..printable import escaped, escaped_json

#: Shared by the pages: colors and layout; building elements, and plots.
BASE_STYLES = ("base.css",)
BASE_SCRIPTS = ("dom.js", "plots.js")
#: Pictures in the page itself.
SELF_CONTAINED = "img-src data:"
#: Could end the script element that holds the data, or begin a comment in it.
_MARKUP = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}

_DOCUMENT = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
<noscript><p class="notice">This page draws itself with its own script, which is switched off here.</p></noscript>
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
</body>
</html>
"""


def part(name: str, package: str = __name__) -> str:
    """A file of a package: a part of a page."""
    return files(package).joinpath(name).read_text(encoding="utf-8")


def policy(styles: Sequence[str], scripts: Sequence[str], sources: str = SELF_CONTAINED) -> str:
    """The page's Content-Security-Policy. `sources`: what it may load beside its script and its style sheet."""
    return (
        f"default-src 'none'; script-src {_hash(_one_scope(scripts))}; style-src {_hash(_joined(styles))}; {sources}; "
        "base-uri 'none'; form-action 'none'"
    )


def document(
    title: str,
    body: str,
    data: Mapping[str, Any],
    styles: Sequence[str],
    scripts: Sequence[str],
    sources: str = SELF_CONTAINED,
) -> str:
    """The page. `body`, `styles` and `scripts` are trusted text; `title` and `data` may hold anything JSON can."""
    return _DOCUMENT.format(
        policy=policy(styles, scripts, sources),
        title=escape(escaped(title)),
        style=_joined(styles),
        body=body,
        data=inert_json(data),
        script=_one_scope(scripts),
    )


def inert_json(data: Any) -> str:
    """JSON for a script element of type application/json: no text in it ends the element or reorders the source."""
    text = escaped_json(json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")))
    for char, escape_ in _MARKUP.items():
        text = text.replace(char, escape_)
    return text


def _joined(styles: Sequence[str]) -> str:
    return "\n".join(styles)


def _one_scope(scripts: Sequence[str]) -> str:
    return '(() => {\n"use strict";\n' + "\n".join(scripts) + "\n})();\n"


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
