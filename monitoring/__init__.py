"""Monitoring of the platform: the configuration of Flower, Celery's console."""
