"""From a stored outcome to those who wait for it."""
