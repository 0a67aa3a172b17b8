"""The models that a worker holds: loading, swapping and watching them."""
