"""The Flask app, composed of every family of routes."""

from __future__ import annotations

from flask import Flask

from inferno.protocol.browsers import BrowserRules
from inferno.settings import Settings, load
from web import security
from web.calls import errors, parameters
from web.oip import infer as oip_infer
from web.oip import models as oip_models
from web.oip import repository as oip_repository
from web.routes import cache, dead, health, infer, lanes, models, pages, reference, tasks
from web.security import Admit
from web.services import Services
from web.sockets import routes as sockets
from web.sockets.handshake import NoThread
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
    app.config["SOCK_SERVER_OPTIONS"] = {"thread_class": NoThread}
    app.extensions["inferno"] = Services.build(settings)
    app.extensions["peers"] = Peers(settings)
    app.extensions["prefixes"] = PREFIXES
    errors.register(app)
    server = settings.server
    rules = BrowserRules((server.host, *server.hosts), server.cors_origins)
    security.register(app, admit or security.admission(rules), rules)
    parameters.register(app)
    app.register_blueprint(pages.blueprint)
    for prefix in PREFIXES:
        for blueprint in API:
            name = f"{prefix.lstrip('/').replace('/', '-')}-{blueprint.name}".lstrip("-")
            app.register_blueprint(blueprint, name=name, url_prefix=prefix or None)
    for blueprint in OIP:
        app.register_blueprint(blueprint)
    app.register_blueprint(reference.blueprint)
    return app
