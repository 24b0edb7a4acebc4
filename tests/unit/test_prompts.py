"""The prompts against the transformers guide (docs/source/en/tasks/idefics.md) and the instruct checkpoints' card."""

from __future__ import annotations

from typing import Any

import pytest

from tasks.errors import JobError
from tasks.payload_fields import ImagePath
from tasks.payloads import parse
from tasks.protocol import END_OF_UTTERANCE
from worker.jobs.prompts import ImageRef, Prompt, build, in_turns, without_ends

EIFFEL = "https://images.unsplash.com/photo-1543349689-9a4d426bee8e?ixlib=rb-4.0.3&auto=format&fit=crop&w=3501&q=80"
LIBERTY = "https://images.unsplash.com/photo-1524099163253-32b7f0256868?ixlib=rb-4.0.3&auto=format&fit=crop&w=3387&q=80"
IDEFIX = "https://upload.wikimedia.org/wikipedia/commons/8/86/Id%C3%A9fix.JPG"
R22B = "https://static.wikia.nocookie.net/asterix/images/2/25/R22b.gif/revision/latest?cb=20110815073052"
DATA_URI = "data:image/png;base64,iVBORw0KGgo="


def prompt(task: str, **arguments: Any) -> Prompt:
    return build(parse(f"idefics.{task}", arguments))


def as_tokenized(parts: Prompt) -> str:
    """The text that the processor makes of a list: blanks at both ends of each string are lost."""
    return "".join(part.strip(" ") if isinstance(part, str) else "<image>" for part in parts)


# caption


def test_a_caption_without_a_prompt_is_the_image_alone() -> None:
    assert prompt("caption", image=EIFFEL) == [ImageRef(EIFFEL)]


def test_a_caption_continues_its_prompt() -> None:
    assert prompt("caption", image=EIFFEL, prompt="This is an image of") == [
        ImageRef(EIFFEL),
        "This is an image of",
    ]


def test_a_captions_examples_make_the_guides_few_shot_prompt() -> None:
    fact = (
        "An image of the Eiffel Tower at night. Fun fact: the Eiffel Tower is the same height as an 81-storey building."
    )
    assert prompt("caption", image=LIBERTY, examples=[{"image": EIFFEL, "text": fact}]) == [
        "User:",
        ImageRef(EIFFEL),
        "Describe this image.\nAssistant: An image of the Eiffel Tower at night. Fun fact: the Eiffel Tower is the "
        "same height as an 81-storey building.\n",
        "User:",
        ImageRef(LIBERTY),
        "Describe this image.\nAssistant:",
    ]


def test_a_captions_instruction_stands_in_each_turn() -> None:
    examples = [{"image": EIFFEL, "text": "Paris"}, {"image": IDEFIX, "text": "Gaul"}]
    assert prompt("caption", image=LIBERTY, examples=examples, instruction="Which place is this?") == [
        "User:",
        ImageRef(EIFFEL),
        "Which place is this?\nAssistant: Paris\n",
        "User:",
        ImageRef(IDEFIX),
        "Which place is this?\nAssistant: Gaul\n",
        "User:",
        ImageRef(LIBERTY),
        "Which place is this?\nAssistant:",
    ]


def test_a_captions_prompt_follows_the_last_colon_as_the_examples_texts_do() -> None:
    parts = prompt("caption", image=LIBERTY, examples=[{"image": EIFFEL, "text": "A tower."}], prompt="A statue")
    text = as_tokenized(parts)
    assert text.count("\nAssistant: A tower.\n") == 1
    assert text.endswith("Describe this image.\nAssistant: A statue")


# answer


def test_a_question_stands_in_the_guides_form() -> None:
    assert prompt("answer", image=EIFFEL, question="Where are these people and what's the weather like?") == [
        "Instruction: Provide an answer to the question. Use the image to answer.\n",
        ImageRef(EIFFEL),
        "Question: Where are these people and what's the weather like? Answer:",
    ]


def test_answered_examples_stand_between_the_instruction_and_the_question() -> None:
    examples = [{"image": EIFFEL, "question": "Which city?", "answer": "Paris"}]
    assert prompt("answer", image=LIBERTY, question="Which one now?", examples=examples) == [
        "Instruction: Provide an answer to the question. Use the image to answer.\n",
        ImageRef(EIFFEL),
        "Question: Which city? Answer: Paris\n",
        ImageRef(LIBERTY),
        "Question: Which one now? Answer:",
    ]


# classify


def test_the_labels_stand_as_python_prints_a_list() -> None:
    categories = ["animals", "vegetables", "city landscape", "cars", "office"]
    assert prompt("classify", image=EIFFEL, labels=categories) == [
        "Instruction: Classify the following image into a single category from the following list: "
        "['animals', 'vegetables', 'city landscape', 'cars', 'office'].\n",
        ImageRef(EIFFEL),
        "Category:",
    ]


def test_labels_with_quotes_and_braces_are_printed_as_python_does() -> None:
    first = prompt("classify", image=EIFFEL, labels=["a dog's life", "{labels}"])[0]
    assert isinstance(first, str)
    assert first.endswith("""list: ["a dog's life", '{labels}'].\n""")


def test_labeled_examples_stand_before_the_image() -> None:
    examples = [{"image": EIFFEL, "label": "tower"}]
    assert prompt("classify", image=LIBERTY, labels=["tower", "statue"], examples=examples)[1:] == [
        ImageRef(EIFFEL),
        "Category: tower\n",
        ImageRef(LIBERTY),
        "Category:",
    ]


# write


def test_a_story_stands_in_the_guides_form() -> None:
    assert prompt("write", images=[EIFFEL]) == [
        "Instruction: Use the image to write a story. \n",
        ImageRef(EIFFEL),
        "Story: \n",
    ]


def test_a_text_takes_several_images_and_its_own_words() -> None:
    assert prompt("write", images=[EIFFEL, LIBERTY], instruction="Advertise this trip.", lead="Advert:") == [
        "Instruction: Advertise this trip. \n",
        ImageRef(EIFFEL),
        ImageRef(LIBERTY),
        "Advert: \n",
    ]


# complete


def test_a_completed_list_stays_as_it_is() -> None:
    parts = ["User:", EIFFEL, "Describe this image.\nAssistant:"]
    assert prompt("complete", prompt=parts) == ["User:", ImageRef(EIFFEL), "Describe this image.\nAssistant:"]


@pytest.mark.parametrize("url", [EIFFEL, "http://example.com/a.png", "HTTPS://EXAMPLE.COM/A.PNG", DATA_URI])
def test_a_string_that_is_wholly_an_address_is_an_image(url: str) -> None:
    assert prompt("complete", prompt=[url]) == [ImageRef(url)]


@pytest.mark.parametrize(
    "text",
    [
        "See https://example.com/a.png",
        "https://example.com/a.png shows a dog",
        "file:///etc/passwd",
        "a/b.jpg",
        "data:text/plain;base64,aGVsbG8=",
    ],
)
def test_any_other_string_is_text(text: str) -> None:
    assert prompt("complete", prompt=[text]) == [text]


@pytest.mark.parametrize(
    "text", ["https://example.com/a.png\n", " https://example.com/a.png", "\ufeffhttps://example.com/a.png"]
)
def test_blanks_around_a_url_are_ignored(text: str) -> None:
    assert prompt("complete", prompt=[text]) == [ImageRef("https://example.com/a.png")]


@pytest.mark.parametrize("uri", ["data:image/svg+xml,<svg/>", "data:image/png;name=a.png;base64,iVBORw0KGgo="])
def test_an_images_uri_never_becomes_prompt_text(uri: str) -> None:
    try:
        parts = prompt("complete", prompt=[uri])
    except JobError:
        return  # Refused: as good.
    assert parts == [ImageRef(uri)]


def test_a_part_that_says_text_is_text_even_when_it_is_an_address() -> None:
    assert prompt("complete", prompt=[{"text": EIFFEL}, {"text": DATA_URI}]) == [EIFFEL, DATA_URI]


def test_a_part_that_says_image_is_an_image() -> None:
    assert prompt("complete", prompt=[{"image": EIFFEL}, {"image": {"path": "a/b.jpg"}}]) == [
        ImageRef(EIFFEL),
        ImageRef(ImagePath(path="a/b.jpg")),
    ]


def test_a_prompt_without_an_image_is_a_prompt() -> None:
    assert prompt("complete", prompt=["Once upon a time"]) == ["Once upon a time"]


# chat


def user(*content: str) -> dict[str, Any]:
    return {"role": "user", "content": [_part(part) for part in content]}


def _part(text: str) -> dict[str, Any]:
    if text.startswith("http"):
        return {"type": "image_url", "image_url": {"url": text}}
    return {"type": "text", "text": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def test_a_conversation_stands_as_the_instruct_checkpoints_card_writes_it() -> None:
    reply = "This picture depicts Idefix, the dog of Obelix in Asterix and Obelix. Idefix is running on the ground."
    messages = [user("What is in this image?", IDEFIX), assistant(reply), user(R22B, "And who is that?")]
    assert prompt("chat", messages=messages) == [
        "User: What is in this image?",
        ImageRef(IDEFIX),
        "<end_of_utterance>",
        f"\nAssistant: {reply}<end_of_utterance>",
        "\nUser:",
        ImageRef(R22B),
        "And who is that?<end_of_utterance>",
        "\nAssistant:",
    ]


def test_a_message_may_be_a_plain_string() -> None:
    messages = [{"role": "user", "content": "Who is Idefix?"}]
    assert prompt("chat", messages=messages) == ["User: Who is Idefix?<end_of_utterance>", "\nAssistant:"]


def test_a_system_message_opens_the_users_turn() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who is Idefix?"}]
    assert prompt("chat", messages=messages) == [
        "User: Be brief.\nWho is Idefix?<end_of_utterance>",
        "\nAssistant:",
    ]


def test_a_system_message_stands_before_the_users_image() -> None:
    messages = [{"role": "system", "content": "Be brief."}, user(IDEFIX, "Who is this?")]
    assert prompt("chat", messages=messages) == [
        "User: Be brief.\n",
        ImageRef(IDEFIX),
        "Who is this?<end_of_utterance>",
        "\nAssistant:",
    ]


def test_a_later_system_message_opens_the_next_turn_only() -> None:
    messages = [
        {"role": "user", "content": "Hello"},
        assistant("Hello!"),
        {"role": "system", "content": "Speak French."},
        {"role": "user", "content": "Who is Idefix?"},
    ]
    assert prompt("chat", messages=messages)[2:] == [
        "\nUser: Speak French.\nWho is Idefix?<end_of_utterance>",
        "\nAssistant:",
    ]


def test_a_system_message_is_said_once() -> None:
    messages = [{"role": "system", "content": "Be brief."}, user("One"), assistant("Two"), user("Three")]
    texts = "".join(part for part in prompt("chat", messages=messages) if isinstance(part, str))
    assert texts.count("Be brief.") == 1


def test_each_message_ends_its_utterance_and_the_answer_is_left_open() -> None:
    messages = [user("One", IDEFIX, R22B), assistant("Two"), user("Three")]
    texts = "".join(part for part in prompt("chat", messages=messages) if isinstance(part, str))
    assert texts.count(END_OF_UTTERANCE) == len(messages)
    assert texts.endswith("\nAssistant:")


# turns


def turns(task: str, **arguments: Any) -> Prompt:
    return in_turns(parse(f"idefics.{task}", arguments))


def test_in_turns_a_caption_is_asked_for() -> None:
    assert turns("caption", image=EIFFEL) == [
        "User:",
        ImageRef(EIFFEL),
        "Describe this image.",
        "<end_of_utterance>\nAssistant:",
    ]


def test_in_turns_a_captions_examples_are_earlier_turns_and_its_prompt_opens_the_answer() -> None:
    examples = [{"image": EIFFEL, "text": "A tower."}]
    assert as_written(turns("caption", image=LIBERTY, examples=examples, prompt="This is")) == (
        "User:<image>Describe this image.<end_of_utterance>\nAssistant: A tower.<end_of_utterance>\n"
        "User:<image>Describe this image.<end_of_utterance>\nAssistant: This is"
    )


def test_in_turns_a_question_is_the_users_words() -> None:
    examples = [{"image": EIFFEL, "question": "Which city?", "answer": "Paris"}]
    assert as_written(turns("answer", image=LIBERTY, question="Which one now?", examples=examples)) == (
        "User:<image>Which city?<end_of_utterance>\nAssistant: Paris<end_of_utterance>\n"
        "User:<image>Which one now?<end_of_utterance>\nAssistant:"
    )


def test_in_turns_the_labels_are_told_once() -> None:
    examples = [{"image": EIFFEL, "label": "tower"}]
    assert as_written(turns("classify", image=LIBERTY, labels=["tower", "statue"], examples=examples)) == (
        "User: Instruction: Classify the following image into a single category from the following list: "
        "['tower', 'statue'].\n<image><end_of_utterance>\nAssistant: tower<end_of_utterance>\n"
        "User:<image><end_of_utterance>\nAssistant:"
    )


def test_in_turns_a_text_begins_with_its_lead() -> None:
    assert as_written(turns("write", images=[EIFFEL, LIBERTY])) == (
        "User:<image><image>Use the image to write a story.<end_of_utterance>\nAssistant: Story:"
    )


def test_in_turns_a_completed_list_and_a_chat_are_unchanged() -> None:
    messages = [user("Who is this?", IDEFIX)]
    assert turns("chat", messages=messages) == prompt("chat", messages=messages)
    assert turns("complete", prompt=["Hello", EIFFEL]) == prompt("complete", prompt=["Hello", EIFFEL])


def test_in_turns_a_system_message_has_its_own() -> None:
    messages = [{"role": "system", "content": "Be brief."}, user(IDEFIX, "Who is this?")]
    assert as_written(turns("chat", messages=messages)) == (
        "System: Be brief.<end_of_utterance>\nUser:<image>Who is this?<end_of_utterance>\nAssistant:"
    )


def test_a_model_without_ends_of_utterances_reads_turns_that_end_with_their_lines() -> None:
    messages = [user("Who is this?", IDEFIX), assistant("A dog."), user("Really?")]
    assert as_written(without_ends(prompt("chat", messages=messages))) == (
        "User: Who is this?<image>\nAssistant: A dog.\nUser: Really?\nAssistant:"
    )


def as_written(parts: Prompt) -> str:
    """The text that the later families make of a list."""
    return "".join(part if isinstance(part, str) else "<image>" for part in parts)
