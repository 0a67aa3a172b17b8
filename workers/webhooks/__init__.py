"""Webhooks: delivery of task events to URLs of clients."""
