r"""K-FAC: Kronecker factors of every block's Fisher, averaged over the run so far (arXiv 1503.05671).

The factors are covariances of the activations and output gradients that the hooks capture anyway. f-INE's discount is
made of them. The discount says what the rest of training leaves of a change made now: a change of the weights at step t
decays under the later steps as ``D_t = exp(-R_t F)``. ``R_t`` is the summed learning rate that remains, times the
optimizer's rate. The Fisher ``F`` stands for the Hessian. :mod:`.spectral` has this and other functions of the Fisher.

Factors use the true labels (empirical Fisher). Tied parameters have the diagonal of the sum of their uses' Fishers; the
sum's partial traces are stored beside it, for bases and sketches. A side with more than ``max_dim`` dimensions has a
diagonal covariance.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ine_callback.capture.per_sample_gradients import GradSample, Lookup, Vector
from ine_callback.curvature.low_rank import Side
from ine_callback.curvature.spectral import SpectralOperator, Spectrum, identity
from ine_callback.distributed.processes import Lockstep

if TYPE_CHECKING:
    from ine_callback.capture.blocks import Block


MAX_DECOMPOSED = 1 << 24  # entries of covariances that are decomposed at once: 64 MB, as much as they themselves


@dataclass
class _Factors:
    """Running sums of a block's covariances; their Kronecker product divided by ``steps`` is the Fisher.

    For a tied block ``diagonal`` is the Fisher's diagonal, and the covariances are its partial traces.

    Attributes:
        full: Whether the left and right covariances are full, not diagonal.
        left: Sum of covariances of the output gradients.
        right: Sum of covariances of the activations.
        diagonal: Sum of the Fisher's diagonals, for a tied block.
        uses: Uses of the block in the sums.
        steps: Optimizer steps in the sums.
        seen: Rows in the sums.
    """

    full: tuple[bool, bool]
    left: Tensor | None = None
    right: Tensor | None = None
    diagonal: Tensor | None = None
    uses: float = 0
    steps: float = 0
    seen: float = 0

    def tensors(self) -> list[Tensor]:
        return [t for t in (self.left, self.right, self.diagonal) if t is not None]


class KFAC:
    """Kronecker factors of every block, averaged over the run so far.

    Args:
        max_dim: Sides with more dimensions have a diagonal covariance.

    Example:
        >>> import torch
        >>> from ine_callback.capture import Block, Outer
        >>> from ine_callback.curvature.spectral import exponential
        >>> weight = torch.nn.Parameter(torch.zeros(1, 1))
        >>> block, kfac = Block("w", (weight,), (1, 1, 1)), KFAC()
        >>> contributions = Outer(torch.ones(4, 1, 1, 1), torch.full((4, 1, 1, 1), 0.5))  # to a mean over 4 rows
        >>> kfac.observe(block, contributions, terms=4.0)
        >>> kfac.end_step()
        >>> kfac.operator(block, exponential(2.0)).weight  # exp(-2 * 4 * sum of .5^2)
        tensor([[[0.0003]]])
    """

    def __init__(self, max_dim: int = 1024) -> None:
        self.max_dim = max_dim
        self._factors: dict[str, _Factors] = {}
        self._seen: dict[str, int] = {}
        self._decomposed: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}  # until an operator takes them

    def observe(self, block: Block, grad_sample: GradSample, terms: Tensor | float, steps: int = 1) -> None:
        """Adds one use of a block.

        Args:
            block: The block.
            grad_sample: The rows' gradient contributions s_i, of the loss as it was differentiated.
            terms: Number of likelihood terms in the mean that the loss is (rows, or tokens): the inverse of the
                coefficient with which each term enters the loss, so that ``F = terms * sum_i s_i s_i^T``.
            steps: Optimizer steps that this update stands for.
        """
        factors = self._factors.get(block.name)
        if factors is None:
            factors = self._factors[block.name] = _Factors(self._full(grad_sample))
        offset = factors.uses * 0.618034 % 1.0  # the golden ratio spreads the positions used evenly over the updates
        left, right = grad_sample.covariances(factors.full, offset)
        left = left * terms
        if block.tied and not isinstance(grad_sample, Vector):
            rows, columns = _diagonal(left, block.layout[1]), _diagonal(right, block.layout[2])
            if factors.diagonal is None:
                factors.diagonal = rows.new_zeros(block.layout)
            factors.diagonal.baddbmm_(rows[..., :, None], columns[..., None, :], alpha=steps)
            # the partial traces of the sum over uses; a lookup's left covariance is its diagonal
            left = torch.diag_embed(left) if factors.full[0] and left.dim() == 2 else left
            left, right = _times(left, columns.sum(-1)), _times(right, rows.sum(-1))
        if factors.left is None:
            factors.left, factors.right = left * steps, right * steps
        else:
            assert factors.right is not None
            factors.left.add_(left, alpha=steps)
            factors.right.add_(right, alpha=steps)
        factors.uses += steps
        factors.seen += grad_sample.rows
        self._seen[block.name] = steps

    def forget(self, block: Block) -> None:
        """Drops a block's sums."""
        self._factors.pop(block.name, None)
        self._seen.pop(block.name, None)

    def end_step(self) -> None:
        """Ends an optimizer step: counts it for the blocks that were observed in it."""
        for name, steps in self._seen.items():
            self._factors[name].steps += steps
        self._seen.clear()

    def pool(self, processes: Lockstep) -> None:
        """Averages the sums over processes; what each process adds later is averaged the next time."""
        if processes.count == 1:
            return
        known = {f"{name} {[t.shape for t in f.tensors()]}": f for name, f in self._factors.items()}
        factors = [known[key] for key in sorted(processes.common(known))]
        counts = torch.tensor(processes.gather([(f.uses, f.steps, f.seen) for f in factors])).double().mean(0)
        for each, (uses, steps, seen) in zip(factors, counts.tolist(), strict=True):
            each.uses, each.steps, each.seen = uses, steps, seen
        processes.average(tensor for each in factors for tensor in each.tensors())

    @contextlib.contextmanager
    def decomposed(self, blocks: Iterable[Block]) -> Iterator[None]:
        """Inside, each of these blocks' operators is made once from covariances that were decomposed together.

        Those of one size at once: many small decompositions are many times as many kernels on a GPU, and waits for it.
        """
        try:
            self._decompose(blocks)
            yield
        finally:
            self._decomposed.clear()

    def _decompose(self, blocks: Iterable[Block]) -> None:
        alike: dict[tuple[Any, ...], list[tuple[tuple[str, str], Tensor]]] = {}
        for block in blocks:
            if (factors := self._factors.get(block.name)) is not None:
                for side in ("left", "right"):
                    covariance = self._covariance(block, factors, side)
                    if covariance.dim() == 3:
                        kind = covariance.shape[-1], covariance.dtype, covariance.device
                        alike.setdefault(kind, []).append(((block.name, side), covariance))
        for (size, *_), group in alike.items():
            count = max(1, MAX_DECOMPOSED // size**2)
            for part in (group[k : k + count] for k in range(0, len(group), count)):
                try:
                    values, vectors = _eigen(torch.cat([covariance for _, covariance in part]))
                except RuntimeError:  # one cannot be: whose that is shows when its own operator is made
                    continue
                sizes = [len(covariance) for _, covariance in part]
                found = zip(values.split(sizes), vectors.split(sizes), strict=True)
                self._decomposed |= {key: each for (key, _), each in zip(part, found, strict=True)}

    def _covariance(self, block: Block, factors: _Factors, side: str) -> Tensor:
        """The mean covariance of one side."""
        steps = factors.steps or self._seen.get(block.name, 1)  # in the first step none has ended yet
        assert factors.left is not None and factors.right is not None
        return factors.left / steps if side == "left" else factors.right / factors.uses

    def _side(self, block: Block, factors: _Factors, side: str) -> tuple[Tensor, Tensor | None]:
        """Eigenvalues [G, K], none negative, and eigenvectors [G, K, K] of one side; None where it is diagonal."""
        if (found := self._decomposed.pop((block.name, side), None)) is not None:
            return found
        covariance = self._covariance(block, factors, side)
        return _eigen(covariance) if covariance.dim() == 3 else (covariance.clamp_min(0), None)

    def operator(self, block: Block, spectrum: Spectrum) -> SpectralOperator:
        """A function of a block's Fisher; the identity for a block that was never observed.

        Args:
            block: The block.
            spectrum: The function, see :mod:`.spectral`.
        """
        factors = self._factors.get(block.name)
        if factors is None:
            return SpectralOperator()
        steps = factors.steps or self._seen.get(block.name, 1)
        (left_values, left), (right_values, right) = (self._side(block, factors, side) for side in ("left", "right"))
        if left_values.dim() == 1:  # a vector block has one side
            return SpectralOperator(spectrum(left_values))
        if factors.diagonal is not None:  # both covariances have the Fisher's trace: the product should have it once
            right_values = right_values / right_values.sum(-1, keepdim=True).clamp_min(1e-30)
        sides = (Side.shrunk(left_values, left, factors.seen), Side.shrunk(right_values, right, factors.seen))
        if factors.diagonal is not None:
            return SpectralOperator(partial(_entries, spectrum, factors.diagonal, steps), sides, entrywise=True)
        return SpectralOperator(partial(spectrum, left_values[..., :, None], right_values[..., None, :]), sides)

    def diagonal(self, block: Block, left: Tensor, right: Tensor, spectrum: Spectrum = identity) -> Tensor:
        """A function of a matrix block's Fisher between columns left [G, O, k] and right [G, I, l]: [G, k, l].

        The columns are taken for eigenvectors, with their variances as eigenvalues: the Fisher's diagonal between them.
        """
        factors = self._factors[block.name]
        steps = factors.steps or self._seen.get(block.name, 1)
        assert factors.left is not None and factors.right is not None
        if factors.diagonal is not None:
            return spectrum(left.square().transpose(-1, -2) @ (factors.diagonal / steps) @ right.square())
        of_left, of_right = self.along(block, left, right)
        return spectrum(of_left[..., :, None], of_right[..., None, :])

    def along(self, block: Block, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """The variances [G, k] and [G, l] of both sides along columns left [G, O, k] and right [G, I, l]."""
        factors = self._factors[block.name]
        steps = factors.steps or self._seen.get(block.name, 1)
        assert factors.left is not None and factors.right is not None
        return _along(factors.left / steps, left), _along(factors.right / factors.uses, right)

    def mean(self, block: Block) -> Tensor:
        """Mean eigenvalue of a block's whole Fisher, a scalar, by traces; 0 for a block that was never observed."""
        factors = self._factors.get(block.name)
        if factors is None or factors.left is None or factors.right is None:
            return torch.zeros(())
        steps = factors.steps or self._seen.get(block.name, 1)
        if factors.diagonal is not None:
            return factors.diagonal.mean() / steps
        if factors.left.dim() == 1:  # a vector block has one side
            return factors.left.mean() / steps
        left, right = (_diagonal(side, side.shape[-1]).mean(-1) for side in (factors.left, factors.right))
        return (left * right).mean() / (steps * factors.uses)

    def eigenvectors(self, block: Block) -> tuple[Tensor | None, Tensor | None]:
        """Eigenvectors of a block's left and right covariance [G, K, K], decomposed in float64.

        None where a side is diagonal, and for blocks that were never observed, or in another layout.
        """
        factors = self._factors.get(block.name)
        if factors is None or factors.left is None or factors.right is None or len(block.layout) == 1:
            return None, None
        if (factors.left.shape[1], factors.right.shape[1]) != block.layout[1:]:  # a bias may have been apart
            return None, None
        sides = zip((factors.left, factors.right), factors.full, strict=True)
        left, right = (None if not full or x is None else _eigen(x.double())[1] for x, full in sides)
        return left, right

    def state_dict(self) -> dict[str, Any]:
        """Every block's sums, by its name: tensors and plain types."""
        return {
            name: {k: v.clone() if isinstance(v, Tensor) else v for k, v in vars(factors).items()}
            for name, factors in self._factors.items()
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Restores what :meth:`state_dict` returned."""
        for name, saved in state.items():
            moved = {k: v.to(device, copy=True) if isinstance(v, Tensor) else v for k, v in saved.items()}
            self._factors[name] = _Factors(**moved | {"full": tuple(saved["full"])})

    def _full(self, grad_sample: GradSample) -> tuple[bool, bool]:
        if isinstance(grad_sample, Vector):
            return False, False
        _, out, inputs = grad_sample.layout
        return out <= self.max_dim and not isinstance(grad_sample, Lookup), inputs <= self.max_dim


def _entries(spectrum: Spectrum, diagonal: Tensor, steps: float) -> Tensor:
    return spectrum(diagonal / steps)


def _times(covariance: Tensor, factor: Tensor) -> Tensor:
    """A covariance [G, K, K] or [G, K] times a factor [G]."""
    return covariance * factor.view(-1, *[1] * (covariance.dim() - 1))


def _along(covariance: Tensor, columns: Tensor) -> Tensor:
    """The variance along each of the columns [G, K, k], as [G, k]; the covariance is [G, K, K], or diagonal [G, K]."""
    times = covariance @ columns if covariance.dim() == 3 else covariance[..., None] * columns
    return (columns * times).sum(-2)


def _diagonal(covariance: Tensor, size: int) -> Tensor:
    """The diagonal [G, K] of a covariance [G, K, K], or of one that is diagonal already."""
    return covariance.diagonal(dim1=-2, dim2=-1) if covariance.dim() == 3 else covariance.expand(-1, size)


def _eigen(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [G, K], none negative, and eigenvectors [G, K, K] of a covariance."""
    # LAPACK in single precision has returned NaN for covariances of size 1e-7, as vanishing gradients leave them
    size = covariance.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(covariance.dtype).tiny)
    scaled = covariance / size
    try:
        values, vectors = torch.linalg.eigh(scaled)
        converged = bool(values.isfinite().all() & vectors.isfinite().all())
    except RuntimeError:  # happens where many inputs are always zero
        converged = False
    if not converged:
        values, vectors = (x.to(covariance.dtype) for x in torch.linalg.eigh(scaled.double()))
    return values.clamp_min(0) * size[..., 0], vectors
