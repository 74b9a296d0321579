"""What scores lose in few bits, where components are drawn at random: a score is the sum over all of them.

A spectrum says how the variance of products falls from component to component: the flatter, the more of them matter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.metrics import Floats, per_query
from benchmarks.store.family import SIZES, TYPES
from ine_callback import GradientStore
from ine_callback.recording.store.pack import allocate
from ine_callback.recording.store.reduce import numbers_of
from ine_callback.report.stored_vectors import StoredVectors

ROWS, QUERIES = 5_000, 50
SPECTRA: dict[str, Callable[[Floats], Floats]] = {
    "flat": np.ones_like,
    "k^-0.25": lambda k: k**-0.25,
    "k^-0.5": lambda k: k**-0.5,
    "k^-0.75": lambda k: k**-0.75,
    "k^-1": lambda k: k**-1.0,
    "k^-1.5": lambda k: k**-1.5,
    "exp(-k/800)": lambda k: np.exp(-k / 800),
}


def all_of(quick: bool) -> dict[str, Any]:
    """Of each spectrum the Spearman correlation of stored scores with exact ones, and how many numbers there are."""
    rows = 400 if quick else ROWS
    return {name: _of(spectrum(np.arange(1.0, rows + 1)), rows) for name, spectrum in SPECTRA.items()}


def _of(variances: Floats, rows: int) -> dict[str, Any]:
    rng, count = np.random.default_rng(0), len(variances)
    values = (rng.normal(size=(rows, count)) * np.sqrt(variances)).astype(np.float32)
    queries = rng.normal(size=(QUERIES, count))
    exact, found = values @ queries.T, {}
    for size in SIZES:
        for dtype in TYPES:
            settings = GradientStore(size, dtype)
            bands = allocate(variances[: settings.dimensions], size) if dtype == "mixed" else ()
            k = min(count, sum(band.count for band in bands) or settings.dimensions)
            numbers, scale = numbers_of(torch.as_tensor(values[:, :k]), dtype, bands)
            eye, ones = np.eye(k, dtype=np.float32), np.ones(k, np.float32)
            store = StoredVectors(numbers, scale, (), eye, ones, np.ones(rows, np.bool_), bands=bands)
            spearman = float(np.mean(per_query(store.products(queries[:, :k]), exact)))
            widths = {str(band.width): band.count for band in bands}
            found[f"{size} {dtype}"] = {"numbers": k, "widths": widths, "spearman": spearman}
    return found
