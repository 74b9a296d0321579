"""Values of rows by opendataval, where it installs: LAVA and KNN-Shapley, both against the same clean rows.

Its pins are old; beside a current torch it runs with ``pip install --no-deps opendataval geomloss==0.2.6`` and what its
import then asks for.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from benchmarks.metrics import Floats

CLASSES = 10
Values = Callable[[Tensor, Tensor, Tensor, Tensor], Floats]


def lava(x: Tensor, y: Tensor, v: Tensor, yv: Tensor) -> Floats:
    """Values [N] by LAVA (arXiv 2305.00054) on the pixels: low is suspicious."""
    from opendataval.dataval.lava.lava import LavaEvaluator

    return _values(LavaEvaluator(random_state=0), x, y, v, yv)


def knn_shapley(x: Tensor, y: Tensor, v: Tensor, yv: Tensor) -> Floats:
    """Values [N] by KNN-Shapley (arXiv 1908.08619) with ten neighbours."""
    from opendataval.dataval.knnshap.knnshap import KNNShapley

    return _values(KNNShapley(k_neighbors=10, random_state=0), x, y, v, yv)


def _values(method: object, x: Tensor, y: Tensor, v: Tensor, yv: Tensor) -> Floats:
    method.x_train, method.y_train = x, F.one_hot(y, CLASSES).float()  # type: ignore[attr-defined]
    method.x_valid, method.y_valid = v, F.one_hot(yv, CLASSES).float()  # type: ignore[attr-defined]
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):  # progress bars
        found: Floats = method.train_data_values().evaluate_data_values()  # type: ignore[attr-defined]
    return found


def installed() -> dict[str, Values]:
    """The methods that can be called here."""
    there = importlib.util.find_spec("opendataval") and importlib.util.find_spec("geomloss")
    return {"LAVA (opendataval)": lava, "KNN-Shapley (opendataval)": knn_shapley} if there else {}
