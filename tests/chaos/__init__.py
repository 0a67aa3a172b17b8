"""The real platform under load while its parts are killed, and the books that are kept outside it.

    schedule -> conductor -> fleet      kills, pauses, restarts and cuts, at seeded times
    load -> the platform -> ledger      what clients sent and saw
    model -> passes                     what was run, noted by the model itself
    ledger + passes -> report           nothing lost, nothing answered twice or wrongly

`python -m tests.chaos` runs it.
"""
