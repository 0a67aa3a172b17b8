"""The HTTP and WebSocket front end: it validates, publishes and delivers, and loads no model."""
