"""The gradient store of one recording: from before the first step to what the report holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ine_callback.capture import Block
from ine_callback.curvature.gradient_sample import GradientSample
from ine_callback.curvature.kfac import KFAC
from ine_callback.distributed.processes import Lockstep
from ine_callback.errors import InfluenceError
from ine_callback.methods.context import FitContext
from ine_callback.recording.snapshots import Snapshot
from ine_callback.recording.store.closing import CompressedCurvature, compressed_queries, compressed_rows
from ine_callback.recording.store.pack import allocate
from ine_callback.recording.store.reduce import (
    RIDGE,
    SAMPLE_BYTES,
    SAMPLE_ROWS,
    Combined,
    Spread,
    components,
    mean_squares,
    numbers_of,
    worths,
)
from ine_callback.recording.store.settings import GradientStore
from ine_callback.recording.store.vectors import RowVectors
from ine_callback.report.bands import Band
from ine_callback.report.stored_vectors import Calibration, StoredBlock, StoredVectors, halves, moments
from ine_callback.scores import Floats, Scores
from ine_callback.scoring.compression import Compression
from ine_callback.stats.ranks import spearman
from ine_callback.utilities.tracking import Track, untracked

NO_STORE = "no gradient store, though one was asked for: {}"  # in the report's notes

_T = TypeVar("_T")


@dataclass
class Passed:
    """What the closing passes gave.

    Attributes:
        sums: Rows' vectors [n, W], each pass's divided by what it spreads a query by; None: there was no pass.
        queries: The run's queries' entries [Q, W], summed over the weights they will be evaluated at.
        weights: Parameters along the run, without the final ones.
        times: How many weights the queries were evaluated at.
        passes: How many passes there were.
    """

    sums: Tensor | None = None
    queries: Tensor | None = None
    weights: list[dict[str, Tensor]] = field(default_factory=list)
    times: int = 0
    passes: int = 0


class StoreRecording:
    """The store of one recording.

    Args:
        settings: Of the store.
        rows: Number of rows; None: unknown.
        device: Of the model.
        processes: Those that train together.
        random: Whether initial weights are random; from fixed ones the closing pass alone makes the store, if there is
            one, with more entries than each step could have.

    Attributes:
        compression: Compresses contributions during the run.
        vectors: The rows' vectors.
        made: The store as it will be on disk, once training is over.
    """

    def __init__(
        self, settings: GradientStore, rows: int | None, device: torch.device, processes: Lockstep, random: bool = True
    ) -> None:
        self.settings, self._device, self._processes, self._random = settings, device, processes, random
        most = self._entries(rows)
        self.compression = Compression(most if random else min(most, settings.fewest_entries), device)
        self.compression.alone = processes.count == 1
        self._of_pass: Compression | None = None  # from fixed weights
        self.vectors = RowVectors(settings, self.compression, device, rows, processes.rank, processes.count)
        self._passed, self._closed, self._known = Passed(), False, rows or 0
        self.made: StoredVectors | None = None
        self._progress: Track = untracked

    def run(self, function: Callable[..., _T], *args: Any) -> _T | None:
        """Calls a part of the store; what fails costs the store alone (:meth:`.Compression.run`)."""
        return self.compression.run(function, *args)

    @property
    def failure(self) -> str:
        """Why there is no store; empty: there is one."""
        return self.compression.failure

    def fail(self, error: Exception) -> None:
        """Gives the store up."""
        self.compression.fail(error)

    def _entries(self, rows: int | None) -> int:
        return self.settings.entries(None if rows is None else -(-rows // self._processes.count), self._random)

    @property
    def final(self) -> Compression:
        """The entries of the store at the end."""
        return self._of_pass or self.compression

    def close(self, kfac: KFAC) -> None:
        """Before the closing pass: entries are those of the run's curvature."""
        if not self._closed and self.compression.bases:
            if self._random and self._known:
                self.compression.dimensions = self._entries(self._known)
            self.compression.rebase(kfac)
            self._closed = True

    def take_pass(
        self,
        context: FitContext,
        kfac: KFAC,
        sample: GradientSample,
        run: KFAC,
        rates: Mapping[Block, Tensor],
        decays: Mapping[Block, Tensor],
    ) -> None:
        """Takes what the closing pass finds at the module's present weights.

        Args:
            context: The model with its rows.
            kfac: Kronecker factors at these weights.
            sample: Gradients at these weights.
            run: The run's Kronecker factors.
            rates: Summed rates R of each block.
            decays: Exponents of weight decay.
        """
        self.close(run)
        if not self._random and self._of_pass is None:
            self._of_pass = Compression(self._entries(self._known), self._device, relative=True)
            self._of_pass.weights = self.compression.weights
            self._of_pass.rebase(run, kfac if self._processes.count == 1 else None)  # each has factors of its own
        compression, passed = self.final, self._passed
        blocks = {block.key: block for block in context.table}
        which = self.vectors.own(self._known)
        size = len(which) * compression.size
        where = self._device if 3 * 4 * size <= self.settings.device_bytes else torch.device("cpu")
        curvature = CompressedCurvature(compression, blocks, kfac, sample, rates, decays, self._known, self._random)
        found, spread = torch.zeros(len(which), compression.size, device=where), Spread(compression.size, self._device)
        for rows, g in compressed_rows(context, curvature.bases, curvature.places, curvature.size):
            mine = torch.isin(rows, which)
            places = rows[mine] // self._processes.count
            with torch.no_grad():
                z = curvature.vectors(g)
                spread.take(z)  # of all rows: each process passes them all
                found[places.to(where)] = z[mine.to(z.device)].to(where)
        found /= spread.of(self._variances(run))
        passed.sums = found if passed.sums is None else passed.sums.add_(found)
        passed.passes += 1
        if self.settings.snapshots:
            self._add_queries(context)

    def take_queries(self, context: FitContext, snapshots: Sequence[Snapshot]) -> None:
        """After the passes: takes the queries at the final weights, and the weights of the passes at others."""
        passed, self._progress = self._passed, context.progress
        if not self.settings.snapshots or len(snapshots) == passed.passes:
            self._add_queries(context)  # else one pass was at these weights
        if self.settings.snapshots:
            trained = {name for name, p in context.module.named_parameters() if p.requires_grad}
            for one in snapshots:
                passed.weights.append({name: w for name, w in (one.tensors or {}).items() if name in trained})

    def _add_queries(self, context: FitContext) -> None:
        if context.queries:
            compression, passed = self.final, self._passed
            found = compressed_queries(context, compression.bases, compression.places, compression.size)
            passed.queries = found if passed.queries is None else passed.queries + found
            passed.times += 1

    def known(self, rows: int) -> None:
        """Tells how many rows there are."""
        self._known = rows

    def _variances(self, run: KFAC) -> Tensor:
        found = self.final.variances(run)
        return found + RIDGE * found.mean().clamp_min(torch.finfo(found.dtype).tiny)

    # -- what comes of it ---------------------------------------------------------------------------------------------

    def prepare(self, run: KFAC) -> None:
        """When training is over: all processes take the same entries. Includes exchanges.

        Args:
            run: The run's Kronecker factors.
        """
        self._processes.exchange()
        run.pool(self._processes)
        self.close(run)

    def make(self, scores: Scores, names: Mapping[torch.nn.Parameter, str], run: KFAC) -> None:
        """Makes the store as it will be on disk, where anything was recorded. Includes exchanges.

        Args:
            scores: The run's, of the same rows.
            names: Of the parameters.
            run: The run's Kronecker factors.
        """
        if self.made is None and self.compression.bases:
            self.close(run)
            for _ in self._progress(["components"], "gradient store"):  # a minute for thousands of rows
                with torch.no_grad():
                    self.made = self._reduced(scores, names, self._variances(run))

    def _reduced(self, scores: Scores, names: Mapping[torch.nn.Parameter, str], variances: Tensor) -> StoredVectors:
        rows = len(scores.observations)
        which = self.vectors.own(rows)
        observations = torch.as_tensor(scores.observations)
        share = observations / observations[observations > 0].double().mean().clamp_min(1e-12)
        parts = []
        if self._passed.sums is not None:
            parts.append((self._passed.sums[: len(which)], share[which].float()))
        if self._random or not parts:  # as mu: from fixed weights the pass ranks better alone
            parts.append((self.vectors.vectors(rows), torch.ones(len(which))))
        vectors = Combined(parts, observations[which] > 0)
        for k in range(len(parts)):
            vectors.sizes[k] = self._together(vectors.spread(k, self._device)).of(variances)
        into, bands = self._components(vectors, variances.repeat(len(parts)))
        rounded, unit = halves(into.cpu().numpy())
        each = [numbers_of(part @ into, self.settings.dtype, bands) for part in vectors.chunks(into.device)]
        numbers, scale = (np.concatenate(found) for found in zip(*each, strict=True))
        unseen = ~vectors.seen.numpy()
        numbers[unseen], scale[unseen] = 0, 0
        numbers, scale = self._gathered(numbers, which, rows), self._gathered(scale, which, rows)
        stored = StoredVectors(
            numbers,
            scale,
            self._blocks(names),
            rounded,
            variances.cpu().numpy().astype(np.float32),
            scores.observations > 0,
            weights=tuple({n: _numpy(w) for n, w in each.items()} for each in self._passed.weights),
            settings=self._facts(),
            bands=bands,
            unit=float(unit),
        )
        return self._calibrated(replace(stored, moments=moments(stored)), scores)

    def _components(self, vectors: Combined, variances: Tensor) -> tuple[Tensor, tuple[Band, ...]]:
        """What makes a row's numbers [W, k], and in how many bits they are."""
        processes, roots = self._processes, variances.sqrt()
        most = min(SAMPLE_ROWS, SAMPLE_BYTES // (4 * len(roots))) // processes.count
        rows = vectors.weighted(roots, max(1, most))
        if processes.count > 1:  # each has a part of the rows: the components are made of all of them, in each
            sizes = [size for size, _ in processes.exchange(len(rows))]
            rows = processes.join(rows, sizes)
        into = components(rows, variances, self.settings.dimensions)
        if self.settings.dtype != "mixed":
            return into, ()
        squares = mean_squares(rows, into / roots[:, None])
        bands = allocate(worths(squares, into.cpu().numpy(), variances.cpu().numpy()), self.settings.bytes_per_row)
        return into[:, : sum(band.count for band in bands)], bands

    def _together(self, spread: Spread) -> Spread:
        """That of all processes' rows."""
        self._average(spread.sums)
        return spread

    def _average(self, tensor: Tensor) -> None:
        if self._processes.count > 1:
            self._processes.exchange()  # whoever failed has left by now
            self._processes.average([tensor])

    def _gathered(self, numbers: NDArray[Any], which: Tensor, rows: int) -> NDArray[Any]:
        """All rows' numbers, in each process."""
        if self._processes.count == 1:
            return numbers
        out = np.zeros((rows, *numbers.shape[1:]), numbers.dtype)
        self._processes.exchange()
        for places, found in self._processes.gather((which.numpy(), numbers)):
            out[places] = found
        return out

    def _blocks(self, names: Mapping[torch.nn.Parameter, str]) -> tuple[StoredBlock, ...]:
        by_key = {block.key: block for block in self.compression.weights}
        found = []
        for key, basis in self.final.bases.items():
            block = by_key[key]
            sides = [None, None] if basis.sides is None else [side.float().cpu().numpy() for side in basis.sides]
            index = basis.index.cpu().numpy()
            found.append(StoredBlock(tuple(names[p] for p in block.parameters), block.layout, index, *sides))
        return tuple(found)

    def _facts(self) -> dict[str, Any]:
        settings = self.settings
        return {
            "bytes_per_row": settings.bytes_per_row,
            "dtype": settings.dtype,
            "working": self.final.size,
            "passes": self._passed.passes,
        }

    def query_entries(self) -> Floats:
        """Entries [Q, W] of the run's queries on data, at the weights that later ones will be evaluated at."""
        if self._passed.queries is None:
            return np.zeros((0, self.final.size))
        found: Floats = (self._passed.queries / self._passed.times).double().cpu().numpy()
        return found

    def _calibrated(self, stored: StoredVectors, scores: Scores) -> StoredVectors:
        """With what the run's own queries, asked again, tell of the accuracy."""
        passed, infos = self._passed, scores.queries
        columns = [k for k, info in enumerate(infos) if info.kind != "self"]
        if passed.queries is None or len(columns) != len(passed.queries):
            return stored
        found = stored.products(stored.of_query(self.query_entries()))
        return replace(stored, calibration=calibrated(found, scores.mu[:, columns], scores.se[:, columns]))


def calibrated(found: Floats, mu: Floats, se: Floats) -> Calibration:
    """How well a store's scores [N, Q] tell the run's."""
    rows = []
    for k in range(mu.shape[1]):
        known = np.isfinite(mu[:, k]) & np.isfinite(found[:, k])
        if known.sum() < 3 or not mu[known, k].any() or not found[known, k].any():
            continue
        x, y = found[known, k], mu[known, k]
        size, missing = np.sqrt(np.mean(y**2)), 1 - (x @ y) ** 2 / ((x @ x) * (y @ y))
        rows.append((spearman(x, y), size, missing, np.sqrt(np.nanmean(se[known, k] ** 2))))
    if not rows:
        return Calibration()
    agreement, size, missing, error = (float(value) for value in np.median(rows, 0))
    return Calibration(agreement, size, missing, error, len(rows))


def _numpy(tensor: Tensor) -> NDArray[Any]:
    """NumPy has no bfloat16."""
    return np.asarray((tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy())


def store_of(
    settings: GradientStore | None,
    discount: bool,
    rows: int | None,
    device: torch.device,
    processes: Lockstep,
    random: bool,
    owner: str,
) -> StoreRecording | None:
    """The store of a recording; None where none is wanted.

    Raises:
        InfluenceError: Where it cannot be had.
    """
    if settings is None:
        return None
    if not discount:
        raise InfluenceError(
            f"{owner}: store= needs the discount, whose curvature says which directions are stored; pass discount=True "
            "and a method that uses signals (FINE)."
        )
    return StoreRecording(settings, rows, device, processes, random)
