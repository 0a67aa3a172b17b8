"""Which tasks leave together, and when. Pure: no clock, thread or queue."""
