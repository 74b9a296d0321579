"""The protocol of a method: fold each step's signals into per-row state, turn the state into scores at the end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor, device

from ine_callback.errors import InfluenceError
from ine_callback.scores import Floats, QueryInfo, Scores


class Method(ABC):
    """A way to turn signals into scores. Life: ``start`` once, ``fold`` every optimizer step, ``finish`` once.

    Implementations keep tensors on the run's device, accumulate in float32 or better and never synchronise with the
    host in ``fold``.
    """

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
            random_weights: Whether initial weights are part of training randomness: they leave a variance of 1 in
                every query, in squared units of ``fold``.
            contrasts: Contrasts J that ``fold`` will be given.
        """

    @abstractmethod
    def fold(
        self,
        rows: Tensor,
        signals: Tensor,
        rate: float,
        unit: Tensor | None = None,
        contrasts: Tensor | None = None,
    ) -> None:
        """Takes one optimizer step.

        Args:
            rows: Dataset index of every row of the step [b], int64, on the run's device; duplicates allowed.
            signals: Inner product of the direction with each row's share of the step's gradient [b, Q]. Shares sum
                to the applied gradient, so for a mean loss a share is the row's gradient divided by b. Non-finite
                signals are left out.
            rate: Effective learning rate of the step: lr / (1 - momentum) for SGD, lr for Adam.
            unit: Standard deviation [b, Q] that random initial weights leave in each query along its present direction
                (the same for all rows, but for self-influence); None: 1. Directions of different times are compared in
                these units.
            contrasts: The signals with half of each layer's units turned [b, Q, J], see
                :mod:`ine_callback.scoring.sign_contrasts`.
        """

    @abstractmethod
    def finish(self) -> Scores:
        """Returns the scores; the state stays valid, so training may go on and ``finish`` be called again."""

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


class EndMethod(ABC):
    """A way to score rows after training, from the trained weights alone; run by the callback, not by the recorder.

    Nothing but its settings lives here: there is no state to fold steps into, to checkpoint or to resume.
    """

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The settings as plain types, for the report."""


def split_methods(methods: Sequence[Method | EndMethod], owner: str) -> tuple[list[Method], EndMethod | None]:
    """The method that folds steps, and the one that runs when training has ended.

    Raises:
        InfluenceError: If there is none of the first kind, or two of either.

    Example:
        >>> from ine_callback import BIF, FINE
        >>> split_methods([FINE(), BIF()], "InfluenceCallback")[1].draws
        200
    """
    if not isinstance(methods, Sequence):
        return checked_methods(methods, owner), None
    ending = [method for method in methods if isinstance(method, EndMethod)]
    if len(ending) > 1:
        raise InfluenceError(
            f"{owner}: {len(ending)} methods run at the end of training; give one, e.g. [FINE(), BIF()]."
        )
    folding = [method for method in methods if not isinstance(method, EndMethod)]
    if ending and not folding:
        kind = type(ending[0]).__name__
        raise InfluenceError(f"{owner}: {kind} needs f-INE beside it: pass [FINE(), {kind}()]; run_bif runs it alone.")
    return checked_methods(folding, owner), ending[0] if ending else None


def checked_methods(methods: Sequence[Method], owner: str) -> list[Method]:
    """The methods to run.

    Raises:
        InfluenceError: If there is none, more than one, or something else.
    """
    if not isinstance(methods, Sequence) or not methods:
        raise InfluenceError(f"{owner}: methods={methods!r} names no method; pass [FINE()] or leave it out.")
    for method in methods:
        if not isinstance(method, Method):
            raise InfluenceError(f"{owner}: {method!r} is not a Method; pass instances such as FINE().")
    if len(methods) > 1:
        raise InfluenceError(f"{owner}: {len(methods)} methods were given; this version runs one, e.g. [FINE()].")
    return list(methods)
