"""The Python client: `from inferno.client import Client`."""

from inferno.client.client import DEFAULT_URL, Client, Task
from inferno.client.encoding import Request
from inferno.client.results import Result, rebuild

__all__ = ["DEFAULT_URL", "Client", "Request", "Result", "Task", "rebuild"]
