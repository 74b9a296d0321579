"""The protocol of a method that accumulates over training: every step updates per-row state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor, device

from ine_callback.errors import InfluenceError
from ine_callback.methods.closing import Closing
from ine_callback.methods.fit_end import FitEndMethod, checked_fit_end
from ine_callback.scores import Floats, QueryInfo, Scores

_FORMER = {"fold": "update", "finish": "compute"}  # names of the abstract methods before 0.2
_FOLD = 5  # what fold got: rows, signals, rate, unit, contrasts


class Method(ABC):
    """A way to turn signals into scores: ``start`` once, ``update`` at every optimizer step, ``compute`` at the end.

    Implementations keep tensors on the run's device, accumulate in float32 or better and never synchronise with the
    host in ``update``.

    Attributes:
        needs_signals: Whether it uses signals. Without them no hook reads the training's passes, and ``update`` gets
            none [b, 0].
        wants_closing: Whether :meth:`close` is to be called, after one more pass over the rows at the final weights.
    """

    needs_signals = True
    wants_closing = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Accepts methods written for earlier versions, with ``fold`` for ``update`` and ``finish`` for ``compute``."""
        super().__init_subclass__(**kwargs)
        for former, name in _FORMER.items():
            if former in vars(cls) and name not in vars(cls):
                setattr(cls, name, vars(cls)[former] if name == "compute" else _fold(vars(cls)[former]))

    @abstractmethod
    def start(
        self,
        rows: int,
        queries: tuple[QueryInfo, ...],
        device: device,
        random_weights: bool = False,
        contrasts: int = 0,
    ) -> None:
        """Allocates the state for ``rows`` rows (dataset indices 0 .. rows - 1) and ``Q = len(queries)`` queries.

        Args:
            rows: Number of rows.
            queries: The queries.
            device: Where the state lives.
            random_weights: Whether initial weights are part of training randomness. They then cause a variance of 1 in
                every query, in squared units of ``update``.
            contrasts: Number J of sign contrasts that ``update`` will get.
        """

    @abstractmethod
    def update(
        self,
        rows: Tensor,
        signals: Tensor,
        rate: float,
        unit: Tensor | None = None,
        contrasts: Tensor | None = None,
        halves: Tensor | None = None,
    ) -> None:
        """Updates the state with one optimizer step.

        Args:
            rows: Dataset index of every row of the step [b], int64, on the run's device; duplicates allowed.
            signals: Inner product [b, Q] of each query's direction with each row's contribution to the step's gradient.
                Contributions sum to the applied gradient, so for a mean loss a contribution is the row's gradient
                divided by b. Non-finite signals are left out.
            rate: Effective learning rate of the step: lr / (1 - momentum) for SGD, lr for Adam.
            unit: Standard deviation [b, Q] that random initial weights cause in each query along its present direction
                (the same for all rows, except for self-influence); None: 1. It makes directions of different times
                comparable.
            contrasts: The signals with Rademacher signs on each layer's units [b, Q, J], see
                :mod:`ine_callback.scoring.sign_contrasts`.
            halves: Differences between halves of the sketches that signals of self-influence are estimated with
                [b, Q, 2], see :mod:`ine_callback.curvature.sketch`; 0 for other queries.
        """

    def close(self, closing: Closing) -> None:  # noqa: B027  # most methods want no closing pass
        """Takes what the closing pass found, once, when training is over."""

    @abstractmethod
    def compute(self) -> Scores:
        """Returns the scores; the state stays valid, so training may go on and ``compute`` be called again."""

    def notes(self) -> list[str]:
        """Sentences for the report about the scores."""
        return []

    @abstractmethod
    def grow(self, rows: int) -> None:
        """Enlarges the state to ``rows`` rows (unsized datasets)."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Tensors and primitives only (loads under ``weights_only=True``)."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned, after :meth:`start`."""


def host(tensor: Tensor) -> Floats:
    """Returns a float64 copy on the host."""
    return np.array(tensor.cpu().numpy(), dtype=np.float64)


def split_methods(methods: Sequence[Method | FitEndMethod], owner: str) -> tuple[list[Method], list[FitEndMethod]]:
    """Splits methods into those that accumulate over training (at most one) and those that run on the trained model.

    Raises:
        InfluenceError: If there is none at all, or two of the first kind.

    Example:
        >>> from ine_callback import BIF, FINE
        >>> split_methods([FINE(), BIF()], "InfluenceCallback")[1][0].draws
        200
    """
    if not isinstance(methods, Sequence) or not methods:
        raise InfluenceError(f"{owner}: methods={methods!r} names no method; pass [FINE()] or leave it out.")
    for method in methods:
        if not isinstance(method, Method | FitEndMethod):
            raise InfluenceError(f"{owner}: {method!r} is not a Method; pass instances such as FINE().")
    training = [method for method in methods if isinstance(method, Method)]
    if len(training) > 1:
        raise InfluenceError(
            f"{owner}: {len(training)} methods accumulate over training; this version runs one, e.g. [FINE(), BIF()]."
        )
    return training, checked_fit_end([method for method in methods if isinstance(method, FitEndMethod)], owner)


def training_methods(methods: Sequence[Method], owner: str) -> list[Method]:
    """Checks the methods of a recorder, which runs no method on the trained model.

    Raises:
        InfluenceError: For a method that runs on the trained model, or no method.
    """
    training, ending = split_methods(methods, owner)
    if ending:
        raise InfluenceError(
            f"{owner}: {ending[0].name} runs on the trained model, which the recorder does not; give it to "
            "InfluenceCallback, or run it afterwards."
        )
    return training


def _fold(former: Callable[..., None]) -> Callable[..., None]:
    """``update`` of a method with ``fold``, which got fewer arguments."""

    def update(self: Method, *given: Any) -> None:
        former(self, *given[:_FOLD])

    return update
