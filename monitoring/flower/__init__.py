"""Flower: how it reads the broker."""
