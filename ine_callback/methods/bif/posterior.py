"""The posterior of a module around its trained weights: gradients, curvature, settings left open, the step size."""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from ine_callback.methods.bif.flat_module import FlatModule, Function
from ine_callback.methods.bif.localization import choose_localization
from ine_callback.methods.bif.quadratic_posterior import QuadraticPosterior
from ine_callback.methods.bif.rows import RowLosses, Rows
from ine_callback.methods.bif.settings import BIFSettings
from ine_callback.methods.bif.sgld import SGLD, Coordinates, Curved, Diagonal, Gradient, State
from ine_callback.stats.chains import minibatch_bias

MAX_GRADIENT_ENTRIES = 2**28  # of row gradients held in memory: 1 GiB in float32
TRIAL_DRAWS = 4  # and their mirror images, by which the localization is chosen
STEEP_DIRECTIONS = 8  # of the Fisher; the steepest of them sets n_beta
_RMSPROP_ALPHA = 0.1  # the preconditioner is 1 / (sqrt(mean square) + alpha)
_CURVATURE_BATCH = 8  # displacements of one pass
_JACOBIAN_BATCH = 8  # rows of one pass; each needs a backward pass of its own through all of them
_MAX_MINIBATCH_BIAS = 0.15
_TRIAL_STEPS, _MAX_HALVINGS, _MAX_GROWTH = 40, 20, 1.5


class LocalPosterior:
    """p(w) ∝ exp(−n_beta L(w) − (γ/2) ‖w − w*‖²).

    Args:
        flat: The module.
        losses: Its row losses.
        data: All training rows; L is the training's loss of them, the mean of their contributions.
        settings: The chains' settings.

    Attributes:
        generator: The chains' generator.
        localization, n_beta: As set, or chosen where the settings leave them open (:mod:`.localization`).
        quadratic: The quadratic posterior.
        mean_gradient: ∇L(w*) [P].
    """

    def __init__(self, flat: FlatModule, losses: RowLosses, data: Rows, settings: BIFSettings) -> None:
        self.flat, self.contributions, self.data, self.settings = flat, losses.contributions, data, settings
        self.generator = torch.Generator(flat.weights.device).manual_seed(settings.seed)
        self.count, self.weights = len(data), flat.weights
        few = min(settings.curvature_rows, self.count, max(1, MAX_GRADIENT_ENTRIES // len(self.weights)))
        order = self._order()
        self._sample = data.take(order[:few])
        others = order[few:] if self.count >= 2 * few else order
        self._others = data.take(others[: settings.eval_rows])
        self.gradients = jacobian(flat, self.contributions, self._sample)
        fisher = QuadraticPosterior(self.gradients, 1.0, 1.0)
        self.localization = settings.localization or self._localization(fisher)
        self.n_beta = settings.n_beta or self._data_weight(fisher)
        self.quadratic = fisher.at(self.n_beta, self.localization).measured(self._curvature)
        self.mean_gradient = torch.zeros_like(self.weights)
        for part in data.split(settings.eval_rows):
            gradient = flat.gradients(self.weights[None], self.contributions, part)[0]
            self.mean_gradient += len(part) / self.count * gradient
        self.whole = settings.batch_size >= self.count or data.picked is not None
        self.anchored = settings.reduced and not self.whole

    def _order(self) -> Tensor:
        return torch.randperm(self.count, generator=self.generator, device=self.weights.device)

    def _localization(self, fisher: QuadraticPosterior) -> float:
        def loss(deviations: Tensor) -> Tensor:
            return self.flat.values(self.weights + deviations, self.contributions, self._others).mean(1)

        return choose_localization(fisher, self.weights, self.settings.n_beta, loss, self._normal(TRIAL_DRAWS))

    def _normal(self, count: int) -> Tensor:
        size = (count, len(self.weights))
        return torch.randn(size, generator=self.generator, dtype=self.weights.dtype, device=self.weights.device)

    def _data_weight(self, fisher: QuadraticPosterior) -> float:
        """n_beta for which the data are as strong as the localization where the measured curvature is largest."""
        top = fisher.curvature.argsort(descending=True)[:STEEP_DIRECTIONS]
        displacements = fisher.directions[top] / (2 * self.localization) ** 0.5  # deviations under this n_beta
        steepest = float(self._curvature(displacements).max()) if len(top) else 0.0
        return self.localization / steepest if steepest > 0 else 1.0

    def _curvature(self, displacements: Tensor) -> Tensor:
        """d · H d / ‖d‖² by central differences [k], where possible on rows that the directions do not come from."""
        found = []
        for d in displacements.split(_CURVATURE_BATCH):
            points = (self.weights + d, self.weights - d)
            ahead, behind = (self.flat.gradients(point, self.contributions, self._others) for point in points)
            found.append(((ahead - behind) * d).sum(1) / 2 / d.square().sum(1))
        return torch.cat(found) if found else displacements.new_zeros(0)

    def gradient(self, deviation: Tensor) -> Tensor:
        """Unbiased gradient of L at each deviation [C, P], from one minibatch for all chains.

        Anchored: ∇L_B(w) − ∇L_B(w*) + ∇L(w*), whose noise vanishes at the trained weights (Baker et al. 2019, arXiv
        1706.05439). The anchor is one more chain of the same batched pass.
        """
        points = self.weights + deviation
        if self.whole:
            return self.flat.gradients(points, self.contributions, self.data)
        rows = torch.randint(
            self.count, (self.settings.batch_size,), generator=self.generator, device=self.weights.device
        )
        batch = self.data.take(rows)
        if not self.anchored:
            return self.flat.gradients(points, self.contributions, batch)
        found = self.flat.gradients(torch.cat([points, self.weights[None]]), self.contributions, batch)
        return found[:-1] - found[-1] + self.mean_gradient

    def coordinates(self) -> Coordinates:
        """The chains' coordinates, by the settings' preconditioner."""
        if self.settings.preconditioner == "rmsprop":
            return Diagonal((1 / (self.gradients.square().mean(0).sqrt() + _RMSPROP_ALPHA)).sqrt())
        return Curved(self.quadratic, -0.5 if self.settings.preconditioner == "curvature" else 0.0)

    def sampler(self, step_size: float | None = None) -> SGLD:
        """The sampler with the settings' step size, or the one found by :func:`calibrate`."""
        step = step_size or self.settings.step_size or self.calibrate()
        reduced = self.settings.reduced
        return SGLD(self.coordinates(), step, self.n_beta, self.localization, self.generator, reduced, reduced)

    def minibatch_bias(self, sampler: SGLD, deviation: Tensor) -> float:
        """Relative inflation of the variance by minibatch noise, at a deviation [P] of the chains."""
        if self.whole:
            return 0.0
        gradients = jacobian(self.flat, self.contributions, self._sample, self.weights + deviation)
        if self.anchored:
            gradients = gradients - self.gradients
        gradients = sampler.coordinates.transpose(gradients)
        return minibatch_bias(gradients.cpu().numpy(), sampler.step_size, sampler.n_beta, self.settings.batch_size)

    @property
    def data_strength(self) -> float:
        """How strong the data are, relative to the localization, where the loss is steepest."""
        return self.n_beta * self.quadratic.steepest / self.localization

    def step_size_bias(self, sampler: SGLD) -> float:
        """Relative inflation of the variance by the step size in the steepest direction; infinite where unstable.

        The stationary variance is 1 / (h − ε h²/4) instead of 1/h, and right for averaged noise.
        """
        quarter = sampler.step_size * self._largest / 4
        if quarter >= 1:
            return math.inf
        return 0.0 if sampler.averaged else quarter / (1 - quarter)

    def calibrate(self) -> float:
        """The largest step size at which trial chains stay as near as those of the quadratic posterior.

        The search starts at 1 in curvature's coordinates and at 1 / (largest curvature) in others, a quarter of the
        quadratic posterior's limit, and halves. A step is too large when, within 40 steps from a common start, chains
        go 1.5 times as far (mean square) as those of the quadratic posterior. It is then lowered until minibatch noise
        inflates no variance by more than 15 %.

        Raises:
            RuntimeError: If no step size is small enough.
        """
        step = 1.0 / self._largest
        for _ in range(_MAX_HALVINGS):
            deviation = self._stable(step)
            if deviation is not None:
                bias = self.minibatch_bias(self.sampler(step), deviation)
                return step * min(1.0, _MAX_MINIBATCH_BIAS / bias) if bias > 0 else step
            step /= 2
        raise RuntimeError(
            f"BIF: chains diverge even at step_size={step:.3g}; raise localization, lower n_beta, or check that the "
            "losses are finite at the trained weights"
        )

    @cached_property
    def _largest(self) -> float:
        """Largest eigenvalue of SᵀAS; where S does not share A's directions, by power iteration."""
        coordinates = self.coordinates()
        if isinstance(coordinates, Curved):
            return float(coordinates.curvature(torch.tensor(self.quadratic.largest)))
        x, size = self._normal(1)[0], 1.0
        for _ in range(30):
            x = coordinates.transpose(self.quadratic.apply(coordinates.deviation(x / x.norm()), lambda a: a))
            size = float(x.norm())
        return size

    def _stable(self, step: float) -> Tensor | None:
        """Where the first trial chain ended [P]; None where chains went too far at this step size."""
        sampler = self.sampler(step)
        seed = int(torch.randint(2**31, (1,), generator=self.generator, device=self.weights.device))
        _, farthest = self._trial(sampler, seed, self._model_gradient, math.inf)
        end, spread = self._trial(sampler, seed, self.gradient, _MAX_GROWTH * farthest)
        return sampler.coordinates.deviation(end.z)[0] if spread <= _MAX_GROWTH * farthest else None

    def _trial(self, sampler: SGLD, seed: int, gradient: Gradient, limit: float) -> tuple[State, float]:
        """Trial chains from one start, and their greatest mean squared distance; stops where it exceeds the limit."""
        sampler.generator.manual_seed(seed)
        state, spread = sampler.init(min(4, self.settings.chains), self.mean_gradient), 0.0
        for _ in range(_TRIAL_STEPS):
            state = sampler.step(state, gradient)
            here = float(state.z.square().mean())
            spread = max(spread, here)
            if not here <= limit:  # also where it is NaN
                return state, math.inf
        return state, spread

    def _model_gradient(self, deviation: Tensor) -> Tensor:
        """∇L of the quadratic model."""
        curved = self.quadratic.apply(deviation, lambda a: (a - self.localization) / self.n_beta)
        return self.mean_gradient + curved


def initial_state(posterior: LocalPosterior, sampler: SGLD) -> State:
    """The chains after the settings' burn-in."""
    state = sampler.init(posterior.settings.chains, posterior.mean_gradient)
    if not posterior.settings.reduced:
        state = state._replace(control_variate=None)  # it is not used, and took a sixth of the time (protocol G1)
    for _ in range(posterior.settings.burn_in):
        state = sampler.step(state, posterior.gradient)
    return state


def jacobian(flat: FlatModule, function: Function, data: Rows, at: Tensor | None = None) -> Tensor:
    """Gradient [n, P] of every row's value of ``function(module, rows) -> [b]``, by default at the trained weights."""
    point = flat.weights if at is None else at
    return torch.cat([flat.jacobian(point, function, part) for part in data.split(_JACOBIAN_BATCH)])
