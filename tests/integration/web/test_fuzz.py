"""The app answers whatever the OpenAPI document allows, and whatever it does not, as documented.

`INFERNO_TEST_EXAMPLES` is the number of examples for each route; few by default.
"""

from __future__ import annotations

import os
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import redis
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.core.result import Ok
from schemathesis.schemas import APIOperation
from schemathesis.specs.openapi import checks

from inferno.settings import Settings
from tests.integration.web.conformance import Conformance
from tests.integration.web.conftest import FakeWorker, announcing_app

EXAMPLES = int(os.environ.get("INFERNO_TEST_EXAMPLES", "0"))

#: Server errors that a document may name.
DOCUMENTED = {501, 503, 504}

#: What the models of these tests answer.
OUTPUTS: dict[str, Any] = {
    "sentiment": {"scores": {"dtype": "float32", "shape": [1, 2], "data": [[0.25, 0.75]]}},
    "digits": {"scores": {"dtype": "float32", "shape": [1, 10], "data": [[0.1] * 10]}},
    "tokens": {"scores": {"dtype": "float32", "shape": [1, 2], "data": [[0, 1]]}},
}

# Whoever asks for more examples has the time.
pytestmark = pytest.mark.timeout(0 if EXAMPLES else 120)

CHECKS = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.unsupported_method,
    checks.allow_header_conformance,
]


@pytest.fixture(scope="module")
def quick(settings: Settings) -> Settings:
    """Settings with which nothing waits for long."""
    repository = settings.repository.model_copy(update={"load_timeout_s": 0.05})
    server = settings.server.model_copy(update={"sync_wait_ms": 5000})
    return settings.model_copy(update={"repository": repository, "server": server})


@pytest.fixture(scope="module")
def running(redis_url, quick, broker):
    """The app and a worker that answers everything at once."""
    with redis.Redis.from_url(redis_url) as client:
        worker = FakeWorker(client, quick)
        worker.outcome = lambda task: OUTPUTS[task.model]
        with announcing_app(quick, client, worker, broker) as app, worker.running():
            yield app, worker


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_every_answer_is_documented(running, subtests, mode):
    app, worker = running
    api = schemathesis.openapi.from_wsgi("/openapi.json", app)
    conformance = Conformance(app, api.raw_schema, of_models=True)
    for result in api.get_all_operations():
        assert isinstance(result, Ok), result
        operation = result.ok()
        can_be_wrong = operation.body or operation.query
        if mode is GenerationMode.NEGATIVE and not can_be_wrong:
            continue
        # Some routes do away with models, tasks or lanes.
        worker.client.flushall()
        worker.serve(sentiment=[1, 2], digits=[1], tokens=[1])
        with subtests.test(operation.label):
            try_out(operation, mode, conformance)


def try_out(operation: APIOperation, mode: GenerationMode, conformance: Conformance) -> None:
    """Call one route with what the document allows, or with what it does not."""

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=EXAMPLES or 5,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    def answers_as_documented(case: Case) -> None:
        if mode is GenerationMode.POSITIVE and case.media_type == "application/json":
            # As its parameters say, they are for other bodies.
            case.query = {} if operation.body else case.query
        response = case.call()
        case.validate_response(response, checks=CHECKS)
        # Schemathesis does not know that 413 is a refusal, too.
        if response.status_code != 413:
            case.validate_response(response, checks=[checks.negative_data_rejection])
        assert response.status_code < 500 or response.status_code in DOCUMENTED, response.text
        path = unquote(urlsplit(response.request.url).path)
        headers = {name.title(): values[0] for name, values in response.headers.items()}
        conformance.check(case.method, path, response.status_code, headers, response.content)

    answers_as_documented()
