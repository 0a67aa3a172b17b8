"""The broker: connections to it, its lanes, and the messages that are published to them."""
