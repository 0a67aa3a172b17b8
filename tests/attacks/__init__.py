"""Attacks of one client on a running platform, beside a bystander that calls it as anybody would.

    python -m tests.attacks                           start a platform and run every attack
    python -m tests.attacks --url URL --pid PID NAME  attack one that runs; PID is its `inferno up`

The attacker calls from 127.0.0.1, the bystander from 127.0.0.2: limits hold for each address.
"""
