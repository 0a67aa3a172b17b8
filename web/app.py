"""The Flask app: every family of routes, on one screen."""

from __future__ import annotations

from flask import Flask

from inferno.settings import Settings, load
from web.calls import errors
from web.oip import infer as oip
from web.routes import cache, dead, health, infer, lanes, models, pages, reference, tasks
from web.services import Services
from web.sockets import conversation as sockets
from web.sockets.peer import Peers

#: The families of routes.
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
#: All of them are found under each of these, so that clients of other servers find what they know.
PREFIXES = ("", "/v1", "/api/v1")

#: A socket that takes no data for this many ping intervals is cut off.
STALLED_PINGS = 2


def create_app(settings: Settings | None = None) -> Flask:
    """Build the app.

    Args:
      settings: by default, those of the environment.
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
    app.register_blueprint(pages.blueprint)
    for prefix in PREFIXES:
        for blueprint in API:
            name = f"{prefix.lstrip('/').replace('/', '-')}-{blueprint.name}".lstrip("-")
            app.register_blueprint(blueprint, name=name, url_prefix=prefix or None)
    app.register_blueprint(oip.blueprint)
    app.register_blueprint(reference.blueprint)
    return app
