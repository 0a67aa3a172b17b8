"""Flask that answers inline, without queue or batches: the cost of a call without a platform."""

from __future__ import annotations

from flask import Flask, Response, jsonify, request
from gevent import monkey

from bench.peers.forward import load


def create_app() -> Flask:
    """Build the app; each web process loads the model."""
    # A forward pass blocks its process; gevent's patched sleep would not.
    forward = load(sleep=monkey.get_original("time", "sleep"))
    app = Flask(__name__)

    @app.post("/predict")
    def predict() -> Response:
        texts = request.get_json()["texts"]
        return jsonify(outputs=forward(texts), batch_size=1)

    return app
