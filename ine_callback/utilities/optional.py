"""Optional packages: imported when needed, with a remedy when missing."""

from __future__ import annotations

from importlib import import_module
from typing import Any

EXTRA = '"ine_callback[report]"'


def need(module: str, what: str, install: str = EXTRA) -> Any:
    """Imports ``module`` for the feature ``what``.

    Args:
        module: Name of the module.
        what: The feature, as the user called it.
        install: What to install for it; by default the extra ``report``.

    Raises:
        ImportError: When it is not installed; the message says how to install it.

    Example:
        >>> need("no_such_package", "InfluenceReport.to_pandas")
        Traceback (most recent call last):
        ImportError: InfluenceReport.to_pandas needs no_such_package; run: pip install "ine_callback[report]"
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"{what} needs {package}; run: pip install {install}") from error
