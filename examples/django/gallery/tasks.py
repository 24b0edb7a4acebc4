"""What the site's own Celery worker runs when a job has ended."""

from celery import shared_task

from .celery import app
from .models import Picture


@shared_task
def save_text(result, id):
    Picture.objects.get(pk=id).done(result["text"])


@shared_task
def save_error(id):
    # The first argument is a stable code, the second says what to do.
    _, message, *_ = app.AsyncResult(id).result.args
    Picture.objects.get(pk=id).failed(message)
