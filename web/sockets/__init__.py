"""WebSockets: one conversation per connection."""
