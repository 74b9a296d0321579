"""Functions of a block's Fisher in its eigenbasis, against dense matrix functions in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ine_callback.curvature.kfac import KFAC
from ine_callback.curvature.spectral import Spectrum, exponential, resolvent, unrolled
from tests.helpers.factors import block, dense, observed, outer

EXACT = {"rtol": 1e-10, "atol": 1e-12}


def one(fisher: Tensor) -> Tensor:
    return torch.eye(len(fisher), dtype=torch.float64)


DENSE: dict[str, tuple[Spectrum, Callable[[Tensor], Tensor]]] = {
    "exponential": (exponential(0.3, 0.1), lambda f: torch.linalg.matrix_exp(-(0.3 * f + 0.1 * one(f)))),
    "resolvent": (resolvent(0.2), lambda f: torch.linalg.inv(f + 0.2 * one(f))),
    "unrolled": (
        unrolled(0.01, 7),
        lambda f: torch.stack([0.01 * torch.linalg.matrix_power(one(f) - 0.01 * f, t) for t in range(7)]).sum(0),
    ),
}


@pytest.mark.parametrize("name", DENSE)
def test_a_spectrum_is_the_same_function_of_the_dense_fisher(name: str) -> None:
    spectrum, function = DENSE[name]
    grad_sample = outer(rows=6, positions=2, out=3, inputs=4)
    own, kfac = observed(grad_sample, terms=6.0)
    operator = kfac.operator(own, spectrum)
    left, right = grad_sample.covariances((True, True))
    expected = function(torch.kron(6.0 * left[0], right[0]))
    torch.testing.assert_close(dense(operator, own.layout), expected, **EXACT)
    gradients = grad_sample.gradient(slice(None)).flatten(1)
    quadratic = torch.einsum("bi,ij,bj->b", gradients, expected, gradients)
    torch.testing.assert_close(operator.quadratic(grad_sample), quadratic, **EXACT)


def test_without_curvature_the_unrolled_spectrum_is_rate_times_steps() -> None:
    torch.testing.assert_close(unrolled(0.5, 3)(torch.zeros(2)), torch.full((2,), 1.5))


def test_a_block_that_was_never_observed_keeps_its_gradient() -> None:
    grad_sample = outer()
    v = torch.randn(1, *grad_sample.layout, dtype=torch.float64)
    torch.testing.assert_close(KFAC().operator(block(grad_sample), resolvent(0.1)).apply(v), v)
