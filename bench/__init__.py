"""The benchmark suite: Inferno beside other servers, in one run, on one machine.

    targets    what is measured: Inferno and its peers, each started and stopped as a whole
    workloads  what they do: echo, simulated, embed
    wrk, load  what is asked of them: closed and open loops
    cache      the same inputs again: what is computed once
    session    the order in which it all happens -> results, a JSON file
    report     tables and comparisons; plot draws them

`python -m bench --help` has the commands; docs/performance.md says what is measured, and how.
"""
