"""The servers that Inferno is measured against, each as its own documentation would write it.

Each folder has the server and what it needs; those without requirements run in the project's own
environment. All offer the same three workloads, which `forward` implements for them.
"""
