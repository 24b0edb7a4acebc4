"""The host that a job's image comes from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .. import urls
from ..chat_messages import ChatImagePart, ChatMessage
from ..payloads import Chat, Complete, Job
from ..prompt_parts import ImagePart

#: Of a job without an image's URL.
NO_HOST = ""


def host_of(job: Job) -> str:
    """The host of the first image with a URL, in lower case; NO_HOST without one."""
    images = (image for image in _images(job) if isinstance(image, str))
    return next((host for image in images if (host := urls.host_of(image))), NO_HOST)


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
