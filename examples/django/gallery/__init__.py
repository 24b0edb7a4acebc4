# So that shared tasks belong to this app, in the site's processes too.
from .celery import app as celery_app

__all__ = ["celery_app"]
