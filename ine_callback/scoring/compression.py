r"""What the run does with a row, as a short vector: its compressed, discounted contributions, ready to be summed.

A signal is ``<P D v, s>``: the query's gradient v, the discount D, the factor P of a contribution s in a step. Whoever
asks after the run has v alone. So D and P go to the row: ``z = sum over its steps of rate D^T P (s - mean of others)``,
and any later query is ``<v, z>``. Both in the entries of :mod:`.coordinates`. The basis is that of the curvature so
far, made anew when the number of steps has doubled; what was summed is moved into it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ine_callback.capture import Block, GradSample
from ine_callback.curvature.gradient_sample import Exponents, Removed
from ine_callback.curvature.kfac import KFAC
from ine_callback.curvature.spectral import exponential
from ine_callback.scoring.coordinates import BlockBasis, choose
from ine_callback.scoring.directions import DirectionSpec

Bases = dict[str, BlockBasis]  # by the blocks' keys

_T = TypeVar("_T")


@dataclass(frozen=True)
class Compressed:
    """Compressed contributions of a pass's rows.

    Attributes:
        values: Entries [b, W].
        places: Which of them each block has, by its key.
    """

    values: Tensor
    places: Mapping[str, slice]

    def times(self, blocks: Sequence[Block], factors: Tensor) -> Compressed:
        """With each block's entries times a factor [K]; without blocks all times one [1]."""
        factors = factors.to(self.values.dtype)
        if not blocks:
            return Compressed(self.values * factors, self.places)
        each = torch.ones_like(self.values[:1])
        for block, factor in zip(blocks, factors, strict=True):
            if block.key in self.places:
                each[:, self.places[block.key]] = factor
        return Compressed(self.values * each, self.places)

    def only(self, blocks: Sequence[Block]) -> Compressed:
        """The part of some blocks; the others' entries are 0."""
        kept = torch.zeros_like(self.values)
        for block in blocks:
            if block.key in self.places:
                kept[:, self.places[block.key]] = self.values[:, self.places[block.key]]
        return Compressed(kept, self.places)


@dataclass(frozen=True)
class _Discount:
    """D^T P on entries: the mean of K-FAC's and the gradient sample's, as directions have it."""

    weight: Tensor  # P of each entry [W]
    alone: Tensor  # K-FAC's discount of each entry [W]
    across: Tensor | None = None  # directions of the sample, times the root of what is removed along them [r, W]
    exponents: Tensor | None = None  # by curvature [W]; 0 where the sample has no gradients
    decay: Tensor | None = None  # factor by weight decay [W]

    def apply(self, x: Tensor) -> Tensor:
        """Of contributions x [b, W]."""
        x = x * self.weight
        alone = x * self.alone
        if self.across is None or self.exponents is None or self.decay is None:
            return alone
        across = (x - x @ self.across.T @ self.across * self.exponents) * self.decay
        return torch.where(self.exponents > 0, (alone + across) / 2, alone)


class Compression:
    """Compresses contributions during the backward pass.

    Args:
        dimensions: Most entries W of a row.
        device: Where signals live.
        relative: Whether entries count by their variance relative to the mean of their layer.

    Attributes:
        bases: The entries taken, by the blocks' keys.
        places: Where each block's are.
        weights: What the optimizer multiplies each block's contributions with.
        alone: Whether there is one process. Of several, what fails in one must end all, for they wait for each other.
        failure: What ended the store, if anything did.
        ending: Called before another discount takes the present one's place.
        moved: Called with a function that moves vectors [n, W'] of the former basis into the new one, and with W.
    """

    def __init__(self, dimensions: int, device: torch.device, relative: bool = False) -> None:
        self.dimensions, self.relative, self._device = dimensions, relative, device
        self.bases: Bases = {}
        self.places: dict[str, slice] = {}
        self.alone, self.failure = True, ""
        self.ending: Callable[[], None] = lambda: None
        self.moved: Callable[[Callable[[Tensor], Tensor], int], None] = lambda move, size: None
        self._made_at = 0
        self.weights: dict[Block, Tensor | float] = {}  # P of each block at the last refresh
        self._found: dict[str, list[Tensor]] = {}
        self._discount: _Discount | None = None

    @property
    def size(self) -> int:
        """Entries W of a row now."""
        return max((place.stop for place in self.places.values()), default=0)

    def run(self, function: Callable[..., _T], *args: Any) -> _T | None:
        """Calls a part of the store, unless one has failed before: that costs the store, not the recording."""
        if self.failure:
            return None
        try:
            return function(*args)
        except Exception as error:
            if not self.alone:
                raise
            self.fail(error)
            return None

    def fail(self, error: Exception) -> None:
        """Gives the store up."""
        self.failure = f"{type(error).__name__}: {error}"
        self.clear()

    def refresh(self, specs: Mapping[Block, DirectionSpec], kfac: KFAC, removed: Removed | None, steps: int) -> None:
        """Makes the discount anew, and the basis where blocks joined or the number of steps has doubled.

        Args:
            specs: What is known of each block's direction.
            kfac: The curvature.
            removed: What the discount of the gradient sample removes; None where it has too few rows.
            steps: Taken so far.
        """
        self.ending()
        self.weights = {block: spec.weight for block, spec in specs.items()}
        known = {block.key for block in specs}
        if not self.bases or steps >= 2 * self._made_at or not set(self.bases) <= known:
            self._made_at = max(1, steps)
            self.rebase(kfac)
        taken = {block: spec for block, spec in specs.items() if block.key in self.bases}
        exponents = {block: spec.exponents for block, spec in taken.items()}
        weight, alone = torch.ones(2, self.size, device=self._device)
        for block, spec in taken.items():
            place = self.places[block.key]
            weight[place] = torch.as_tensor(spec.weight).to(weight)
            alone[place] = self.bases[block.key].diagonal(kfac, block, exponential(*spec.exponents)).to(alone)
        self._discount = _Discount(weight, alone, *self._across(exponents, removed))

    def _across(
        self, exponents: Exponents, removed: Removed | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradient sample's directions, exponents and decay in entries; None without a sample."""
        if removed is None:
            return None, None, None
        kept = removed.weight > 0  # others are rounding
        into = (removed.vectors[:, kept] * removed.weight[kept].sqrt()).T.to(self._device, torch.float32)
        across = torch.zeros(len(into), self.size, device=self._device)
        by_curvature, decay = torch.zeros(self.size, device=self._device), torch.ones(self.size, device=self._device)
        for block, stored in removed.rows.items():
            if block not in exponents:
                continue
            place = self.places[block.key]
            across[:, place] = into @ self.bases[block.key].of_stored(stored).to(into)
            by_curvature[place], fall = (torch.as_tensor(x).to(into) for x in exponents[block])
            decay[place] = torch.exp(-fall)
        return across, by_curvature, decay

    def rebase(self, kfac: KFAC, by: KFAC | None = None) -> None:
        """Takes the entries of the present curvature, and has what was summed moved to them.

        Args:
            kfac: The curvature, whose eigenvectors the entries are between.
            by: Whose variances they are chosen by; None: the same.
        """
        before, places = self.bases, self.places
        chosen = choose(self.counts(by or kfac), kfac, self.dimensions, self._device, by)
        self.bases = {block.key: basis for block, basis in chosen.items()}
        self.places = placed(self.bases)
        if before:
            self.moved(lambda x: self.taken_from(x, before, places), self.size)

    def counts(self, kfac: KFAC) -> dict[Block, float]:
        """How many times the variances of each block's entries count: by what scores they make.

        With the variance c of an entry in gradients, rows' and queries' alike, its part of a score has the size ``P c``
        less the discount, which keeps the order; after ``(F + damping)^-1`` of each layer ``c / (c + damping)``.
        """
        if not self.relative:
            return {block: abs(float(weight)) for block, weight in self.weights.items()}
        tiny = torch.finfo(torch.float32).tiny
        return {block: 1 / max(float(kfac.mean(block)), tiny) for block in self.weights}

    def taken_from(self, x: Tensor, before: Bases, places: Mapping[str, slice]) -> Tensor:
        """Vectors x [n, W'] of other entries, in these [n, W]."""
        out = x.new_zeros(len(x), self.size)
        for key, basis in self.bases.items():
            if key in before:
                there = x[:, places[key]].to(self._device)
                out[:, self.places[key]] = there if basis is before[key] else basis.moved(there, before[key]).to(out)
        return out

    # -- one pass -----------------------------------------------------------------------------------------------------

    def take(self, block: Block, grad_sample: GradSample) -> None:
        """Takes one use of a block."""
        basis = self.bases.get(block.key)
        if basis is not None:
            self._found.setdefault(block.key, []).append(basis.of(grad_sample))

    def settle(self, rows: int) -> Compressed:
        """What a pass left, with zeros for blocks that it did not use."""
        values = torch.zeros(rows, self.size, device=self._device)
        for key, found in self._found.items():
            if key in self.places:
                values[:, self.places[key]] = (found[0] if len(found) == 1 else torch.stack(found).sum(0)).to(values)
        self._found.clear()
        return Compressed(values, self.places)

    def nothing(self, rows: int) -> Compressed:
        """What a pass left in a store that failed."""
        return Compressed(torch.zeros(rows, self.size, device=self._device), self.places)

    def clear(self) -> None:
        """Forgets what this pass left so far."""
        self._found.clear()

    def variances(self, kfac: KFAC) -> Tensor:
        """Variance of each entry [W] of the rows' gradients over the run."""
        out = torch.zeros(self.size, device=self._device)
        for block in self.weights:
            if block.key in self.bases:
                out[self.places[block.key]] = self.bases[block.key].diagonal(kfac, block).to(out)
        return out

    @property
    def discounted_size(self) -> int:
        """Entries of the contributions that the present discount is of: other than :attr:`size` in another basis."""
        return self.size if self._discount is None else len(self._discount.weight)

    def discounted(self, x: Tensor) -> Tensor:
        """``D^T P x`` of contributions x [b, W]."""
        return x if self._discount is None else self._discount.apply(x)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The basis; discounts are made anew."""
        bases = {
            key: {"index": basis.index, "sides": None if basis.sides is None else list(basis.sides)}
            for key, basis in self.bases.items()
        }
        return {"made_at": self._made_at, "bases": bases}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        self._made_at = state["made_at"]
        for key, saved in state["bases"].items():
            sides = None if saved["sides"] is None else tuple(side.to(self._device) for side in saved["sides"])
            self.bases[key] = BlockBasis(saved["index"].to(self._device), sides)
        self.places = placed(self.bases)


def placed(bases: Bases) -> dict[str, slice]:
    """Where each block's entries are, one block's behind the other's."""
    places, start = {}, 0
    for key, basis in bases.items():
        places[key] = slice(start, start + len(basis.index))
        start += len(basis.index)
    return places
