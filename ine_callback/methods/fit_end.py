"""Methods that run on a trained model: at train end, or after chosen epochs, beside f-INE or alone.

A method gets a :class:`~ine_callback.methods.context.FitContext` and returns an
:class:`~ine_callback.scores.Attribution`, which the report stores and shows whoever made it. All that is needed for a
method of your own:

    class GradientNorm(FitEndMethod):
        name = "gradient norm"

        def run(self, context):
            norms = torch.zeros(context.rows, 1)

            def take(rows, gradients):
                norms[rows, 0] = gradients.squared_norms().sqrt().cpu()

            yield PerSamplePass(), take  # one pass over the training rows, shared by all methods that ask for the same
            return Attribution(self.name, numpy.arange(context.rows), context.infos, norms.numpy())
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ine_callback.errors import InfluenceError
from ine_callback.scores import Attribution, Check, LayerScores, QueryInfo, Stage, TokenScores

if TYPE_CHECKING:
    from ine_callback.methods.context import FitContext, RowGradients

Need = Literal["queries", "whole_weights", "training_rows"]
Labels = Literal["true", "sampled", "expected"]
Take = Callable[[Tensor, "RowGradients"], None]


@dataclass(frozen=True)
class PerSamplePass:
    """One pass over training rows that hands out every row's gradient. Equal ones are made once for all who ask.

    Args:
        labels: ``"true"``: gradients of the rows' own losses. ``"sampled"``: of losses whose labels are drawn from the
            model's prediction. ``"expected"``: every row comes once for each class c, its gradient times the square
            root of the predicted probability, so that the squares' sum is the expectation over labels.
        rows: Dataset indices; None: all.
    """

    labels: Labels = "true"
    rows: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.labels not in get_args(Labels):
            raise InfluenceError(f"PerSamplePass: labels={self.labels!r} is none of {', '.join(get_args(Labels))}.")


Steps = Generator[tuple[PerSamplePass, Take], None, Attribution]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C ended a method early; what it has found so far comes along.

    Args:
        found: The scores so far, with a note.
    """

    def __init__(self, found: Attribution) -> None:
        super().__init__()
        self.found = found


class FitEndMethod(ABC):
    """A way to score rows from trained weights.

    Attributes:
        name: Names the method in the report; unique among a fit's methods.
        at: When it runs: after so many finished epochs, or at the ``"end"`` of training.
        needs: What must be there, checked before training starts: ``"queries"`` with a loss of their own (``"self"`` is
            none), ``"whole_weights"`` in each process, ``"training_rows"`` that can be read by their index.
    """

    name: str
    at: Sequence[Stage] = ("end",)
    needs: Sequence[Need] = ("queries", "whole_weights", "training_rows")

    @abstractmethod
    def run(self, context: FitContext) -> Attribution | Steps:
        """Scores rows from the present weights, leaving no trace in the module.

        A plain function returns the scores. One that yields pairs of a :class:`PerSamplePass` and a function
        ``take(rows, gradients)`` gets the pass made, together with other methods that ask for an equal one, and goes on
        when it is over.

        Raises:
            InfluenceError: Or anything else: the report then says what, and nothing else is lost.
            Interrupted: Where Ctrl-C ended it early.
        """

    def settings(self) -> dict[str, Any]:
        """The settings as plain types, for the report."""
        return {}


class FitEndMethods:
    """Runs a fit's methods when their time has come, and keeps what they found.

    Args:
        methods: Any number.
        owner: Class named in messages.
        on_error: ``"raise"`` is for tests; else a method that fails is named in the notes.

    Attributes:
        found: What the methods returned, in the order in which they ran.
        notes: Sentences for the report.
    """

    def __init__(self, methods: Sequence[FitEndMethod], owner: str, on_error: str = "warn") -> None:
        self.methods, self._owner, self._on_error = list(methods), owner, on_error
        self.found: list[Attribution] = []
        self.notes: list[str] = []
        self._reached: set[Stage] = set()

    def check(self, queries: Sequence[QueryInfo], sharded: bool, training_rows: bool) -> None:
        """Refuses before training what a method would lack at its end.

        Raises:
            InfluenceError: Naming the method, what it lacks and the remedy.
        """
        for method in self.methods:
            if "queries" in method.needs and not queries:
                raise InfluenceError(
                    f"{self._owner}: {method.name} has no query: 'self' is f-INE's alone; add 'val' or another one."
                )
            if "whole_weights" in method.needs and sharded:
                raise InfluenceError(
                    f"{self._owner}: {method.name} needs the whole weights in each process; leave it out here, and run "
                    "it on a checkpoint with devices=1."
                )
            if "training_rows" in method.needs and not training_rows:
                raise InfluenceError(
                    f"{self._owner}: {method.name} reads training rows by their index, which this training set does "
                    "not have; leave it out, or train on a dataset with __getitem__ and __len__."
                )

    def due(self, at: Stage) -> list[FitEndMethod]:
        """The methods that run at a stage."""
        return [method for method in self.methods if at in method.at]

    def run(self, context: FitContext) -> None:
        """Runs the methods that are due at the context's stage.

        Raises:
            KeyboardInterrupt: Again, where Ctrl-C ended a method in the middle of training: it is meant for both.
        """
        self._reached.add(context.at)
        waiting: dict[FitEndMethod, Steps] = {}
        for method in self.due(context.at):
            steps = self._guarded(method, lambda method=method: method.run(context), context.at)  # type: ignore[misc]
            if isinstance(steps, Generator):
                waiting[method] = steps
            elif steps is not None:
                self._keep(method, steps, context.at)
        while waiting:
            waiting = self._round(waiting, context)

    def _round(self, waiting: Mapping[FitEndMethod, Steps], context: FitContext) -> dict[FitEndMethod, Steps]:
        """Lets every method go on to its next pass, makes each different pass once; returns those that go on."""
        asked: dict[PerSamplePass, dict[FitEndMethod, Take]] = {}
        for method, steps in waiting.items():
            request = self._guarded(method, lambda steps=steps: self._next(steps), context.at)  # type: ignore[misc]
            if isinstance(request, tuple):
                asked.setdefault(request[0], {})[method] = request[1]
            elif request is not None:
                self._keep(method, request, context.at)
        going: dict[FitEndMethod, Steps] = {}
        for what, takers in asked.items():
            going |= {method: waiting[method] for method in self._pass(what, takers, context)}
        return going

    @staticmethod
    def _next(steps: Steps) -> tuple[PerSamplePass, Take] | Attribution:
        try:
            return next(steps)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]

    def _pass(self, what: PerSamplePass, takers: dict[FitEndMethod, Take], context: FitContext) -> list[FitEndMethod]:
        """Makes one pass for all who asked for it; returns those whose function took every batch."""
        left = dict(takers)

        def all_of_them() -> bool:
            for rows, gradients in context.per_sample(what):
                for method, take in list(left.items()):
                    if not self._guarded(method, lambda take=take: take(rows, gradients) or True, context.at):  # type: ignore[misc]  # noqa: B023
                        del left[method]
                if not left:
                    break
            return True

        first = next(iter(takers))
        done = self._guarded(first, all_of_them, context.at, whose=list(takers))
        return list(left) if done else []

    def _guarded(
        self, method: FitEndMethod, function: Callable[[], Any], at: Stage, whose: Sequence[FitEndMethod] = ()
    ) -> Any:
        """What a part of a method returns; None and a note where it failed, for nothing else must be lost to it."""
        try:
            return function()
        except Interrupted as stopped:
            self._keep(method, stopped.found, at)
            if at != "end":
                raise KeyboardInterrupt from stopped
        except Exception as error:
            if self._on_error == "raise":
                raise
            for each in whose or [method]:
                message = f"{each.name} failed: {type(error).__name__}: {error}"
                self.notes.append(message)
                warnings.warn(f"{self._owner}: {message} The report holds the rest.", stacklevel=2)
        return None

    def _keep(self, method: FitEndMethod, found: Any, at: Stage) -> None:
        if not isinstance(found, Attribution):
            kind = type(found).__name__
            self.notes.append(f"{method.name} failed: run() returned a {kind}; return an Attribution")
            warnings.warn(f"{self._owner}: {self.notes[-1]}. The report holds the rest.", stacklevel=2)
            return
        settings = dict(found.settings) or method.settings()
        self.found.append(replace(found, method=method.name, at=at, settings=settings))

    def missed(self) -> list[str]:
        """Notes on the stages that training never reached."""
        notes = []
        for method in self.methods:
            missed = [at for at in method.at if at not in self._reached and at != "end"]
            if missed:
                notes.append(f"{method.name}: training ended before epochs {missed} of at={list(method.at)}")
        return notes

    def state_dict(self) -> dict[str, Any]:
        """The scores so far as tensors and plain types."""
        return {
            "reached": list(self._reached),
            "found": [packed(each) for each in self.found],
            "notes": list(self.notes),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        self.found = [_unpacked(each) for each in state["found"]]
        self.notes, self._reached = list(state["notes"]), set(state["reached"])


_PARTS = {"layers": LayerScores, "tokens": TokenScores}


def packed(found: Attribution) -> dict[str, Any]:
    """An attribution as tensors and plain types, which load under ``weights_only=True``."""
    state: dict[str, Any] = {}
    for name, value in vars(found).items():
        if name == "queries":
            value = [vars(query) for query in value]
        elif name == "checks":
            value = [vars(check) for check in value]
        elif name in _PARTS and value is not None:
            value = {key: _tensor(part) for key, part in vars(value).items()}
        elif name in ("columns", "arrays"):
            value = {key: _tensor(part) for key, part in value.items()}
        state[name] = _tensor(value)
    return state


def _tensor(value: Any) -> Any:
    return torch.from_numpy(np.ascontiguousarray(value)) if isinstance(value, np.ndarray) else value


def _array(value: Any) -> Any:
    return value.numpy() if isinstance(value, Tensor) else value


def _unpacked(state: dict[str, Any]) -> Attribution:
    fields = {name: _array(value) for name, value in state.items()}
    fields["queries"] = tuple(QueryInfo(**query) for query in state["queries"])
    fields["checks"] = tuple(Check(**check) for check in state["checks"])
    for name, kind in _PARTS.items():
        if fields[name] is not None:
            fields[name] = kind(**{key: _array(part) for key, part in fields[name].items()})
    for name in ("columns", "arrays"):
        fields[name] = {key: _array(part) for key, part in fields[name].items()}
    return Attribution(**fields)


def checked_fit_end(methods: Sequence[FitEndMethod], owner: str) -> list[FitEndMethod]:
    """The methods, each of which must have a name of its own and stages that can be.

    Raises:
        InfluenceError: For two of one name, or an impossible stage.
    """
    names = [method.name for method in methods]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InfluenceError(f"{owner}: two methods are called {twice}; give each a name of its own.")
    for method in methods:
        check_stages(method.name, method.at)
    return list(methods)


def check_stages(owner: str, at: Any) -> None:
    """Checks when a method is to run.

    Raises:
        InfluenceError: If ``at`` is no list of different stages.
    """
    stages = at if isinstance(at, Sequence) and not isinstance(at, str) else []
    valid = [s == "end" or (isinstance(s, int) and not isinstance(s, bool) and s > 0) for s in stages]
    if not stages or not all(valid) or len(set(stages)) < len(stages):
        raise InfluenceError(
            f"{owner}: at={at!r} must list different numbers of finished epochs or 'end', such as [2, 5, 'end']."
        )
