import uuid

from django.db import models


class Picture(models.Model):
    """An upload and its caption."""

    #: The job's id, too.
    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    name = models.CharField(max_length=255)
    state = models.CharField(max_length=20, default="waiting")
    text = models.TextField(blank=True)

    def __str__(self):
        return self.name

    def done(self, text):
        self.state, self.text = "done", text.strip()
        self.save()

    def failed(self, why):
        self.state, self.text = "failed", why
        self.save()
