"""Settings (`settings.py`), Celery's configuration (`celery.py`), logging, and the Redis users (`redis/`)."""
