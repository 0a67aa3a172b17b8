"""Settings: names of variables, aliases, and errors that name the variable."""

import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from inferno import settings
from inferno.errors import ConfigurationError
from inferno.operate.settings_document import documented_settings
from inferno.settings import Settings, exposure, load, variable


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.upper().startswith("INFERNO_"):
            monkeypatch.delenv(name)


def test_every_field_has_a_description_and_a_default() -> None:
    for group in Settings.model_fields:
        section = getattr(load(), group)
        assert type(section).__doc__
        for field, info in type(section).model_fields.items():
            assert info.description, f"{group}.{field}"
            assert info.description.endswith("."), f"{group}.{field}"
            assert not info.is_required(), f"{group}.{field}"


@pytest.mark.parametrize(
    ("name", "value", "group", "field", "expected"),
    [
        ("INFERNO_SERVER__PORT", "8123", "server", "port", 8123),
        ("INFERNO_REDIS__URL", "redis://host:1/2", "redis", "url", "redis://host:1/2"),
        ("INFERNO_DATA__DIR", "elsewhere", "data", "dir", Path("elsewhere")),
        ("INFERNO_REPOSITORY__ACTIVE", '{"embed": 1}', "repository", "active", {"embed": 1}),
        ("INFERNO_REPOSITORY__ACTIVE__EMBED", "2", "repository", "active", {"embed": 2}),
        ("INFERNO_BATCHING__MAX_BATCH_SIZE", "64", "batching", "max_batch_size", 64),
        ("INFERNO_BATCHING__MAX_BATCH_DELAY_MS", "1.5", "batching", "max_batch_delay_ms", 1.5),
        ("INFERNO_BATCHING__MAX_BATCH_WAIT_MS", "7", "batching", "max_batch_delay_ms", 7.0),
        ("INFERNO_BATCHING__MAX_BATCH_LATENCY_MS", "8", "batching", "max_batch_delay_ms", 8.0),
        ("INFERNO_BATCHING__ADAPTIVE", "false", "batching", "adaptive", False),
        ("INFERNO_INFERENCE__CORES", "2-4, 7", "inference", "cores", (2, 3, 4, 7)),
        ("INFERNO_TASKS__TIMEOUT_MS", "250", "tasks", "timeout_ms", 250),
        ("INFERNO_WORKER__MODEL_NAME", "echo", "worker", "model_name", "echo"),
        ("INFERNO_LOG__LEVEL", "DEBUG", "log", "level", "DEBUG"),
    ],
)
def test_a_variable_sets_its_field(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, group: str, field: str, expected: object
) -> None:
    monkeypatch.setenv(name, value)
    assert getattr(getattr(load(), group), field) == expected


def test_the_name_of_a_variable_is_made_from_group_and_field() -> None:
    assert variable("server", "port") == "INFERNO_SERVER__PORT"


@pytest.mark.parametrize("name", ["INFERNO_NO_SUCH_GROUP__X", "INFERNO_SERVER__NO_SUCH_FIELD"])
def test_unknown_variables_are_ignored(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    assert load() == Settings()


@pytest.mark.parametrize(
    ("name", "value", "expectation"),
    [
        ("INFERNO_SERVER__PORT", "70000", "less than or equal to 65535"),
        ("INFERNO_SERVER__PORT", "eighty", "valid integer"),
        ("INFERNO_REDIS__FSYNC", "often", "'always', 'everysec' or 'no'"),
        ("INFERNO_BATCHING__MAX_BATCH_SIZE", "0", "greater than or equal to 1"),
        ("INFERNO_BATCHING__MAX_BATCH_DELAY_MS", "-1", "greater than or equal to 0"),
        ("INFERNO_BATCHING__MAX_BATCH_WAIT_MS", "-1", "greater than or equal to 0"),
        ("INFERNO_BATCHING__ADAPTIVE", "perhaps", "valid boolean"),
        ("INFERNO_INFERENCE__DEVICE", "tpu", "'auto', 'cpu' or 'cuda'"),
        ("INFERNO_INFERENCE__CORES", "half", "expected core numbers, such as 2-7 or 1,3"),
        ("INFERNO_INFERENCE__CORES", "1 2", "expected core numbers, such as 2-7 or 1,3"),
        ("INFERNO_INFERENCE__CORES", "0-99999", "expected core numbers, such as 2-7 or 1,3"),
        ("INFERNO_INFERENCE__CORES", "7-2", "expected core numbers, such as 2-7 or 1,3"),
        ("INFERNO_REPOSITORY__ACTIVE", "{embed: 1", 'expected JSON such as {"embed": 1}'),
        ("INFERNO_REDIS__PORT", "70000", "less than or equal to 65535"),
        ("INFERNO_REDIS__LISTEN", "everywhere", "IPv4 or IPv6 address"),
        ("INFERNO_REDIS__MAXMEMORY_BYTES", "half", "valid integer"),
        ("INFERNO_TASKS__RECORD_TTL_S", "5", "expected at least INFERNO_TASKS__RESULT_TTL_S=3600"),
    ],
)
def test_an_error_names_the_variable_the_value_and_the_expectation(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, expectation: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError) as raised:
        load()
    assert raised.value.detail.startswith(f"{name}={value!r}: ")
    assert expectation in raised.value.detail


def test_executors_share_the_cores_that_are_kept_for_passes() -> None:
    assert Settings(inference={"cores": "2-9"}).inference.pass_threads(2) == 4
    assert Settings(inference={"cores": "2-9", "threads": 1}).inference.pass_threads(2) == 1


def test_a_result_that_would_outlive_its_record_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a lifetime of results over the default one of records
    monkeypatch.setenv("INFERNO_TASKS__RESULT_TTL_S", "100000")
    with pytest.raises(ConfigurationError, match="INFERNO_TASKS__RECORD_TTL_S=86400"):
        load()


def test_a_heartbeat_that_would_lapse_between_two_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("INFERNO_WORKER__HEARTBEAT_INTERVAL_S", "10")
    with pytest.raises(ConfigurationError, match=r"HEARTBEAT_TTL_S=6.0: .*INTERVAL_S=10"):
        load()


@pytest.mark.parametrize("scheme", ["redis-streams", "rediss-streams"])
def test_streams_are_not_named_as_a_broker(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    monkeypatch.setenv("INFERNO_BROKER__URL", f"{scheme}://:password@elsewhere/0")
    with pytest.raises(ConfigurationError, match=r"leave this unset.*INFERNO_REDIS__URL") as raised:
        load()
    assert "password" not in raised.value.detail


def test_every_error_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFERNO_SERVER__PORT", "x")
    monkeypatch.setenv("INFERNO_FLOWER__PORT", "y")
    with pytest.raises(ConfigurationError, match=r"INFERNO_SERVER__PORT.*; INFERNO_FLOWER__PORT"):
        load()


def test_a_group_that_is_no_json_is_a_configuration_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFERNO_SERVER", "no JSON")
    with pytest.raises(ConfigurationError, match='"server"'):
        load()


@pytest.mark.parametrize(
    ("url", "broker", "backend"),
    [
        ("redis://host:1/2", "redis-streams://host:1/2", "redis://host:1/2"),
        (
            "unix:///a%20b/redis.sock?db=2",
            "redis-streams+socket:///a%20b/redis.sock?virtual_host=2",
            "redis+socket:///a%20b/redis.sock?virtual_host=2",
        ),
        (
            "unix://:password@/redis.sock",
            "redis-streams+socket://:password@/redis.sock?virtual_host=0",
            "redis+socket://:password@/redis.sock?virtual_host=0",
        ),
        (
            "rediss://user:password@host/0?ssl_ca_certs=/ca.pem",
            "rediss-streams://user:password@host/0?ssl_cert_reqs=required&ssl_ca_certs=/ca.pem",
            "rediss://user:password@host/0?ssl_cert_reqs=required&ssl_ca_certs=/ca.pem",
        ),
        (
            "rediss://host/0?ssl_cert_reqs=none",
            "rediss-streams://host/0?ssl_cert_reqs=none",
            "rediss://host/0?ssl_cert_reqs=none",
        ),
    ],
)
def test_celery_gets_the_url_of_redis_in_its_own_words(url: str, broker: str, backend: str) -> None:
    settings = Settings(redis={"url": url})

    assert (settings.broker_url, settings.backend_url) == (broker, backend)


def test_a_broker_of_its_own_is_also_reached_by_tls_or_a_socket() -> None:
    tls = Settings(broker={"url": "rediss://host/0"})
    local = Settings(broker={"url": "unix:///redis.sock"})

    assert tls.broker_url == "rediss://host/0?ssl_cert_reqs=required"
    assert local.broker_url == "redis+socket:///redis.sock?virtual_host=0"
    assert Settings(broker={"url": "amqp://a:b@c//?x=1"}).broker_url == "amqp://a:b@c//?x=1"


def test_a_url_of_redis_has_a_known_scheme(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFERNO_REDIS__URL", "redis+socket://:secret@/redis.sock")
    with pytest.raises(ConfigurationError, match="redis://, rediss:// or unix://") as raised:
        load()
    assert "secret" not in raised.value.detail


@pytest.mark.parametrize(
    "password", ["too-short", "with spaces in the middle", "per%cent-per%cent"]
)
def test_a_password_that_needs_escapes_or_is_short_is_refused(
    monkeypatch: pytest.MonkeyPatch, password: str
) -> None:
    monkeypatch.setenv("INFERNO_REDIS__PASSWORD", password)
    with pytest.raises(ConfigurationError, match="at least 16 characters") as raised:
        load()
    assert password not in raised.value.detail


@pytest.mark.parametrize(
    ("url", "is_risky"),
    [
        ("redis://host/0", True),
        ("redis://10.0.0.1", True),
        ("redis://user@host", True),
        ("redis://:password@host", False),
        ("rediss://host", False),
        ("redis://127.0.0.2:7000", False),
        ("redis://localhost", False),
        ("redis://[::1]:6379", False),
        ("unix:///redis.sock", False),
        (None, False),
    ],
)
def test_an_open_redis_elsewhere_is_a_risk(url: str | None, is_risky: bool) -> None:
    assert (Settings(redis={"url": url}).redis.risk is not None) == is_risky


def test_no_password_is_shown_with_the_settings() -> None:
    shown = Settings(
        redis={"url": "redis://:secret-of-redis@host", "password": "secret-of-embedded"},
        broker={"url": "amqp://user:secret-of-broker@host"},
    )
    values = [setting.value(shown) for setting in documented_settings()]

    assert "secret-of" not in repr(shown)
    assert [value for value in values if "secret-of" in value] == []
    assert "redis://:**********@host" in values


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        load().server.port = 1  # type: ignore[misc]


def test_urls_have_working_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load().redis_url == "redis://127.0.0.1:6379/0"
    assert load().flower_url == "http://127.0.0.1:5555"
    monkeypatch.setenv("INFERNO_FLOWER__URL", "https://flower.example")
    monkeypatch.setenv("INFERNO_REDIS__URL", "redis://host/3")
    assert load().flower_url == "https://flower.example"
    assert load().redis_url == "redis://host/3"


def test_importing_the_module_reads_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    # Given settings that were made before a variable changes
    before = load()
    monkeypatch.setenv("INFERNO_SERVER__PORT", "8999")
    # Then they stay as they were, and only a new load sees it
    assert before.server.port == 8000
    assert settings.load().server.port == 8999


@pytest.mark.parametrize(
    ("secret", "key"), [("plain text", b"plain text"), ("whsec_AAEC/w==", b"\0\1\2\xff")]
)
def test_a_secret_is_text_or_base64(
    monkeypatch: pytest.MonkeyPatch, secret: str, key: bytes
) -> None:
    assert load().webhooks.key is None
    monkeypatch.setenv("INFERNO_WEBHOOKS__SECRET", secret)
    assert load().webhooks.key == key
    assert secret not in repr(load())


@pytest.mark.parametrize("secret", ["whsec_no-base64!", "whsec_"])
def test_a_secret_that_is_wrong_is_not_repeated(
    monkeypatch: pytest.MonkeyPatch, secret: str
) -> None:
    monkeypatch.setenv("INFERNO_WEBHOOKS__SECRET", secret)
    with pytest.raises(ConfigurationError, match=r"INFERNO_WEBHOOKS__SECRET=\.\.\.: ") as raised:
        load()
    assert secret + "'" not in raised.value.detail
    assert "no-base64" not in raised.value.detail


def test_names_and_origins_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFERNO_SERVER__HOSTS", "Inferno.example, web")
    monkeypatch.setenv("INFERNO_SERVER__CORS_ORIGINS", "https://App.example,http://localhost:3000")
    server = load().server
    assert server.hosts == ("inferno.example", "web")
    assert server.cors_origins == ("https://app.example", "http://localhost:3000")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("HOSTS", "https://inferno.example"),
        ("HOSTS", "inferno.example:443"),
        ("HOSTS", "*.example"),
        ("CORS_ORIGINS", "app.example"),
        ("CORS_ORIGINS", "https://app.example/"),
        ("CORS_ORIGINS", "null"),
        ("CORS_ORIGINS", "https://*.example"),
    ],
)
def test_names_and_origins_that_never_match_are_refused(
    monkeypatch: pytest.MonkeyPatch, field: str, value: str
) -> None:
    monkeypatch.setenv(f"INFERNO_SERVER__{field}", value)
    with pytest.raises(
        ConfigurationError, match=r"expected (names without|origins of) .*, such as"
    ):
        load()


@pytest.mark.parametrize("name", ["CERTFILE", "KEYFILE"])
def test_a_certificate_needs_its_key(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(f"INFERNO_SERVER__{name}", "inferno.pem")
    with pytest.raises(ConfigurationError, match="expected INFERNO_SERVER__CERTFILE"):
        load()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_servers_on_this_machine_alone_are_not_exposed(host: str) -> None:
    assert exposure("Flower", host, 5555) is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.0.2.1", "gpu-box"])
def test_all_other_servers_are_exposed(host: str) -> None:
    assert "port 5555, and authenticates nobody" in (exposure("Flower", host, 5555) or "")
