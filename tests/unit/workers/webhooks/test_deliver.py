"""The parts of the webhook task that need no worker."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import pytest
from celery import Celery
from celery.exceptions import Reject

from inferno import names
from inferno.settings import Settings
from tasks.broker.connection import connect
from tasks.broker.lanes import Lanes
from tasks.broker.webhook_message import message
from tasks.celery import route
from tasks.state.records import Records
from workers.webhooks.deliver import Deliver
from workers.webhooks.outbound import Outbound
from workers.webhooks.places import Places


def test_webhooks_go_to_a_queue_of_their_own() -> None:
    sent = message("https://a.example", "1", "start", "m", None, 1.5)

    assert route(sent.name) == {"queue": "webhooks"}
    assert route(names.task_name("m")) == {"queue": "m"}
    assert route("celery.backend_cleanup") is None
    assert json.loads(json.dumps(sent.kwargs)) == sent.kwargs


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port on which nothing listens, and that no other test can take meanwhile."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def test_a_next_try_that_the_broker_does_not_take_is_not_dropped(closed_port: int) -> None:
    settings = Settings(redis={"url": f"redis://127.0.0.1:{closed_port}/0"})
    app = Celery("test", broker=settings.redis.url)
    app.conf.task_publish_retry = False
    client = connect(settings)
    records, lanes = Records(client, settings), Lanes(app, client, settings)
    outbound = Outbound(1.0, allow_private=False)
    places = Places(2, per_receiver=1, max_wait_s=1.0)
    task = app.register_task(Deliver(records, lanes, outbound, places, settings.webhooks))
    kwargs = message("https://a.example", "1", "completed", "m", 1, 1.5).kwargs
    task.push_request(
        id="w", args=(), kwargs=kwargs, called_directly=False, delivery_info={"routing_key": "x"}
    )

    # Without Redis, neither the state of the task can be read nor the next attempt published.
    with pytest.raises(Reject) as raised:
        task.run(**kwargs)

    assert raised.value.requeue
    assert isinstance(raised.value.__context__, Reject)
    task.pop_request()
    app.close()
