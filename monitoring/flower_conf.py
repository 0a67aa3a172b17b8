"""Flower's options, filled from Inferno's settings: ``celery -A tasks flower --conf=monitoring/flower_conf.py``."""

from inferno.settings import load as _load

_settings = _load().flower

address = _settings.host
port = _settings.port
persistent = False
