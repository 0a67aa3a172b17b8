"""Flower's options, with values from Inferno's settings; the Procfile's `flower` line uses them."""

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
    _Broker.lanes = []  # Without the repository, Flower shows the queues that workers report.
_Broker.url = _settings.broker_url
_views.Broker = _Broker
