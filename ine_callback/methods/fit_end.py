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

import contextlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from ine_callback.errors import InfluenceError
from ine_callback.methods.packing import packed, unpacked
from ine_callback.methods.passes import PerSamplePass
from ine_callback.queries.bound import QuerySource
from ine_callback.scores import Attribution, QueryInfo, Stage, attribute_name
from ine_callback.utilities.isolation import isolated

if TYPE_CHECKING:
    from ine_callback.methods.context import FitContext
from ine_callback.methods.row_gradients import RowGradients

Need = Literal["queries", "whole_weights", "training_rows"]
Take = Callable[[Tensor, "RowGradients"], None]


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
        data: Data that it reads beside the training rows, as queries name theirs; looked up before training.
    """

    name: str
    at: Sequence[Stage] = ("end",)
    needs: Sequence[Need] = ("queries", "whole_weights", "training_rows")
    data: Sequence[Any] = ()

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

    def check(self, processes: int) -> None:  # noqa: B027  # most methods have nothing to refuse
        """Refuses, before training, settings that cannot work.

        Args:
            processes: How many train together.

        Raises:
            InfluenceError: Naming the setting and the remedy.
        """

    def settings(self) -> dict[str, Any]:
        """The settings as plain types, for the report."""
        return {}


@dataclass(eq=False)
class _Running:
    """A method at work: what it does next, and whether it has returned or failed."""

    method: FitEndMethod
    steps: Steps | None = None
    take: Take = lambda rows, gradients: None
    over: bool = False


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

    def check(
        self,
        queries: Sequence[QueryInfo],
        sharded: bool,
        unreadable: str,
        processes: int = 1,
        source: QuerySource | None = None,
    ) -> None:
        """Refuses before training what a method would lack at its end.

        Args:
            queries: Those with a loss of their own.
            sharded: Whether processes hold parts of the weights.
            unreadable: Why training rows cannot be read by their index; empty where they can.
            processes: How many train together.
            source: Where methods get further data from.

        Raises:
            InfluenceError: Naming the method, what it lacks and the remedy.
        """
        for method in self.methods:
            method.check(processes)
            if source is not None:
                for data in method.data:
                    source.batches(data)
            if "queries" in method.needs and not queries:
                raise InfluenceError(
                    f"{self._owner}: {method.name} has no query: 'self' is f-INE's alone; add 'val' or another one."
                )
            if "whole_weights" in method.needs and sharded:
                raise InfluenceError(
                    f"{self._owner}: {method.name} needs the whole weights in each process; leave it out here, and run "
                    "it on a checkpoint with devices=1."
                )
            if "training_rows" in method.needs and unreadable:
                raise InfluenceError(
                    f"{self._owner}: {method.name} reads training rows by their index, but {unreadable}; leave it "
                    "out, or train on a dataset with __getitem__ and __len__, whose indices row_fn returns if given."
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
        running = [_Running(method) for method in self.due(context.at)]
        with self._guarded(running, context), isolated(context.module):
            for one in running:
                with self._guarded([one], context):
                    self._begin(one, context)
            while going := [one for one in running if one.steps is not None]:
                self._round(going, context)
        self.notes += [note for note in context.notes if note not in self.notes]

    def _begin(self, one: _Running, context: FitContext) -> None:
        found = one.method.run(context)
        if isinstance(found, Generator):
            one.steps = found
        else:
            self._keep(one, found, context)

    def _round(self, going: Sequence[_Running], context: FitContext) -> None:
        """Lets every method go on to its next pass, and makes each different pass once."""
        asked: dict[PerSamplePass, list[_Running]] = {}
        for one in going:
            with self._guarded([one], context):
                if what := self._next(one, context):
                    asked.setdefault(what, []).append(one)
        for what, takers in asked.items():
            with self._guarded(takers, context):
                for rows, gradients in context.per_sample(what):
                    for one in [each for each in takers if each.steps is not None]:
                        with self._guarded([one], context):
                            one.take(rows, gradients)
                    if all(one.steps is None for one in takers):
                        break

    def _next(self, one: _Running, context: FitContext) -> PerSamplePass | None:
        """The pass that a method asks for next; None where it is done."""
        assert one.steps is not None
        try:
            asked: Any = next(one.steps)
        except StopIteration as end:
            self._keep(one, end.value, context)
            return None
        what, take = asked if isinstance(asked, tuple) and len(asked) == 2 else (asked, None)
        if not isinstance(what, PerSamplePass) or not callable(take):
            raise InfluenceError(
                f"run() yielded {asked!r}; yield a PerSamplePass and a function take(rows, gradients)."
            )
        one.take = take
        return what

    def _keep(self, one: _Running, found: Any, context: FitContext) -> None:
        """Takes what a method returned, in place of what it found when training was at this stage before."""
        if not isinstance(found, Attribution):
            raise InfluenceError(f"run() returned {type(found).__name__}; return an Attribution.")
        if context.source.is_indexed and found.rows.max() >= context.rows:
            raise InfluenceError(f"run() scored row {found.rows.max()}; there are rows 0 to {context.rows - 1}.")
        settings = dict(found.settings) or one.method.settings()
        found = replace(found, method=one.method.name, at=context.at, settings=settings)
        self.found = [each for each in self.found if (each.method, each.at) != (found.method, found.at)] + [found]
        one.steps, one.over = None, True

    @contextlib.contextmanager
    def _guarded(self, running: Sequence[_Running], context: FitContext) -> Iterator[None]:
        """A part of methods' work: where it fails they end with a note, for nothing else must be lost to it."""
        try:
            yield
        except KeyboardInterrupt as stopped:
            if isinstance(stopped, Interrupted) and len(running) == 1:
                with self._guarded(running, context):
                    self._keep(running[0], stopped.found, context)
            self._end(running, "was ended by Ctrl-C.")
            if context.at != "end":
                raise KeyboardInterrupt from stopped
        except Exception as error:
            if self._on_error == "raise":
                raise
            self._end(running, f"failed: {type(error).__name__}: {error}")

    def _end(self, running: Sequence[_Running], why: str) -> None:
        """Notes why methods have no scores, of those that are not over."""
        for one in [each for each in running if not each.over]:
            steps, one.steps, one.over = one.steps, None, True
            message = f"{one.method.name} {why}"
            self.notes.append(message)
            warnings.warn(f"{self._owner}: {message} The report holds the rest.", stacklevel=2)
            if steps is not None:
                with contextlib.suppress(Exception):
                    steps.close()

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
        self.found = [unpacked(each) for each in state["found"]]
        self.notes, self._reached = list(state["notes"]), set(state["reached"])


def checked_fit_end(methods: Sequence[FitEndMethod], owner: str) -> list[FitEndMethod]:
    """The methods, each of which must have a name of its own and stages that can be.

    Raises:
        InfluenceError: For two of one name, or an impossible stage.
    """
    for method in methods:
        name: Any = getattr(method, "name", None)
        if not isinstance(name, str) or not name.strip():
            raise InfluenceError(f"{owner}: {type(method).__name__} has no name; set name = 'my method' in the class.")
    names = [attribute_name(method.name) for method in methods]
    twice = [method.name for method, name in zip(methods, names, strict=True) if names.count(name) > 1]
    if twice:
        raise InfluenceError(f"{owner}: {twice} would have one name in the report; give each a name of its own.")
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
