"""Weights that are computed from parameters, as adapters do it: every row's gradients against a loop over the rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from ine_callback.capture.bare import pullback
from tests.helpers.oracle import Setting, check, run
from tests.helpers.vision import needs_saved, parameter

SERIES = (5, 4)


class Adapted(nn.Module):
    """A linear layer, a use of computed weights between, and a head: [b, 5, 4] -> [b, 3]."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        for name, shape in shapes.items():
            self.register_parameter(name, parameter(*shape))
        self.register_buffer("fixed", torch.randn(4, 4))

    def use(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.use(self.first(x))).mean(1))


def adapted(use: Callable[[Any, Tensor], Tensor], **shapes: tuple[int, ...]) -> Callable[[], nn.Module]:
    return lambda: type("Adapting", (Adapted,), {"use": use})(**shapes)


class DoRA(nn.Module):
    """Liu et al. 2024 as PEFT has it: the norm of W + B A, from calls with the identity, has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.down, self.up = nn.Linear(4, 4), nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)
        nn.init.zeros_(self.up.weight)
        self.base.requires_grad_(False)
        self.magnitude, self.head = nn.Parameter(self.base.weight.norm(dim=1)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        identity = torch.eye(4, dtype=x.dtype)
        change = self.up(self.down(identity)).T.detach()
        scale = (self.magnitude / (self.base.weight + change).norm(dim=1)).view(1, -1)
        result = F.linear(x, self.base.weight)
        x = self.base(x) + (scale - 1) * result + scale * self.up(self.down(x)) * 0.5
        return self.head(torch.tanh(x).mean(1))


class Prompted(nn.Module):
    """p-tuning: an encoder makes four prompts from a table, for all rows; put before their words."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(4, 6), nn.Linear(4, 3)
        self.encoder = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.LayerNorm(5), nn.Linear(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        prompts = self.encoder(self.table(torch.arange(4)[None])).repeat(len(x), 1, 1)
        return self.head(torch.tanh(torch.cat([prompts, x], 1)).cumsum(1).tanh().mean(1))


class Words(nn.Module):
    """A table of words that is computed: low rank, or with other entries for some words."""

    def __init__(self, low_rank: bool) -> None:
        super().__init__()
        self.low_rank, self.head = low_rank, nn.Linear(4, 3)
        self.register_buffer("fixed", torch.randn(7, 4))
        self.a, self.b = (parameter(7, 2), parameter(2, 4)) if low_rank else (parameter(2, 4), parameter(4))

    def forward(self, ids: Tensor) -> Tensor:
        if self.low_rank:
            table = self.fixed + F.dropout(self.a, 0.0) @ self.b
        else:
            table = self.fixed.index_copy(0, torch.tensor([1, 2]), self.a) * self.b
        return self.head(torch.tanh(F.embedding(ids, table, padding_idx=0)))


class Kernels(nn.Module):
    """Convolutions with low-rank kernels, one of them transposed: [b, 4, 5] -> [b, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.other = parameter(6, 2), parameter(2, 6), parameter(4, 6, 2)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv1d(x, (self.one @ self.two).view(6, 2, 3), padding=1, groups=2)
        x = F.conv_transpose1d(torch.tanh(x)[:, :4], self.other.exp(), stride=2)
        return self.head(torch.tanh(x).mean(2))


class Normed(nn.Module):
    """A layer of torch whose weight a parametrization computes."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(x)).mean(1))


def rotated(m: Any, x: Tensor) -> Tensor:
    """OFT: Cayley's rotation of two blocks of the input."""
    q = m.q - m.q.mT
    one = torch.eye(2, dtype=x.dtype)
    rotations = torch.linalg.solve(one - q, one + q)
    blocks = x.unflatten(-1, (2, 2))
    return torch.einsum("...rk,rkc->...rc", blocks, rotations).flatten(-2)


USES = {
    "Kronecker product": adapted(lambda m, x: x @ torch.kron(m.a, m.b), a=(2, 2), b=(2, 2)),
    "singular values": adapted(lambda m, x: x @ (m.a * m.e).T @ m.b.T, a=(3, 4), b=(4, 3), e=(3, 1)),
    "rotations": adapted(rotated, q=(2, 2, 2)),
    "Householder": adapted(lambda m, x: x - 2 * (x @ F.normalize(m.u, dim=0)) @ m.u.T, u=(4, 1)),
    "spectrum": adapted(lambda m, x: x @ torch.fft.ifft2(m.f.diag()).real, f=(4,)),
    "matrix on the left": adapted(lambda m, x: (m.w @ x.mT).mT + (m.w.tanh() @ x[:, 0].T).T[:, None], w=(4, 4)),
    "matrices of groups": adapted(lambda m, x: torch.bmm(x.permute(2, 0, 1), m.w).permute(1, 2, 0), w=(4, 5, 5)),
    "entries by row": adapted(lambda m, x: x * m.scale[(x[:, 0, 0] > 0).long()][:, None], scale=(2, 4)),
    "flipped": adapted(lambda m, x: x + m.shift.flip(0).cumsum(0), shift=(4,)),
}
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(4, 6)),
    "weight_norm of a whole, no bias": lambda: parametrizations.weight_norm(nn.Linear(4, 6, bias=False), dim=None),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(4, 6), "weight", "cayley"),
    "weight_norm of old": lambda: nn.utils.weight_norm(nn.Linear(4, 6)),
    "pruned weight and bias": lambda: prune.random_unstructured(
        prune.l1_unstructured(nn.Linear(4, 6), "weight", amount=0.3), "bias", amount=0.5
    ),
}


def factored(m: Any, x: Tensor) -> Tensor:
    """LoHa."""
    return F.linear(x, m.fixed + (m.a @ m.b) * (m.c @ m.d))


SETTINGS = [
    Setting("DoRA", DoRA, SERIES),
    Setting("p-tuning", Prompted, SERIES),
    Setting("products of factors", adapted(factored, a=(4, 2), b=(2, 4), c=(4, 2), d=(2, 4)), SERIES),
    *(Setting(name, use, SERIES) for name, use in USES.items()),
    Setting("low-rank table", lambda: Words(True), (5,), words=True, each_token=True),
    Setting("table with other entries", lambda: Words(False), (5,), words=True, each_token=True),
    Setting("kernels", Kernels, (4, 5)),
    *(Setting(name, lambda layer=layer: Normed(layer()), SERIES) for name, layer in LAYERS.items()),  # type: ignore[misc]
    Setting(
        "weight_norm, convolution",
        lambda: Normed(parametrizations.weight_norm(nn.Conv1d(5, 4, 3, padding=1))),
        (5, 6),
    ),
]


@needs_saved
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("rows", [4, 5])
@pytest.mark.parametrize("setting", SETTINGS, ids=[s.name for s in SETTINGS])
def test_rows_gradients_are_those_of_a_loop(setting: Setting, rows: int) -> None:
    """Also where the batch has as many rows as the weights, or a row has positions (5)."""
    torch.manual_seed(0)
    check(run(setting, batch_size=rows, steps=2))


class Hadamard(torch.autograd.Function):
    """A product of products with a backward pass of its own, as PEFT's LoHa has it."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        ctx.save_for_backward(a, b, c, d)
        return (a @ b) * (c @ d)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        a, b, c, d = ctx.saved_tensors
        one, other = grad * (c @ d), grad * (a @ b)
        return one @ b.T, a.T @ one, other @ d.T, c.T @ other


@needs_saved
def test_a_function_that_is_known_to_compute_alone_is_called_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {"a": (4, 2), "b": (2, 4), "c": (4, 2), "d": (2, 4)}
    use = adapted(lambda m, x: F.linear(x, m.fixed + Hadamard.apply(m.a, m.b, m.c, m.d)), **shapes)
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="it is used by .*HadamardBackward"):
        run(Setting("LoHa", use, SERIES), uncaptured="warn")
    monkeypatch.setattr(pullback, "ONLY_COMPUTE", {f"{__name__}.Hadamard"})
    check(run(Setting("LoHa", use, SERIES)))
