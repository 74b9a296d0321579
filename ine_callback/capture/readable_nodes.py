"""Whether what an operation of the autograd graph saved can be read a second time."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

# torch 2.6 to 2.12 do not tell what activation checkpointing saved, so that nothing saved is read
SAVED_IS_READ = hasattr(torch._C._autograd.SavedTensor, "unpack_hook")


def is_readable(node: Any) -> bool:
    """Whether all that an operation saved can be read a second time.

    What activation checkpointing saved can be read once only, by autograd.
    """
    kind: Any = type(node)
    for name in _saved_by(kind):
        saved = getattr(node, name)
        for each in saved if isinstance(saved, tuple | list) else [saved]:
            if getattr(each, "unpack_hook", "unknown") is not None:
                return False
    return True


@cache
def _saved_by(kind: type) -> tuple[str, ...]:
    return tuple(name for name in dir(kind) if name.startswith("_raw_saved_"))
