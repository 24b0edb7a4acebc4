"""`python -m config`: the settings in force, as environment variables, secrets masked."""

from __future__ import annotations

import re
import sys

from pydantic import SecretStr, ValidationError

from config.settings import PREFIX, Settings, load


def lines(settings: Settings) -> list[str]:
    """One line `IDEFICS_NAME=value` for each setting."""
    return [f"{PREFIX}{name.upper()}={shown(getattr(settings, name))}" for name in Settings.model_fields]


def shown(value: object) -> str:
    """A setting's value as in the environment, secrets masked."""
    if isinstance(value, SecretStr):
        secret = value.get_secret_value()
        return _masked_url(secret) if "://" in secret else "****" * bool(secret)
    if isinstance(value, dict):
        return ",".join(f"{name}=****" for name in value)
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "" if value is None else str(value)


def _masked_url(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    credentials, at, host = rest.rpartition("@")
    host = re.sub(r"(?<=password=)[^&;]*", "****", host)
    return f"{scheme}{separator}{'****' if credentials else ''}{at}{host}"


if __name__ == "__main__":
    try:
        print("\n".join(lines(load())))
    except (ValidationError, ValueError) as error:
        sys.exit(str(error))
