"""Our request of an ordinary message equals the one that Celery would have made."""

from __future__ import annotations

import orjson
import pytest
from celery import Celery
from celery.worker.request import Request
from celery_batches import Batches

from tasks.transport import Message, pack
from workers.batches.celery_request import Delivery

APP = Celery("unit", broker="memory://", set_as_current=False)

#: Attributes that Celery and handlers of its signals read.
ATTRIBUTES = (
    *("id", "name", "type", "args", "kwargs", "argsrepr", "kwargsrepr", "root_id", "parent_id"),
    *("eta", "expires", "hostname", "delivery_info", "ignore_result", "task", "task_id", "groups"),
    *("body", "content_type", "content_encoding", "utc"),
)


class Consumer:
    """The parts of Celery's consumer that a request uses."""

    app = APP
    hostname = "worker@host"
    event_dispatcher = None
    connection_errors = (OSError,)


@pytest.fixture
def task():
    task = Batches()
    task.name = "infer.m"
    task.bind(APP)
    return task


def message(**headers) -> Message:
    """Return a message as a Celery client publishes it."""
    template = APP.amqp.as_task_v2("an-id", "infer.m", kwargs={"a": 1}, argsrepr="", **headers)
    properties = template.properties | {"correlation_id": "an-id"}
    body = orjson.dumps(template.body).decode()
    packed = pack(body, "m", headers=template.headers, properties=properties, priority=4)
    return Message(orjson.loads(packed))


@pytest.mark.parametrize("headers", [{}, {"expires": 60, "retries": 2, "kwargsrepr": "text: [1]"}])
def test_a_delivery_tells_what_celery_s_request_tells(task, headers):
    raw = message(**headers)._raw
    ours = Delivery.read(Message(raw), task, Consumer)
    assert ours is not None
    theirs = Request(Message(raw), app=APP, hostname=Consumer.hostname, task=task, eventer=None)
    for safe in (True, False):
        assert ours.info(safe) == theirs.info(safe)
    for name in ATTRIBUTES:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.request_dict["retries"] == theirs.request_dict["retries"]
    assert str(ours) == str(theirs)


@pytest.mark.parametrize(
    "headers",
    [{"countdown": 60}, {"shadow": "another"}, {"task": "infer.another"}, {"expires": "soon"}],
)
def test_what_is_out_of_the_ordinary_is_left_to_celery(task, headers):
    odd = message(**{k: v for k, v in headers.items() if k in ("countdown", "shadow")})
    odd.headers |= headers
    assert Delivery.read(odd, task, Consumer) is None


def test_a_body_that_is_no_json_is_left_to_celery(task):
    odd = message()
    odd.body = b"["
    assert Delivery.read(odd, task, Consumer) is None
    pickled = message()
    pickled.content_type = "application/x-python-serialize"
    assert Delivery.read(pickled, task, Consumer) is None
