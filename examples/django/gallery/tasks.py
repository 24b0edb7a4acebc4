"""What the site's own Celery worker runs when a job has ended."""

from celery import shared_task
from idefics_jobs.errors import from_exception

from .celery import app
from .models import Picture


@shared_task
def save_text(result, id):
    Picture.objects.get(pk=id).done(result["text"])


@shared_task
def save_error(id):
    # A text for visitors: the error's own text is for you, and may name hosts and settings.
    _, body = from_exception(app.AsyncResult(id).result).response()
    Picture.objects.get(pk=id).failed(body["error"]["message"])
