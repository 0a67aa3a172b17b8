"""The OpenAPI document: what each view declares about itself, and the document made of it."""
