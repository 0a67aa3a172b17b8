"""What may be done to a task or a deployment after it was accepted."""
