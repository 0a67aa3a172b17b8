"""Flower's options, with values from Inferno's settings; the Procfile's `flower` line uses them."""

import logging as _logging
from urllib.parse import urlsplit as _urlsplit

import flower.views as _views

from inferno import log_records as _log_records
from inferno import names as _names
from inferno.errors import PackageError as _PackageError
from inferno.protocol.browsers import BrowserRules as _BrowserRules
from inferno.repository.repository import Repository as _Repository
from inferno.settings import exposure as _exposure
from inferno.settings import load as _load
from monitoring.flower import guard as _guard
from monitoring.flower.broker import Broker as _Broker

_log_records.install()
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

_guard.install(
    _BrowserRules((address, _urlsplit(_settings.flower_url).hostname, *_settings.server.hosts))
)

if (_warning := _exposure("Flower", address, port)) is not None:
    _logging.getLogger("flower").warning(_warning)
