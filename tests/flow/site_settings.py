"""What a Django project's settings module says to Celery, with routes and without."""

from __future__ import annotations

import os

#: The Redis database with the lists.
NOTES = 2


class Settings:
    """Our tasks' queue is named wherever they are sent."""

    CELERY_BROKER_URL = os.environ.get("SITE_BROKER", "")
    CELERY_RESULT_BACKEND = os.environ.get("SITE_RESULTS", "")
    CELERY_WORKER_HIJACK_ROOT_LOGGER = False


class RoutedSettings(Settings):
    """The site's code then names no queue."""

    CELERY_TASK_ROUTES = {"idefics.*": {"queue": "idefics"}, "site.report": {"queue": "reports"}}
