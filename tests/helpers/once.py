"""What takes processes of its own is run once for all test processes (pytest-xdist), in a folder that they share."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from filelock import FileLock  # comes with torch

_NAME = "INE_TESTS_SHARED"
if _NAME not in os.environ:  # this process starts the others
    os.environ[_NAME] = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, os.environ[_NAME], ignore_errors=True)


def once(name: str, make: Callable[[Path], object]) -> Path:
    """The folder that ``make`` filled, here or in another process."""
    folder = Path(os.environ[_NAME]) / name
    with FileLock(f"{folder}.lock"):
        if not (folder / "made").exists():
            folder.mkdir(exist_ok=True)
            make(folder)
            (folder / "made").touch()
    return folder


def spawned(name: str, process: Callable[[int, str], None]) -> list[Any]:
    """What two processes found: each calls ``process(rank, folder)`` and saves ``folder/rank.pt``."""
    folder = once(name, lambda folder: mp.spawn(process, (str(folder),), 2))  # type: ignore[no-untyped-call]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]
