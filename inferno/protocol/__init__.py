"""What travels: tensors, signatures, the bodies of requests, and the life of a task."""
