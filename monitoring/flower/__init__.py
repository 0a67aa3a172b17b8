"""Flower's view of the broker."""
