"""The Flask app, composed of every family of routes."""

from __future__ import annotations

from flask import Flask

from inferno.protocol.browsers import BrowserRules
from inferno.settings import Settings, load
from web import security
from web.calls import errors
from web.oip import infer as oip_infer
from web.oip import models as oip_models
from web.oip import repository as oip_repository
from web.routes import cache, dead, health, infer, lanes, models, pages, reference, tasks
from web.security import Admit
from web.services import Services
from web.sockets import routes as sockets
from web.sockets.peer import Peers

#: The families of routes of our own API.
API = (
    infer.blueprint,
    tasks.blueprint,
    dead.blueprint,
    lanes.blueprint,
    cache.blueprint,
    models.blueprint,
    health.blueprint,
    sockets.blueprint,
)
#: Prefixes under which each of them exists: clients of other servers expect some of them.
PREFIXES = ("", "/v1", "/api/v1")
#: The Open Inference Protocol, under a prefix of its own.
OIP = (oip_infer.blueprint, oip_models.blueprint, oip_repository.blueprint)

#: Number of ping intervals after which a socket that takes no data is cut off.
STALLED_PINGS = 2


def create_app(settings: Settings | None = None, admit: Admit | None = None) -> Flask:
    """Build the app.

    Args:
      settings: the settings; by default from the environment.
      admit: runs before each call, and raises an error to refuse it; by default the rules for
        browsers.
    Raises:
      ConfigurationError: a setting or the model repository is wrong.
    """
    settings = settings or load()
    app = Flask(__name__)
    app.config["MAX_CONTENT_LENGTH"] = settings.limits.max_body_bytes
    app.config["SOCK_SERVER_OPTIONS"] = {
        "ping_interval": settings.websocket.ping_interval_s,
        "max_message_size": settings.limits.max_body_bytes,
        "receive_bytes": 65_536,
    }
    app.extensions["inferno"] = Services.build(settings)
    app.extensions["peers"] = Peers(
        settings.websocket.max_queued_messages,
        STALLED_PINGS * settings.websocket.ping_interval_s,
    )
    app.extensions["prefixes"] = PREFIXES
    errors.register(app)
    server = settings.server
    rules = BrowserRules((server.host, *server.hosts), server.cors_origins)
    security.register(app, admit or security.admission(rules), rules)
    app.register_blueprint(pages.blueprint)
    for prefix in PREFIXES:
        for blueprint in API:
            name = f"{prefix.lstrip('/').replace('/', '-')}-{blueprint.name}".lstrip("-")
            app.register_blueprint(blueprint, name=name, url_prefix=prefix or None)
    for blueprint in OIP:
        app.register_blueprint(blueprint)
    app.register_blueprint(reference.blueprint)
    return app
