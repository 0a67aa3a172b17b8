"""What a worker does with the tasks of its lanes: batch, forward, settle."""
