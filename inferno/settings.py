"""Every setting of the platform, in one typed table.

The environment variable ``INFERNO_SERVER__PORT`` sets the field `port` of the group `server`. Each
entry point calls `load()` once and passes the object on; no other module reads the environment.
"""

from __future__ import annotations

import base64
import json
import os
import re
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import parse_qsl, urlencode, urlsplit

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    IPvAnyAddress,
    NonNegativeInt,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict, SettingsError

from inferno.errors import ConfigurationError

Port = Annotated[int, Field(ge=1, le=65535)]

#: Passwords that the embedded Redis takes.
_PASSWORD = re.compile(r"[A-Za-z0-9._-]{16,}")


class Group(BaseModel):
    """One group of settings.

    Unknown names are ignored, so one environment can serve several versions of Inferno.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)


def _from_commas(value: object) -> object:
    if not isinstance(value, str):
        return value
    return tuple(name.strip() for name in value.split(",") if name.strip())


class ServerSettings(Group):
    """The web tier."""

    host: str = Field(default="127.0.0.1", description="Address that the web tier listens on.")
    port: Port = Field(default=8000, description="Port that the web tier listens on.")
    hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="Names under which clients reach the web tier and Flower, separated by commas, "
        "such as `inferno.example`, without scheme, port or wildcard. IP addresses, "
        "`localhost` and the address that a server listens on need no entry. `*`: any name.",
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="Origins of other sites whose pages may call the web tier from a browser, "
        "separated by commas, such as `https://app.example`: scheme, host and port only. `*`: "
        "every page.",
    )
    certfile: Path | None = Field(
        default=None,
        description="File with the TLS certificate and its chain, in PEM. Unset: no TLS.",
    )
    keyfile: Path | None = Field(
        default=None,
        validate_default=True,
        description="File with the key of the TLS certificate, in PEM.",
    )
    processes: int = Field(
        default=2, ge=1, description="Number of web processes (gunicorn workers)."
    )
    connections: int = Field(
        default=4000,
        ge=1,
        description="Open connections of one web process. At more, the slowest one is closed.",
    )
    connections_per_address: int = Field(
        default=2500,
        ge=1,
        description="Open connections of one address in one web process. At more, its slowest one "
        "is closed. Behind a proxy, all clients share the proxy's address.",
    )
    max_held_bytes: int = Field(
        default=268_435_456,
        ge=1,
        description="Memory that the request bodies and unread answers of one web process may "
        "take, in bytes. At more, the slowest connection is closed.",
    )
    idle_timeout_s: float = Field(
        default=65.0,
        gt=0,
        description="How long a connection may stay open without a request, in seconds.",
    )
    head_timeout_s: float = Field(
        default=10.0,
        gt=0,
        description="Time limit for receiving a request line and its headers, in seconds.",
    )
    stall_timeout_s: float = Field(
        default=20.0,
        gt=0,
        description="A client that sends nothing of a body, or takes nothing of an answer, for "
        "this long is cut off, in seconds.",
    )
    min_bytes_per_s: int = Field(
        default=4096,
        ge=1,
        description="Lowest average rate of a body or an answer, in bytes per second. It counts "
        "once stall_timeout_s has passed.",
    )
    sync_wait_ms: int = Field(
        default=30_000,
        ge=1,
        description="How long a synchronous call waits before it answers 202, in milliseconds.",
    )

    def check_certificate(self) -> None:
        """Load the TLS certificate and its key, if there are any.

        Only the front end does so: other processes may not be able to read the key.

        Raises:
          ConfigurationError: one of them cannot be read, or they do not belong together.
        """
        if self.certfile is None or self.keyfile is None:
            return
        # Few processes need it, and importing it takes a while.
        import ssl

        try:
            for path in (self.certfile, self.keyfile):
                path.open().close()
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            # Without an answer, OpenSSL would ask the terminal for the password of the key.
            context.load_cert_chain(self.certfile, self.keyfile, password="")
        except OSError as exc:
            raise ConfigurationError(
                f"{variable('server', 'certfile')}={self.certfile} and "
                f"{variable('server', 'keyfile')}={self.keyfile}: expected a certificate and its "
                f"key in PEM, without a password: {exc}"
            ) from None

    @field_validator("keyfile")
    @classmethod
    def _check_key(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        if (value is None) != (info.data.get("certfile") is None):
            raise ValueError(f"expected {variable('server', 'certfile')} with it, or neither")
        return value

    @field_validator("hosts", "cors_origins", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return _from_commas(value)

    @field_validator("hosts")
    @classmethod
    def _check_hosts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name != "*" and not re.fullmatch(r"[\w.-]+", name, re.ASCII):
                raise ValueError(
                    "expected names without scheme, port or wildcard, such as inferno.example, "
                    f"not {name!r}"
                )
        return tuple(map(str.lower, value))

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            if origin != "*" and not re.fullmatch(
                r"[A-Za-z][\w+.-]*://[^/\s?#*@]+", origin, re.ASCII
            ):
                raise ValueError(
                    "expected origins of scheme, host and port only, such as https://app.example, "
                    f"not {origin!r}"
                )
        return tuple(map(str.lower, value))


class RedisSettings(Group):
    """Redis, which holds tasks, records and results."""

    # The URL may hold a password, so a printed object leaves it out.
    url: str | None = Field(
        default=None,
        repr=False,
        description="URL of Redis: `redis://`, `rediss://` (TLS) or `unix://`. Unset: an embedded "
        "server is started, on a Unix socket that only its user can reach.",
    )
    listen: IPvAnyAddress | None = Field(
        default=None,
        description="IP address of this machine on which the embedded server also listens, always "
        "with a password, for workers on other machines; 0.0.0.0: all of them. Unset: none, or "
        "127.0.0.1 if `INFERNO_REDIS__PORT` is set.",
    )
    port: int = Field(
        default=0,
        ge=0,
        le=65535,
        description="Port of the embedded server on that address. 0: 6379.",
    )
    password: SecretStr | None = Field(
        default=None,
        description="Password of the embedded server if it has that address: at least 16 of A-Z, "
        "a-z, 0-9, `-`, `_` and `.`. Unset: a generated one, in `redis/password.txt` of the data "
        "directory.",
    )
    maxmemory_bytes: int | None = Field(
        default=None,
        ge=0,
        description="Memory of the embedded server, in bytes; submits are refused with 503 when "
        "it is nearly full. 0: no limit. Unset: half of the machine's, or of the container's if "
        "that is less.",
    )
    reserve: float = Field(
        default=0.1,
        ge=0,
        le=0.9,
        description="Share of Redis' memory (`maxmemory`) that new tasks may not take, so that "
        "accepted tasks can end. At least 4 MB, unless that is more than half. 0: new tasks are "
        "refused only when Redis is full.",
    )
    fsync: Literal["always", "everysec", "no"] = Field(
        default="everysec",
        description="When the embedded server flushes its append-only file (`appendfsync`).",
    )
    prefix: str = Field(default="inferno:", description="Prefix of the platform's keys.")
    connect_timeout_s: float = Field(
        default=2.0, gt=0, description="Time limit for connecting to Redis, in seconds."
    )
    timeout_s: float = Field(
        default=10.0, gt=0, description="Time limit of one Redis command, in seconds."
    )

    @field_validator("url")
    @classmethod
    def _check_scheme(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("redis://", "rediss://", "unix://")):
            raise ValueError("expected a URL that begins with redis://, rediss:// or unix://")
        return value

    @field_validator("password")
    @classmethod
    def _check_password(cls, value: SecretStr | None) -> SecretStr | None:
        # Such a password needs no escapes in URLs, shells and redis.conf.
        if value is not None and not _PASSWORD.fullmatch(value.get_secret_value()):
            raise ValueError("expected at least 16 characters of A-Z, a-z, 0-9, '-', '_' and '.'")
        return value

    @property
    def address(self) -> tuple[str, int] | None:
        """Host and port of the embedded server; None if it has its Unix socket only."""
        if self.listen is None and not self.port:
            return None
        return str(self.listen or "127.0.0.1"), self.port or 6379

    @property
    def risk(self) -> str | None:
        """What to warn of if Redis is on another machine without a password and without TLS."""
        parts = urlsplit(self.url or "")
        host = parts.hostname or "localhost"
        is_local = host in ("localhost", "::1") or host.startswith("127.")
        if parts.scheme != "redis" or parts.password or is_local:
            return None
        return (
            f"{variable('redis', 'url')} names another machine, and neither a password nor TLS: "
            "whoever reaches that Redis controls the platform"
        )


class BrokerSettings(Group):
    """The queue in which tasks wait."""

    url: str | None = Field(
        default=None,
        repr=False,
        description="URL of the Celery broker. Unset: lanes on Redis Streams, in the same Redis as "
        "the results. `redis://...`: Celery's own lists. `amqp://...`: RabbitMQ.",
    )

    @field_validator("url")
    @classmethod
    def _refuse_streams(cls, value: str | None) -> str | None:
        # A task and its record are written in one atomic step, which needs one Redis.
        if value is not None and "-streams:" in value.partition("//")[0]:
            raise ValueError(
                "lanes on Redis Streams are always in the Redis of the records; leave this unset "
                f"and set {variable('redis', 'url')}"
            )
        return value

    @property
    def scheme(self) -> str:
        """Scheme of the URL, such as ``amqp``; "" when it is unset."""
        return (self.url or "").partition("://")[0]


class DataSettings(Group):
    """Files that a running platform writes."""

    dir: Path = Field(
        default=Path("data"), description="Directory of the embedded server's files and of logs."
    )


class RepositorySettings(Group):
    """The model repository."""

    root: Path = Field(
        default=Path("models"),
        description="Directory of the packages, as `<name>/<version>/model.yaml`.",
    )
    allow_code: bool = Field(
        default=True,
        description="Serve packages that are code: the formats `python` (also MLflow's "
        "python_function) and `torchscript`, and functions that `processor` names, except those of "
        "`inferno.processors`.",
    )
    active: Annotated[dict[str, int], NoDecode] = Field(
        default_factory=dict,
        description='Active version by model, as JSON: `{"embed": 1}`. Default: the newest.',
    )
    preload: Literal["all", "active", "none"] = Field(
        default="all",
        description="Versions that a worker loads before it takes tasks, and as soon as they "
        "appear. Other versions are loaded on first use.",
    )
    reconcile_interval_s: float = Field(
        default=5.0,
        gt=0,
        description="How often workers and web processes check for new packages and for changes of "
        "the desired state, in seconds. Changes over HTTP are also announced at once.",
    )
    load_timeout_s: float = Field(
        default=300.0,
        gt=0,
        description="How long a call that loads or unloads a version waits for the workers, in "
        "seconds.",
    )
    idle_unload_s: float | None = Field(
        default=None,
        gt=0,
        description="Unload versions that were not used for this long, in seconds. Active and "
        "pinned versions stay loaded. Unset: versions are only unloaded to make room.",
    )
    memory_budget_bytes: int | None = Field(
        default=None,
        gt=0,
        description="Memory limit for the loaded versions of one worker, in bytes. The least "
        "recently used ones are unloaded first. Unset: no limit.",
    )
    pinned: Annotated[list[str], NoDecode] = Field(
        default_factory=list,
        description="Models and versions that are never unloaded for being idle or to make room, "
        'as JSON: `["embed", "digits/1"]`.',
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
    """Batching, for models whose package does not set it."""

    max_batch_size: int = Field(
        default=32, ge=1, description="Maximum number of rows in one forward pass."
    )
    max_batch_delay_ms: float = Field(
        default=20.0,
        ge=0,
        description="Longest time in ms that the oldest waiting task is held back for others while "
        "an executor is free.",
        validation_alias=AliasChoices(
            "max_batch_delay_ms", "max_batch_wait_ms", "max_batch_latency_ms"
        ),
    )
    slo_p95_ms: float | None = Field(
        default=None,
        gt=0,
        description="Latency objective: the 95th percentile in ms, from acceptance to result. "
        "Steers batch size and window, and replaces max_batch_delay_ms. Unset: no objective.",
    )
    adaptive: bool = Field(
        default=True,
        description="End the window early when no other task is expected in it, or when waiting "
        "longer costs more than sharing a pass can save.",
    )


class InferenceSettings(Group):
    """Engines, which run forward passes."""

    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Device of the engines. `auto`: CUDA if available, else CPU."
    )
    onnx_providers: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="Execution providers of ONNX Runtime in order of preference, separated by "
        "commas. Unset: derived from the device.",
    )
    quantize: Literal["none", "int8", "fp16", "bf16"] = Field(
        default="none",
        description="Precision that models are loaded in, if their format and device support it. "
        "Models may set their own.",
    )
    compile: bool = Field(
        default=False,
        description="Compile torch modules with torch.compile. It needs a C++ compiler and adds up "
        "to a minute to loading. Models may set their own.",
    )
    threads: int = Field(
        default=0,
        ge=0,
        description="Threads of one forward pass. 0: the available cores divided among the model's "
        "executors.",
    )
    cores: Annotated[tuple[NonNegativeInt, ...], NoDecode] = Field(
        default=(),
        description="Cores reserved for forward passes, such as `2-7` or `1,3`. Everything else in "
        "workers, and what `inferno up` starts, runs on the other cores. Unset: no reservation.",
    )
    timeout_s: float = Field(
        default=120.0,
        gt=0,
        le=86_400,
        description="Time limit of one forward pass, in seconds. A worker that exceeds it is "
        "restarted. Models may set their own.",
    )

    @field_validator("onnx_providers", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return _from_commas(value)

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
                raise ValueError("expected core numbers, such as 2-7 or 1,3")
            cores.update(more)
        return tuple(sorted(cores))

    def pass_threads(self, executors: int) -> int:
        """Return the threads of one forward pass.

        Args:
          executors: number of concurrent forward passes.
        """
        cores = self.cores or os.sched_getaffinity(0)
        return self.threads or max(len(cores) // executors, 1)


class TaskSettings(Group):
    """Deadlines, attempts and lifetimes of tasks."""

    timeout_ms: int | None = Field(
        default=None,
        ge=1,
        description="Default of a task's `timeout_ms`: its forward pass must start within this "
        "many milliseconds. Unset: no deadline.",
    )
    result_ttl_s: int = Field(
        default=3600, ge=1, description="How long a result is kept, in seconds."
    )
    record_ttl_s: int = Field(
        default=86_400,
        ge=1,
        validate_default=True,
        description="How long a task's record is kept after its last change, in seconds; at least "
        "result_ttl_s.",
    )
    listed: int = Field(
        default=100_000, ge=1, description="Number of newest tasks that can be listed."
    )
    max_attempts: int = Field(
        default=3,
        ge=1,
        description="Number of forward passes in which a task's worker may die before the task "
        "fails.",
    )
    keep_payloads: Literal["never", "failed", "always"] = Field(
        default="never",
        description="Which finished tasks keep their inputs for result_ttl_s, so that they can be "
        "retried. Dead letters always keep them.",
    )
    dead_ttl_s: int = Field(
        default=604_800, ge=1, description="How long a dead letter is kept, in seconds."
    )
    claim_bytes: int = Field(
        default=65_536,
        ge=0,
        description="Inputs larger than this many bytes get a Redis key of their own instead of "
        "travelling in the message. Only for lanes on Redis Streams. 0: never.",
    )
    claim_ttl_s: int = Field(
        default=604_800,
        ge=1,
        description="How long such inputs are kept after the task was accepted or its last attempt "
        "started, in seconds. They are deleted when the task ends.",
    )
    idempotency_ttl_s: int = Field(
        default=86_400, ge=1, description="How long an Idempotency-Key is remembered, in seconds."
    )
    cancel_on_disconnect: bool = Field(
        default=False,
        description="Cancel the task of a synchronous caller that disconnects, unless another "
        "caller waits for it.",
    )
    refuse_hopeless: bool = Field(
        default=True,
        description="Refuse tasks at once if their predicted wait exceeds their timeout_ms.",
    )

    @field_validator("record_ttl_s")
    @classmethod
    def _outlive_the_result(cls, value: int, info: ValidationInfo) -> int:
        # Without its record a task is unknown, even if its result still exists.
        result_ttl_s = info.data.get("result_ttl_s", 0)
        if value < result_ttl_s:
            raise ValueError(
                f"expected at least {variable('tasks', 'result_ttl_s')}={result_ttl_s}"
            )
        return value


class CacheSettings(Group):
    """Kept results, which answer later tasks of models whose package allows it."""

    enabled: bool = Field(
        default=True,
        description="Keep results and let equal tasks share a computation, if the model's package "
        "allows it.",
    )
    ttl_s: int = Field(
        default=3600,
        ge=1,
        description="How long a result is kept, in seconds, unless the model's package sets it.",
    )
    max_entries: int = Field(
        default=10_000, ge=1, description="Maximum number of kept results, of all models together."
    )
    max_bytes: int = Field(
        default=67_108_864, ge=1, description="Maximum total size of the kept results, in bytes."
    )
    max_result_bytes: int = Field(
        default=1_000_000, ge=1, description="Maximum size of one kept result, in bytes."
    )


class RetrySettings(Group):
    """Retries after transient errors, for models whose package does not set them."""

    max_retries: int = Field(
        default=3, ge=0, description="Number of retries after the first attempt."
    )
    backoff_s: float = Field(
        default=2.0,
        gt=0,
        description="Delay before the first retry, in seconds; doubles each time.",
    )
    max_backoff_s: float = Field(default=30.0, gt=0, description="Longest delay, in seconds.")
    jitter: bool = Field(
        default=True, description="Randomize each delay between zero and its full length."
    )


class WorkerSettings(Group):
    """The worker processes."""

    model_name: str | None = Field(
        default=None, description="Model that the Procfile's `worker` line serves."
    )
    heartbeat_interval_s: float = Field(
        default=2.0, gt=0, description="Time between two heartbeats, in seconds."
    )
    heartbeat_ttl_s: float = Field(
        default=6.0,
        validate_default=True,
        gt=0,
        description="A worker counts as gone when its last heartbeat is older than this, in "
        "seconds.",
    )
    lease_s: float = Field(
        default=900.0,
        gt=0,
        description="A worker that is silent for this long counts as dead even if its connections "
        "are open, in seconds. Must exceed any forward pass that holds Python's GIL.",
    )
    grace_s: float = Field(
        default=30.0,
        gt=0,
        description="How long a stopping process may finish its work before it is killed, in "
        "seconds.",
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
    """Celery's task events, for Flower and other monitors."""

    send: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="When workers send events. `auto`: while a monitor listens; workers notice it "
        "within a second.",
    )
    sample: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="Share of tasks that events are sent for. Below 1, monitors count too few.",
    )


class FlowerSettings(Group):
    """Flower, Celery's worker console."""

    host: str = Field(default="127.0.0.1", description="Address that Flower listens on.")
    port: Port = Field(default=5555, description="Port that Flower listens on.")
    url: str | None = Field(
        default=None,
        description="Public URL of Flower, for links. Default: from host and port.",
    )


class LimitSettings(Group):
    """Limits that are checked before a task is queued."""

    max_body_bytes: int = Field(
        default=12_000_000, ge=1, description="Maximum size of a request body, in bytes."
    )
    max_header_bytes: int = Field(
        default=32_768,
        ge=256,
        description="Maximum size of a request line and its headers, in bytes.",
    )
    max_text_bytes: int = Field(
        default=1_000_000, ge=1, description="Maximum size of one text input, in bytes of UTF-8."
    )
    max_image_bytes: int = Field(
        default=8_000_000, ge=1, description="Maximum size of one decoded binary input, in bytes."
    )
    max_rows: int = Field(default=1024, ge=1, description="Maximum number of rows in one task.")
    max_rank: int = Field(
        default=32, ge=1, le=32, description="Maximum number of dimensions of a tensor."
    )
    max_elements: int = Field(
        default=64_000_000,
        ge=1,
        description="Maximum number of elements in all tensors of one task.",
    )
    max_items: int = Field(
        default=100_000,
        ge=1,
        description="Maximum number of texts and binary items in one task.",
    )
    max_input_bytes: int = Field(
        default=256_000_000,
        ge=1,
        description="Maximum size of all decoded inputs of one task, in bytes.",
    )
    max_image_pixels: int = Field(
        default=50_000_000,
        ge=1,
        description="Maximum number of pixels of one picture, as its header declares them.",
    )
    max_total_pixels: int = Field(
        default=200_000_000,
        ge=1,
        description="Maximum number of pixels of all pictures of one task.",
    )
    max_json_depth: int = Field(
        default=64, ge=4, description="Maximum depth of nested lists and objects in JSON."
    )
    max_json_values: int = Field(
        default=2_000_000,
        ge=1,
        description="Maximum number of values in JSON: numbers, texts, lists and objects. An empty "
        "list or object counts twice.",
    )
    max_json_members: int = Field(
        default=250_000,
        ge=1,
        description="Maximum number of members of all objects in JSON.",
    )


class WebsocketSettings(Group):
    """WebSocket connections."""

    ping_interval_s: float = Field(
        default=25.0,
        gt=0,
        description="Time between two pings from the server, in seconds. A client that has sent "
        "nothing since the last one, and taken nothing, is closed.",
    )
    message_timeout_s: float = Field(
        default=120.0,
        gt=0,
        description="How long a client may take to send one message, in seconds.",
    )
    send_timeout_s: float = Field(
        default=30.0,
        gt=0,
        description="A client that takes none of the bytes sent to it for this long is cut off, in "
        "seconds.",
    )
    max_message_bytes: int | None = Field(
        default=None,
        ge=1,
        description="Maximum size of one message from a client, in bytes. Unset: "
        "INFERNO_LIMITS__MAX_BODY_BYTES.",
    )
    messages_per_s: float = Field(
        default=5000.0,
        ge=1,
        description="Number of messages that are read from one socket in a second; pings and "
        "fragments count too. What comes faster is read later.",
    )
    max_queued_messages: int = Field(
        default=1000,
        ge=1,
        description="Maximum number of messages waiting for a slow reader. At more, its socket is "
        "closed.",
    )
    max_queued_bytes: int = Field(
        default=16_000_000,
        ge=1,
        description="Maximum size of the messages waiting for a slow reader, in bytes, and of the "
        "submits of one socket that are handled at the same time. One message always fits.",
    )
    max_held_bytes: int = Field(
        default=128_000_000,
        ge=1,
        description="Maximum size of all messages that one web process holds for its sockets: "
        "arriving, being handled or waiting to be sent, in bytes. At more, the socket that has "
        "held most for longest is closed.",
    )
    max_subscriptions: int = Field(
        default=10_000,
        ge=1,
        description="Maximum number of tasks that one socket waits for, or names in one message.",
    )
    max_per_address: int = Field(
        default=2000,
        ge=1,
        description="Maximum number of sockets of one client address in each web process. Behind a "
        "proxy, all clients have its address.",
    )


class WebhookSettings(Group):
    """Calls to the URLs that clients name in `webhook`."""

    secret: SecretStr | None = Field(
        default=None,
        description="Secret that signs webhooks: `whsec_` and base64, or any other text. Unset: no "
        "signatures.",
    )
    timeout_s: float = Field(
        default=10.0, gt=0, description="Time limit of one delivery, in seconds."
    )
    per_host: int = Field(
        default=16,
        ge=1,
        description="Most calls of one host and port at the same time, for each process "
        "`webhooks`. Other calls of it wait, without delaying those of other hosts.",
    )
    max_retries: int = Field(
        default=8, ge=0, description="Number of retries of a webhook that failed."
    )
    backoff_s: int = Field(
        default=2,
        ge=1,
        description="Longest delay before the first retry, in seconds; doubles each time. The "
        "actual delay is a random part of it.",
    )
    max_backoff_s: int = Field(
        default=600,
        ge=1,
        # Celery redelivers a message that waits in a worker for its visibility timeout, an hour.
        le=1800,
        description="Upper limit of the delay, in seconds.",
    )
    allow_private: bool = Field(
        default=False,
        description="Also call loopback, private and link-local addresses. Clients can then reach "
        "every HTTP service that the process `webhooks` can reach.",
    )

    @field_validator("secret")
    @classmethod
    def _check_secret(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            try:
                empty = not _decode_secret(value)
            except ValueError:
                raise ValueError("expected base64 after whsec_") from None
            if empty:
                raise ValueError("expected a secret that is not empty; unset it for no signatures")
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
        default="INFO", description="Lowest level that is logged."
    )
    max_bytes: int = Field(
        default=20_000_000,
        ge=10_000,
        description="Size in bytes at which `inferno up` continues the log of a process in a new "
        "file; at least 10,000.",
    )
    kept: int = Field(
        default=5,
        ge=1,
        description="Number of older log files that are kept for each process; at least 1.",
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
        """URL of Redis. The supervisor sets it for the processes that it starts."""
        return self.redis.url or "redis://127.0.0.1:6379/0"

    @property
    def broker_url(self) -> str:
        """URL of Celery's broker."""
        # redis:// becomes redis-streams://, and rediss:// (with TLS) rediss-streams://.
        if self.broker.url is None:
            return _celery_url(self.redis_url, "-streams")
        is_redis = self.broker.scheme in ("rediss", "unix")
        return _celery_url(self.broker.url) if is_redis else self.broker.url

    @property
    def backend_url(self) -> str:
        """URL of Celery's result backend."""
        return _celery_url(self.redis_url)

    @property
    def flower_url(self) -> str:
        """Public URL of Flower."""
        return self.flower.url or f"http://{self.flower.host}:{self.flower.port}"


def _celery_url(url: str, suffix: str = "") -> str:
    """Return a URL of Redis as Celery and kombu write it.

    Args:
      url: ``redis://``, ``rediss://`` or ``unix://``, as redis-py reads them.
      suffix: added to the scheme, to name another transport than Celery's own.
    """
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query))
    if parts.scheme == "unix":
        query = {"virtual_host": query.pop("db", "0"), **query}
        scheme = f"redis{suffix}+socket"
    else:
        scheme = parts.scheme + suffix
        if parts.scheme == "rediss":
            # redis-py's default. Without it, Celery refuses the URL and kombu would not use TLS.
            query = {"ssl_cert_reqs": "required", **query}
    ending = f"?{urlencode(query, safe='/')}" if query else ""
    return f"{scheme}://{parts.netloc}{parts.path}{ending}"


def load() -> Settings:
    """Read the settings from the environment.

    Raises:
      ConfigurationError: a value is wrong; names the variable, its value and what is expected.
    """
    try:
        return Settings()
    except ValidationError as exc:
        raise ConfigurationError("; ".join(_explain(error) for error in exc.errors())) from None
    except SettingsError as exc:
        # A variable such as INFERNO_SERVER sets a whole group as JSON.
        raise ConfigurationError(f"a group of settings is not valid JSON: {exc}") from None


def exposure(name: str, host: str, port: int) -> str | None:
    """Return a warning if others than this machine can reach a server, which authenticates nobody.

    Args:
      name: name of the server, for people.
      host: address that it listens on.
      port: port that it listens on.
    """
    try:
        local = host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        local = False  # A name of this machine, or empty for every address.
    if local:
        return None
    return (
        f"{name} listens on {host or 'every address'}, port {port}, and authenticates nobody: "
        "whoever reaches it controls the models and reads all tasks"
    )


def variable(group: str, field: str) -> str:
    """Return the environment variable of a field, such as ``INFERNO_SERVER__PORT``."""
    return f"INFERNO_{group}__{field}".upper()


def _explain(error: object) -> str:
    assert isinstance(error, dict)
    name = "INFERNO_" + "__".join(str(part).upper() for part in error["loc"])
    message = error["msg"].removeprefix("Value error, ")
    # The message ends up in logs: it must not repeat a secret, or a URL that may hold one.
    value = "..." if error["loc"][-1] in ("secret", "url", "password") else repr(error["input"])
    return f"{name}={value}: {message[:1].lower()}{message[1:]}"
