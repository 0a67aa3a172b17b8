"""The worker process: `celery -A tasks worker -Q <model>`."""
