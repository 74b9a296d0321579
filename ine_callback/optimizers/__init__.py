"""What an optimizer does with a gradient, now and over the rest of the schedule."""

from ine_callback.optimizers import adam, muon, rms, sgd, signs  # noqa: F401 - they register their rules
from ine_callback.optimizers.registry import Rate, UpdateRule, register_optimizer

__all__ = ["Rate", "UpdateRule", "register_optimizer"]
