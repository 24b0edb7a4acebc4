"""A batch file's lines: read, refused, answered and found again."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tasks import (
    Caption,
    DeadlineExceeded,
    ImageBlocked,
    ImageInvalid,
    InvalidRequest,
    JobCanceled,
    JobError,
    WorkerLost,
)
from tasks.batch_lines import Fingerprints, Line, answer, answered, fingerprint, is_failed, read_line
from tasks.payloads import Chat, Complete
from tasks.results import Choice, TokenLogprob, TopLogprob
from tasks.testing import canned

URL = "https://example.com/a.jpg"
OURS = {"custom_id": "r1", "task": "caption", "arguments": {"image": URL}}
MESSAGES = [
    {"role": "user", "content": [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": URL}}]}
]
RESULT = canned("a cat", Complete(prompt=["Hello"]))


def line(asked: Any, number: int = 1) -> Line:
    return read_line(number, json.dumps(asked))


def openai(**body: Any) -> dict[str, Any]:
    body = {"model": "gpt-4o", "messages": MESSAGES, **body}
    return {"custom_id": "r1", "method": "POST", "url": "/v1/chat/completions", "body": body}


def refusal(asked: Any) -> str:
    with pytest.raises(JobError) as refused:
        line(asked).job()
    return str(refused.value)


# Reading


@pytest.mark.parametrize("task", ["caption", "idefics.caption"])
def test_a_line_of_ours_is_a_task_and_its_arguments(task: str) -> None:
    assert line({**OURS, "task": task}).job() == Caption(image=URL)


def test_a_line_of_openais_is_a_chat() -> None:
    assert line(openai()).job() == Chat.model_validate({"messages": MESSAGES})


def test_openais_options_have_ours_names() -> None:
    asked = openai(max_completion_tokens=100, temperature=0.5, top_p=0.9, seed=7, stop="\n")
    job = line(asked).job()
    assert isinstance(job, Chat)
    assert (job.max_completion_tokens, job.temperature, job.top_p, job.seed, job.stop) == (100, 0.5, 0.9, 7, ["\n"])
    assert line(openai(max_tokens=50, stop=["a", "b"])).job().arguments().keys() == {
        "messages",
        "max_completion_tokens",
        "stop",
    }
    assert line(openai(max_tokens=50)).job().arguments()["max_completion_tokens"] == 50
    assert line(openai(max_tokens=50, max_completion_tokens=None)).job().arguments()["max_completion_tokens"] == 50


NEUTRAL: dict[str, Any] = {
    "n": 1,
    "best_of": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "top_k": -1,
    "min_p": 0,
    "stream": False,
    "stream_options": {"include_usage": True},
    "logprobs": False,
    "top_logprobs": 0,
    "logit_bias": {},
    "response_format": {"type": "text"},
    "tools": [],
    "tool_choice": "none",
    "parallel_tool_calls": True,
    "functions": [],
    "function_call": "none",
    "modalities": ["text"],
    "reasoning_effort": "low",
    "user": "u",
    "store": True,
    "metadata": {"a": "b"},
    "service_tier": "auto",
    "safety_identifier": "s",
    "prompt_cache_key": "k",
    "stop": "",
}


@pytest.mark.parametrize(
    ("name", "value"), [*NEUTRAL.items(), *((name, None) for name in [*NEUTRAL, "seed", "temperature", "audio"])]
)
def test_openais_options_that_ask_for_nothing_are_passed_over(name: str, value: Any) -> None:
    assert line(openai(**{name: value})).job() == line(openai()).job()


def test_openais_line_may_abstain() -> None:
    asked = line(openai(min_confidence=0.7))
    assert asked.job().min_confidence == 0.7
    doubtful = RESULT.model_copy(update={"abstained": True})
    assert answer(asked, doubtful, "job")["response"]["body"]["abstained"] is True
    assert "abstained" not in answer(asked, RESULT, "job")["response"]["body"]


def test_openais_sampling_is_ours() -> None:
    asked = {
        "temperature": 0.5, "n": 3, "presence_penalty": 0.5, "frequency_penalty": -1, "repetition_penalty": 1.2,
        "min_p": 0.1, "logit_bias": {"50256": -100},
    }  # fmt: skip
    sent = line(openai(**asked, logprobs=True, top_logprobs=4)).job().arguments()
    assert sent == {**sent, **asked, "logprobs": 4}
    assert line(openai(logprobs=True)).job().logprobs == 0


def test_an_openai_answer_has_its_choices_and_log_probabilities() -> None:
    likely = TopLogprob(token=" c\N{LATIN SMALL LETTER E WITH ACUTE}", id=7, logprob=-0.1)
    part = TopLogprob(token="\N{REPLACEMENT CHARACTER}", id=8, logprob=-3.0)
    tokens = [TokenLogprob(**likely.model_dump(), top_logprobs=[likely, part])]
    first = Choice(text="a", finish_reason="stop", logprobs=tokens)
    done = RESULT.model_copy(update={"choices": [first, Choice(text="b", finish_reason="length")]})
    told = answer(line(openai()), done, "j")["response"]["body"]["choices"]
    assert [(each["index"], each["message"]["content"], each["finish_reason"]) for each in told] == [
        (0, "a", "stop"),
        (1, "b", "length"),
    ]
    known = {"token": " c\xe9", "logprob": -0.1, "bytes": [32, 99, 195, 169]}
    assert told[0]["logprobs"] == {
        "content": [
            {**known, "top_logprobs": [known, {"token": "\N{REPLACEMENT CHARACTER}", "logprob": -3.0, "bytes": None}]}
        ],
        "refusal": None,
    }
    assert told[1]["logprobs"] is None


def test_a_top_p_of_nothing_is_greedy() -> None:
    assert line(openai(top_p=0, temperature=0.7)).job() == line(openai()).job()


def test_several_answers_are_sampled_at_openais_default_and_a_single_one_is_greedy() -> None:
    assert line(openai(n=2)).job() == line(openai(n=2, temperature=1)).job()
    assert line(openai(n=2, temperature=0.3)).job().temperature == 0.3
    assert line(openai(n=2, num_beams=3)).job().temperature == 0
    assert line(openai(n=1)).job().temperature == 0


@pytest.mark.parametrize("greedy", [{"temperature": 0}, {"top_p": 0}])
def test_several_greedy_answers_are_refused(greedy: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="temperature"):
        line(openai(n=2, **greedy)).job()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "required"),
        ("top_logprobs", 5),
        ("seed", -1),
        ("presence_penalty", 3),
        ("logit_bias", {"50256": -101}),
        ("logit_bias", {"cat": 1}),
        ("response_format", {"type": "xml"}),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "alloy"}),
        ("reasoning_effort", "high"),
        ("unheard_of", 1),
    ],
)
def test_openais_options_that_no_worker_has_are_refused_by_name(name: str, value: Any) -> None:
    assert name in refusal(openai(**{name: value}))


@pytest.mark.parametrize(
    "url",
    [
        "/v1/chat/completions",
        "/chat/completions",
        "/v1/chat/completions/",
        "/chat/completions?api-version=2024-10-21",
        "/openai/deployments/my-gpt/chat/completions?api-version=2024-10-21",
        "https://mine.openai.azure.com/openai/deployments/my-gpt/chat/completions",
    ],
)
def test_azures_forms_of_the_url_are_taken(url: str) -> None:
    assert line({**openai(), "url": url}).job() == line(openai()).job()


@pytest.mark.parametrize("url", ["/v1/completions", "/v1/responses", "completions", "/x/chat", "", None, 5, "http://["])
def test_another_url_is_refused(url: Any) -> None:
    assert "/v1/chat/completions" in refusal({**openai(), "url": url})


def test_a_conversation_as_it_was_echoed_is_taken() -> None:
    echoed = {
        "role": "assistant",
        "content": "A cat.",
        "refusal": None,
        "audio": None,
        "tool_calls": None,
        "function_call": None,
        "annotations": [],
    }
    asked = openai(
        messages=[
            {"role": "developer", "content": "Be brief.", "name": "policy"},
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": URL, "cache_control": None}],
                "name": "ann",
            },
            echoed,
            {"role": "assistant", "content": None, "refusal": "I cannot say."},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": URL, "detail": None}}]},
        ]
    )
    picture = [{"type": "image_url", "image_url": {"url": URL}}]
    plain = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": picture},
        {"role": "assistant", "content": "A cat."},
        {"role": "assistant", "content": "I cannot say."},
        {"role": "assistant", "content": [{"type": "text", "text": "No."}]},
        {"role": "user", "content": picture},
    ]
    assert line(asked).job().arguments()["messages"] == plain


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ([{"type": "image_url", "image_url": {"url": 5}}], "messages.0.content.0.image_url.url: "),
        ([{"type": "image_url", "image_url": {"url": "a.jpg"}}], "messages.0.content.0.image_url.url: an image is"),
        ([{"type": "image_url"}], "messages.0.content.0.image_url: "),
        ([{"type": "text", "text": 5}], "messages.0.content.0.text: "),
        ([{"type": "input_audio", "input_audio": {}}], "messages.0.content.0: type is one of"),
        ([{"text": "a"}], "messages.0.content.0: type is one of"),
        (["a"], "messages.0.content.0: "),
        (5, "messages.0.content: "),
        (None, "messages.0.content: "),
    ],
)
def test_an_error_in_a_message_is_one_place_and_one_reason(content: Any, told: str) -> None:
    message = refusal(openai(messages=[{"role": "user", "content": content}]))
    assert message.startswith(told)
    assert ";" not in message.replace("...;base64", "")


@pytest.mark.parametrize(
    ("message", "name"),
    [
        ({"role": "tool", "content": "a"}, "role"),
        ({"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, "tool_calls"),
        ({"role": "user", "content": "a", "audio": {"id": "x"}}, "audio"),
    ],
)
def test_a_message_that_asks_for_what_no_worker_does_is_refused_by_name(message: Any, name: str) -> None:
    assert name in refusal(openai(messages=[message, *MESSAGES]))


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({**OURS, "task": "paint"}, "There is no task"),
        ({**OURS, "arguments": {"image": URL, "colour": 1}}, "colour"),
        ({**OURS, "arguments": {"image": "file:///etc/passwd"}}, "no other scheme"),
        ({**OURS, "arguments": {"image": URL, "idempotency_key": "k"}}, "idempotency_key"),
        ({**OURS, "arguments": None}, "A line is"),
        ({**OURS, "id": 1}, "unknown: id"),
        ({**openai(), "url": "/v1/embeddings"}, "/v1/chat/completions"),
        ({**openai(), "body": []}, "an object as its body"),
        ({**OURS, "custom_id": ""}, "custom_id"),
        ({**OURS, "custom_id": "\ud800"}, "custom_id"),
        ({"task": "caption", "arguments": {}}, "custom_id"),
        ([], "not a JSON object"),
    ],
)
def test_a_bad_line_is_refused_and_told_why(asked: Any, told: str) -> None:
    assert told in refusal(asked)


@pytest.mark.parametrize("text", ["{", b"\xff\xfe", "[" * 100_000])
def test_what_is_no_json_is_refused_with_its_lines_number(text: str | bytes) -> None:
    bad = read_line(7, text)
    with pytest.raises(InvalidRequest, match="Line 7 is not JSON"):
        bad.job()
    assert answer(bad, InvalidRequest("no"), "job")["line"] == 7


# Answering


def test_our_answer_is_a_result_or_an_error() -> None:
    assert answer(line(OURS), RESULT, "job") == {"custom_id": "r1", "result": RESULT.model_dump(mode="json")}
    error = {"code": "image_blocked", "message": "no"}
    assert answer(line(OURS), ImageBlocked("no"), "job") == {"custom_id": "r1", "error": error}
    assert answer(line(OURS), JobCanceled(), "job")["error"]["code"] == "canceled"


def test_an_error_has_its_detail() -> None:
    gone = ImageInvalid("nothing there", detail="http_404")
    assert answer(line(OURS), gone, "job")["error"]["detail"] == "http_404"
    assert answer(line(openai()), gone, "job")["response"]["body"]["error"]["detail"] == "http_404"


def test_openais_answer_is_a_chat_completion() -> None:
    told = answer(line(openai()), RESULT, "job")
    assert told.keys() == {"id", "custom_id", "response", "error"}
    assert told["id"].startswith("batch_req_")
    assert (told["custom_id"], told["error"]) == ("r1", None)
    assert (told["response"]["status_code"], told["response"]["request_id"]) == (200, "job")
    body = told["response"]["body"]
    assert (body["object"], body["model"], type(body["created"])) == ("chat.completion", "fake", int)
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "a cat", "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert body["usage"] == {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}


@pytest.mark.parametrize(("ours", "theirs"), [("stop_sequence", "stop"), ("length", "length"), ("deadline", "length")])
def test_a_finish_reason_is_one_of_openais(ours: str, theirs: str) -> None:
    told = answer(line(openai()), RESULT.model_copy(update={"finish_reason": ours}), "job")
    assert told["response"]["body"]["choices"][0]["finish_reason"] == theirs


def test_openais_refused_request_is_a_response_with_an_error() -> None:
    told = answer(line(openai()), InvalidRequest("no"), "job")
    error = {"message": "no", "type": "invalid_request_error", "param": None, "code": "invalid_request"}
    assert (told["error"], told["response"]["status_code"], told["response"]["body"]) == (None, 400, {"error": error})


@pytest.mark.parametrize(
    ("outcome", "code"),
    [(DeadlineExceeded(), "batch_expired"), (JobCanceled(), "batch_cancelled"), (WorkerLost("gone"), "worker_lost")],
)
def test_openais_request_without_an_answer_has_no_response(outcome: Any, code: str) -> None:
    told = answer(line(openai()), outcome, "job")
    assert (told["response"], told["error"]) == (None, {"code": code, "message": str(outcome)})


# Finding again


@pytest.mark.parametrize("asked", [OURS, openai(), {**OURS, "custom_id": None}, {**openai(), "custom_id": None}, []])
@pytest.mark.parametrize("is_duplicate", [False, True])
@pytest.mark.parametrize("outcome", [RESULT, InvalidRequest("no"), WorkerLost("gone")])
def test_an_answer_tells_which_line_it_is_for_and_whether_that_failed(
    asked: Any, is_duplicate: bool, outcome: Any
) -> None:
    asked = line(asked, 7).as_duplicate() if is_duplicate else line(asked, 7)
    told = json.loads(json.dumps(answer(asked, outcome, "job")))
    assert answered(told) == asked.fingerprint
    assert is_failed(told) == (outcome is not RESULT)


def test_a_duplicate_is_not_taken_for_the_line_that_it_repeats() -> None:
    first, again = line(OURS, 1), line(OURS, 2).as_duplicate()
    assert first.fingerprint != again.fingerprint
    with pytest.raises(InvalidRequest, match="Line 2: custom_id 'r1' is an earlier line's"):
        again.job()


def test_a_number_as_custom_id_is_not_taken_for_a_lines_number() -> None:
    assert line({**OURS, "custom_id": "7"}).fingerprint != read_line(7, "{").fingerprint


@pytest.mark.parametrize("foreign", [[], {}, {"custom_id": "r1"}, OURS, {"custom_id": "r1", "response": {}, "id": "x"}])
def test_what_is_no_answer_is_refused(foreign: Any) -> None:
    with pytest.raises((ValueError, KeyError)):
        answered(foreign)


def test_fingerprints_are_a_small_set() -> None:
    numbers, some = [fingerprint(str(number)) for number in range(20_000)], Fingerprints()
    assert all(some.add(number) for number in numbers)
    assert not any(some.add(number) for number in numbers)
    assert len(some) == 20_000
    assert all(number in some for number in numbers)
    assert fingerprint("another") not in some
    assert len(some._slots) * some._slots.itemsize <= 32 * 20_000
