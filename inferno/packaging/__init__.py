"""Before a model serves: create its package, check it, tune it, and share it.

reading     an artifact -> a draft of its package; one module for each kind of artifact
creation    a draft -> a trial run if the artifact tells too little -> a version in the repository
validation  a version -> a report of what is wrong, and of what clients will see
tuning      a version -> measured forward passes -> recommended settings
exchange    a version <-> a store: a folder, a web server, or anything that fsspec supports
"""
