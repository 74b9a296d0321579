"""Cases of which most run in `make test-all` alone, for they run through what the others run through."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import pytest


def mostly_long(cases: Iterable[Any], *short: Hashable) -> list[Any]:
    """The cases, all but the named ones marked ``long``.

    Raises:
        ValueError: If one of the short ones is no case: then none of its kind would run.
    """
    cases = list(cases)
    if missing := set(short) - {str(case) for case in cases}:
        raise ValueError(f"mostly_long: {missing} are no cases of {cases}")
    return [pytest.param(case, id=str(case), marks=() if str(case) in short else pytest.mark.long) for case in cases]
