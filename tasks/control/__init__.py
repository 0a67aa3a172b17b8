"""Changes to tasks and deployments after they were accepted: cancel, expire, replay, roll out."""
