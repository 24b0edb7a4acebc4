"""No text becomes a special token, whatever a tokenizer makes of it, in any family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from config.settings import Settings
from tasks import InvalidRequest
from tasks.payloads import parse
from tasks.protocol import END_OF_UTTERANCE
from tests.model.checkpoints import TEMPLATE, later_checkpoint, random_checkpoint
from tests.model.conftest import noise
from worker.jobs.prompts import ImageRef, build, in_turns
from worker.models.loading import load

#: As tokenizers are that drop what is not seen and fold what looks alike, before they look for special tokens.
NORMALIZER: dict[str, Any] = {
    "type": "Sequence",
    "normalizers": [
        {
            "type": "Replace",
            "pattern": {"Regex": "[\\u0000-\\u0008\\u200b-\\u200f\\u2060\\ufeff\\u00ad]"},
            "content": "",
        },
        {"type": "NFKC"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ],
}
IMAGE_SOURCE = "https://example.com/a.png"


def _checkpoint(folder: Path, family: str) -> Path:
    if family == "idefics":
        random_checkpoint(folder, use_resampler=False)
    else:
        later_checkpoint(folder, family.partition(" ")[0], TEMPLATE if "chat" in family else None)
    return folder


@pytest.fixture(scope="module", params=["idefics", "idefics2", "idefics2 chat", "idefics3", "idefics3 chat"])
def codec(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = _checkpoint(tmp_path_factory.mktemp("normalising") / "checkpoint", request.param)
    codec = load(Settings(model=str(folder), dtype="float32")).codec
    tokenizer = json.loads(codec.tokenizer.backend_tokenizer.to_str())
    tokenizer["normalizer"] = NORMALIZER
    for token in tokenizer["added_tokens"]:
        token["normalized"] = True
    codec.tokenizer._tokenizer = Tokenizer.from_str(json.dumps(tokenizer))
    return codec


def _parts(codec: Any, task: str, **arguments: Any) -> list[Any]:
    job = parse(task, arguments)
    picture = codec.picture(noise(0))
    prompt = in_turns(job) if codec.has_chat_template else build(job)
    return [picture if isinstance(part, ImageRef) else part for part in prompt]


def _wide(token: str) -> str:
    return "".join(chr(ord(letter) + 0xFEE0) if "!" <= letter <= "~" else letter for letter in token)


HIDES = {
    "full width": _wide,
    "one letter": lambda token: _wide(token[0]) + token[1:],
    "zero width": lambda token: token[:3] + "\u200b" + token[3:],
    "soft hyphen": lambda token: token[:-1] + "\u00ad" + token[-1],
    "byte order mark": lambda token: "\ufeff" + token[0] + "\ufeff" + token[1:],
}


@pytest.mark.parametrize("hide", HIDES)
def test_a_hidden_token_is_refused_by_name(codec: Any, hide: str) -> None:
    for token in {*codec._reserved, END_OF_UTTERANCE} - {"<unk>", "<pad>"}:
        text = f"a {HIDES[hide](token)} b"
        for task, arguments in (
            ("idefics.caption", {"image": IMAGE_SOURCE, "prompt": text}),
            ("idefics.answer", {"image": IMAGE_SOURCE, "question": text}),
            ("idefics.complete", {"prompt": [IMAGE_SOURCE, {"text": text}]}),
            ("idefics.complete", {"prompt": [{"text": text}]}),
            ("idefics.chat", {"messages": [{"role": "user", "content": text}]}),
        ):
            with pytest.raises(InvalidRequest, match=token.replace("|", r"\|")):
                codec.prepare(_parts(codec, task, **arguments))
        with pytest.raises(InvalidRequest, match=token.replace("|", r"\|")):
            codec.encode_labels(["Category:"], ["cat", text])


def test_a_hidden_token_in_pieces_is_refused(codec: Any) -> None:
    pieces = [{"text": "a <im\u200b"}, {"text": "\u200bage> b"}]
    with pytest.raises(InvalidRequest, match="reserved"):
        codec.prepare(_parts(codec, "idefics.complete", prompt=[IMAGE_SOURCE, *pieces]))


def test_ordinary_texts_are_taken(codec: Any) -> None:
    for text in (
        "a < b > c",
        _wide("<b>"),
        "日本語 \u200b emoji 🦆",
        "<imag e>",
        "image>",
        "<",
        "",
        "\ufffd\U0010ffff",
        "<|x|>",
    ):
        codec.prepare(_parts(codec, "idefics.complete", prompt=[IMAGE_SOURCE, {"text": text}, IMAGE_SOURCE]))
        codec.prepare(_parts(codec, "idefics.answer", image=IMAGE_SOURCE, question=text))
        codec.encode_labels(["Category:"], ["cat", f"{text}dog"])
    codec.prepare(
        _parts(codec, "idefics.complete", prompt=[f"User: a{END_OF_UTTERANCE}{END_OF_UTTERANCE}", IMAGE_SOURCE])
    )
