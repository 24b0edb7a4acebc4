"""Structured answers, their cost and validity: `python -m benchmarks.structured [shipped] [mid-size] [valid] [--save
structured]`.

`shipped` and `mid-size` are the tokens a second of rows that keep to a schema, divided by those of rows without one, in
turns on one model. `valid` checks 10,000 complete answers, greedy and sampled, in random forms: half of their schemas
are those of the JSON Schema test suite that are supported.
"""

from __future__ import annotations

import json
import random
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jsonschema import Draft202012Validator

from benchmarks import measures
from benchmarks.checkpoints import CHECKPOINTS
from config.settings import Settings
from tasks.payloads import parse
from worker.engine.engine import Engine
from worker.engine.grammar import Grammar
from worker.engine.interfaces import Model
from worker.engine.row import Row, Sampling
from worker.engine.scheduler import Limits
from worker.jobs.grammars import Grammars
from worker.models.loading import load

ROWS, TOKENS, ROUNDS = 32, 64, 15
ANSWERS = 10_000
#: Answers in one form, forms that run together, and the tokens after which an answer is cut.
EACH, TOGETHER, MOST_TOKENS = 20, 100, 150
#: See tests/unit/test_grammars.py.
SUITE = Path(__file__).parents[1] / "tests" / "unit" / "json_schema_suite.json"
PRODUCT = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "price": {"type": "number"},
        "colour": {"enum": ["red", "green", "blue"]},
        "sizes": {"type": "array", "items": {"type": "integer"}, "maxItems": 4},
    },
    "required": ["name", "price", "colour", "sizes"],
    "additionalProperties": False,
}
#: Longer than the rows that are measured.
PRODUCTS = {"type": "array", "items": PRODUCT, "minItems": 50}

Schema = dict[str, Any]
#: A form, and whether a text has it.
Form = tuple[dict[str, Any], Callable[[str], bool]]


# --- Cost ---


def cost(checkpoint: str) -> dict[str, Any]:
    """Tokens a second with a schema to those without, as the median of the rounds."""
    with tempfile.TemporaryDirectory() as folder:
        model = load(Settings(model=str(CHECKPOINTS[checkpoint].make(Path(folder))), dtype="float32"))
    grammars = Grammars(model.codec.grammar_tokens)
    grammar = compiled(grammars, of_schema(PRODUCTS))
    ratios, speeds = [], []
    for number in range(ROUNDS + 1):
        # Each goes first as often as the other.
        order: Sequence[Grammar | None] = (grammar, None) if number % 2 else (None, grammar)
        taken = {with_form is not None: seconds(model, with_form) for with_form in order}
        ratios.append(taken[False] / taken[True])
        speeds.append(ROWS * TOKENS / taken[True])
    grammars.close()
    # The first round is warming up.
    return {
        "ratio": round(statistics.median(ratios[1:]), 3),
        "tokens_per_s": round(statistics.median(speeds[1:])),
        "rounds": [round(ratio, 3) for ratio in ratios[1:]],
    }


def seconds(model: Model, grammar: Grammar | None) -> float:
    """How long the rows take. Each has as many tokens with a grammar as without one."""
    tokens = model.codec.prepare(["Question: What is it? Answer:"])
    rows = [Row(tokens, Sampling(TOKENS), grammar=grammar) for _ in range(ROWS)]
    started = time.perf_counter()
    model.run(rows, lambda: None, lambda running: ())
    taken = time.perf_counter() - started
    assert all(len(row.output.result().ids) == TOKENS for row in rows)
    return taken


# --- Validity ---


def valid(count: int = ANSWERS) -> dict[str, int]:
    """Check `count` complete answers, which run beside answers without a form. Answers that are cut do not count."""
    rng = random.Random(0)
    schemas = [case["schema"] for case in json.loads(SUITE.read_text())["cases"]]
    # Python's `re`, by which answers are checked, has no classes of Unicode.
    suite = [schema for schema in schemas if "\\p{" not in json.dumps(schema).replace("\\\\", "\\")]
    model = load(Settings(model="demo", dtype="float32"))
    grammars = Grammars(model.codec.grammar_tokens)
    engine = Engine(model, Limits(rows=64, tokens=60_000))
    engine.start()
    found = {"answers": 0, "wrong": 0, "cut": 0, "tokens": 0}
    try:
        while found["answers"] < count:
            forms = [form(rng, suite) for _ in range(min(TOGETHER, -(-count // EACH)))]
            asked = [(fits, engine_row(rng, model, compiled(grammars, asked))) for asked, fits in forms * EACH]
            plain = [engine_row(rng, model, None) for _ in range(len(asked) // 4)]
            for row in rng.sample([*(row for _, row in asked), *plain], len(asked) + len(plain)):
                engine.submit(row)
            for fits, row in asked:
                judge(found, fits, row)
    finally:
        engine.stop()
        grammars.close()
    return found


def judge(found: dict[str, int], fits: Callable[[str], bool], row: Row) -> None:
    """Count a row's answer."""
    output = row.output.result()
    assert row.grammar
    text = row.grammar.text(output.ids)
    found["tokens"] += len(output.ids)
    found["answers" if output.finish_reason == "stop" else "cut"] += 1
    if output.finish_reason == "stop" and not fits(text):
        found["wrong"] += 1
        print("WRONG:", repr(text), row.grammar.definition)


def engine_row(rng: random.Random, model: Model, grammar: Grammar | None) -> Row:
    tokens = model.codec.prepare([rng.choice(["Question: What is it? Answer:", "Story: \n", "User: Hi\nAssistant:"])])
    temperature = rng.choice([0.0, 1.0, 2.0])
    sampling = Sampling(
        max_new_tokens=MOST_TOKENS if grammar else 30,
        temperature=temperature,
        top_p=rng.choice([None, 0.9]) if temperature else None,
        seed=rng.getrandbits(60),
        eos_ids=model.codec.eos_ids,
    )
    return Row(tokens, sampling, grammar=grammar)


def compiled(grammars: Grammars, asked: dict[str, Any]) -> Grammar:
    job: Any = parse("idefics.complete", {"prompt": ["a"], "response_format": asked})
    return grammars.of(job.response_format)


def of_schema(schema: Schema) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"schema": schema}}


def form(rng: random.Random, suite: Sequence[Schema]) -> Form:
    """A random one of any kind."""
    kind = rng.choice(["schema", "schema", "suite", "suite", "regex", "choice"])
    if kind in ("schema", "suite"):
        schema = rng.choice(suite) if kind == "suite" else random_object(rng, 3)
        return of_schema(schema), partial(fits_schema, schema)
    if kind == "regex":
        parts = rng.choices(["[a-z]{1,5}", "[0-9]{2}", "(red|blue)", " ", "é?", "[^\\n]{3}", "[世界]{1,2}"], k=4)
        regex = "".join(["x", *parts])
        return {"type": "regex", "regex": regex}, lambda text: re.fullmatch(regex, text) is not None
    words = ["cat", "a cat", 'say "hi"', "back\\slash", "é", "世界", "two words"]
    choice = rng.sample(words, rng.randint(1, 5))
    return {"type": "choice", "choice": choice}, choice.__contains__


def fits_schema(schema: Schema, text: str) -> bool:
    try:
        return bool(Draft202012Validator(schema).is_valid(json.loads(text)))
    except ValueError:
        return False


def random_object(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(["name", "size", "größe", "is it?", 'a "b"', "x"], rng.randint(1, 4))
    return {
        "type": "object",
        "properties": {name: random_schema(rng, depth - 1) for name in names},
        "required": rng.sample(names, rng.randint(0, len(names))),
        "additionalProperties": False,
    }


def random_schema(rng: random.Random, depth: int) -> Schema:
    """A schema whose texts all have an end."""
    low = rng.randint(-50, 50)
    leaves: list[Schema] = [
        {"type": "string", "maxLength": rng.randint(0, 12)},
        {"type": "string", "minLength": 2, "maxLength": 5},
        {"type": "string", "pattern": "^[A-Z][a-z]{1,6}$"},
        {"type": "string", "format": "date"},
        {"enum": ["red", "dark red", 3, None, True]},
        {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 300)},
        {"type": "integer", "minimum": 0, "exclusiveMaximum": 100, "multipleOf": 7},
        {"type": "boolean"},
        {"const": {"a": [1, "b"]}},
    ]
    if depth <= 0 or rng.random() < 0.5:
        return rng.choice(leaves)
    nested: list[Callable[[], Schema]] = [
        lambda: random_object(rng, depth),
        lambda: {"type": "array", "items": random_schema(rng, depth - 1), "maxItems": rng.randint(0, 3)},
        lambda: {"anyOf": [random_schema(rng, depth - 1), rng.choice(leaves)]},
        lambda: {"type": "array", "prefixItems": [rng.choice(leaves)] * 2, "items": False, "minItems": 2},
    ]
    return rng.choice(nested)()


def main() -> None:
    torch.set_num_threads(1)
    measures.run(__doc__, {"shipped": partial(cost, "shipped"), "mid-size": partial(cost, "mid-size"), "valid": valid})


if __name__ == "__main__":
    main()
