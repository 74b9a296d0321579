"""Fair subspaces against what is known exactly."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ine_callback import FairSettings, fair_subspaces
from ine_callback.methods.fairness.estimator import MEASURES, Estimator
from ine_callback.methods.fairness.inputs import variable
from ine_callback.stats.influence_of import agreement, influence_of, left_out
from ine_callback.stats.sufficient_dimension import eigenspace, kernel, quantile_slices, whitening

Array = NDArray[np.float64]


def recovery(seed: int, sizes: tuple[int, ...]) -> dict[str, list[float]]:
    """Greatest angles in degrees to the true spaces of target and attribute, at several numbers of rows."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(10, 10))
    root = torch.tensor(mixing @ mixing.T / 10 + 0.5 * np.eye(10))
    found: dict[str, list[float]] = {"target": [], "attribute": [], "shared": []}
    for n in sizes:
        u = rng.normal(size=(n, 10))
        y = u[:, 1] / (0.5 + (u[:, 0] + 1.5) ** 2) + 0.2 * rng.normal(size=n)
        z = (u[:, 0] + 0.3 * rng.normal(size=n) > 0.5) + 2 * (u[:, 2] + 0.3 * rng.normal(size=n) > 0)
        x, weights = torch.tensor(u) @ root, torch.full((n,), 1 / n, dtype=torch.float64)
        mean, lower = whitening(x, weights, 0.0)
        white = torch.linalg.solve_triangular(lower, (x - mean).T, upper=False).T
        spaces = []
        for codes in (quantile_slices(torch.tensor(y), 10), torch.tensor(z)):
            slices = torch.eye(int(codes.max()) + 1, dtype=torch.float64)[codes]
            space = eigenspace(kernel(white, slices, weights, "sir"), slice(8, None))
            spaces.append(torch.linalg.qr(root @ torch.linalg.solve_triangular(lower.T, space, upper=True))[0])
        shared = spaces[0] @ torch.linalg.svd(spaces[0].T @ spaces[1])[0][:, 0]
        cosines = {
            "target": torch.linalg.svdvals(spaces[0][[0, 1]]).min(),
            "attribute": torch.linalg.svdvals(spaces[1][[0, 2]]).min(),
            "shared": shared[0].abs(),
        }
        for name, cosine in cosines.items():
            found[name].append(float(torch.rad2deg(torch.arccos(cosine.clamp(max=1)))))
    return found


def leace(seed: int) -> dict[str, float]:
    """Full removal with G − 1 = 3 directions against LEACE, of its authors where installed; class means after it."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(500, 8)) @ rng.normal(size=(8, 8))
    z = np.digitize(x[:, 0] / x[:, 0].std() + rng.normal(size=500), [-1, 0, 1])
    y = (x[:, 1] > 0).astype(int)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        module = fair_subspaces(x, y, z, FairSettings(sensitive_rank=3, permutations=19)).projection(0)
        removed = module(torch.tensor(x)).numpy()
    finally:
        torch.set_default_dtype(default)
    means = np.stack([removed[z == k].mean(0) for k in range(4)])
    found = {"closed form": float(np.abs(removed - _leace(x, z)).max()), "means": float(np.abs(means - means[0]).max())}
    if importlib.util.find_spec("concept_erasure"):
        from concept_erasure import LeaceEraser

        hot = torch.eye(4, dtype=torch.float64)[torch.tensor(z)]
        eraser = LeaceEraser.fit(torch.tensor(x), hot, shrinkage=False, svd_tol=1e-9)
        found["concept-erasure"] = float(np.abs(removed - eraser(torch.tensor(x)).numpy()).max())
    return found


def _leace(x: Array, z: NDArray[np.int64]) -> Array:
    centred, hot = x - x.mean(0), np.eye(z.max() + 1)[z]
    values, vectors = np.linalg.eigh(centred.T @ centred / len(x))
    white = vectors @ np.diag(values**-0.5) @ vectors.T
    left, size, _ = np.linalg.svd(white @ (centred.T @ (hot - hot.mean(0))), full_matrices=False)
    basis = left[:, size > 1e-8 * size[0]]
    return np.asarray(x - centred @ white.T @ basis @ basis.T @ np.linalg.inv(white).T)


def trade_off(seed: int, n: int) -> dict[str, float]:
    """Greatest error of excess risk and gap along the path of Gaussian features, whose closed form is known."""
    rng = np.random.default_rng(seed)
    u = rng.normal(size=(n, 4))
    z = (u[:, 0] + 0.5 * rng.normal(size=n) > 0).astype(int)
    y = u @ np.array([0.8, 1.0, 0.0, 0.0]) + rng.normal(size=n)
    each = _estimator(u, y, z)
    found = torch.stack(each(each.uniform))[1:].reshape(-1, len(MEASURES)).numpy()
    share = np.array(each.keeps)
    risk, gap = (1 - share) ** 2 * 0.64, share * 0.8 * 2 * np.sqrt(2 / np.pi) / np.sqrt(1.25)
    return {"risk": float(np.abs(found[:, 0] - 1 - risk).max()), "gap": float(np.abs(found[:, 2] - gap).max())}


def rows_left_out(seed: int, n: int, draws: int) -> dict[str, float]:
    """Influence values against leaving every row out, and standard errors against the bootstrap's; worst measures."""
    rng = np.random.default_rng(seed)
    u = rng.normal(size=(n, 5))
    z = (u[:, 0] + 0.5 * rng.normal(size=n) > 0).astype(int)
    y = u @ np.array([0.8, 1.0, 0, 0, 0.5]) + rng.normal(size=n)
    each = _estimator(u @ rng.normal(size=(5, 5)), y, z)
    found = influence_of(each, each.uniform)
    measured = left_out(each, range(n), n) - found.value
    last = len(found.value) - len(MEASURES)
    asked = {"cosine": 0, "loss without": 1, "loss": last, "gap": last + MEASURES.index("gap")}
    out: dict[str, float] = {"mean": float(found.rows.mean(0).abs().max())}
    drawn = [torch.stack(each(torch.tensor(rng.multinomial(n, np.full(n, 1 / n)) / n))) for _ in range(draws)]
    spread = torch.stack(drawn).std(0)
    for name, k in asked.items():
        correlation, slope = agreement(found.removal[:, k], measured[:, k])
        ratio = float(found.standard_error[k] / spread[k])
        out |= {f"{name}: correlation": correlation, f"{name}: slope": slope, f"{name}: error over bootstrap": ratio}
    return out


def chance(seeds: int) -> dict[str, float]:
    """Shares of runs in which an independent attribute shares a direction, and the target itself all."""
    shared, whole = 0, 0
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(200, 4))
        y, z = (x[:, 0] + rng.normal(size=200) > 0).astype(int), rng.permutation(np.arange(200) % 2)
        settings = FairSettings(permutations=99, seed=seed)
        shared += any(each.kind == "shared" for each in fair_subspaces(x, y, z, settings).directions)
        whole += all(each.kind == "shared" for each in fair_subspaces(x, y, y, settings).directions)
    return {"independent": shared / seeds, "itself": whole / seeds}


def _estimator(x: Array, y: Array, z: NDArray[Any]) -> Estimator:
    target, groups = variable(y, 10, "target", 1), variable(z, 10, "attribute", 1)
    features: Tensor = torch.tensor(x)
    return Estimator(features, target, groups, (1, 1), "sir", 0.0, 1)
