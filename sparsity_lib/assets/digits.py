"""Real images without a download: scikit-learn's 1,797 handwritten digits of 8 x 8 pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsity_lib.errors import unknown

SPLITS = ("training", "evaluation")


def digits(split: str) -> dict[str, Tensor]:
    """Images and labels of one split, as a ViT takes them.

    Returns {"pixel_values": [n, 1, 8, 8] float32 in [-1, 1], "labels": [n]}: 1,198 images for "training", and for
    "evaluation" the other third, with equal shares of each digit.
    Raises SparsityError for another split.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1  # grey levels of 0 to 16
    labels = torch.tensor(found.target, dtype=torch.long)
    parts = train_test_split(range(len(labels)), test_size=1 / 3, random_state=0, stratify=found.target)
    chosen = torch.tensor(parts[SPLITS.index(split)])
    return {"pixel_values": images[chosen], "labels": labels[chosen]}
