"""What a run was made with."""

from __future__ import annotations

import platform

import lightning
import numpy as np
import torch

from ine_callback._version import __version__


def versions() -> dict[str, str]:
    """Versions of this package and of what it computes with; no paths, no hostnames."""
    return {
        "ine_callback": __version__,
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
