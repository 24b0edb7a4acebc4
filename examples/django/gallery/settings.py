import os
from pathlib import Path

BASE_DIR = Path(__file__).parents[1]
DEBUG = True
SECRET_KEY = "for the desk only"  # noqa: S105 - of an example
ALLOWED_HOSTS = ["localhost", "127.0.0.1"]
INSTALLED_APPS = ["gallery"]
MIDDLEWARE = ["django.middleware.common.CommonMiddleware", "django.middleware.csrf.CsrfViewMiddleware"]
TIME_ZONE = "UTC"
ROOT_URLCONF = "gallery.urls"
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": os.environ.get("DATABASE", BASE_DIR / "db.sqlite3"),
        "OPTIONS": {"timeout": 20},
    }
}

CELERY_BROKER_URL = os.environ.get("BROKER_URL", "redis://localhost:6379/0")
CELERY_RESULT_BACKEND = os.environ.get("RESULT_BACKEND", "redis://localhost:6379/1")
# Celery on Redis has four priorities by default; the models' workers read all ten.
CELERY_BROKER_TRANSPORT_OPTIONS = {"priority_steps": list(range(10))}

# The URL that callbacks are posted to. Empty: a link to this site's own Celery worker is used instead.
CALLBACK_URL = os.environ.get("CALLBACK_URL", "")
CALLBACK_SECRET = os.environ.get("CALLBACK_SECRET", "")
