"""Experts: tokens that an index selected are traced back to their rows, or their layers are left out by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.cases import mostly_long
from tests.helpers.kept_steps import BATCH, EXACT, Net, check, recorded
from tests.helpers.oracle import TELLS
from tests.helpers.vision import needs_saved

WIDTH, EXPERTS, CHOSEN = 5, 4, 2


class Experts(nn.Module):
    """Two of four experts for each token, weighted by a router; ``select`` says how tokens come to an expert."""

    def __init__(self, select: str) -> None:
        super().__init__()
        self.select, self.gate = select, nn.Linear(WIDTH, EXPERTS, bias=False)
        layers = lambda: (nn.Linear(WIDTH, 7), nn.SiLU(), nn.LayerNorm(7), nn.Linear(7, WIDTH))  # noqa: E731
        self.experts = nn.ModuleList(nn.Sequential(*layers()) for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, WIDTH)
        weights, chosen = self.gate(flat).softmax(-1).topk(CHOSEN, -1)
        return getattr(self, f"_{self.select}")(x, flat, weights / weights.sum(-1, keepdim=True), chosen).view(x.shape)

    def _each(self, flat: Tensor, weights: Tensor, chosen: Tensor, take: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        out = torch.zeros_like(flat)
        for k, expert in enumerate(self.experts):
            token, place = torch.where(chosen == k)
            out = out.index_add(0, token, expert(take(token, chosen == k)) * weights[token, place, None])
        return out

    def _index(self, x: Tensor, flat: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        return self._each(flat, weights, chosen, lambda token, _: flat[token])

    def _mixtral(self, x: Tensor, flat: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        return self._each(flat, weights, chosen, lambda token, _: flat[None, token].reshape(-1, WIDTH))

    def _index_select(self, x: Tensor, flat: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        return self._each(flat, weights, chosen, lambda token, _: flat.index_select(0, token))

    def _gather(self, x: Tensor, flat: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        return self._each(flat, weights, chosen, lambda token, _: flat.gather(0, token[:, None].expand(-1, WIDTH)))

    def _mask(self, x: Tensor, flat: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        return self._each(flat, weights, chosen, lambda _, mine: flat[mine.any(-1)])

    def _mask_of_pairs(self, x: Tensor, flat: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        return self._each(flat, weights, chosen, lambda _, mine: x[mine.any(-1).view(x.shape[:2])])

    def _pairs(self, x: Tensor, flat: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        length = x.shape[1]
        return self._each(flat, weights, chosen, lambda token, _: x[token // length, token % length])

    def _twice(self, x: Tensor, flat: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """A selection of a selection."""
        turned = torch.arange(len(flat) - 1, -1, -1)
        return self._each(flat, weights, chosen, lambda token, _: flat[turned][turned[token]])

    def _sorted(self, x: Tensor, flat: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """All tokens sorted by expert, then cut."""
        order = chosen.flatten().argsort(stable=True)
        token, counts = order // CHOSEN, chosen.flatten().bincount(minlength=EXPERTS).tolist()
        parts = [expert(part) for expert, part in zip(self.experts, flat[token].split(counts), strict=True)]
        return torch.zeros_like(flat).index_add(0, token, torch.cat(parts) * weights.flatten()[order][:, None])

    def _repeated(self, x: Tensor, flat: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Each token once for each of its experts."""
        many, mine = flat.repeat_interleave(CHOSEN, 0), chosen.flatten()
        out = torch.zeros_like(many)
        for k, expert in enumerate(self.experts):
            out[mine == k] = expert(many[mine == k])
        return (out.view(-1, CHOSEN, WIDTH) * weights[..., None]).sum(1)

    def _stacked(self, x: Tensor, flat: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """One by one, which is not traced."""
        take = lambda token, _: torch.stack([flat[k] for k in [*token.tolist(), 0]])[:-1]  # noqa: E731
        return self._each(flat, weights, chosen, take)


SELECTIONS = [
    name[1:] for name in vars(Experts) if name[0] == "_" and name[1] != "_" and name not in ("_each", "_stacked")
]


class Texts(nn.Module):
    def __init__(self, select: str) -> None:
        super().__init__()
        self.embed, self.norm, self.moe = nn.Linear(2, WIDTH), nn.LayerNorm(WIDTH), Experts(select)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.embed(x.view(len(x), 3, 2)))
        return self.head((z + self.moe(self.norm(z))).mean(1))


def made(select: str) -> Callable[[], Net]:
    def make() -> Net:
        torch.manual_seed(2)  # an expert gets no token in the first batch
        return Net(Texts(select))

    return make


@needs_saved
@pytest.mark.parametrize("options", [{}, {"rank": 4}], ids=["exact", "compressed"])
@pytest.mark.parametrize("select", mostly_long(SELECTIONS, "mask", "twice", "gather"))
def test_experts_are_recorded_exactly(select: str, options: dict[str, Any]) -> None:
    module, recorder, keep = recorded(made(select), queries=["val", "self"], **options)
    assert recorder.coverage.share == 1.0, recorder.coverage.uncaptured
    assert len(recorder.capture.routed) == 3 * EXPERTS
    check(module, keep)
    for step, (_, signals, _) in enumerate(keep.steps if not options else []):
        x, y, net = module.seen[step]
        for row in range(BATCH):
            loss = module.loss(net, x[row : row + 1], y[row : row + 1]) / BATCH
            g = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)
            truth = BATCH * sum(part.square().sum() for part in g if part is not None)
            torch.testing.assert_close(signals[row, 1], truth, **EXACT)


def test_what_cannot_be_traced_is_left_out_by_name_and_the_rest_stays_exact() -> None:
    module, recorder, keep = recorded(made("stacked"))
    left = {name.removeprefix("net.") for name in recorder.coverage.uncaptured}
    assert left == {name for name, _ in module.net.named_parameters() if "experts" in name}
    assert not recorder.capture.routed
    check(module, keep, {name for name, _ in module.net.named_parameters()} - left)


@pytest.mark.skipif(TELLS, reason="this torch tells what checkpoints saved")
def test_where_what_is_saved_cannot_be_read_experts_are_left_out() -> None:
    _, recorder, _ = recorded(made("index"))
    assert all("experts" in name for name in recorder.coverage.uncaptured) and recorder.coverage.uncaptured


@needs_saved
def test_no_graph_is_held_by_the_rows_of_experts() -> None:
    _, recorder, _ = recorded(made("index"))
    assert recorder.capture.selected is None or recorder.capture.selected.grad_fn is None
