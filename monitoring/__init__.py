"""Watching the platform: Flower, Celery's console, is configured here."""
