"""The host that a job's image comes from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from ..chat_messages import ChatImagePart, ChatMessage
from ..payloads import Chat, Complete, Job
from ..prompt_parts import ImagePart

#: Of a job without an image's URL.
NO_HOST = ""


def host_of(job: Job) -> str:
    """The host of the first image with a URL, in lower case; NO_HOST without one."""
    for image in _images(job):
        # A data: URI may have megabytes.
        if isinstance(image, str) and image[:4].lower() == "http":
            return host_of_url(image)
    return NO_HOST


def host_of_url(url: str) -> str:
    """A URL's host in lower case; NO_HOST if it has none."""
    try:
        return (urlsplit(url).hostname or NO_HOST).rstrip(".")
    except ValueError:
        return NO_HOST


def _images(job: Job) -> Iterator[Any]:
    """Strings, or paths below the workers' image root."""
    if isinstance(job, Complete):
        yield from (part.image for part in job.prompt if isinstance(part, ImagePart))
    elif isinstance(job, Chat):
        contents = (message.content for message in job.messages if isinstance(message, ChatMessage))
        parts = (part for content in contents if not isinstance(content, str) for part in content)
        yield from (part.image_url.url for part in parts if isinstance(part, ChatImagePart))
    elif hasattr(job, "images"):
        yield from job.images
    elif hasattr(job, "image"):
        yield job.image
