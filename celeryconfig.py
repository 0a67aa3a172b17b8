"""Celery's own settings, under Celery's names; their values come from `inferno.settings`."""

from inferno.protocol.requests import MAX_PRIORITY as _MAX_PRIORITY
from inferno.settings import load as _load

_settings = _load()

# Where tasks and results travel.
broker_url = _settings.broker_url
result_backend = _settings.redis_url
result_expires = _settings.tasks.result_ttl_s
redis_socket_connect_timeout = _settings.redis.connect_timeout_s
redis_socket_keepalive = True
broker_connection_retry_on_startup = True
broker_connection_timeout = _settings.redis.connect_timeout_s
broker_pool_limit = 64
broker_transport_options = {
    "body_encoding": "utf-8",
    "health_check_interval": 10,
    "queue_order_strategy": "priority",
    "lease": _settings.worker.lease_s,
    "socket_connect_timeout": _settings.redis.connect_timeout_s,
    "socket_keepalive": True,
    "socket_timeout": _settings.redis.timeout_s,
}

if broker_url.startswith(("amqp", "pyamqp")):
    # Accepted is what RabbitMQ has confirmed; Redis answers each command anyway.
    broker_transport_options = {"confirm_publish": True}

# Messages.
accept_content = ["json"]
result_accept_content = ["json"]
task_serializer = "json"
result_serializer = "json"
task_routes = ["tasks.celery.route"]
# Queues of RabbitMQ have priorities only if they are declared so; other brokers do not look at it.
task_queue_max_priority = _MAX_PRIORITY
# A publish that fails is answered with 503 at once; the client decides when to try again.
task_publish_retry = False

# Workers. Concurrency and prefetch follow from the models and are set by `workers.launch`.
imports = ["workers.launch"]
worker_pool = "threads"
task_acks_late = True
task_reject_on_worker_lost = True
task_send_sent_event = False
worker_send_task_events = True
worker_hijack_root_logger = True
worker_log_color = False
worker_cancel_long_running_tasks_on_connection_loss = False
# Would lower the prefetch after a reconnect, and with it the size of batches.
worker_enable_prefetch_count_reduction = False
