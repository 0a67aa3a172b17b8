"""Celery's settings, under Celery's names, with values from `inferno.settings`."""

from inferno.protocol.requests import MAX_PRIORITY as _MAX_PRIORITY
from inferno.settings import load as _load

_settings = _load()

# Broker and results.
broker_url = _settings.broker_url
result_backend = _settings.backend_url
result_expires = _settings.tasks.result_ttl_s
redis_socket_connect_timeout = _settings.redis.connect_timeout_s
# Celery passes it on to Unix sockets, which have no such option.
redis_socket_keepalive = not _settings.redis_url.startswith("unix:")
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
    # A task only counts as accepted once RabbitMQ confirms it. Redis answers every command.
    broker_transport_options = {"confirm_publish": True}

# Messages.
accept_content = ["json"]
result_accept_content = ["json"]
task_serializer = "json"
result_serializer = "json"
event_serializer = "json"
task_routes = ["tasks.celery.route"]
# RabbitMQ only supports priorities in queues that declare them; other brokers ignore this.
task_queue_max_priority = _MAX_PRIORITY
# Answer 503 at once when a publish fails; the client decides when to retry.
task_publish_retry = False

# Workers. `workers.launch` sets concurrency and prefetch from the models.
imports = ["workers.launch"]
worker_pool = "threads"
task_acks_late = True
task_reject_on_worker_lost = True
task_send_sent_event = False
# Restarting a pool by remote control can import modules by name.
worker_pool_restarts = False
worker_send_task_events = True
worker_hijack_root_logger = True
worker_log_color = False
worker_cancel_long_running_tasks_on_connection_loss = False
# It would lower the prefetch after a reconnect, and thereby the size of batches.
worker_enable_prefetch_count_reduction = False
