"""Flower's options, filled from Inferno's settings; used by the `flower` line of the Procfile."""

import flower.views as _views

from inferno import names as _names
from inferno.errors import PackageError as _PackageError
from inferno.repository.repository import Repository as _Repository
from inferno.settings import load as _load
from monitoring.flower.broker import Broker as _Broker

_settings = _load()

address = _settings.flower.host
port = _settings.flower.port
persistent = False

try:
    _Broker.lanes = [*_Repository.read(_settings.repository).models, _names.WEBHOOK_QUEUE]
except _PackageError:
    _Broker.lanes = []  # It runs where the models are not, and shows what workers tell of.
_views.Broker = _Broker
