"""Workers check the inputs of messages again: other Celery clients never pass the front end."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from inferno.errors import InvalidInput
from inferno.protocol.limits import UNLIMITED
from inferno.protocol.requests import InferRequest
from inferno.protocol.tasks import TaskState
from inferno.repository.repository import Repository as Packages
from inferno.testing.processes import wait_until
from tests.pictures import png_header, white_png

SIGNATURE = {
    "inputs": [
        {"name": "text", "dtype": "string", "shape": ["batch"], "optional": True},
        {"name": "image", "dtype": "bytes", "shape": ["batch"], "optional": True},
        {"name": "x", "dtype": "float32", "shape": ["batch", "n"], "optional": True},
    ],
    "one_of": ["text", "image", "x"],
    "outputs": [{"name": "rows", "dtype": "int64", "shape": ["batch"]}],
}
CODE = """
import numpy as np

def build(context):
    def model(inputs):
        return {"rows": np.zeros(len(next(iter(inputs.values()))), int)}
    return model
"""
LIMITS = {
    "INFERNO_LIMITS__MAX_TEXT_BYTES": "100000",
    "INFERNO_LIMITS__MAX_ELEMENTS": "1000",
    "INFERNO_LIMITS__MAX_ITEMS": "20",
    "INFERNO_LIMITS__MAX_ROWS": "30",
    "INFERNO_LIMITS__MAX_TOTAL_PIXELS": "2000000",
    "INFERNO_TASKS__KEEP_PAYLOADS": "failed",
}
PICTURE = base64.b64encode(white_png(1000, 1000)).decode()
BILLIONS = base64.b64encode(png_header(2**31 - 1, 2**31 - 1)).decode()
HOSTILE: list[tuple[dict[str, Any], str]] = [
    ({"inputs": {"text": ["a"] * 31}}, "at most 30 rows"),
    ({"inputs": {"text": ["a"] * 25}}, "at most 20 texts or binary items"),
    ({"inputs": {"text": "a" * 100_001}}, "at most 100000 bytes"),
    ({"inputs": {"x": [[1] * 1001]}}, "at most 1000 elements"),
    ({"inputs": {"x": {"shape": [0] + [2**31 - 1] * 3, "base64": ""}}}, "expected shape"),
    ({"inputs": {"x": [[[]]] * 10}}, "expected shape"),
    ({"inputs": {"x": [["1"]]}}, "expected float32 values, got text"),
    ({"inputs": {"image": [PICTURE] * 3}}, "at most 2000000 pixels in all, got 3000000"),
    ({"inputs": {"image": BILLIONS}}, "at most 50000000 pixels"),
    ({"inputs": {f"x{n}": 1 for n in range(1000)}}, "and 995 more"),
    ({"claim": {"text": [2**40]}}, "at most 30 rows"),
    ({"claim": {"x": [1, 2**40]}}, "at most 1000 elements"),
    ({"claim": {"y": [1]}}, "Unexpected input"),
]


@pytest.fixture
def limited(repository, start_worker):
    """A worker with small limits."""
    repository.add("limited", code=CODE, signature=SIGNATURE, batching={"max_batch_delay_ms": 20})
    with start_worker("limited", **LIMITS) as worker:
        yield worker


def test_hostile_messages_fail_alone(limited, celery):
    def send(kwargs: dict[str, Any]) -> Any:
        return celery.send_task("infer.limited", kwargs=kwargs, queue="limited")

    sent = [(send(kwargs), send({"inputs": {"text": "fine"}})) for kwargs, _ in HOSTILE]
    for (hostile, mate), (kwargs, detail) in zip(sent, HOSTILE, strict=True):
        with pytest.raises(InvalidInput, match=detail):
            hostile.get(timeout=30)
        assert mate.get(timeout=30)["outputs"]["rows"]["data"] == [0], kwargs
    assert limited.poll() is None


@pytest.mark.parametrize("size", [100, 99_000])
def test_a_task_that_is_run_again_is_checked_again(
    limited, settings, submitter, replay, records, size
):
    """Its inputs are in the message, or under a key of their own."""
    package = Packages.read(settings.repository).model("limited").package()
    request = InferRequest({"text": ["x" * size] * 25}, "limited")
    task_id = submitter.submit(
        request, package, request.arrays(package.signature, UNLIMITED)
    ).task_id

    def has_failed() -> bool:
        record, _ = records.fetch(task_id)
        return record.state is TaskState.FAILED

    for _ in range(2):
        wait_until(has_failed)
        _, outcome = records.fetch(task_id)
        assert "at most 20 texts or binary items" in outcome.error.detail
        task_id = replay.retry(task_id).task_id
    assert limited.poll() is None
