"""The connection to the broker, and the lanes on it."""
