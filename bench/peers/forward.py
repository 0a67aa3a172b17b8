"""The workloads for the peers: functions from texts to one output for each.

This runs in every peer's environment, so it needs only numpy, onnxruntime and tokenizers, and these
only for embeddings.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Largest number of rows in a forward pass, and how long a request may wait for others, in ms.
MAX_BATCH_SIZE = 32
MAX_BATCH_DELAY_MS = 10

#: Set by `bench.targets` for each peer.
WORKLOAD = os.environ.get("BENCH_WORKLOAD", "echo")
PORT = int(os.environ.get("BENCH_PORT", "0"))

_EMBED = Path(__file__).resolve().parents[2] / "models" / "embed"
_VERSIONS = {"embed": 2, "embed-int8": 1}

Forward = Callable[[list[str]], list[Any]]


def load(workload: str = WORKLOAD, sleep: Callable[[float], None] = time.sleep) -> Forward:
    """Return the forward pass of a workload.

    Args:
      workload: name of the workload.
      sleep: a sleep that blocks the process, where `time.sleep` is patched and does not.
    """
    if workload == "echo":
        return list
    if workload == "simulated":
        return _in_passes(Simulated(sleep))
    return _in_passes(Embed(_VERSIONS[workload]))


def _in_passes(forward: Forward) -> Forward:
    """Split calls into passes of at most the largest batch."""

    def run(texts: list[str]) -> list[Any]:
        starts = range(0, len(texts), MAX_BATCH_SIZE)
        return [row for at in starts for row in forward(texts[at : at + MAX_BATCH_SIZE])]

    return run


class Simulated:
    """A simulated accelerator: 5 ms and 0.05 ms a row, with one pass at a time on the machine."""

    def __init__(self, sleep: Callable[[float], None]) -> None:
        """Open the lock that all processes of the server share."""
        self._sleep = sleep
        self._lock = os.open(os.environ["BENCH_LOCK"], os.O_RDWR | os.O_CREAT)

    def __call__(self, texts: list[str]) -> list[str]:
        """Return the texts after the time of a pass."""
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        try:
            self._sleep((5.0 + 0.05 * len(texts)) / 1000)
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_UN)
        return texts


class Embed:
    """The artifact of `embed` that the project prepared."""

    def __init__(self, version: int) -> None:
        """Load the artifact with a thread for each core."""
        import onnxruntime
        from tokenizers import Tokenizer

        folder = _EMBED / str(version)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = len(os.sched_getaffinity(0))
        self._session = onnxruntime.InferenceSession(
            str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.enable_truncation(256)
        self._tokenizer.enable_padding()

    def __call__(self, texts: list[str]) -> list[list[float]]:
        """Return the embedding of each text, 384 numbers."""
        import numpy as np

        encodings = self._tokenizer.encode_batch_fast(texts)
        feed = {
            "input_ids": np.array([e.ids for e in encodings], np.int64),
            "attention_mask": np.array([e.attention_mask for e in encodings], np.int64),
        }
        rows: list[list[float]] = self._session.run(["embedding"], feed)[0].tolist()
        return rows


def answer_members(forward: Forward, members: list[list[str]]) -> list[dict[str, Any]]:
    """Answer the requests of one batch with one call: flatten, run, split.

    Args:
      forward: function from `load`.
      members: texts of each request.
    Returns:
      For each request, its outputs and the number of requests in the batch.
    """
    rows = iter(forward([text for texts in members for text in texts]))
    return [
        {"outputs": [next(rows) for _ in texts], "batch_size": len(members)} for texts in members
    ]
