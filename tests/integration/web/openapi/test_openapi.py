"""The OpenAPI document: complete, valid, and true."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import jsonschema_rs
import pytest

from inferno.protocol.webhooks import EVENTS
from inferno.settings import Settings
from web.app import create_app
from web.openapi import document as openapi

ROOT = Path(__file__).resolve().parents[4]

#: Pages for people, and the files that they load.
PAGES = {"/", "/docs", "/static/{filename}", "/docs/swagger-ui/{filename}"}

#: What is refused whatever is asked, to clients of Triton.
NOT_THERE = {"/v2/systemsharedmemory", "/v2/systemsharedmemory/{rest}"}


def operations(document):
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


def test_every_route_is_in_the_document(app, document):
    missing = {
        (route.method, route.path)
        for route in openapi.routes(app, app.extensions["prefixes"])
        if route.path not in PAGES | NOT_THERE
        and route.method not in document["paths"].get(route.path, {})
    }
    assert missing == set(), "describe them beside their views; see web/openapi/document.py"


def test_document_has_each_route_once_and_where_the_handbook_has_it(document):
    handbook = (ROOT / "docs" / "api.md").read_text()
    for path, methods in document["paths"].items():
        if re.match(r"/v1/models/\w+:predict|/v2/", path):
            # Of one model each; the handbook has the protocol's in short.
            continue
        shown = path.replace("{model}", "<name>").replace("{", "<").replace("}", ">")
        assert shown in handbook, f"{list(methods)} {path}"
    ids = [operation["operationId"] for *_, operation in operations(document)]
    assert sorted(set(ids)) == sorted(ids)


def test_document_says_something_of_everything(document):
    tags = {tag["name"] for tag in document["tags"]}
    for path, method, operation in operations(document):
        assert operation["summary"], (method, path)
        assert set(operation["tags"]) <= tags
        for parameter in operation["parameters"]:
            assert parameter["description"], (method, path, parameter["name"])
        assert "500" in operation["responses"]


def test_every_schema_is_one_and_every_reference_leads_somewhere(document):
    references = set(re.findall(r'"\$ref": "([^"]+)"', json.dumps(document)))
    components = document["components"]["schemas"]
    assert references <= {f"#/components/schemas/{name}" for name in components}
    for schema in components.values():
        whole = {"components": document["components"]} | schema
        jsonschema_rs.meta.validate(whole)


def test_examples_are_valid(document):
    checked = 0
    for _path, _method, operation in operations(document):
        contents = [operation.get("requestBody", {}).get("content", {})]
        contents += [answer["content"] for answer in operation["responses"].values()]
        for media in (media for content in contents for media in content.values()):
            examples = [one["value"] for one in media.get("examples", {}).values()]
            examples += [media["example"]] if "example" in media else []
            for example in examples:
                whole = {"components": document["components"]} | media["schema"]
                jsonschema_rs.Draft202012Validator(whole).validate(example)
                checked += 1
    assert checked > 20


def test_document_of_the_default_models_has_a_valid_example_for_each():
    app = create_app(Settings())
    document = json.loads(app.test_client().get("/openapi.json").data)
    models = set(app.extensions["inferno"].repository.models)
    app.extensions["inferno"].close()
    assert {"digits", "echo", "embed", "mock", "sentiment"} <= models
    for model in models:
        body = document["paths"][f"/v1/models/{model}:predict"]["post"]["requestBody"]
        media = body["content"]["application/json"]
        if "example" in media:
            whole = {"components": document["components"]} | media["schema"]
            jsonschema_rs.Draft202012Validator(whole).validate(media["example"])


def test_aliases_are_named(document):
    assert "`/result/{task_id}`" in document["paths"]["/tasks/{task_id}"]["get"]["description"]


def test_constraints_are_those_that_validate(document):
    body = document["components"]["schemas"]["SubmitBody"]["properties"]
    assert body["priority"]["maximum"] == 9
    events = body["webhook_events"]["anyOf"][0]["items"]["enum"]
    assert set(events) == set(EVENTS)


@pytest.mark.parametrize(
    ("path", "status", "codes"),
    [
        ("/v1/models/{model}:predict", "409", {"request_in_progress", "task_cancelled"}),
        ("/lanes/{model}/purge", "501", {"not_supported"}),
    ],
)
def test_problems_have_the_codes_of_their_errors(document, path, status, codes):
    problem = document["paths"][path]["post"]["responses"][status]
    schema = problem["content"]["application/problem+json"]["schema"]
    assert set(schema["properties"]["code"]["enum"]) == codes


def test_document_is_there_without_redis(app, monkeypatch):
    def closed(*_, **__):
        raise ConnectionRefusedError

    app.extensions["inferno"].client.connection_pool.disconnect()
    monkeypatch.setattr("redis.connection.Connection._connect", closed)
    client = app.test_client()
    assert client.get("/openapi.json").status_code == 200


# The schemas of one model


def test_schemas_of_a_model_are_those_of_its_signature(client):
    schemas = client.get("/v1/models/sentiment/schema").json
    inputs = schemas["request"]["properties"]["inputs"]
    assert inputs["required"] == ["text"]
    outputs = schemas["response"]["anyOf"][0]["properties"]["outputs"]["properties"]
    assert outputs["scores"]["properties"]["shape"]["prefixItems"][1] == {"const": 2}
    assert client.get("/v1/models/sentiment/schema?version=1").status_code == 200
    assert client.get("/v1/models/sentiment/schema?version=9").status_code == 404
    assert client.get("/v1/models/sentiment/schema?version=one").json["field"] == "version"


def test_rows_of_a_schema_are_as_many_as_the_model_takes(client):
    schemas = client.get("/v1/models/tokens/schema").json
    rows = schemas["request"]["properties"]["inputs"]["properties"]["tokens"]["anyOf"][1]
    assert rows["maxItems"] == 4


def test_page_loads_nothing_from_elsewhere(app):
    client = app.test_client()
    page = client.get("/docs")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    files = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    for file in [file for file in files if not file.startswith("#")]:
        with client.get(file) as answer:
            assert answer.status_code == 200, file


def test_document_is_built_once_for_each_change_of_the_models(
    redis_url, repository, tmp_path, monkeypatch
):
    root = tmp_path / "models"
    shutil.copytree(repository, root)
    settings = {"redis": {"url": redis_url}, "repository": {"root": root}}
    client = create_app(Settings.model_validate(settings)).test_client()
    built, build = [], openapi.document

    def counted(*args):
        built.append(args)
        return build(*args)

    monkeypatch.setattr(openapi, "document", counted)
    answers = {client.get("/openapi.json").data for _ in range(3)}
    assert (len(answers), len(built)) == (1, 1)
    manifest = root / "digits" / "1" / "model.yaml"
    manifest.write_text(manifest.read_text() + "description: Another text.\n")
    assert "Another text." in client.get("/openapi.json").text
    assert len(built) == 2
