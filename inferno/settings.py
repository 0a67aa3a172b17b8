"""Every setting of the platform, in one typed table.

A field of group `server` named `port` is set by the environment variable ``INFERNO_SERVER__PORT``.
Each entry point calls `load()` once and passes the object on; no other module reads the
environment.
"""

from __future__ import annotations

import base64
import json
import os
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict, SettingsError

from inferno.errors import ConfigurationError

Port = Annotated[int, Field(ge=1, le=65535)]


class Group(BaseModel):
    """One group of settings.

    Unknown names are ignored, so that one environment can serve many versions.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)


class ServerSettings(Group):
    """The web tier."""

    host: str = Field(default="127.0.0.1", description="Address that the web tier listens on.")
    port: Port = Field(default=8000, description="Port that the web tier listens on.")
    processes: int = Field(
        default=2, ge=1, description="Number of web processes (gunicorn workers)."
    )
    connections: int = Field(
        default=2000, ge=1, description="Open connections that one web process accepts."
    )
    sync_wait_ms: int = Field(
        default=30_000,
        ge=1,
        description="How long a synchronous call waits before it answers 202, in ms.",
    )


class RedisSettings(Group):
    """The broker, the records and the results."""

    url: str | None = Field(
        default=None, description="Redis to use. Unset: an embedded server is started."
    )
    port: int = Field(
        default=0,
        ge=0,
        le=65535,
        description="Port of the embedded server. 0: a free one is chosen.",
    )
    fsync: Literal["always", "everysec", "no"] = Field(
        default="everysec",
        description="When the embedded server flushes its append-only file (`appendfsync`).",
    )
    prefix: str = Field(default="inferno:", description="Prefix of the platform's own keys.")
    connect_timeout_s: float = Field(
        default=2.0, gt=0, description="Limit for connecting to Redis, in seconds."
    )
    timeout_s: float = Field(
        default=10.0, gt=0, description="Limit for one command of Redis, in seconds."
    )


class BrokerSettings(Group):
    """Where tasks wait."""

    url: str | None = Field(
        default=None,
        description="Celery broker. Unset: lanes on Redis Streams, in the Redis of the results. "
        "`redis://...`: Celery's own lists. `amqp://...`: RabbitMQ.",
    )

    @field_validator("url")
    @classmethod
    def _is_no_stream(cls, value: str | None) -> str | None:
        # A task and its record are written in one step, which needs one Redis.
        if value is not None and "-streams:" in value.partition("//")[0]:
            raise ValueError(
                "lanes on Redis Streams are in the Redis of the records; leave it unset, and name "
                f"that Redis with {variable('redis', 'url')}"
            )
        return value

    @property
    def scheme(self) -> str:
        """What the URL begins with, such as ``amqp``; "" when it is unset."""
        return (self.url or "").partition("://")[0]


class DataSettings(Group):
    """Where everything written while running goes."""

    dir: Path = Field(default=Path("data"), description="Directory for Redis' files and for logs.")


class RepositorySettings(Group):
    """The model repository."""

    root: Path = Field(
        default=Path("models"), description="Directory of `<name>/<version>/model.yaml` packages."
    )
    active: Annotated[dict[str, int], NoDecode] = Field(
        default_factory=dict,
        description='Active version by model, as JSON: `{"embed": 1}`. Default: the highest.',
    )
    preload: Literal["all", "active", "none"] = Field(
        default="all",
        description="Versions that a worker loads before it takes tasks, and when they appear; "
        "others load on first use.",
    )
    reconcile_interval_s: float = Field(
        default=5.0,
        gt=0,
        description="How often workers and front ends look for new packages and for what is wanted "
        "of the models, in s; changes made over HTTP are announced besides.",
    )
    load_timeout_s: float = Field(
        default=300.0,
        gt=0,
        description="How long a call that loads or unloads waits for the workers, in s.",
    )
    idle_unload_s: float | None = Field(
        default=None,
        gt=0,
        description="A version that nothing asks for is unloaded when it was not used for so long, "
        "in s; not the active one, and none that is pinned. Unset: only to make room.",
    )
    memory_budget_bytes: int | None = Field(
        default=None,
        gt=0,
        description="Memory that the loaded versions of one worker may take together; those that "
        "were not used for longest make room for others. Unset: no limit.",
    )
    pinned: Annotated[list[str], NoDecode] = Field(
        default_factory=list,
        description='What is never unloaded for being idle or to make room, as JSON: `["embed", '
        '"digits/1"]`.',
    )

    @field_validator("active", "pinned", mode="before")
    @classmethod
    def _from_json(cls, value: object, info: ValidationInfo) -> object:
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value)
        except ValueError:
            example = '{"embed": 1}' if info.field_name == "active" else '["embed", "digits/1"]'
            raise ValueError(f"expected JSON such as {example}") from None


class BatchingSettings(Group):
    """Defaults for models whose package does not say."""

    max_batch_size: int = Field(default=32, ge=1, description="Rows of one forward pass, at most.")
    max_batch_delay_ms: float = Field(
        default=20.0,
        ge=0,
        description="How long the oldest waiting task may be held back for others to join, while "
        "an executor is free, in ms.",
        validation_alias=AliasChoices(
            "max_batch_delay_ms", "max_batch_wait_ms", "max_batch_latency_ms"
        ),
    )
    slo_p95_ms: float | None = Field(
        default=None,
        gt=0,
        description="What 95 of 100 tasks shall take at most, from acceptance to result, in ms: "
        "steers batch size and window, and replaces max_batch_delay_ms. Unset: no objective.",
    )
    adaptive: bool = Field(
        default=True,
        description="End the window early when no other task is expected before it is over, or "
        "waiting longer would cost more than sharing a pass can save.",
    )


class InferenceSettings(Group):
    """How engines run."""

    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Device of the engines. `auto`: CUDA if there is one, else CPU."
    )
    onnx_providers: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="ONNX Runtime's execution providers, in order of preference, separated by "
        "commas. Unset: derived from the device.",
    )
    quantize: Literal["none", "int8", "fp16", "bf16"] = Field(
        default="none",
        description="Precision that models are loaded in, where their format and device can. "
        "Models may set their own.",
    )
    compile: bool = Field(
        default=False,
        description="Compile torch modules with torch.compile, which needs a C++ compiler and "
        "takes up to a minute when they are loaded. Models may set their own.",
    )
    threads: int = Field(
        default=0,
        ge=0,
        description="Threads of one forward pass. 0: the cores that it may use, shared by the "
        "model's executors.",
    )
    cores: Annotated[tuple[NonNegativeInt, ...], NoDecode] = Field(
        default=(),
        description="Cores that are kept for forward passes, such as `2-7` or `1,3`: all else in "
        "workers, and what `inferno up` starts, runs on the others. Unset: all run on all.",
    )
    timeout_s: float = Field(
        default=120.0,
        gt=0,
        le=86_400,
        description="Limit of one forward pass, in seconds. A worker whose pass takes longer ends "
        "and is restarted. Models may set their own.",
    )

    @field_validator("onnx_providers", mode="before")
    @classmethod
    def _from_commas(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        return tuple(name.strip() for name in value.split(",") if name.strip())

    @field_validator("cores", mode="before")
    @classmethod
    def _from_ranges(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        cores: set[int] = set()
        for part in filter(None, map(str.strip, value.split(","))):
            found = re.fullmatch(r"(\d{1,4})(?: *- *(\d{1,4}))?", part)
            more = range(int(found[1]), int(found[2] or found[1]) + 1) if found else ()
            if not more:
                raise ValueError("expected numbers of cores, such as 2-7 or 1,3")
            cores.update(more)
        return tuple(sorted(cores))

    def pass_threads(self, executors: int) -> int:
        """Return the threads of one forward pass, of so many at the same time."""
        cores = self.cores or os.sched_getaffinity(0)
        return self.threads or max(len(cores) // executors, 1)


class TaskSettings(Group):
    """Lifetimes of tasks, and of what they were asked."""

    timeout_ms: int | None = Field(
        default=None,
        ge=1,
        description="Deadline of tasks that set none: the forward pass must start within it.",
    )
    result_ttl_s: int = Field(
        default=3600, ge=1, description="How long a result can be fetched, in seconds."
    )
    record_ttl_s: int = Field(
        default=86_400,
        ge=1,
        validate_default=True,
        description=(
            "How long a task is remembered after its last change, in seconds; "
            "not below result_ttl_s."
        ),
    )

    listed: int = Field(
        default=100_000, ge=1, description="How many of the newest tasks can be listed."
    )
    max_attempts: int = Field(
        default=3,
        ge=1,
        description="Forward passes during which a task's worker may end before it is given up.",
    )
    keep_payloads: Literal["never", "failed", "always"] = Field(
        default="never",
        description="Of which finished tasks the inputs are kept, for result_ttl_s, so that they "
        "can be retried. Dead letters always keep theirs.",
    )
    dead_ttl_s: int = Field(
        default=604_800, ge=1, description="How long a dead letter is kept, in seconds."
    )
    claim_bytes: int = Field(
        default=65_536,
        ge=0,
        description="Inputs larger than this, in bytes, are kept under a key of their own instead "
        "of in the message, for lanes on Redis Streams. 0: never.",
    )
    claim_ttl_s: int = Field(
        default=604_800,
        ge=1,
        description="How long such inputs are kept, in seconds, after the task was accepted or its "
        "last attempt began. They are deleted when it ends.",
    )
    idempotency_ttl_s: int = Field(
        default=86_400, ge=1, description="How long an Idempotency-Key is remembered, in seconds."
    )
    cancel_on_disconnect: bool = Field(
        default=False,
        description="Cancel the task of a synchronous caller that disconnects, when nobody else "
        "waits for it.",
    )
    refuse_hopeless: bool = Field(
        default=True,
        description="Refuse tasks at once whose predicted wait is longer than their timeout_ms.",
    )

    @field_validator("record_ttl_s")
    @classmethod
    def _outlive_the_result(cls, value: int, info: ValidationInfo) -> int:
        # A task whose record is gone is unknown, even while its result is still there.
        result_ttl_s = info.data.get("result_ttl_s", 0)
        if value < result_ttl_s:
            raise ValueError(
                f"expected at least {variable('tasks', 'result_ttl_s')}={result_ttl_s}"
            )
        return value


class CacheSettings(Group):
    """Results that are kept to answer later tasks, of models whose package allows it."""

    enabled: bool = Field(
        default=True,
        description="Keep results and let equal tasks share a computation, where a model's package "
        "allows it.",
    )
    ttl_s: int = Field(
        default=3600,
        ge=1,
        description="How long a result is kept, in seconds, for models whose package does not say.",
    )
    max_entries: int = Field(
        default=10_000, ge=1, description="Results that are kept, at most; of all models together."
    )
    max_bytes: int = Field(
        default=67_108_864, ge=1, description="Size of the kept results together."
    )
    max_result_bytes: int = Field(
        default=1_000_000, ge=1, description="A larger result is not kept."
    )


class RetrySettings(Group):
    """What happens after a transient error, for models whose package does not say."""

    max_retries: int = Field(default=3, ge=0, description="Further attempts after the first.")
    backoff_s: float = Field(
        default=2.0, gt=0, description="Delay before the first retry, in s; doubles with each."
    )
    max_backoff_s: float = Field(default=30.0, gt=0, description="Longest delay, in s.")
    jitter: bool = Field(
        default=True, description="Draw each delay evenly from zero to its full length."
    )


class WorkerSettings(Group):
    """The worker processes."""

    model_name: str | None = Field(
        default=None, description="The model served by the Procfile's `worker` line."
    )
    heartbeat_interval_s: float = Field(
        default=2.0, gt=0, description="Time between two heartbeats, in s."
    )
    heartbeat_ttl_s: float = Field(
        default=6.0,
        validate_default=True,
        gt=0,
        description="A worker whose last heartbeat is older than this counts as gone, in s.",
    )
    lease_s: float = Field(
        default=900.0,
        gt=0,
        description="A worker that is silent for longer counts as dead although its connections "
        "are there, in s; longer than any forward pass that holds Python's lock.",
    )
    grace_s: float = Field(
        default=30.0,
        gt=0,
        description="How long a stopping process may finish its work before it is killed, in s.",
    )

    @field_validator("heartbeat_ttl_s")
    @classmethod
    def _outlive_the_interval(cls, value: float, info: ValidationInfo) -> float:
        interval_s = info.data.get("heartbeat_interval_s", 0)
        if value <= interval_s:
            raise ValueError(
                f"expected more than {variable('worker', 'heartbeat_interval_s')}={interval_s:g}"
            )
        return value


class EventSettings(Group):
    """Celery's events of tasks, for Flower and other monitors."""

    send: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="Whether workers send them. `auto`: while somebody listens, which is found out "
        "within a second.",
    )
    sample: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="Share of the tasks that they are sent of; below 1, monitors count too few.",
    )


class FlowerSettings(Group):
    """Flower, Celery's worker console."""

    host: str = Field(default="127.0.0.1", description="Address that Flower listens on.")
    port: Port = Field(default=5555, description="Port that Flower listens on.")
    url: str | None = Field(
        default=None,
        description="Where people reach Flower, for links to it. Default: host and port.",
    )


class LimitSettings(Group):
    """What is refused before it is queued."""

    max_body_bytes: int = Field(default=12_000_000, ge=1, description="Size of a request body.")
    max_text_bytes: int = Field(
        default=1_000_000, ge=1, description="Size of one text input, as UTF-8."
    )
    max_image_bytes: int = Field(
        default=8_000_000, ge=1, description="Size of one binary input, decoded."
    )
    max_rows: int = Field(default=1024, ge=1, description="Rows of one task.")


class WebsocketSettings(Group):
    """WebSocket connections."""

    ping_interval_s: float = Field(
        default=25.0, gt=0, description="Time between two pings of the server, in s."
    )
    max_queued_messages: int = Field(
        default=1000,
        ge=1,
        description="Messages waiting for a slow reader before its socket is closed.",
    )
    max_subscriptions: int = Field(
        default=10_000, ge=1, description="Tasks that one socket may wait for at the same time."
    )


class WebhookSettings(Group):
    """Calls to the URLs that clients name in `webhook`."""

    secret: SecretStr | None = Field(
        default=None,
        description=(
            "Signs webhooks: `whsec_` and base64, or any other text. Unset: they are not signed."
        ),
    )
    timeout_s: float = Field(default=10.0, gt=0, description="Limit for one delivery, in seconds.")
    max_retries: int = Field(
        default=8, ge=0, description="Further deliveries of a webhook that was not taken."
    )
    backoff_s: int = Field(
        default=2,
        ge=1,
        description=(
            "Longest wait before the first of them, in seconds; it doubles each time, "
            "and a random part of it is waited."
        ),
    )
    max_backoff_s: int = Field(
        default=600,
        ge=1,
        # Celery delivers again what has waited in a worker for its visibility timeout, an hour.
        le=1800,
        description="The wait grows no longer than this, in seconds.",
    )
    allow_private: bool = Field(
        default=False,
        description=(
            "Also call loopback, private and link-local addresses. Clients can then reach every "
            "HTTP service that the worker `webhooks` can reach."
        ),
    )

    @field_validator("secret")
    @classmethod
    def _decodes(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            try:
                empty = not _decode_secret(value)
            except ValueError:
                raise ValueError("expected base64 after whsec_") from None
            if empty:
                raise ValueError("expected a secret that is not empty; leave it unset for none")
        return value

    @property
    def key(self) -> bytes | None:
        """The secret, decoded."""
        return None if self.secret is None else _decode_secret(self.secret)


def _decode_secret(secret: SecretStr) -> bytes:
    text = secret.get_secret_value()
    if text.startswith("whsec_"):
        return base64.b64decode(text.removeprefix("whsec_"), validate=True)
    return text.encode()


class LogSettings(Group):
    """Logging of web and worker processes."""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="INFO", description="Least level logged."
    )


class Settings(BaseSettings):
    """All groups. Read once per entry point with `load()`."""

    model_config = SettingsConfigDict(
        env_prefix="INFERNO_", env_nested_delimiter="__", frozen=True, extra="ignore"
    )

    server: ServerSettings = Field(default_factory=ServerSettings)
    redis: RedisSettings = Field(default_factory=RedisSettings)
    broker: BrokerSettings = Field(default_factory=BrokerSettings)
    data: DataSettings = Field(default_factory=DataSettings)
    repository: RepositorySettings = Field(default_factory=RepositorySettings)
    batching: BatchingSettings = Field(default_factory=BatchingSettings)
    inference: InferenceSettings = Field(default_factory=InferenceSettings)
    tasks: TaskSettings = Field(default_factory=TaskSettings)
    cache: CacheSettings = Field(default_factory=CacheSettings)
    retries: RetrySettings = Field(default_factory=RetrySettings)
    worker: WorkerSettings = Field(default_factory=WorkerSettings)
    events: EventSettings = Field(default_factory=EventSettings)
    flower: FlowerSettings = Field(default_factory=FlowerSettings)
    limits: LimitSettings = Field(default_factory=LimitSettings)
    websocket: WebsocketSettings = Field(default_factory=WebsocketSettings)
    webhooks: WebhookSettings = Field(default_factory=WebhookSettings)
    log: LogSettings = Field(default_factory=LogSettings)

    @property
    def redis_url(self) -> str:
        """The URL of the Redis to talk to; the supervisor sets it for the processes it starts."""
        return self.redis.url or "redis://127.0.0.1:6379/0"

    @property
    def broker_url(self) -> str:
        """The URL of Celery's broker."""
        # redis:// becomes redis-streams://, and rediss:// (with TLS) rediss-streams://.
        return self.broker.url or self.redis_url.replace("://", "-streams://", 1)

    @property
    def flower_url(self) -> str:
        """Where people reach Flower."""
        return self.flower.url or f"http://{self.flower.host}:{self.flower.port}"


def load() -> Settings:
    """Read the settings from the environment.

    Raises:
      ConfigurationError: a value is wrong; names the variable, the value and what is expected.
    """
    try:
        return Settings()
    except ValidationError as exc:
        raise ConfigurationError("; ".join(_explain(error) for error in exc.errors())) from None
    except SettingsError as exc:
        # A variable such as INFERNO_SERVER sets a whole group, as JSON.
        raise ConfigurationError(f"a group of settings is no JSON: {exc}") from None


def variable(group: str, field: str) -> str:
    """Return the environment variable of a field, such as ``INFERNO_SERVER__PORT``."""
    return f"INFERNO_{group}__{field}".upper()


def _explain(error: object) -> str:
    assert isinstance(error, dict)
    name = "INFERNO_" + "__".join(str(part).upper() for part in error["loc"])
    message = error["msg"].removeprefix("Value error, ")
    # A secret is not repeated, nor a URL that may hold one: what this says ends in logs.
    value = "..." if error["loc"][-1] in ("secret", "url") else repr(error["input"])
    return f"{name}={value}: {message[:1].lower()}{message[1:]}"
