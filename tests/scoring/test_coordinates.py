"""Entries of gradients: those of tied weights, and vectors that are moved from one basis into another."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ine_callback.capture import Block, Outer
from ine_callback.curvature.kfac import KFAC
from ine_callback.curvature.spectral import exponential
from ine_callback.scoring.coordinates import MANY_ROWS, BlockBasis, choose


def columns(groups: int, size: int, count: int) -> Tensor:
    return torch.linalg.qr(torch.randn(groups, size, size, dtype=torch.float64)).Q[..., :count]


def staircase(groups: int, rows: int, width: int, most: int) -> Tensor:
    product = torch.arange(1, rows + 1)[:, None] * torch.arange(1, width + 1)
    return (product <= most).expand(groups, -1, -1).flatten().nonzero()[:, 0]


@pytest.mark.parametrize("rows", [5, MANY_ROWS])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("scattered", [False, True])
def test_moved_entries_are_those_of_the_whole_gradient_between_the_new_columns(
    groups: int, scattered: bool, rows: int
) -> None:
    torch.manual_seed(0)
    index = staircase(groups, 6, 9, 10)
    if scattered:  # in no order, as a tied weight's
        index = torch.randperm(groups * 6 * 9)[: len(index)]
    before = BlockBasis(index, (columns(groups, 8, 6), columns(groups, 11, 9)))
    after = BlockBasis(staircase(groups, 7, 8, 14), (columns(groups, 8, 7), columns(groups, 11, 8)))
    x = torch.randn(rows, len(index), dtype=torch.float64)
    whole = torch.zeros(rows, groups, 8, 11, dtype=torch.float64)
    for values, place in zip(x.T, index.tolist(), strict=True):
        g, rest = divmod(place, 6 * 9)
        left, right = before.sides[0][g, :, rest // 9], before.sides[1][g, :, rest % 9]  # type: ignore[index]
        whole[:, g] += values[:, None, None] * left[:, None] * right[None]
    torch.testing.assert_close(after.moved(x, before), after.of_vectors(whole))


def test_a_tied_weight_has_single_entries_for_which_its_fisher_is_exact() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(6, 4))
    block, kfac = Block("w", (weight,), (1, 6, 4), tied=True), KFAC()
    for _ in range(2):
        kfac.observe(block, Outer(torch.randn(9, 1, 1, 4).exp(), torch.randn(9, 1, 1, 6)), terms=9.0)
    kfac.end_step()
    basis = choose({block: 1.0}, kfac, 7, torch.device("cpu"))[block]
    discount = kfac.operator(block, exponential(0.1)).weight
    assert discount is not None
    entries = basis.of_vectors(discount[None])[0]
    torch.testing.assert_close(entries.sort().values, discount.flatten().sort().values[:7])  # of the largest variance
    torch.testing.assert_close(basis.diagonal(kfac, block, exponential(0.1)), entries)
