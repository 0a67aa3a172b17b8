"""The front page as the server writes it; the browser's part is tested end to end."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import yaml

from web.app import create_app

ROOT = Path(__file__).resolve().parents[4]


class Elements(HTMLParser):
    """Collects the tags of a page with their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def attributes(self, name: str) -> list[str]:
        return [value for _, found in self.found if (value := found.get(name)) is not None]


def test_page_needs_nothing_inline_and_nobody_else(client):
    response = client.get("/")
    assert response.status_code == 200
    policy = response.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    page = Elements(response.text)
    assert not page.attributes("style")
    assert not [name for _, found in page.found for name in found if name.startswith("on")]
    assert all(found.get("src") for tag, found in page.found if tag == "script")
    for address in page.attributes("src") + page.attributes("href"):
        assert address.startswith(("/", "#", "http://127.0.0.1:5555")), address
    for address in page.attributes("src"):
        with client.get(address) as file:
            assert file.status_code == 200


def test_page_has_a_form_for_every_model_and_names_the_broken_ones(client):
    page = client.get("/")
    models = Elements(page.text).attributes("data-model")
    assert models == ["digits", "sentiment", "tokens"]
    assert "A sample sentence." in page.text
    assert re.search(r"<b>broken</b> cannot be served", page.text)


def test_inputs_get_the_control_that_fits_them(client):
    page = Elements(client.get("/").text)
    assert page.attributes("data-kind") == ["image", "text", "json", "json"]
    assert [tag for tag, _ in page.found].count("canvas") == 1, "digits can be drawn"


def test_readiness_is_shown_by_word_and_glyph(client, worker):
    worker.serve(sentiment=[2])
    page = client.get("/").text
    assert page.count("no worker") == 2
    assert Elements(page).attributes("data-ready") == ["no", "yes", "no"]


def test_what_a_package_says_is_escaped(settings, store, tmp_path):
    evil = "<script>alert(1)</script>\"'"
    folder = tmp_path / "evil" / "1"
    folder.mkdir(parents=True)
    tensor = {"name": "text", "dtype": "string", "shape": ["batch"], "description": evil}
    manifest = {
        "name": "evil",
        "version": 1,
        "format": "python",
        "description": evil,
        "labels": [evil],
        "signature": {"inputs": [tensor], "outputs": [tensor]},
        "warm_up": {"inputs": {"text": f"</textarea>{evil}"}},
    }
    (folder / "model.yaml").write_text(yaml.safe_dump(manifest))
    repository = settings.repository.model_copy(update={"root": tmp_path})
    app = create_app(settings.model_copy(update={"repository": repository}))
    page = app.test_client().get("/").text
    assert len(re.findall("<script", page)) == 1, "only our own"
    assert len(re.findall("</textarea>", page)) == 1
    [labels] = Elements(page).attributes("data-labels")
    assert yaml.safe_load(labels) == [evil]
    app.extensions["inferno"].close()


def test_page_says_that_redis_is_down(app, client, monkeypatch):
    def closed(*_, **__):
        raise ConnectionRefusedError

    app.extensions["inferno"].client.connection_pool.disconnect()
    monkeypatch.setattr("redis.connection.Connection._connect", closed)
    response = client.get("/")
    assert response.status_code == 200
    assert "Redis does not answer" in response.text


#: Where there is no prefix.
ROOT_ONLY = {"/", "/docs", "/openapi.json"}


def test_every_route_is_documented_and_mounted_under_every_prefix(app):
    document = (ROOT / "docs" / "api.md").read_text()
    rules = {rule.rule for rule in app.url_map.iter_rules() if "static" not in rule.endpoint}
    # The Open Inference Protocol has a prefix of its own.
    alone = {rule for rule in rules if rule in ROOT_ONLY or rule.startswith("/v2")}
    roots = {rule for rule in rules - alone if not rule.startswith(("/v1", "/api/v1"))}
    assert rules - alone == {prefix + rule for prefix in ("", "/v1", "/api/v1") for rule in roots}
    for rule in roots:
        # The document shows models where most clients look for them.
        shown = f"/v1{rule}" if rule.startswith("/models") else rule
        assert shown.replace("<model>", "<name>") in document, rule
