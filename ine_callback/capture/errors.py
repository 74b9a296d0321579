"""Errors of one layer, in words, and those that are the machine's."""

from __future__ import annotations

import torch

# errors of the machine, not of a layer; AcceleratorError is new in torch 2.8
FATAL = (MemoryError, torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError))


class LayerError(ValueError):
    """One layer cannot be recorded; the message says why, after the layer's name."""


def in_words(error: Exception) -> str:
    """An exception as the reason why a layer is dropped."""
    if isinstance(error, LayerError):
        return str(error)
    first = next(iter(str(error).strip().splitlines()), "")[:200]
    return f"recording it failed with {type(error).__name__}: {first}"
