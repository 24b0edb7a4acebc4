"""Variables of the environment that look like our settings, but were set by Kubernetes or docker for a service."""

from __future__ import annotations

import re

#: Variables that Kubernetes puts into each pod for a Service of its namespace, and docker for `--link`: the ends of
#: their names, and the forms of their values. For a Service called `idefics-redis` they begin like our settings.
_INJECTED = tuple(
    (re.compile(name + r"\Z"), re.compile(value))
    for name, value in (
        (r"_SERVICE_HOST", r"[\w.:-]*"),
        (r"_SERVICE_PORT(_[A-Z0-9_]+)?", r"\d*"),
        (r"_PORT", r"(tcp|udp|sctp)://\S+"),
        (r"_PORT_\d+_(TCP|UDP|SCTP)", r"(tcp|udp|sctp)://\S+"),
        (r"_PORT_\d+_(TCP|UDP|SCTP)_PROTO", r"tcp|udp|sctp"),
        (r"_PORT_\d+_(TCP|UDP|SCTP)_PORT", r"\d+"),
        (r"_PORT_\d+_(TCP|UDP|SCTP)_ADDR", r"[\w.:-]+"),
        # docker's links: the name, and the other container's environment.
        (r"_NAME", r"/\S+"),
        (r"_ENV_\w+", r"(?s:.*)"),
    )
)


def is_injected(rest: str, value: str) -> bool:
    """Whether Kubernetes or docker set a variable, for a service whose name begins like our settings.

    `rest`: what follows the service's first word in the variable's name, from the underscore on.
    """
    return any(ending.search(rest) and form.fullmatch(value) for ending, form in _INJECTED)
