"""The servers that Inferno is compared with, each written as its own documentation recommends.

Each folder has a server and its requirements; a server without requirements runs in the project's
environment. All offer the same workloads, which `forward` implements.
"""
