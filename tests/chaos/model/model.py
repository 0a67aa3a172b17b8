"""A model that notes in a file which tasks were in each of its passes, in which process and when.

Lines are ``<text> <pid> <start|end> <monotonic seconds>``; the clock is that of the machine, so
that the times of all processes compare.
"""

import os
import random
import time

import numpy as np


def answer(text: str) -> str:
    """Return what the model answers to a text."""
    return f"<{text[::-1]}>"


def build(context):
    """Open the file and return the model."""
    path = context.parameters["ledger"]
    shortest_ms, longest_ms = context.parameters["pass_ms"]
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def note(texts, event):
        tail = f" {os.getpid()} {event} {time.monotonic():.6f}\n"
        # One write for a batch: lines of several processes do not mix.
        os.write(file, "".join(text + tail for text in texts).encode())

    def model(inputs):
        texts = inputs["text"].tolist()
        if texts[0] != "warm-up":
            note(texts, "start")
            time.sleep(random.uniform(shortest_ms, longest_ms) / 1000)
            note(texts, "end")
        return {"text": np.array([answer(text) for text in texts], object)}

    return model
