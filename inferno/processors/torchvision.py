"""torchvision's detectors as modules that take one tensor; for a package's `entrypoint`."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence


class DetectionModule(nn.Module):
    """Wraps a module that takes a list of pictures and returns a dict of boxes for each."""

    def __init__(self, detector: nn.Module) -> None:
        """Store the detector, such as one from `torchvision.models.detection`."""
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Find the boxes in pictures.

        Args:
          images: float [rows, 3, height, width].
        Returns:
          `boxes` [rows, n, 4], `labels` and `scores` [rows, n], padded with 0.
        """
        found = self.detector(list(images))
        return {
            name: pad_sequence([row[name] for row in found], batch_first=True)
            for name in ("boxes", "labels", "scores")
        }
