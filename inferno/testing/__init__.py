"""Runs Redis, RabbitMQ, workers, the web tier and whole platforms for tests and benchmarks."""
