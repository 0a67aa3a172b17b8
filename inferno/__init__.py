"""The core of Inferno: models, protocol, batching, engines, client and commands.

It imports no web framework and no queue; only `inferno.operate` talks to Redis.
"""
