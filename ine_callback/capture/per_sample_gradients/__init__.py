"""Per-sample gradients of one use of a parameter, as the factors that the forward and backward pass left behind."""

from ine_callback.capture.per_sample_gradients.base import GradSample, row_chunks, wide_sum, widened
from ine_callback.capture.per_sample_gradients.compressed import CompressedGradients
from ine_callback.capture.per_sample_gradients.lookup import Lookup
from ine_callback.capture.per_sample_gradients.outer import Outer
from ine_callback.capture.per_sample_gradients.ragged import Ragged, of_entries, sums_by_row
from ine_callback.capture.per_sample_gradients.vector import Vector
from ine_callback.capture.per_sample_gradients.windows import Kernel, Windows

__all__ = [
    "CompressedGradients",
    "GradSample",
    "Kernel",
    "Lookup",
    "Outer",
    "Ragged",
    "Vector",
    "Windows",
    "of_entries",
    "row_chunks",
    "sums_by_row",
    "wide_sum",
    "widened",
]
