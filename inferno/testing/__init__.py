"""Runs Redis, a worker and a whole platform for tests and benchmarks."""
