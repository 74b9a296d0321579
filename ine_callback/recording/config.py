"""Options of a recording: declared once, for the callback, the bare recorder and Hugging Face."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

from ine_callback.curvature.low_rank import RANK
from ine_callback.errors import InfluenceError
from ine_callback.recording.store.settings import GradientStore
from ine_callback.utilities.options import InitialWeights, OnError, Uncaptured, check_count


@dataclass(frozen=True, kw_only=True)
class RecordingConfig:
    """How signals are recorded.

    Args:
        refresh_every: Optimizer steps between refreshes of the queries' directions; None: 20 at first, later an eighth
            of the steps so far.
        curvature_every: Optimizer steps between curvature updates, which are averaged over the run; None: 4 at first,
            later a 64th of the steps so far.
        rank: Most dimensions of a layer's inputs, for each query, in which directions are held, where those retain 99 %
            of the signals' variance (else all). None: all, always, and self-influence without sketches (slow).
        discount: Whether the curvature of the rest of training discounts early steps. Off: the paper's first-order
            signal.
        max_dim: Sides of a layer larger than this use a diagonal curvature.
        reservoir: Rows whose per-sample gradients are stored for the part of the discount that sees across layers; 0:
            none.
        initial_weights: ``random`` (training from scratch) counts the draw of the initial weights as training
            randomness; ``fixed`` (fine-tuning) only the order of the rows.
        layers: Patterns of the names of the modules to record, e.g. ``["*.11.*", "head"]``; None: all.
        uncaptured: Trainable parameters without a capture are named (``"warn"``), refused (``"raise"``) or recorded by
            per-row autograd (``"fallback"``, slow: one backward pass a row).
        store: Keeps of every row what the run did with it, so that queries can come after the run; None: not.
        on_error: ``"warn"`` stops the recording and lets training go on; ``"raise"`` is for tests.

    Example:
        >>> from ine_callback.recording.config import RecordingConfig
        >>> RecordingConfig(refresh_every=0).check("Recorder")
        Traceback (most recent call last):
        ine_callback.errors.InfluenceError: Recorder: refresh_every=0 must be an integer of at least 1.
    """

    refresh_every: int | None = None
    curvature_every: int | None = None
    rank: int | None = RANK
    discount: bool = True
    max_dim: int = 1024
    reservoir: int = 800
    initial_weights: InitialWeights = "random"
    layers: Sequence[str] | None = None
    uncaptured: Uncaptured = "warn"
    store: GradientStore | None = None
    on_error: OnError = "warn"

    def check(self, owner: str) -> None:
        """Checks the options before anything is built from them.

        Args:
            owner: Class named in messages.

        Raises:
            InfluenceError: Naming the option, its value and what it may be.
        """
        for name in ("refresh_every", "curvature_every", "rank", "max_dim"):
            value = getattr(self, name)
            if value is not None or name == "max_dim":
                check_count(owner, name, value)
        if self.on_error not in get_args(OnError):
            raise InfluenceError(f"{owner}: on_error={self.on_error!r} is unknown; pass 'warn' or 'raise'.")
        if self.uncaptured not in get_args(Uncaptured):
            raise InfluenceError(
                f"{owner}: uncaptured={self.uncaptured!r} is unknown; pass 'warn', 'fallback' or 'raise'."
            )
        if self.initial_weights not in get_args(InitialWeights):
            raise InfluenceError(
                f"{owner}: initial_weights={self.initial_weights!r} is unknown; pass 'random' where another run would "
                "draw them anew, or 'fixed' where it would start from the same ones (fine-tuning)."
            )

    def unless(self, together: RecordingConfig | None, owner: str) -> RecordingConfig:
        """These options, or those that a user gave ``together``; checked.

        Raises:
            InfluenceError: If both were given, or one cannot be right.
        """
        if together is not None and self != RecordingConfig():
            raise InfluenceError(f"{owner}: options come both in config= and one by one; give them in config= alone.")
        chosen = together or self
        chosen.check(owner)
        return chosen

    def facts(self) -> dict[str, Any]:
        """The options as plain types, for the report."""
        facts = asdict(self) | {"layers": None if self.layers is None else list(self.layers)}
        del facts["on_error"]  # says nothing about the scores
        return facts
