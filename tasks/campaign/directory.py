"""The campaigns on a broker, of all producers: listed, and steered from any machine (`idefics-jobs campaigns`)."""

from __future__ import annotations

from typing import Any

from celery import Celery

from ..errors import NotFound
from ..outbox import connect
from ..redis_keys import CAMPAIGN_ABOUT, CAMPAIGN_INDEX, CAMPAIGN_WANTED, broker_prefix
from ..setup_check import registry
from ..steering import State, Wanted, read_wanted, server_time
from .record import MAX_CAMPAIGNS, TTL_S, CampaignRecord, record


class Campaigns:
    """Reads and steers the campaigns on an app's broker. Its methods raise RedisError."""

    def __init__(self, app: Celery) -> None:
        """Raises OperationalError if the broker is away, and ConfigurationError if it is not Redis."""
        with registry(app):
            self._redis: Any = connect(app)
        self._prefix = broker_prefix(app)

    def all(self) -> list[CampaignRecord]:
        """All campaigns that have a record, the one that reported last first."""
        ids = self._redis.zrevrange(self._prefix + CAMPAIGN_INDEX.named(), 0, MAX_CAMPAIGNS - 1)
        return self._read([id.decode(errors="replace") for id in ids])

    def get(self, asked: str) -> CampaignRecord:
        """The campaign with this id, beginning of an id, or name: of several with the name the one that reported last.

        Raises NotFound, also if an id begins like this for several.
        """
        known = self.all()
        exact = next((each for each in known if asked in (each.id, each.info.name)), None)
        found = [exact] if exact else [each for each in known if asked and each.id.startswith(asked)]
        if len(found) == 1:
            return found[0]
        if found:
            raise NotFound(f"{len(found)} campaigns have an id that begins with {asked!r}: write more of it.")
        raise NotFound(
            f"No campaign {asked!r} in this Redis: `idefics-jobs campaigns ls` lists them. A record is kept for a week "
            "after its producer's last report."
        )

    def want(self, id: str, state: State) -> None:
        """Set what is wanted of a campaign. Its workers and its producer follow within about a second."""
        key = self._prefix + CAMPAIGN_WANTED.named(id)
        if state == "running":
            self._redis.delete(key)
        else:
            self._redis.set(key, Wanted(state, server_time(self._redis)).written(), ex=TTL_S)

    def _read(self, ids: list[str]) -> list[CampaignRecord]:
        if not ids:
            return []
        with self._redis.pipeline(transaction=False) as pipe:
            pipe.time()
            for id in ids:
                pipe.hgetall(self._prefix + CAMPAIGN_ABOUT.named(id))
            (seconds, _), *hashes = pipe.execute()
        wanted = read_wanted(self._redis, self._prefix, ids)
        return [record(id, found, wanted[id], seconds) for id, found in zip(ids, hashes, strict=True) if found]
