"""Models of models: the coordinator of their stages."""
