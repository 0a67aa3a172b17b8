"""Watching the platform. Flower is configured here; metrics, history and tracing have their place here too."""
