"""Flower's options, filled from Inferno's settings; used by the `flower` line of the Procfile."""

from inferno.settings import load as _load

_settings = _load().flower

address = _settings.host
port = _settings.port
persistent = False
