"""Subsets of the training rows, and the losses on dev rows after training on each: one file a subset."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from rich.progress import track
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ine_callback.errors import InfluenceError
from ine_callback.methods.airrep.settings import NAME, AirRepSettings
from ine_callback.report.files import replace_file
from ine_callback.scores import Floats
from ine_callback.utilities.isolation import unmoved
from ine_callback.utilities.optional import need
from ine_callback.utilities.validate import listed

EXTRA = '"ine_callback[airrep]"'
SETTINGS = "airrep.json"  # what all files of a folder have in common
Train = Callable[[NDArray[np.int64], int], ArrayLike | Tensor]


@dataclass(frozen=True)
class Collected:
    """What was found by training on subsets.

    Attributes:
        rows: Training rows of each subset [M, n].
        losses: Losses of the dev rows after training on it [M, seeds, D].
    """

    rows: NDArray[np.int64]
    losses: Floats


def draw_subset(number: int, settings: AirRepSettings, total: int) -> NDArray[np.int64]:
    """Rows of one subset [n], drawn without replacement; each subset has a random stream of its own.

    >>> draw_subset(3, AirRepSettings(size=4), 10)
    array([3, 7, 8, 9])
    """
    rng = np.random.default_rng([settings.seed, number])
    return np.sort(rng.choice(total, settings.rows_of(total), replace=False)).astype(np.int64)


def collect(
    train: Train, total: int, dev: int, folder: Path, settings: AirRepSettings, at_once: int = 1, progress: bool = True
) -> Collected:
    """Trains on each subset that ``folder`` has no file of, and reads all files.

    Every file is written whole or not at all, so a collection that was killed goes on where it ended.

    Args:
        train: Trains on rows [n] with a seed, and returns the losses of the dev rows [D]. With ``at_once`` above 1 it
            gets the rows of some subsets [k, n] and returns [k, D].
        total: Number of training rows N.
        dev: Number of dev rows D.
        folder: Where files go.
        settings: Subsets, their size, seeds.
        at_once: Subsets that are trained in one call.
        progress: Whether a bar is shown.

    Raises:
        InfluenceError: If the folder belongs to other settings or holds a damaged file, or losses are no D finite
            numbers.
    """
    subsets = np.stack([draw_subset(k, settings, total) for k in range(settings.subsets)])
    if 2 * subsets.shape[1] >= total:
        warnings.warn(
            f"{NAME}: subsets of {subsets.shape[1]} of {total} rows are at least half of them, and differ little; "
            "losses will too. Take a smaller size.",
            stacklevel=3,
        )
    files = need("safetensors.numpy", f"{NAME}.collect", EXTRA)
    _claim(folder, {"rows": total, "dev": dev, "size": subsets.shape[1], "seed": settings.seed})
    shape = (settings.seeds, dev)
    known = {
        k: _read(files, path, subsets[k], shape) for k in range(len(subsets)) if (path := _path(folder, k)).exists()
    }
    missing = [k for k in range(len(subsets)) if k not in known]
    parts = [missing[start : start + at_once] for start in range(0, len(missing), at_once)]
    for part in track(parts, description="AirRep: trainings", disable=not (progress and parts)):
        found = [_trained(train, subsets[part], seed, dev, part, at_once) for seed in range(settings.seeds)]
        for k, losses in zip(part, np.stack(found, 1), strict=True):
            replace_file(_path(folder, k), files.save({"rows": subsets[k], "losses": losses}))
            known[k] = losses
    return Collected(subsets, np.stack([known[k] for k in range(len(subsets))]))


def refuse_shared(rows: Any, dev: Any) -> None:
    """Refuses dev rows that are training rows too: their own training would be what is judged.

    Args:
        rows: The training rows, a map-style dataset.
        dev: The dev rows, likewise.

    Raises:
        InfluenceError: Naming them.
    """
    with unmoved((rows, dev)):
        there = {_digest(rows[k]) for k in range(len(rows))}
        if shared := [k for k in range(len(dev)) if _digest(dev[k]) in there]:
            raise InfluenceError(
                f"{NAME}: dev rows {listed(np.array(shared))} are training rows too; leave them out of one, for they "
                "must not be trained on."
            )


def _digest(item: Any) -> bytes:
    made = blake2b(digest_size=16)
    for leaf in tree_leaves(item):
        array = np.asarray(leaf.detach().cpu() if isinstance(leaf, Tensor) else leaf)
        made.update(array.tobytes() if array.dtype.kind in "biufc" else repr(leaf).encode())
        made.update(repr(array.shape).encode())
    return made.digest()


def _path(folder: Path, number: int) -> Path:
    return folder / f"subset-{number:05d}.safetensors"


def _claim(folder: Path, settings: dict[str, int]) -> None:
    """Says in the folder what its files are made of, or refuses one that is made of something else."""
    path = folder / SETTINGS
    if not path.exists():
        replace_file(path, json.dumps(settings).encode())
        return
    try:
        before = json.loads(path.read_text())
    except ValueError as error:
        raise InfluenceError(f"{NAME}: {path} is damaged ({error}); use another folder.") from None
    if before != settings:
        raise InfluenceError(
            f"{NAME}: {folder} holds subsets of {before}, and these settings make {settings}; use another folder, or "
            "the former settings."
        )


def _read(files: Any, path: Path, rows: NDArray[np.int64], shape: tuple[int, int]) -> Floats:
    """The losses in a file [seeds, D]."""
    try:
        found = files.load(path.read_bytes())
        same = np.array_equal(found["rows"], rows)
        losses: Floats = found["losses"]
    except Exception as error:  # safetensors has an error class of its own, and a damaged file any other
        raise InfluenceError(f"{NAME}: {path} is damaged ({error}); delete it, and it is made again.") from None
    if not same or losses.shape != shape:
        raise InfluenceError(
            f"{NAME}: {path} has losses of {losses.shape} (seeds, dev rows), and {shape} are asked for"
            f"{'' if same else ', or it is of other rows'}; use another folder."
        )
    return losses


def _trained(
    train: Train, subsets: NDArray[np.int64], seed: int, dev: int, numbers: Sequence[int], at_once: int
) -> Floats:
    """Losses after training on some subsets with one seed [k, D]."""
    found: Any = train(subsets[0] if at_once == 1 else subsets, seed)
    losses = np.asarray(found.detach().cpu() if isinstance(found, Tensor) else found, dtype=np.float64)
    losses = losses[None] if at_once == 1 else losses
    if losses.shape != (len(subsets), dev) or not np.isfinite(losses).all():
        bad = f", {int((~np.isfinite(losses)).sum())} of them not finite" if losses.dtype.kind == "f" else ""
        raise InfluenceError(
            f"{NAME}: training on subset {numbers[0]} with seed {seed} gave losses of shape {losses.shape}{bad}; it "
            f"must give a finite loss for each of {dev} dev rows. What was collected is kept."
        )
    return losses
