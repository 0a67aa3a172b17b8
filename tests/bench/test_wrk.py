"""wrk's output as it was printed, read."""

from __future__ import annotations

import pytest

from bench.wrk import WrkFailed, parse

RESULT = (
    'result {"answered": 1640, "refused": 2, "wrong": 0, "sized": 1640, "cached": 12, '
    '"passes": 51.25, "seconds": 2.001093, "connect": 0, "read": 3, "write": 0, "timeout": 0, '
    '"p50": 72.142, "p90": 111.3, "p95": 136.7, "p99": 220.5, "max": 435.127}'
)
OUTPUT = f"""\
Running 2s test @ http://127.0.0.1:40007
  1 threads and 64 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency    79.55ms   43.72ms 435.13ms   89.69%
    Req/Sec   825.35    228.21     1.25k    65.00%
  1642 requests in 2.00s, 0.93MB read
Requests/sec:    820.55
Transfer/sec:    475.33KB

{RESULT}
sample 503 {{"type": "about:blank", "code": "broker_unavailable"}}
"""


def test_rates_and_latencies_are_read():
    load = parse(OUTPUT)
    assert (load.answered, load.cached, load.seconds) == (1640, 12, 2.001093)
    assert load.latency_ms == {
        "p50": 72.142, "p90": 111.3, "p95": 136.7, "p99": 220.5, "max": 435.127
    }  # fmt: skip


def test_a_mean_batch_is_answers_over_passes():
    assert parse(OUTPUT).mean_batch == 32.0
    assert parse(OUTPUT.replace('"passes": 51.25', '"passes": 0.0')).mean_batch is None


def test_errors_are_counted_by_kind_and_one_is_shown():
    load = parse(OUTPUT)
    assert load.errors == {"refused": 2, "read": 3}
    assert load.sample == '503 {"type": "about:blank", "code": "broker_unavailable"}'


def test_no_result_is_an_error_that_shows_what_wrk_said():
    with pytest.raises(WrkFailed, match="Connection refused"):
        parse("unable to connect to 127.0.0.1:1 Connection refused\n")
