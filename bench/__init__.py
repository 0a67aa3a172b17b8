"""The benchmark suite: Inferno beside other servers, in one run, on one machine.

    targets    Inferno and its peers, each started and stopped as a whole
    workloads  what they serve: echo, simulated, embed
    wrk, load  the load: closed and open loops
    cache      equal inputs: what is computed once
    session    the order of a run -> results, a JSON file
    report     tables and comparisons; plot draws them

`python -m bench --help` lists the commands; docs/performance.md explains what is measured and how.
"""
