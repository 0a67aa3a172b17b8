"""How a stored outcome reaches the callers that wait for it, and what they are shown of it."""
