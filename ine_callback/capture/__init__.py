"""Per-sample gradients from the live forward and backward pass."""

from ine_callback.capture.blocks import Block, BlockTable
from ine_callback.capture.hooks import Capture
from ine_callback.capture.layers import register_layer
from ine_callback.capture.per_sample_gradients import GradSample, Lookup, Outer, Vector

__all__ = ["Block", "BlockTable", "Capture", "GradSample", "Lookup", "Outer", "Vector", "register_layer"]
