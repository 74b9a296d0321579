"""CPU seconds and peak memory of a computation, in a process of its own."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch

T = TypeVar("T")
STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Measured(Generic[T]):
    """A result with its CPU seconds, and the megabytes at the peak above the start (NaN where not told)."""

    result: T
    seconds: float
    peak_mb: float


def measure(function: Callable[[], T]) -> Measured[T]:
    """Runs ``function`` in a process of its own, so that its peak of memory can be told."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_measure, function).result()


def _measure(function: Callable[[], T]) -> Measured[T]:
    torch.set_num_threads(1)
    started, before = time.process_time(), _memory("VmRSS")
    if STATUS.is_file():
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of the imports
    result = function()
    return Measured(result, time.process_time() - started, _memory("VmHWM") - before)


def _memory(key: str) -> float:
    """Resident memory of this process (VmRSS) or its peak (VmHWM) in MB; NaN where the system does not tell."""
    if not STATUS.is_file():
        return float("nan")
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(key))
    return float(line.split()[1]) / 1e3
