"""Ensembles: models whose package is a graph of other models."""
