"""bench/precision.py, in small."""

import pytest

from bench.precision import CANDIDATES, Candidate, table


@pytest.mark.long
def test_each_precision_is_measured_and_compared() -> None:
    candidates = [Candidate(*each, threads=1) for each in CANDIDATES]
    for candidate in candidates:
        candidate.measure(seconds=0.1)
    found = [candidate.figures() for candidate in candidates]

    exact, shipped, quantised = found
    assert exact.cosine > 0.9999
    for small in (shipped, quantised):
        assert 0.95 <= small.cosine < 0.9999
        assert small.batched_cosine >= 0.95
        assert small.memory_bytes < exact.memory_bytes
    assert table(found).count("\n| version") == len(CANDIDATES)
