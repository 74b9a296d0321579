"""Scores asked after the run beside the same queries asked in it: accuracy over bytes, from one recorded run each."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from benchmarks.metrics import Floats, per_query
from benchmarks.store.protocols import Recorded
from ine_callback import GradientStore
from ine_callback.report.stored_vectors import StoredVectors

BYTES = (132, 260, 516, 1024, 2044)


def curve(found: Recorded) -> dict[str, Any]:
    """What is lost at each number of bytes, and by each type at 1,024."""
    settings = [GradientStore(each) for each in BYTES] + [
        GradientStore(1024, "float16"),
        GradientStore(1024, "float32"),
    ]
    mu = found.recorder.report().scores.mu
    rows: dict[str, Any] = {}
    for one in settings:
        store, seconds = reduced(found, one)
        asked = again(found, store)
        spearman = per_query(asked, mu)
        rows[f"{one.bytes_per_row} {one.dtype}"] = {
            "numbers": store.dimensions,
            "spearman": float(np.nanmean(spearman)),
            "worst_tenth": float(np.nanquantile(spearman, 0.1)),
            "retraining": found.judge(asked),
            "seconds_to_reduce": seconds,
        }
    return {
        "rows": len(mu),
        "working": found.store.compression.size,
        "in_run": found.judge(mu),
        "seconds_with": found.seconds[0],
        "seconds_without": found.seconds[1],
        "bytes": rows,
    }


def reduced(found: Recorded, settings: GradientStore) -> tuple[StoredVectors, float]:
    """The same run's vectors on as many bytes as another setting has."""
    recorder, started = found.recorder, time.process_time()
    found.store.settings, found.store.made = settings, None
    store = recorder.report().store
    assert store is not None
    return store, time.process_time() - started


def again(found: Recorded, store: StoredVectors) -> Floats:
    """The run's own queries, asked of the store [N, Q]."""
    return store.products(store.of_query(found.store.query_entries()))
