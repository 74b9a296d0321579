"""AirRep (arXiv 2505.18513): learns from trainings on subsets which rows help; a score is a dot product."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset

from ine_callback.errors import InfluenceError
from ine_callback.methods.airrep import collect as collecting
from ine_callback.methods.airrep.collect import EXTRA, Collected, Train
from ine_callback.methods.airrep.encoder import FeatureEncoder, embed, reader, with_features_kept
from ine_callback.methods.airrep.evaluate import Evaluation, intervals, lds, noise_ceiling
from ine_callback.methods.airrep.ranking import pooled, targets
from ine_callback.methods.airrep.settings import NAME, AirRepSettings, Pooling
from ine_callback.methods.airrep.split import Split, split
from ine_callback.methods.airrep.training import score, train
from ine_callback.methods.airrep.views import attribution, report_of
from ine_callback.report import InfluenceReport
from ine_callback.report.files import find, replacing
from ine_callback.scores import Floats
from ine_callback.utilities.optional import need
from ine_callback.utilities.options import check_count
from ine_callback.utilities.validate import row_ids

FACTS, WEIGHTS = "airrep-fit.json", "airrep-fit.safetensors"
EMBEDDINGS, COUNTS = "airrep.embeddings", "airrep.counts"  # beside the encoder's own tensors


class AirRep:
    """A representation of rows whose inner products predict what training on a subset does to a query.

    An offline step: :meth:`collect` trains the model on some hundred random subsets and notes the losses of the dev
    rows, :meth:`fit` trains an encoder to rank subsets as these losses do. Then any row is scored for any query, new
    ones too, by one dot product. Sign: a score above 0 means that training on the row lowers the query's loss (it
    helps). Scores of one query can be compared, those of different queries cannot.

    Args:
        encoder: Maps a batch to [b, d]; its parameters are trained, in place. :class:`FeatureEncoder` makes one of
            features that there are. It is never normalised.
        subsets: Subsets of the training rows on which the model is trained anew.
        size: Rows of a subset: a number, or below 1 a fraction of all rows.
        dev: Rows, held out of all trainings, whose losses are learned from: a map-style dataset whose items are like
            those of the training rows. A quarter of them judges. :meth:`collect` needs it.
        pooling: ``"attention"``, or ``"mean"``, by which scores of groups are means of their rows' scores.
        steps: Optimizer steps of the encoder.
        seeds: Trainings of each subset; from 2 on the noise ceiling is measured.
        held_out: Fraction of the subsets, and of the dev rows, that judge.
        learning_rate: Of the encoder.
        rows_at_once: Rows that the encoder sees at once with gradients; changes memory, not the result.
        seed: Of everything that is drawn.

    Raises:
        InfluenceError: For invalid settings.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from torch.utils.data import TensorDataset
        >>> _ = torch.manual_seed(0)
        >>> x, dev = torch.randn(100, 3), torch.randn(40, 3)
        >>> def train(rows, seed):  # stands for a training: the loss falls with the rows' mean product with the dev row
        ...     return -(dev @ x[rows].mean(0))
        >>> airrep = AirRep(FeatureEncoder(lambda batch: batch[0], [x]), 100, 10, TensorDataset(dev), "mean", 200)
        >>> with TemporaryDirectory() as folder:
        ...     found = airrep.collect(train, TensorDataset(x), folder, progress=False).fit(progress=False)
        >>> found.usable, airrep.scores(TensorDataset(dev[:2])).attribution("AirRep").scores.shape
        (True, (100, 2))
    """

    def __init__(
        self,
        encoder: nn.Module,
        subsets: int = 300,
        size: float = 0.06,
        dev: Dataset[Any] | None = None,
        pooling: Pooling = "attention",
        steps: int = 400,
        *,
        seeds: int = 1,
        held_out: float = 0.25,
        learning_rate: float = 1e-3,
        rows_at_once: int = 4096,
        seed: int = 0,
    ) -> None:
        self.settings = AirRepSettings(
            subsets, size, pooling, steps, seeds, held_out, learning_rate, rows_at_once, seed
        )
        if not isinstance(encoder, nn.Module) or not any(p.requires_grad for p in encoder.parameters()):
            raise InfluenceError(
                f"{NAME}: the encoder {type(encoder).__name__} has nothing to train; pass a module with parameters "
                "that need gradients, or FeatureEncoder(function, sample) for a function of a batch."
            )
        self.encoder, self.dev = encoder.eval(), dev  # both passes of the gradient cache must agree
        self.dataset: Dataset[Any] | None = None
        self.collected: Collected | None = None
        self.evaluation: Evaluation | None = None
        self.losses: list[float] = []  # of the encoder's steps
        self._embeddings, self._counts = torch.empty(0), np.zeros(0, np.int64)

    def collect(
        self, train: Train, dataset: Dataset[Any], folder: str | Path, at_once: int = 1, progress: bool = True
    ) -> AirRep:
        """Trains the model on each subset, or reads from ``folder`` what was trained before.

        One file a subset, written whole or not at all: a collection that was killed goes on where it ended.

        Args:
            train: ``(rows [n], seed) -> losses of the dev rows [D]``, from a fresh start; :func:`retraining` makes one
                of a LightningModule and a Trainer.
            dataset: The training rows, map-style.
            folder: Where the files go.
            at_once: With k > 1 ``train`` gets the rows of up to k subsets [k, n] and returns [k, D], such as by
                ``torch.func.vmap``.
            progress: Whether a bar is shown.

        Raises:
            InfluenceError: If there is no dev set or too small a one, if it shares rows with ``dataset``, if the folder
                is of other settings, or if a loss is not finite.
            ImportError: Without the package safetensors.
        """
        check_count(f"{NAME}.collect", "at_once", at_once)
        if self.dev is None:
            raise InfluenceError(f"{NAME}.collect: there are no dev rows; pass AirRep(encoder, dev=dataset).")
        total, dev = len(dataset), len(self.dev)  # type: ignore[arg-type]
        if dev < 8:
            raise InfluenceError(f"{NAME}.collect: {dev} dev rows are too few; give at least 8, better some hundred.")
        self.settings.rows_of(total)
        collecting.refuse_shared(dataset, self.dev)
        for some in (dataset, self.dev):  # an encoder that cannot read rows fails now, not after the trainings
            embed(self.encoder, reader(some, self.encoder), torch.arange(2))
        self.collected = collecting.collect(train, total, dev, Path(folder), self.settings, at_once, progress)
        self.dataset = dataset
        self._counts = np.bincount(self.collected.rows.ravel(), minlength=total) * self.settings.seeds
        return self

    def fit(self, progress: bool = True) -> Evaluation:
        """Trains the encoder, and judges it on dev rows and subsets that it has not seen.

        Args:
            progress: Whether a bar is shown.

        Returns:
            The evaluation, which every report repeats.

        Raises:
            InfluenceError: If nothing was collected, the encoder was fitted before, or losses say nothing.
        """
        if self.collected is None or self.dataset is None or self.dev is None:
            raise InfluenceError(f"{NAME}.fit: nothing was collected; call collect(train, dataset, folder) before.")
        if self.evaluation is not None:
            raise InfluenceError(f"{NAME}.fit: the encoder is trained already; make a new AirRep with a fresh one.")
        losses = torch.from_numpy(self.collected.losses.mean(1).T)  # [D, M]
        parts = split(losses.numpy(), self.settings)
        total, dev = len(self.dataset), len(self.dev)  # type: ignore[arg-type]
        reads = [(reader(self.dev, self.encoder), dev), (reader(self.dataset, self.encoder), total)]
        trained, (read_dev, read_rows) = with_features_kept(self.encoder, reads)
        subsets = torch.from_numpy(self.collected.rows)
        held = (parts.held_queries, subsets[parts.held_subsets], self.settings.pooling)
        before = score(trained, read_dev, read_rows, *held)
        helpful = targets(losses[parts.queries][:, parts.subsets])
        self.losses = train(
            trained, read_dev, read_rows, parts.queries, subsets[parts.subsets], helpful, self.settings, progress
        )
        after = score(trained, read_dev, read_rows, *held)
        raw = score(nn.Identity(), read_dev, read_rows, *held) if isinstance(self.encoder, FeatureEncoder) else None
        self._embeddings = embed(trained, read_rows, torch.arange(total)).cpu()
        self.evaluation = self._evaluated(parts, losses, before, after, raw)
        return self.evaluation

    def scores(self, queries: Dataset[Any], names: Sequence[str] | None = None) -> InfluenceReport:
        """Scores of all training rows for each row of ``queries``, as a report; above 0: helpful.

        The report has no score by f-INE. ``report.attribution("AirRep")`` has the scores, and can be added to the
        report of a run by ``with_attributions``.

        Args:
            queries: Rows like the dev rows.
            names: A name for each; by default their numbers.

        Raises:
            InfluenceError: If the encoder was not fitted, or names do not belong.
        """
        embeddings, evaluation = self._fitted("scores")
        found = self._embed(queries)
        names = [f"query {k}" for k in range(len(found))] if names is None else list(names)
        if len(names) != len(found):
            raise InfluenceError(f"{NAME}.scores: {len(names)} names for {len(found)} queries; give one for each.")
        values = (embeddings.double() @ found.double().T).numpy()
        return report_of(attribution(values, names, evaluation, self.settings), self._counts, self.settings)

    def group(self, rows: Iterable[int] | NDArray[Any], queries: Dataset[Any]) -> Floats:
        """Predicted helpfulness [Q] of training on these rows together, for each row of ``queries``.

        Not the sum of the rows' scores: the pooling that the encoder was trained with. It tells groups of one size
        apart for one query; its unit means nothing.

        Raises:
            InfluenceError: If the encoder was not fitted.
            KeyError: If there is no such row.
        """
        embeddings, _ = self._fitted("group")
        ids = row_ids(rows, len(embeddings), f"{NAME}.group")
        size = self.settings.rows_of(len(embeddings))
        if not size / 2 <= len(ids) <= 2 * size:
            warnings.warn(
                f"{NAME}.group: {len(ids)} rows, and the encoder was trained on subsets of {size}; for other sizes the "
                "score is not calibrated. Collect with size near that of your groups.",
                stacklevel=2,
            )
        found = pooled(self._embed(queries), embeddings[torch.from_numpy(ids)][None], self.settings.pooling)
        return np.asarray(found[:, 0].numpy(), dtype=np.float64)

    def save(self, folder: str | Path) -> Path:
        """Writes the encoder's weights, the training rows' embeddings and the evaluation; read by :meth:`load`.

        Raises:
            InfluenceError: If the encoder was not fitted.
        """
        embeddings, evaluation = self._fitted("save")
        files = need("safetensors.torch", f"{NAME}.save", EXTRA)
        tensors = {name: t.detach().cpu().clone().contiguous() for name, t in self.encoder.state_dict().items()}
        tensors |= {EMBEDDINGS: embeddings, COUNTS: torch.from_numpy(self._counts)}
        facts = {"settings": asdict(self.settings), "evaluation": asdict(evaluation)}
        with replacing(Path(folder), (WEIGHTS, FACTS)) as aside:
            (aside / WEIGHTS).write_bytes(files.save(tensors))
            (aside / FACTS).write_text(json.dumps(facts, indent=1))
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path, encoder: nn.Module) -> AirRep:
        """Reads what :meth:`save` wrote; nothing is executed.

        Args:
            folder: Where it is.
            encoder: A module built like the one that was trained; gets its weights.

        Raises:
            InfluenceError: If the files are damaged, or of another encoder.
            OSError: If there are none.
        """
        files = need("safetensors.torch", f"{NAME}.load", EXTRA)
        raw, text = ((find(Path(folder), name) or Path(folder, name)).read_bytes() for name in (WEIGHTS, FACTS))
        try:
            tensors, facts = files.load(raw), json.loads(text)
            found = cls(encoder, **facts["settings"])
            told = facts["evaluation"]
            told |= {name: tuple(told[name]) for name in ("interval", "gain_interval")}
            found.evaluation = Evaluation(**told)
            found._embeddings, found._counts = tensors.pop(EMBEDDINGS), tensors.pop(COUNTS).numpy()
            encoder.load_state_dict(tensors)
        except InfluenceError:
            raise
        except Exception as error:  # safetensors, json and torch each have errors of their own
            raise InfluenceError(f"{NAME}.load: {folder} holds no fit of this encoder: {error}") from None
        return found

    def _evaluated(self, parts: Split, losses: Tensor, before: Tensor, after: Tensor, raw: Tensor | None) -> Evaluation:
        assert self.collected is not None
        truth = -losses[parts.held_queries][:, parts.held_subsets].numpy()
        untrained, trained = (np.asarray(each.cpu().double().numpy()) for each in (before, after))
        interval, gain = intervals(trained, untrained, truth, self.settings.seed)
        held = self.collected.losses[parts.held_subsets.numpy()][:, :, parts.held_queries.numpy()]
        return Evaluation(
            lds(trained, truth),
            interval,
            lds(untrained, truth),
            gain,
            float("nan") if raw is None else lds(raw.cpu().double().numpy(), truth),
            noise_ceiling(held),
            len(parts.held_queries),
            len(parts.held_subsets),
            parts.dropped,
        )

    def _embed(self, queries: Dataset[Any]) -> Tensor:
        return embed(self.encoder, reader(queries, self.encoder), torch.arange(len(queries))).cpu()  # type: ignore[arg-type]

    def _fitted(self, what: str) -> tuple[Tensor, Evaluation]:
        if self.evaluation is None:
            raise InfluenceError(f"{NAME}.{what}: the encoder is not trained yet; call collect(...) and fit() before.")
        return self._embeddings, self.evaluation
