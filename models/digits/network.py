"""The network that `train.py` trains and `prepare.py` turns into artifacts."""

from __future__ import annotations

import torch
from torch import nn

#: Value of a pixel that is all ink, as in scikit-learn's digits.
INK = 16.0


class Network(nn.Module):
    """Two convolutions and two dense layers; 38,000 weights."""

    def __init__(self) -> None:
        """Start with random weights."""
        super().__init__()
        # TorchScript sees a module's attributes, but not its globals.
        self.scale = 1 / INK
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.dense1 = nn.Linear(32 * 4 * 4, 64)
        self.dense2 = nn.Linear(64, 10)

    def logits(self, ink: torch.Tensor) -> torch.Tensor:
        """Return unnormalised scores.

        Args:
          ink: pictures, [batch, 8, 8], from 0 (paper) to 16 (ink).
        Returns:
          [batch, 10].
        """
        x = ink.unsqueeze(1) * self.scale
        x = torch.relu(self.conv1(x))
        x = torch.relu(self.conv2(x))
        x = torch.max_pool2d(x, 2).flatten(1)
        scores: torch.Tensor = self.dense2(torch.relu(self.dense1(x)))
        return scores

    def forward(self, ink: torch.Tensor) -> torch.Tensor:
        """Return the probability of each digit, [batch, 10]."""
        return torch.softmax(self.logits(ink), dim=1)
