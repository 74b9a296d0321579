"""Digits, text and tables for the benchmarks: from a folder given by the user, else what scikit-learn brings along."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

MNIST = "mnist10k.npz"


def folder(given: str | None) -> Path | None:
    """The data folder: ``--data``, else the environment variable INE_DATA, else None.

    Raises:
        SystemExit: If the folder named does not hold the file.
    """
    named = given or os.environ.get("INE_DATA")
    if not named:
        return None
    path = Path(named)
    if not (path / MNIST).is_file():
        raise SystemExit(
            f"{path} holds no {MNIST} (x uint8 [10000, 28, 28], y [10000]); without --data digits are used"
        )
    return path


def digits(path: Path | None) -> tuple[Tensor, Tensor]:
    """Images [n, pixels] in 0 .. 1 and labels [n]: MNIST's 10,000, or scikit-learn's digits where path is None."""
    if path is None:
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
        return torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y).long()
    raw = np.load(path / MNIST)
    return torch.tensor(raw["x"], dtype=torch.float32).flatten(1) / 255, torch.tensor(raw["y"]).long()


def text(path: Path | None) -> str:
    """Shakespeare (1.1 MB) from the folder, or the descriptions of scikit-learn's data sets where path is None."""
    if path is not None:
        return (path / "tinyshakespeare.txt").read_text()
    from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_iris, load_wine

    return "".join(load().DESCR for load in (load_breast_cancer, load_diabetes, load_digits, load_iris, load_wine))


def excerpt() -> str:
    """Four poems (7 kB), for quick forms."""
    return (Path(__file__).parents[1] / "examples" / "excerpt.txt").read_text()


def table(name: str) -> tuple[Tensor, Tensor]:
    """Standardised features [n, d] and targets [n] of a table of scikit-learn's: classes, or standardised numbers."""
    from sklearn import datasets

    if name == "cancer":
        x, y = datasets.load_breast_cancer(return_X_y=True)
    elif name == "diabetes":
        x, y = datasets.load_diabetes(return_X_y=True)
    elif name == "friedman":
        x, y = datasets.make_friedman1(2000, noise=1.0, random_state=0)
    else:
        x, y = datasets.make_classification(
            2000, 20, n_informative=8, n_redundant=4, n_classes=4, class_sep=1.2, flip_y=0.02, random_state=0
        )
    inputs = _standard(torch.tensor(x, dtype=torch.float32))
    if name in ("diabetes", "friedman"):
        return inputs, _standard(torch.tensor(y, dtype=torch.float32))
    return inputs, torch.tensor(y).long()


def _standard(x: Tensor) -> Tensor:
    return (x - x.mean(0)) / x.std(0).clamp(min=1e-6)
