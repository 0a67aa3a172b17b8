"""The core of Inferno: models, protocol, batching and engines.

It knows no web framework, queue or Redis client.
"""
