"""Runs a platform on one machine: processes, the embedded Redis, checks and the screen."""
