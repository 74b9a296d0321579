"""What a report holds and which rows answer a question: all that its views, files and plots read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ine_callback.applications import label_errors as labels_of
from ine_callback.applications import relabel, weights
from ine_callback.applications.group import GroupScore, NewtonGroup, group_score, newton_group
from ine_callback.applications.layer_plan import LayerPlan
from ine_callback.applications.layer_sensitivity import Aggregate, LayerSensitivity, layer_sensitivity
from ine_callback.report import rows as tables
from ine_callback.report.runinfo import RunInfo
from ine_callback.report.store_questions import StoreQuestions
from ine_callback.report.table import ScoreTable
from ine_callback.report.validate import checked, checked_attributions, no_query
from ine_callback.scores import Attribution, Floats, QueryInfo, Scores
from ine_callback.utilities.validate import row_ids
from ine_callback.utilities.words import NO_QUERY

Rows = NDArray[np.int64]


class Contents(StoreQuestions):
    """Scores of every row on every query, with tests and provenance, ready to ask; see :class:`.InfluenceReport`.

    Args:
        scores: What a method's ``compute()`` returned.
        run: Provenance.
        attributions: Scores by methods that ran on the trained model; of several stages of training in their order.
    """

    def __init__(self, scores: Scores, run: RunInfo | None = None, attributions: Sequence[Attribution] = ()) -> None:
        self.scores = checked(scores)
        self.run = run if run is not None else RunInfo(rows=len(self.scores.observations))
        self.attributions = checked_attributions(attributions)

    def attribution(self, method: str) -> Attribution | None:
        """What a method found on the trained model, at the last stage at which it ran; None where it did not run.

        Example:
            >>> from ine_callback.report import example_report
            >>> from ine_callback.scores import example_attribution
            >>> report = example_report().with_attributions(example_attribution())
            >>> report.attribution("example").scores.shape, report.attribution("other")
            ((5, 1), None)
        """
        return next((each for each in reversed(self.attributions) if each.method == method), None)

    def stages(self, method: str) -> tuple[Attribution, ...]:
        """All attributions by one method, in the order of training.

        Example:
            >>> from ine_callback.report import example_report
            >>> from ine_callback.scores import example_attribution
            >>> [each.at for each in example_report().with_attributions(example_attribution()).stages("example")]
            ['end']
        """
        return tuple(each for each in self.attributions if each.method == method)

    # ---- what there is ----

    @property
    def rows(self) -> int:
        """Number of rows N; their ids are the dataset indices 0 to N - 1."""
        return len(self.scores.observations)

    @property
    def queries(self) -> tuple[str, ...]:
        """Names of the Q queries."""
        return tuple(query.name for query in self.scores.queries)

    @property
    def observations(self) -> NDArray[np.int64]:
        """Optimizer steps that contained each row [N]."""
        return self.scores.observations

    @property
    def unseen(self) -> NDArray[np.int64]:
        """Rows that were never observed, which have no score (not a score of 0)."""
        return np.flatnonzero(self.observations == 0)

    @property
    def recommended_query(self) -> str:
        """The query to look for label errors with: the first ``"self"`` query, else ``"margin"``, else the first.

        Where the run knew the model's predictions, :meth:`label_errors` lists wrong labels and :meth:`suspect_labels`
        ranks rows; of the queries self-influence does it best. Margins answer what helps or hurts the validation set.
        The mean validation loss asks the wrong question for label errors: flipped labels act as label smoothing and
        lower the loss of wrong, over-confident predictions. Numbers: docs/methods/fine.md.
        """
        return labels_of.recommended(self.scores)

    def info(self, query: str | None = None) -> QueryInfo:
        """Kind and question of a query."""
        return self.scores.queries[self.column(query)]

    def column(self, query: str | None = None) -> int:
        """Column of a query in the ``[N, Q]`` arrays of :attr:`scores`.

        Raises:
            KeyError: When there is no such query; the message lists the choices. ValueError: for an estimand.
        """
        if not self.queries:
            raise KeyError(f"InfluenceReport: {NO_QUERY}")
        if query is None:
            return 0
        if query not in self.queries:
            raise no_query(query, self.queries, self.attributions)
        return self.queries.index(query)

    # ---- rows ----

    def top(self, k: int = 10, query: str | None = None) -> ScoreTable:
        """The ``k`` rows with the largest scores, most helpful first (for a ``"self"`` query: the most atypical).

        Fewer when fewer rows have a score; ties in order of row id. Look at the sign and at ``q`` too: the list is
        ``k`` long even when no row helps.
        """
        return tables.extreme(self.scores, k, self.column(query), largest=True)

    def bottom(self, k: int = 10, query: str | None = None) -> ScoreTable:
        """The ``k`` rows with the smallest scores, most harmful first (for a ``"self"`` query: the most typical)."""
        return tables.extreme(self.scores, k, self.column(query), largest=False)

    def flagged(self, q: float = 0.05, query: str | None = None) -> ScoreTable:
        """All rows whose q-value is at most ``q``, largest ``|mu|`` first, both signs.

        Of the rows listed, a fraction of about ``q`` is expected to be there by chance (Benjamini-Hochberg).

        Example:
            >>> from ine_callback.report import example_report
            >>> example_report().flagged(query="self").rows
            array([ 3, 17, 29])
        """
        return tables.flagged(self.scores, q, self.column(query))

    def label_errors(self, q: float = labels_of.RATE) -> labels_of.LabelErrors:
        """Rows whose label is probably wrong, the most probable first, with an estimated false-discovery rate.

        From what the model said against each row's label while it was trained, at no cost. Clean data gives a short
        list or none. The rate is an estimate and no guarantee: for q = 0.1 the true one was .11 to .17 on average where
        the network separates the classes well, and greater where it does not (docs/methods/label-errors.md). Where
        nothing can be told, as in a regression, the list is empty and its ``note`` says why.

        Args:
            q: Greatest false-discovery rate.

        Example:
            >>> from ine_callback.report import example_report
            >>> found = example_report().label_errors()
            >>> len(found), found.note[:42]
            (0, "The run's loss has no one label a row, so ")
        """
        return labels_of.label_errors(self.scores, q, "InfluenceReport.label_errors")

    def drop_list(self, q: float | None = None, query: str | None = None) -> Rows:
        """Rows to look at, and perhaps drop, worst first: wrong labels, or without these what a query's test finds.

        Without ``query`` and where the run knew the model's predictions these are the rows of :meth:`label_errors`;
        else those of :meth:`unlike_batch_mates`.

        Args:
            q: False discovery rate; by default .1 for label errors and .05 for the test.
            query: Name of the query whose test is asked instead.

        Example:
            >>> from ine_callback.report import example_report
            >>> example_report().drop_list(query="val margin")
            array([ 3, 17, 29])
        """
        return self._drop(q, query, "InfluenceReport.drop_list")

    def unlike_batch_mates(self, q: float = labels_of.TESTED_RATE, query: str | None = None) -> Rows:
        """Rows that differ from their batch-mates: those with q-value at most ``q`` at the suspect end, worst first.

        That is no list of errors: hard and rare rows with right labels differ too. On clean data self-influence's test
        lists 1 to 15 % of the rows, more of them the longer the training, since it takes a row's visits as independent.

        The suspect end of a ``"self"`` query is the upper one (the row lowers its own loss more than others do:
        mislabelled or hard), that of any other query the lower one (harmful, ``mu < 0``).

        Args:
            q: False discovery rate of the test "exchangeable with its batch-mates"; a hard but rightly labelled
                row is no false discovery, so look before you drop.
            query: Name of the query; by default :attr:`recommended_query`.

        Example:
            >>> from ine_callback.report import example_report
            >>> example_report().unlike_batch_mates(query="val margin")
            array([ 3, 17, 29])
        """
        return labels_of.suspects(self.scores, q, self._suspect_column(query), "InfluenceReport.unlike_batch_mates")

    def keep_list(self, q: float | None = None, query: str | None = None) -> Rows:
        """The rest of :meth:`drop_list`, in order of row id: rows to train on next time, never observed ones included.

        Example:
            >>> from ine_callback.report import example_report
            >>> keep = example_report().keep_list()  # torch.utils.data.Subset(dataset, keep)
            >>> len(keep), bool(set(keep) & {3, 17, 29})
            (57, False)
        """
        return np.setdiff1d(np.arange(self.rows), self._drop(q, query, "InfluenceReport.keep_list"))

    def _drop(self, q: float | None, query: str | None, who: str) -> Rows:
        if query is None and labels_of.knows_labels(self.scores):
            return labels_of.label_errors(self.scores, labels_of.RATE if q is None else q, who).rows
        rate = labels_of.TESTED_RATE if q is None else q
        return labels_of.suspects(self.scores, rate, self._suspect_column(query), who)

    def suspect_labels(self, k: int | None = None) -> NDArray[np.int64]:
        """Rows whose label to check, most suspicious first: by the model's margin against their label.

        The margin, squashed by tanh and averaged over the row's visits, the early ones less (``suspicion`` in
        :mod:`ine_callback.applications.label_errors`); where the run knew no margins, the mean loss. Both cost nothing,
        and rank wrong labels better than influence scores do (``python -m benchmarks.label_errors``). Neither has a
        test: where to stop reading says :meth:`label_errors`.

        Args:
            k: Greatest number of rows; by default all observed ones.

        Raises:
            ValueError: If the losses of single rows were not known in the run.

        Example:
            >>> from ine_callback.report import example_report
            >>> example_report().suspect_labels(3)
            array([ 3, 29, 17])
        """
        return labels_of.by_suspicion(self.scores, k)

    def suggest_labels(
        self,
        labels: ArrayLike,
        probabilities: ArrayLike | None = None,
        rows: Iterable[int] | NDArray[Any] | None = None,
    ) -> relabel.LabelSuggestions:
        """Which label each suspected row may really have, with the probability that it is right.

        With *out-of-fold* probabilities, of models that were not trained on the row, the confidence is honest: on
        digits with random flips it adds up to nearly the number of right proposals (docs/howto/label-cleaning.md). With
        those of a model that was trained on the row itself it is not: such a model has learnt the wrong label too, so
        the noise found is near 0, and so are all confidences; the order of the other classes is still good.

        Without probabilities the report proposes, from the queries of ``Query.per_class``: the class that the row harms
        most. That is right about as often where the label is wrong, but says nothing about whether it is.

        Args:
            labels: The label that each row was trained with [N], 0 ... C - 1.
            probabilities: Class probabilities of all rows, out-of-fold [N, C].
            rows: Rows to propose labels for; by default :meth:`drop_list`. Without probabilities those without any
                score are left out.

        Raises:
            ValueError: On arrays of other shapes, labels that are no classes, what are no probabilities, or where there
                are neither probabilities nor queries of classes.

        Example:
            >>> from ine_callback.report import example_report
            >>> labels = np.repeat([0, 1, 0, 1], [30, 10, 12, 8])
            >>> one = np.where(labels == 1, 0.99, 0.01)  # probability of class 1
            >>> one[[3, 17, 29]] = 0.99  # in contradiction to the labels
            >>> one[40:] = 0.4  # no class is likely for these rows
            >>> found = example_report().suggest_labels(labels, np.stack([1 - one, one], axis=1))
            >>> found.rows, found.proposed, found.confidence.round(2), round(found.noise, 2)
            (array([ 3, 17, 29]), array([1, 1, 1]), array([0.94, 0.94, 0.94]), 0.07)
        """
        chosen = self.drop_list() if rows is None else row_ids(rows, self.rows, relabel.WHO)
        return relabel.suggest_labels(self.scores, labels, probabilities, chosen)

    def weights(self, q: float | None = None, query: str | None = None, strength: float = 0.0) -> Floats:
        """Weight of each row in the next training [N], for :class:`~ine_callback.InfluenceSampler` or a weighted loss.

        By default 0 for the rows of ``drop_list(q, query)`` and 1 for all others. With a ``strength`` every score
        counts and none is tested: ``1 + strength * z``, cut to 0 ... 2, where z is the score in units of its root mean
        square over the rows, positive at the end that is not the suspect one. Rows that were never observed weigh 1.

        Args:
            q: False discovery rate of the list.
            query: Name of the query; by default that of the list.
            strength: How much a score of usual size (root mean square) changes a weight; 0: the list alone.

        Raises:
            ValueError: On a strength that is no number of at least 0.

        Example:
            >>> from ine_callback.report import example_report
            >>> example_report().weights()[:5]
            array([1., 1., 1., 0., 1.])
            >>> example_report().weights(query="val margin", strength=0.5)[5:10].round(2)
            array([2.  , 1.03, 0.82, 1.09, 1.28])
        """
        column = self._suspect_column(query)
        drop = self.drop_list(q, query) if strength == 0.0 else np.empty(0, dtype=np.int64)
        return weights.weights(self.scores, drop, column, strength)

    def row(self, row: int) -> ScoreTable:
        """One row on every query; a row that was never observed has NaN and says so.

        Example:
            >>> from ine_callback.report import example_report
            >>> example_report().row(59).note
            'row 59 was never observed: it has no score, which is not a score of 0'
        """
        return tables.on_every_query(self.scores, row)

    def group(self, rows: Iterable[int] | NDArray[Any], query: str | None = None) -> GroupScore:
        """The score of a set of rows: scores are additive, ``mu_S = sum of mu_i``.

        Args:
            rows: Dataset indices, each once, all observed.
            query: Name of the query.

        Raises:
            ValueError: On an empty set, duplicates, non-integers, or rows without a score.
            KeyError: On rows that do not exist.

        Example:
            >>> from ine_callback.report import example_report
            >>> group = example_report().group([3, 17, 29], query="val margin")
            >>> group.size, group.mu < 0, group.p < 1e-6
            (3, True, True)
        """
        return group_score(self.scores, rows, self.column(query))

    def newton_group(self, rows: Iterable[int] | NDArray[Any], query: str | None = None) -> NewtonGroup:
        """The Newton step of leaving a set of rows out, where :class:`~ine_callback.IF` was given it in ``groups``.

        Raises:
            ValueError: If no method was given these rows.
            KeyError: When there is no such query.
        """
        return newton_group(self.attributions, rows, query)

    # ---- blocks of the network ----

    def layers(
        self,
        method: str | None = None,
        query: str | None = None,
        blocks: str | None = None,
        aggregate: Aggregate = "positive",
    ) -> LayerSensitivity:
        """How sensitive each block of the network is: the rows' help through it, summed over the rows.

        Formula and source: :mod:`ine_callback.applications.layer_sensitivity`.

        Args:
            method: Name of the method; by default the first that kept scores by layer.
            query: Name of one query; by default all.
            blocks: Regular expression with one group, the block's name, searched in each layer's name. By default the
                repeated ``prefix.<number>.``, without biases and norm layers.
            aggregate: ``"positive"``: scores above 0; ``"top25"``: the largest quarter of these; ``"all"``: all scores.

        Raises:
            ValueError: Without scores by layer, without two blocks, or where scores are not finite.

        Example:
            >>> from ine_callback.report import example_report
            >>> from ine_callback.scores import LayerScores, example_attribution
            >>> from dataclasses import replace
            >>> scores = np.arange(10.0).reshape(5, 2, 1)
            >>> found = replace(example_attribution(), layers=LayerScores(("B.0.weight", "B.1.weight"), scores))
            >>> example_report().with_attributions(found).layers().of("val")
            array([20., 25.])
        """
        with_layers = [each.method for each in self.attributions if each.layers is not None]
        found = self.attribution(with_layers[0] if method is None and with_layers else method or "")
        if found is None:
            raise ValueError(
                f"InfluenceReport.layers: no scores by layer {f'by {method!r}' if method else 'of any method'}; train "
                f"with a method that keeps them, such as IF(per_layer=True). Methods here: {with_layers}"
            )
        return layer_sensitivity(found, query, blocks, aggregate)

    def layer_plan(
        self,
        method: str | None = None,
        query: str | None = None,
        blocks: str | None = None,
        aggregate: Aggregate = "positive",
    ) -> LayerPlan:
        """Plans by sensitivity: ``.experts(total)`` for each block, ``.sparsity(budget)``; arguments: :meth:`layers`.

        Args:
            method: Name of the method.
            query: Name of the query; by default the method's first.
            blocks: Regular expression of the blocks.
            aggregate: Which rows' scores are summed.
        """
        found = self.layers(method, query, blocks, aggregate)
        return LayerPlan(found.blocks, found.of(query))

    def _suspect_column(self, query: str | None) -> int:
        return self.column(self.recommended_query if query is None else query)
