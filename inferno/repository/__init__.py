"""Model packages: their manifests, the graphs of ensembles, and the repository that holds them."""
