"""Flask in front of Celery: send a task, wait for its result."""

from __future__ import annotations

import os

from celery import Celery
from flask import Flask, Response, jsonify, request

#: How long a call waits for its task, in seconds.
WAIT_S = 30


def create_app() -> Flask:
    """Build the app."""
    tasks = Celery("web", broker=os.environ["BENCH_REDIS"], backend=os.environ["BENCH_REDIS"])
    app = Flask(__name__)

    @app.post("/predict")
    def predict() -> Response:
        result = tasks.send_task("predict", args=[request.get_json()["texts"]])
        return jsonify(result.get(timeout=WAIT_S))

    return app
