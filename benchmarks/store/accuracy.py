"""Scores asked after the run beside the same queries asked in it: accuracy over bytes, from one recorded run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from benchmarks.metrics import Floats, per_query
from benchmarks.store.protocols import Recorded
from ine_callback import GradientStore, InfluenceReport
from ine_callback.recording.store.pack import allocate
from ine_callback.recording.store.recording import StoreRecording
from ine_callback.recording.store.reduce import numbers_of, worths
from ine_callback.report.bands import Band
from ine_callback.report.stored_vectors import StoredVectors, moments

BYTES = (64, 128, 256, 512, 1024)
WIDE = (2048, 4096)
BOTH = (256, 512, 1024, *WIDE)  # bytes at which mixed widths are beside int8


def curve(found: Recorded) -> dict[str, Any]:
    """What is lost at each number of bytes up to those the run's store was made for, and by each type at these."""
    most = found.store.settings.bytes_per_row
    sizes = BYTES if most == BYTES[-1] else WIDE
    settings = [GradientStore(each, "int8") for each in sizes]
    settings += [GradientStore(each, "mixed") for each in sizes if each in BOTH]
    if most == BYTES[-1]:
        settings += [GradientStore(most, "float16"), GradientStore(most, "float32")]
    whole, seconds = everything(found.store, found.recorder.report)
    mu = found.recorder.report().scores.mu
    rows: dict[str, Any] = {}
    for one in settings:
        store = shortened(whole, one)
        asked = again(found.store, store)
        spearman = per_query(asked, mu)
        rows[f"{one.bytes_per_row} {one.dtype}"] = {
            "numbers": store.dimensions,
            "spearman": float(np.nanmean(spearman)),
            "worst_tenth": float(np.nanquantile(spearman, 0.1)),
            "retraining": None if found.judge is None else found.judge(asked),
        }
    return {
        "rows": len(mu),
        "queries": mu.shape[1],
        "parameters": sum(p.numel() for p in found.recorder.module.parameters()),
        "working": found.store.final.size,
        "in_run": None if found.judge is None else found.judge(mu),
        "seconds": found.seconds,
        "seconds_to_reduce": seconds,
        "bytes": rows,
    }


def everything(recorded: StoreRecording, make: Callable[[], InfluenceReport]) -> tuple[StoredVectors, float]:
    """As many components of the run's vectors as a store has numbers at most, in float32, and the CPU seconds of them.

    Args:
        recorded: The run's, of which no report was made yet.
        make: Makes the report.
    """
    before = recorded.settings
    recorded.settings = replace(before, bytes_per_row=4 * before.dimensions + 4, dtype="float32")
    started = time.process_time()
    store = make().store
    seconds = time.process_time() - started
    recorded.settings = before
    assert store is not None
    return store, seconds


def shortened(whole: StoredVectors, settings: GradientStore) -> StoredVectors:
    """The leading components alone, as a store with these settings has them: the components do not depend on these."""
    values = np.asarray(whole.rows) * whole.scale[:, None]
    bands: tuple[Band, ...] = ()
    size = min(settings.dimensions, whole.dimensions)
    if settings.dtype == "mixed":
        squares = np.square(values[whole.seen, :size], dtype=np.float64).mean(0)
        components = np.asarray(whole.components[:, :size], np.float32) * np.float32(whole.unit)
        worth = worths(squares, components, np.tile(whole.variances, len(components) // len(whole.variances)))
        bands = allocate(worth, settings.bytes_per_row)
        size = sum(band.count for band in bands)
    numbers, scale = numbers_of(torch.as_tensor(values[:, :size]), settings.dtype, bands)
    short = replace(whole, rows=numbers, scale=scale, components=whole.components[:, :size], bands=bands)
    return replace(short, moments=moments(short))


def again(recorded: StoreRecording, store: StoredVectors) -> Floats:
    """The run's own queries, asked of the store [N, Q]."""
    return store.products(store.of_query(recorded.query_entries()))
