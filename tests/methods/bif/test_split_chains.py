"""Chains shared by processes: real ones, over gloo."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from ine_callback import BIF, BIFScores, EachRow, bif_scores
from ine_callback.errors import InfluenceError
from ine_callback.methods.bif.statistics import Scatter
from tests.helpers.bif.quadratic import PLAIN, WHOLE, exact, forms, quadratic_problem
from tests.helpers.once import spawned

COMMON: dict[str, Any] = {"n_beta": 10.0, "localization": 4.0, "batch_size": WHOLE, "draws": 120, "thinning": 6}
REDUCED = BIF(32, step_size=0.8, **COMMON)
SIMPLE = BIF(8, step_size=0.02, burn_in=100, seed=4, **COMMON, **PLAIN)


def scores(bif: BIF) -> BIFScores:
    model, data, query = quadratic_problem()
    return bif_scores(model, data, {"q": EachRow(query)}, bif, forms, progress=False)


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {"reduced": scores(REDUCED), "plain": scores(SIMPLE)}
    with pytest.raises(InfluenceError, match="chains=6 cannot be divided among 2 processes; take a multiple of 4"):
        scores(BIF(6, step_size=0.8, **COMMON))
    with pytest.raises(InfluenceError, match="the chains diverged at draw 1 of"):  # in both, though one alone fails
        scores(BIF(4, step_size=0.8 if rank else 1e30, **COMMON))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def together() -> list[dict[str, BIFScores]]:
    return spawned("chains", process)


@pytest.mark.parametrize("kind", ["reduced", "plain"])
@pytest.mark.long
def test_processes_share_the_chains_and_agree(together: list[dict[str, BIFScores]], kind: str) -> None:
    one, other = (found[kind] for found in together)
    for name, value in vars(one).items():
        there = getattr(other, name)
        assert np.array_equal(value, there) if isinstance(value, np.ndarray) else repr(value) == repr(there), name
    alone = scores(REDUCED if kind == "reduced" else SIMPLE)
    assert one.loss.shape == alone.loss.shape and one.settings == alone.settings
    half = len(one.loss) // 2
    assert len(np.unique(one.loss[:half, 0].round(9))) == half  # no two processes run the same chain
    _, data, query = quadratic_problem()
    v = torch.linalg.inv(10.0 * data[1].mean(0) + 4.0 * torch.eye(5))
    z = (one.scores - exact(data, query, v)) / one.se
    assert np.sqrt((z**2).mean()) < 1.6 and np.corrcoef(one.scores.ravel(), alone.scores.ravel())[0, 1] > 0.98
    # as many chains, as small an error: mirrored pairs must have stayed pairs
    assert 0.6 < np.median(one.se) / np.median(alone.se) < 1.6
    if kind == "reduced":  # the mean loss is even, and the same in both of a pair
        assert np.allclose(one.loss[:half], one.loss[half:])


def test_scatter_of_parts_is_that_of_the_whole() -> None:
    samples = torch.randn(9, 2, 3, generator=torch.Generator().manual_seed(0))
    whole, parts = Scatter(), [Scatter(), Scatter()]
    whole.add(samples)
    parts[0].add(samples[:2])
    parts[1].add(samples[2:])
    joined = Scatter.joined(parts, samples.device)
    assert joined.count == 9 and torch.allclose(joined.error(), whole.error(), atol=1e-6)
