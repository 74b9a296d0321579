"""What a fit's methods may ask for: gradients against a pass for each row, queries, features, no trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ine_callback.errors import CaptureError, InfluenceError
from ine_callback.methods import FitContext, PerSamplePass
from ine_callback.queries import LossQuery
from ine_callback.queries.module_loss import ModuleLoss
from ine_callback.queries.sources import DataSource
from tests.helpers.contexts import (
    CLASSES,
    EXACT,
    LABELS,
    ROWS,
    VECTORS,
    WIDTH,
    Loss,
    Tied,
    Twice,
    bound,
    choices,
    entropy,
    explicit,
    names_of,
    numbers,
)
from tests.helpers.oracle import TELLS
from tests.helpers.vision import Vision

TERMS = 5


class Image(nn.Sequential):
    def __init__(self) -> None:
        norm = nn.BatchNorm2d(3)
        super().__init__(
            nn.Conv2d(2, 3, 3, stride=2), norm, nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(12, CLASSES)
        )
        norm.running_mean.copy_(numbers(3))


def of_tokens(module: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]).flatten(0, 1), batch[1].flatten())


def weighted(module: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1], torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64))


def squares(module: nn.Module, batch: Any) -> Tensor:
    return F.mse_loss(module(batch[0]).squeeze(-1), batch[1])


def scaled(module: nn.Module, batch: Any) -> Tensor:
    """A constant is no part of a row's own loss, be it on purpose or the number of a batch's rows."""
    size = len(batch[1]) if len(batch[1]) > 1 else 0.5
    return F.mse_loss(module(batch[0]).squeeze(-1), batch[1], reduction="sum") / (2 * size)


def ragged() -> Tensor:
    """Targets of which rows ignore different numbers, one all."""
    targets = choices(7, ROWS, TERMS)
    targets[torch.arange(TERMS) >= 1 + torch.arange(ROWS)[:, None] % TERMS] = -100
    targets[3] = -100
    return targets


class Outside(nn.Module):
    """A weight that is also used outside of its own module's call."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.inner(x).tanh() + x @ self.inner.weight)
        return out


IMAGES, IDS = numbers(ROWS, 2, 5, 5), choices(7, ROWS, TERMS)
PROBLEMS: dict[str, tuple[Callable[[], nn.Module], Loss, tuple[Tensor, Tensor]]] = {
    "linear": (
        lambda: nn.Sequential(nn.Linear(WIDTH, 6), nn.Tanh(), nn.Linear(6, CLASSES)),
        entropy,
        (VECTORS, LABELS),
    ),
    "squares": (lambda: nn.Linear(WIDTH, 1), squares, (VECTORS, numbers(ROWS))),
    "scaled": (lambda: nn.Linear(WIDTH, 1), scaled, (VECTORS, numbers(ROWS))),
    "class weights": (lambda: nn.Linear(WIDTH, CLASSES), weighted, (VECTORS, LABELS)),
    "convolution": (Image, entropy, (IMAGES, LABELS)),
    "embedding": (lambda: nn.Sequential(nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 7)), of_tokens, (IDS, IDS)),
    "ragged": (lambda: nn.Sequential(nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 7)), of_tokens, (IDS, ragged())),
    "tied": (Tied, of_tokens, (IDS, IDS.flip(1))),
    **({"bare parameters": (Vision, entropy, (numbers(ROWS, 5, 4), LABELS))} if TELLS else {}),
    **({"used outside": (Outside, entropy, (VECTORS, LABELS))} if TELLS else {}),
    "one layer twice": (Twice, entropy, (VECTORS, LABELS)),
}


def context_of(name: str, **options: Any) -> FitContext:
    make, loss, data = PROBLEMS[name]
    torch.manual_seed(0)
    return bound(make().double(), loss, data, **options)


@pytest.mark.parametrize("name", PROBLEMS)
def test_gradients_are_those_of_each_row_alone(name: str) -> None:
    context, (_, loss, data) = context_of(name), PROBLEMS[name]
    names = names_of(context.module)
    truth = explicit(context.module, loss, data, list(names.values()))
    norms = sum((g.flatten(1).square().sum(1) for g in truth.values()), torch.zeros(ROWS).double())
    rows: list[Tensor] = []
    for part, gradients in context.per_sample():
        rows.append(part)
        for block in gradients:
            expected = block.to_layout([truth[names[p]][part] for p in block.parameters])
            torch.testing.assert_close(gradients.formed(block), expected, **EXACT)
        assert {names[p] for block in gradients for p in block.parameters} == set(truth)
        torch.testing.assert_close(gradients.squared_norms(), norms[part], **EXACT)
        directions = {block: numbers(2, *block.layout) for block in gradients}
        products = sum(
            torch.einsum("bi,qi->bq", gradients.formed(block).flatten(1), direction.flatten(1))
            for block, direction in directions.items()
        )
        torch.testing.assert_close(gradients.products(directions), products, **EXACT)
    assert torch.cat(rows).tolist() == list(range(ROWS)) and not context.notes


@pytest.mark.parametrize("name", ["linear", "convolution", "tied"])
def test_query_gradients_are_autograds(name: str) -> None:
    context, (_, loss, data) = context_of(name), PROBLEMS[name]
    for part, gradients in context.per_sample(PerSamplePass(rows=(2, 1))):
        products = gradients.products(context.query_gradients())
        values, found = context.query_values(), context.query_gradients()
        assert part.tolist() == [2, 1] and set(found) == set(gradients)
    module = context.module.eval()
    parameters = list(module.parameters())
    wanted = []
    for k, (part, factor) in enumerate(((slice(9), 1.0), (slice(9, 20), 2.0))):
        value = factor * loss(module, tuple(each[part] for each in data))
        torch.testing.assert_close(values[k], value.detach(), **EXACT)
        wanted.append(torch.autograd.grad(value, parameters))
    for block, gradient in found.items():
        places = [next(k for k, p in enumerate(parameters) if p is one) for one in block.parameters]
        expected = block.to_layout([torch.stack([each[k] for each in wanted]) for k in places])
        torch.testing.assert_close(gradient, expected, **EXACT)
    truth = explicit(module, loss, tuple(each[:3] for each in data), list(names_of(module).values()))
    for row, line in zip((2, 1), products, strict=True):
        own = torch.stack([sum((g * t[row]).sum() for g, t in zip(q, truth.values(), strict=True)) for q in wanted])
        torch.testing.assert_close(line, own, **EXACT)


@pytest.mark.parametrize("name", ["linear", "class weights"])
def test_all_labels_give_the_exact_fisher(name: str) -> None:
    """Of each row Σ_c g_c g_cᵀ = Σ_c p(c) ∇log p(c) ∇log p(c)ᵀ; its weight in the batch is no part of its own loss."""
    context, data = context_of(name), PROBLEMS[name][2]
    module, names = context.module, names_of(context.module)
    found = torch.zeros(ROWS, CLASSES, sum(p.numel() for p in names)).double()
    seen: dict[int, int] = {}
    for part, gradients in context.per_sample(PerSamplePass("expected")):
        parts = {names[block.parameters[0]]: gradients.formed(block).flatten(1) for block in gradients}
        draw = seen.get(int(part[0]), 0)
        seen[int(part[0])] = draw + 1
        found[part, draw] = torch.cat([parts[name] for name in sorted(parts)], 1)
    assert set(seen.values()) == {CLASSES}
    order = {names[block.parameters[0]]: block for block in context.table}
    for row in (0, 7, ROWS - 1):
        log_p = F.log_softmax(module(data[0][row : row + 1]), 1)[0]
        fisher = torch.zeros(found.shape[2], found.shape[2]).double()
        for c in range(CLASSES):
            flat = []
            for name in sorted(order):
                gradient = torch.autograd.grad(log_p[c], order[name].parameters, retain_graph=True)
                flat.append(order[name].to_layout([g[None] for g in gradient]).flatten())
            fisher += log_p[c].exp() * torch.outer(torch.cat(flat), torch.cat(flat))
        torch.testing.assert_close(found[row].mT @ found[row], fisher.detach(), **EXACT)


def test_drawn_labels_are_the_same_for_the_same_seed() -> None:
    def norms(seed: int) -> Tensor:
        context = context_of("linear", seed=seed)
        return torch.cat([g.squared_norms() for _, g in context.per_sample(PerSamplePass("sampled"))])

    assert torch.equal(norms(0), norms(0)) and not torch.equal(norms(0), norms(1))
    with pytest.raises(InfluenceError, match="labels='guessed' is none of true, sampled, expected"):
        PerSamplePass("guessed")  # type: ignore[arg-type]


def test_features_are_a_layers_inputs() -> None:
    context = context_of("convolution")
    found = dict(zip(("rows", "features"), map(torch.cat, zip(*context.features("5"), strict=True)), strict=True))
    module = context.module.eval()
    torch.testing.assert_close(found["features"], nn.Sequential(*list(module)[:5])(IMAGES).detach(), **EXACT)
    assert found["rows"].tolist() == list(range(ROWS))
    (pair,) = context.features("0", [4, 2])
    assert torch.equal(pair[1], IMAGES[[4, 2]].flatten(1)) and pair[0].tolist() == [4, 2]
    with pytest.raises(CaptureError, match=r"layer 'inner' was called 2 times for a batch"):
        next(iter(context_of("one layer twice").features("inner")))


FIRST = {
    "used outside": "inner",
    "bare parameters": "embed",
    "squares": "",
    "scaled": "",
    "class weights": "",
    "tied": "embed",
    "one layer twice": "out",
}  # a layer used once


def state_of(module: nn.Module) -> list[Any]:
    hooks = [
        len(kept) for m in module.modules() for name, kept in vars(m).items() if "hooks" in name and kept is not None
    ]
    tensors = [t.clone() for t in (*module.parameters(), *module.buffers())]
    rest = [(m.training, sorted(vars(m))) for m in module.modules()]
    return [tensors, [p.grad for p in module.parameters()], torch.get_rng_state(), hooks, rest]


@pytest.mark.parametrize("name", PROBLEMS)
def test_passes_leave_no_trace(name: str) -> None:
    context = context_of(name)
    for p in context.module.parameters():
        p.grad = torch.ones_like(p)
    before, gradients = state_of(context.module), [p.grad for p in context.module.parameters()]
    for what in ("true", "sampled"):
        for _ in context.per_sample(PerSamplePass(what)):  # type: ignore[arg-type]
            context.query_gradients()
    list(context.features(FIRST.get(name, "0")))
    after = state_of(context.module)
    for here, there in zip(before[0] + [before[2]], after[0] + [after[2]], strict=True):
        assert torch.equal(here, there)
    assert before[3:] == after[3:]
    assert all(a is b and bool((a == 1).all()) for a, b in zip(gradients, after[1], strict=True))


def test_the_layers_asked_for_alone() -> None:
    context = context_of("linear", layers=["2"])
    for _, gradients in context.per_sample():
        assert [block.name for block in gradients] == ["2.weight"]
    assert any("layers= leaves out" in note for note in context.notes)


def test_losses_of_validation_are_queries_too() -> None:
    """Queries come bound; here by a module's own step."""
    import lightning as L

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(WIDTH, CLASSES)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        validation_step = training_step

    module = Module().double()
    loader = DataLoader(TensorDataset(VECTORS, LABELS), batch_size=16)
    losses = ModuleLoss(module, "Test")
    source = DataSource("Test", losses, loader, [loader], 10**6)
    context = FitContext(module, LossQuery("val").bind("val", source), source, losses.training)
    total = torch.zeros(1).double()
    for _, gradients in context.per_sample():
        total += gradients.products(context.query_gradients()).sum(0)
    (direction,) = context.query_gradients().values()
    torch.testing.assert_close(total[0] / ROWS, direction.square().sum(), **EXACT)  # the training rows are the query's
