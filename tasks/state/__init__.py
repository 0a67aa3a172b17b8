"""Every Redis key of a task and of the cluster, and every atomic step that changes them."""
