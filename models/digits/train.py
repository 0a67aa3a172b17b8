"""Train the digits network on scikit-learn's handwritten digits.

`python models/digits/train.py`; needs torch, scikit-learn and safetensors, and about a minute.
Writes `weights.safetensors` and `heldout.npz`, a quarter of the images, which no training step has
seen.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from network import INK, Network
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.nn import functional

HERE = Path(__file__).resolve().parent
SEED = 7
EPOCHS = 80
BATCH = 64


def main() -> None:
    """Train, measure and save."""
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    digits = load_digits()
    train_x, test_x, train_y, test_y = train_test_split(
        digits.images, digits.target, test_size=0.25, stratify=digits.target, random_state=SEED
    )
    network = train(torch.tensor(train_x, dtype=torch.float32), torch.tensor(train_y))
    with torch.no_grad():
        found = network(torch.tensor(test_x, dtype=torch.float32)).argmax(1).numpy()
    right = int((found == test_y).sum())
    print(f"held out: {right} of {len(test_y)} right, {100 * right / len(test_y):.2f} %")
    save_file(network.state_dict(), HERE / "weights.safetensors")
    np.savez_compressed(
        HERE / "heldout.npz", pixels=test_x.astype(np.uint8), labels=test_y.astype(np.uint8)
    )


def train(images: torch.Tensor, labels: torch.Tensor) -> Network:
    """Train a network on images [n, 8, 8] with values from 0 to 16."""
    network = Network()
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1e-2)
    steps = EPOCHS * math.ceil(len(images) / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(images)).split(BATCH):
            loss = functional.cross_entropy(
                network.logits(distort(images[rows])), labels[rows], label_smoothing=0.05
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def distort(images: torch.Tensor) -> torch.Tensor:
    """Turn, slant, scale, shift and dim each image a little.

    Clients' images vary more than those of the training set.
    """
    n = len(images)
    turn = torch.randn(n) * 0.1
    scale = 1 + torch.randn(n) * 0.08
    transform = torch.zeros(n, 2, 3)
    transform[:, 0, 0] = torch.cos(turn) * scale
    transform[:, 0, 1] = torch.sin(turn) + torch.randn(n) * 0.1
    transform[:, 1, 0] = -torch.sin(turn)
    transform[:, 1, 1] = torch.cos(turn) * scale
    transform[:, :, 2] = torch.randn(n, 2) * 0.1
    grid = functional.affine_grid(transform, [n, 1, 8, 8], align_corners=False)
    moved = functional.grid_sample(images.unsqueeze(1), grid, align_corners=False).squeeze(1)
    strength = 1 + torch.rand(n, 1, 1) * 0.4 - 0.2
    return (moved * strength).clamp(0, INK)


if __name__ == "__main__":
    main()
