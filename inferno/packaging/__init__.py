"""Making model packages, checking them, and carrying them from place to place.

reading     an artifact -> a draft of its package; one module for each kind of artifact
creation    a draft -> run it where it does not say enough -> a version in the repository
validation  a version -> what is right and wrong with it, and what clients will see
exchange    a version <-> a store: a folder, a web server, or whatever fsspec knows
"""
