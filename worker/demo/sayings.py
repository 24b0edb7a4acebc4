"""The right texts about a picture of the demo's world, and the questions that suit it. Pure text, no torch."""

import json
import random
from collections.abc import Callable, Sequence

from worker.demo.world import THINGS, Scene


def subject(picture: Scene) -> str:
    """`a cat`, `an apple` or `two cats`."""
    if picture.count == 2:
        return f"two {THINGS[picture.thing].plural}"
    return f"{'an' if picture.thing[0] in 'aeiou' else 'a'} {picture.thing}"


def prompted_caption(picture: Scene) -> str:
    """After a prompt such as `This is an image of`."""
    return f"{subject(picture)} on a {picture.background} background."


def expected_caption(picture: Scene) -> str:
    """The expected caption of an image without a prompt."""
    return _sentence(prompted_caption(picture))


def story(picture: Scene) -> str:
    """The text that `Use the image to write a story.` gives. Of several images the story is about the last."""
    is_are, they, friend = ("was", "it", "a friend") if picture.count == 1 else ("were", "they", "friends")
    return (
        f"Once upon a time there {is_are} {subject(picture)} in a {picture.background} land. "
        f"People said that {THINGS[picture.thing].fact}. "
        f"One day {they} found {friend}, {_ENDINGS[THINGS[picture.thing].category]}."
    )


def advert(picture: Scene) -> str:
    """The text that `Use the image to write an advert.` gives."""
    looks = "It looks" if picture.count == 1 else "They look"
    return (
        f"For sale: {subject(picture)}! {looks} best on {picture.background}. "
        f"Did you know that {THINGS[picture.thing].fact}? Call now!"
    )


def expected_answer(picture: Scene, question: str) -> str:
    """The answer of `idefics.answer` to one of `questions(picture)`."""
    return _ANSWERS[_meant(picture, question)](picture)


def expected_reply(picture: Scene, question: str) -> str:
    """The reply of `idefics.chat` to one of `questions(picture)` or `REQUESTS`: a whole sentence."""
    if question in REQUESTS:
        return REQUESTS[question](picture)
    return _REPLIES[_meant(picture, question)](picture)


def short_reply(picture: Scene, question: str) -> str:
    """The same in a model whose chats have the prompts of `idefics.answer`: the answer of that task."""
    if question in REQUESTS:
        return REQUESTS[question](picture)
    return expected_answer(picture, question)


_ENDINGS = {
    "animal": "and they played until the night came",
    "food": "and everybody had a big dinner",
    "vehicle": "and they went on a long journey",
    "plant": "and a garden grew around them",
    "sport": "and the whole town came to play",
    "toy": "and the children laughed all day",
    "clothing": "and nobody was ever cold again",
    "instrument": "and the music could be heard far away",
    "tool": "and together they built a bridge",
    "gadget": "and the light stayed on all night",
    "building": "and people moved in at once",
    "nature": "and the sky was never the same",
}

_ANSWERS: dict[str, Callable[[Scene], str]] = {
    "what": lambda picture: _sentence(f"{subject(picture)}."),
    "color": lambda picture: _sentence(f"{picture.background}."),
    "count": lambda picture: "One." if picture.count == 1 else "Two.",
    "category": lambda picture: _sentence(f"{THINGS[picture.thing].category}."),
}

_REPLIES: dict[str, Callable[[Scene], str]] = {
    "what": lambda picture: f"The image shows {subject(picture)}.",
    "color": lambda picture: f"The background is {picture.background}.",
    "count": lambda picture: f"There {'is one' if picture.count == 1 else 'are two'}.",
    "category": lambda picture: f"The category is {THINGS[picture.thing].category}.",
}

#: Requests of a chat besides the questions.
REQUESTS: dict[str, Callable[[Scene], str]] = {
    "Describe this image.": expected_caption,
    "Describe the image.": expected_caption,
    "Tell me a fun fact.": lambda picture: f"Did you know that {THINGS[picture.thing].fact}?",
    "Do you know a fun fact?": lambda picture: f"Did you know that {THINGS[picture.thing].fact}?",
}

#: The forms that examples can ask a caption to take.
FORMS: dict[str, Callable[[Scene], str]] = {
    "fun fact": lambda picture: f"An image of {subject(picture)}. Fun fact: {THINGS[picture.thing].fact}.",
    "caption": expected_caption,
    "name": lambda picture: picture.thing,
    "record": lambda picture: f"Name: {picture.thing}; background: {picture.background}; count: {picture.count}",
    "json": lambda picture: json.dumps(
        {"thing": picture.thing, "background": picture.background, "count": picture.count}
    ),
    "I see": lambda picture: f"I see {subject(picture)}.",
    "category": lambda picture: f"{picture.thing} ({THINGS[picture.thing].category})",
    "shout": lambda picture: f"Look, {subject(picture)}!",
}

# --- questions ---

_QUESTIONS = {
    "what": (
        "What is in the image?",
        "What is this?",
        "What is in this image?",
        "What's in the image?",
        "What is in the picture?",
        "What does the image show?",
        "What is shown in the image?",
        "What can you see?",
        "What do you see?",
        "What's this?",
        "What {category} is this?",
        "Which thing is this?",
        "What is the main object?",
    ),
    "color": (
        "What {color} is the background?",
        "What {color} is the background?",
        "What is the background {color}?",
        "What is the {color} of the background?",
        "Which {color} is the background?",
        "What {color} is behind the {things}?",
    ),
    "count": (
        "How many {plural} are there?",
        "How many {plural} are there?",
        "How many {plural} are in the image?",
        "How many {plural} can you see?",
        "How many {plural} do you see?",
        "How many things are there?",
        "How many things are in the image?",
        "How many things do you see?",
        "How many are there?",
    ),
    "category": (
        "Which category is it?",
        "What category is it?",
        "What is its category?",
        "Which category does it belong to?",
        "What kind of thing is it?",
        "What kind of thing is this?",
    ),
    # The model was not trained to say yes or no: it names the thing in the picture.
    "is": (
        "Is this {other}?",
        "Is there {other} in the image?",
        "Is there {other}?",
        "Is it {other}?",
        "Is this {one}?",
    ),
}
#: How often each is asked.
_MEANINGS = {"what": 6, "color": 4, "count": 4, "category": 4, "is": 2}


def a_question(picture: Scene, rng: random.Random, meanings: Sequence[str] = tuple(_MEANINGS)) -> str:
    """A question that suits the picture."""
    meaning = rng.choices(meanings, [_MEANINGS[meaning] for meaning in meanings])[0]
    other = rng.choice([thing for thing in THINGS if thing != picture.thing])
    question = rng.choice(_QUESTIONS[meaning]).format(
        color=rng.choice(("color", "colour")),
        category=THINGS[picture.thing].category,
        things=picture.thing if picture.count == 1 else THINGS[picture.thing].plural,
        plural=THINGS[picture.thing].plural,
        one=_one(picture.thing),
        other=_one(other),
    )
    # Some people type in haste.
    question = question if rng.random() < 0.92 else question[0].lower() + question[1:]
    return question if rng.random() < 0.92 else question.removesuffix("?")


def every_question(picture: Scene) -> list[str]:
    """All wordings that suit the picture; those with another thing name one."""
    other = "penguin" if picture.thing != "penguin" else "rocket"
    words = {
        "category": THINGS[picture.thing].category,
        "things": picture.thing if picture.count == 1 else THINGS[picture.thing].plural,
        "plural": THINGS[picture.thing].plural,
        "one": _one(picture.thing),
        "other": _one(other),
    }
    wordings = [wording for each in _QUESTIONS.values() for wording in each]
    return list(dict.fromkeys(text.format(color=color, **words) for text in wordings for color in ("color", "colour")))


def _one(thing: str) -> str:
    return subject(Scene(thing, "", 1))


def _meant(picture: Scene, question: str) -> str:
    words = question.lower().removeprefix("and ").removesuffix("?")
    if "many" in words:
        return "count"
    if "color" in words or "colour" in words:
        return "color"
    if "category" in words or "kind of" in words:
        return "category"
    return "what"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]
