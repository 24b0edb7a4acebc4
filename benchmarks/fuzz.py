"""Broken images and payloads by the thousand: `python -m benchmarks.fuzz [--save fuzz] [images] [payloads]`.

Each must end in an answer, or in an error that says what to correct.
"""

from __future__ import annotations

import base64
import io
import json
import random
import re
import socket
import struct
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

from benchmarks import measures
from benchmarks.corpus import end_of
from config.settings import Settings
from tasks.errors import Internal, JobError
from tasks.payloads import PAYLOADS, parse
from tasks.protocol import RESERVED_TOKENS
from worker.engine.engine import Engine
from worker.engine.scheduler import Limits
from worker.jobs.runs import JobContext
from worker.jobs.service import Service
from worker.models.fake import FakeModel

IMAGES, PAYLOADS_TRIED = 100_000, 10_000
#: Seconds that one image may take.
MOST_S = 2.0
#: The part of the images that declare millions of pixels: each takes as long as thousands of others.
GIANTS = 0.02
PNG_START = b"\x89PNG\r\n\x1a\n"


# --- Images ---


def seeds() -> list[bytes]:
    """Pictures of all formats and modes, plain, clear, turned and moving."""
    plain = Image.effect_noise((48, 32), 60).convert("RGB")
    plain.paste((255, 0, 0), (4, 4, 20, 20))
    clear = plain.copy()
    clear.putalpha(Image.radial_gradient("L").resize(plain.size))
    exif = Image.Exif()
    exif[0x0112] = 6
    frames: dict[str, Any] = {"save_all": True, "append_images": [Image.new("RGB", plain.size)]}
    return [
        *(_encoded(plain.convert(mode), "JPEG") for mode in ("L", "RGB", "CMYK")),
        _encoded(plain, "JPEG", progressive=True, exif=exif),
        _encoded(plain, "MPO", **frames),
        *(_encoded(plain.convert(mode), "PNG") for mode in ("1", "L", "P", "RGB", "LA", "RGBA")),
        _encoded(clear, "PNG", exif=exif, icc_profile=b"profile" * 9),
        _encoded(plain.quantize(16), "PNG", transparency=3),
        _encoded(Image.new("I;16", plain.size, 999), "PNG"),
        _encoded(plain, "PNG", **frames),
        *(_encoded(plain.convert(mode), "GIF") for mode in ("L", "P", "RGB")),
        _encoded(clear, "GIF"),
        _encoded(plain, "GIF", **frames, comment=b"hello"),
        _encoded(plain, "WEBP", exif=exif),
        _encoded(clear, "WEBP", lossless=True),
        _encoded(clear, "WEBP", quality=40),
        _encoded(plain, "WEBP", **frames),
        *(_encoded(plain.resize((640, 480)), kind) for kind in ("JPEG", "PNG", "WEBP", "GIF")),
    ]


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _flip(data: bytearray, chance: random.Random, _: bytes) -> None:
    for _flipped in range(chance.choice((1, 2, 8, 40))):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def _truncate(data: bytearray, chance: random.Random, _: bytes) -> None:
    del data[chance.randrange(len(data)) :]


def _splice(data: bytearray, chance: random.Random, other: bytes) -> None:
    start = chance.randrange(len(other))
    at = chance.randrange(len(data))
    data[at : at + chance.choice((0, 4, 40, 400))] = other[start : start + chance.randrange(1, 400)]


def _change_header(data: bytearray, chance: random.Random, _: bytes) -> None:
    _write_number(data, chance.randrange(min(40, len(data))), chance)


def _change_length(data: bytearray, chance: random.Random, _: bytes) -> None:
    """Of a PNG's or WebP's chunk, or a JPEG's segment: there the number stands beside a name."""
    names = [b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"fcTL", b"fdAT", b"eXIf", b"VP8", b"ALPH", b"ANMF", b"\xff"]
    places = [at for name in names if (at := data.find(name, chance.randrange(len(data)))) >= 0]
    if places:
        _write_number(data, max(0, chance.choice(places) + chance.choice((-4, 1, 2, 4))), chance)


def _enlarge(data: bytearray, chance: random.Random) -> None:
    """Declare up to as many pixels as are decoded."""
    width, height = chance.randrange(1_000, 6_300), chance.randrange(1_000, 6_300)
    if data.startswith(PNG_START):
        data[16:24] = struct.pack(">II", width, height)
    elif data.startswith(b"GIF"):
        data[6:10] = struct.pack("<HH", width, height)
    elif data.startswith(b"RIFF"):
        data[24:30] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    elif found := re.search(rb"\xff[\xc0\xc2]", data):
        data[found.end() + 3 : found.end() + 7] = struct.pack(">HH", height, width)


def _write_number(data: bytearray, at: int, chance: random.Random) -> None:
    number = chance.choice((0, 1, 2, 255, 2**12, 2**13 - 1, 2**14, 2**15, 2**16 - 1, 2**31, 2**32 - 1))
    size = chance.choice((1, 2, 4))
    data[at : at + size] = (number % 256**size).to_bytes(size, chance.choice(("big", "little")))


MUTATIONS: tuple[Callable[[bytearray, random.Random, bytes], None], ...] = (
    _flip,
    _truncate,
    _splice,
    _change_header,
    _change_length,
)


def mutated(pictures: Sequence[bytes], chance: random.Random) -> bytes:
    """One of the pictures, broken in one to three ways."""
    data = bytearray(chance.choice(pictures))
    for _ in range(chance.choice((1, 1, 2, 3))):
        if data:
            chance.choice(MUTATIONS)(data, chance, chance.choice(pictures))
    if chance.random() < GIANTS:
        _enlarge(data, chance)
    # A decoder looks no further than a wrong checksum.
    return with_checksums(bytes(data)) if chance.random() < 0.7 else bytes(data)


def with_checksums(data: bytes) -> bytes:
    if not data.startswith(PNG_START):
        return data
    fixed, at = bytearray(data), len(PNG_START)
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if end + 4 > len(data):
            break
        fixed[end : end + 4] = struct.pack(">I", zlib.crc32(data[at + 4 : end]))
        at = end + 4
    return bytes(fixed)


def images(count: int = IMAGES) -> dict[str, Any]:
    """Raises any error other than the two that an image may have."""
    chance, pictures = random.Random(1), seeds()
    ends: Counter[str] = Counter()
    times: list[float] = []
    for _ in range(count):
        data = mutated(pictures, chance)
        # Of the processor: other processes do not make it longer.
        started = time.thread_time()
        ends[end_of(data)] += 1
        times.append(time.thread_time() - started)
    times.sort()
    return {
        "tried": count,
        "ends": dict(ends),
        "over_2_s": sum(taken > MOST_S for taken in times),
        "slowest_ms": [round(1000 * taken, 1) for taken in times[-5:]],
        "median_ms": round(1000 * times[count // 2], 2),
    }


# --- Payloads ---

_PICTURES = seeds()
_HOSTILE_TEXTS = [
    *RESERVED_TOKENS,
    "<end_of_utterance>",
    "",
    " ",
    "\x00\x1b[2J",
    "\ud800",
    "\u202eabc",
    "x" * 300,
    "x" * 5_000,
    "http://127.0.0.1/x",
    "https://[::1]:99999/",
    "http://user@example.com/",
    "file:///etc/passwd",
    "data:image/png;base64,####",
    "data:image/png;base64,",
    "data:,",
]


def _mostly(good: st.SearchStrategy[Any], bad: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Jobs have many fields, and one bad one hides what the others do."""
    return st.integers(0, 19).flatmap(lambda number: bad if number == 19 else good)


BAD_TEXTS = st.one_of(st.sampled_from(_HOSTILE_TEXTS), st.text(st.characters(), max_size=5))
TEXTS = _mostly(st.text(min_size=1, max_size=30), BAD_TEXTS)
NUMBERS = st.one_of(
    st.integers(-2, 20), st.integers(), st.floats(), st.sampled_from([10**400, -(2**63), 2**63, 1e308, -0.0])
)
JUNK: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=8,
)


def _data_uri(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def _broken_picture(number: int) -> bytes:
    return mutated(_PICTURES, random.Random(number))


PICTURE = _mostly(
    st.sampled_from(_PICTURES).map(_data_uri),
    st.one_of(
        st.integers(0, 10**6).map(_broken_picture).map(_data_uri),
        BAD_TEXTS,
        st.fixed_dictionaries({"path": TEXTS}),
        JUNK,
    ),
)
_PART = st.fixed_dictionaries({"type": st.just("text"), "text": TEXTS}) | st.fixed_dictionaries(
    {"type": st.just("image_url"), "image_url": st.fixed_dictionaries({"url": PICTURE})}
)
_TURN = st.fixed_dictionaries(
    {
        "role": _mostly(st.just("user"), st.sampled_from(["system", "assistant", "tool"])),
        "content": TEXTS | st.lists(_mostly(_PART, JUNK), max_size=4),
    }
)
#: Each field in something like its form. Examples are objects of any of these.
_FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "image": PICTURE,
    "images": st.lists(PICTURE, min_size=1, max_size=4),
    "prompt": st.lists(
        st.fixed_dictionaries({"image": PICTURE}) | st.fixed_dictionaries({"text": TEXTS}) | TEXTS,
        min_size=1,
        max_size=5,
    ),
    "question": TEXTS,
    "answer": TEXTS,
    "text": TEXTS,
    "label": TEXTS,
    "labels": st.lists(TEXTS, min_size=2, max_size=5),
    "instruction": TEXTS,
    "lead": TEXTS,
    "messages": st.lists(_TURN, min_size=1, max_size=4),
    "max_new_tokens": _mostly(st.integers(1, 40), NUMBERS),
    "max_completion_tokens": _mostly(st.integers(1, 40), NUMBERS),
    "num_beams": _mostly(st.integers(1, 16), NUMBERS),
    "temperature": _mostly(st.floats(0, 10), NUMBERS),
    "top_p": _mostly(st.floats(0.01, 1), NUMBERS),
    "top_k": _mostly(st.integers(0, 100), NUMBERS),
    "min_p": _mostly(st.floats(0, 1), NUMBERS),
    "repetition_penalty": _mostly(st.floats(0.1, 5), NUMBERS),
    "presence_penalty": _mostly(st.floats(-2, 2), NUMBERS),
    "frequency_penalty": _mostly(st.floats(-2, 2), NUMBERS),
    "logit_bias": _mostly(st.dictionaries(st.integers(0, 2_000).map(str), st.floats(-100, 100), max_size=4), JUNK),
    "logprobs": _mostly(st.integers(0, 20), NUMBERS),
    "n": _mostly(st.integers(1, 4), NUMBERS),
    "seed": _mostly(st.integers(0, 2**63 - 1), NUMBERS),
    "min_confidence": _mostly(st.floats(0, 1), NUMBERS),
    "stream": _mostly(st.booleans(), JUNK),
    "response_format": _mostly(
        st.sampled_from(
            [
                {"type": "json_object"},
                {"type": "choice", "choice": ["yes", "no"]},
                {"type": "regex", "regex": "[a-z]{1,9}"},
                {"type": "json_schema", "json_schema": {"schema": {"type": "object", "maxProperties": 2}}},
            ]
        ),
        st.fixed_dictionaries({"type": st.just("regex"), "regex": TEXTS}) | JUNK,
    ),
    "response_model": JUNK,
    "stop": st.lists(TEXTS, max_size=3),
    "deadline_s": _mostly(st.floats(0, 9), NUMBERS),
    "callback": st.fixed_dictionaries({"url": st.just("https://example.com/done"), "key_id": TEXTS}) | JUNK,
    "metadata": st.dictionaries(TEXTS, JUNK, max_size=4),
    "idempotency_key": TEXTS,
}
#: By task: the fields of an example of it beside its picture.
_EXAMPLES = {"idefics.caption": ("text",), "idefics.answer": ("question", "answer"), "idefics.classify": ("label",)}


def _field(task: str, name: str) -> st.SearchStrategy[Any]:
    if name == "examples":
        names = ("image", *_EXAMPLES[task])
        return st.lists(_mostly(st.fixed_dictionaries({each: _FIELDS[each] for each in names}), JUNK), max_size=3)
    # Caption's is a text, and complete's a list.
    return TEXTS if (task, name) == ("idefics.caption", "prompt") else _FIELDS[name]


@st.composite
def jobs(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A task and its keyword arguments: its required fields, some others, and at times junk among them."""
    task = draw(st.sampled_from(sorted(PAYLOADS)))
    fields = PAYLOADS[task].model_fields
    required = {name for name, field in fields.items() if field.is_required()}
    others = draw(st.sets(st.sampled_from(sorted(fields)), max_size=3))
    arguments = {name: draw(_field(task, name)) for name in sorted(required | others)}
    if draw(st.integers(0, 9)) == 9:
        arguments[draw(st.sampled_from(sorted(fields)) | TEXTS)] = draw(JUNK)
    return task, arguments


class Answering:
    """A service on the fake model. No look-up leaves this machine: every name is loopback's."""

    def __init__(self) -> None:
        model = FakeModel()
        self._engine = Engine(model, Limits(rows=8, tokens=1_000_000))
        self._service = Service(Settings(), model.info, model.codec, self._engine)
        self._names = mock.patch.object(socket, "getaddrinfo", _loopback)

    def __enter__(self) -> Answering:
        self._engine.start()
        self._names.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._names.stop()
        self._engine.stop()

    def end(self, task: str, arguments: dict[str, Any]) -> str:
        """`result` or an error's code. Raises what would become `internal`."""
        try:
            # As it comes from the queue.
            result = self._service.run(parse(task, json.loads(json.dumps(arguments))), JobContext(id="job"))
        except Internal:
            raise
        except JobError as error:
            str(error).encode()
            return error.code
        json.dumps(result.model_dump(mode="json"), ensure_ascii=False).encode()
        return "result"


def _loopback(host: Any, port: Any, *_: Any, **__: Any) -> list[tuple[Any, ...]]:
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]


def payloads(count: int = PAYLOADS_TRIED) -> dict[str, Any]:
    ends: Counter[str] = Counter()
    by_task: Counter[str] = Counter()
    slowest = 0.0
    with Answering() as answering:
        # Without shrinking, so that all of them are tried, and each once.
        @seed(1)
        @settings(
            max_examples=count,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(jobs())
        def try_one(job: tuple[str, dict[str, Any]]) -> None:
            nonlocal slowest
            started = time.perf_counter()
            ends[answering.end(*job)] += 1
            slowest = max(slowest, time.perf_counter() - started)
            by_task[job[0]] += 1

        try_one()
    return {
        "tried": ends.total(),
        "ends": dict(ends.most_common()),
        "by_task": dict(sorted(by_task.items())),
        "slowest_ms": round(1000 * slowest, 1),
    }


if __name__ == "__main__":
    measures.run(__doc__, {"images": images, "payloads": payloads})
