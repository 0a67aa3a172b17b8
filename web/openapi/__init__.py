"""The OpenAPI document, and the decorators that it is made of."""
