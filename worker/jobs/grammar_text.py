"""A job's `response_format` as a grammar in llguidance's notation. Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from llguidance import regex_to_lark

from tasks.response_format import (
    ChoiceFormat,
    GrammarFormat,
    JsonObjectFormat,
    JsonSchemaFormat,
    RegexFormat,
    ResponseFormat,
)

#: Before an answer most models write a blank, which is no part of it.
WITH_BLANK = 'start: " "? @body'
#: JSON is written as by Python's json.dumps: a model that may write any white space sometimes never ends. What the
#: library does not support is refused and not ignored.
_JSON_OPTIONS = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "coerce_one_of": False,
    "lenient": False,
}


def grammar_text(form: ResponseFormat, *, with_blank: bool) -> str:
    """The grammar of a form; `with_blank`: that of its texts with and without a blank before them."""
    body = _body(form)
    if not with_blank:
        return _written([body])
    return _written([{"lark_grammar": WITH_BLANK}, {"name": "body", **body}])


def never_begins_with_blank(form: ResponseFormat) -> bool:
    """Whether this is known without compiling it."""
    return not isinstance(form, RegexFormat | GrammarFormat)


def _body(form: ResponseFormat) -> dict[str, Any]:
    if isinstance(form, JsonSchemaFormat):
        return {"json_schema": {**form.json_schema.schema_, "x-guidance": _JSON_OPTIONS}}
    if isinstance(form, JsonObjectFormat):
        return {"json_schema": {"type": "object", "x-guidance": _JSON_OPTIONS}}
    if isinstance(form, RegexFormat):
        return {"lark_grammar": f"start: TEXT\nTEXT: /{regex_to_lark(form.regex)}/"}
    if isinstance(form, ChoiceFormat):
        return {"lark_grammar": f"start: {' | '.join(map(_literal, form.choice))}"}
    return {"lark_grammar": form.grammar}


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _written(grammars: Sequence[dict[str, Any]]) -> str:
    return json.dumps({"grammars": grammars}, ensure_ascii=False)
