"""The fallback finds the scale of any loss, and refuses losses that compare rows; it is proposed where it helps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ine_callback import Recorder
from tests.helpers.kept_steps import BATCH, EXACT, Net, check, data, recorded, truth
from tests.helpers.oracle import TELLS, Keep, by_loop, opaque


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.t = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(()))

    def forward(self, z: Tensor) -> Tensor:
        return z * opaque(self.w) * opaque(self.t).exp()


class Lossy(Net):
    kind = ""

    def loss(self, net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        z, target = net(x), F.one_hot(y, 3).to(x.dtype)
        return {
            "l1 sum": lambda: F.l1_loss(z, target, reduction="sum"),
            "l1 mean": lambda: F.l1_loss(z, target),
            "smooth sum": lambda: F.cross_entropy(z, y, label_smoothing=0.1, reduction="sum"),
            "mse sum by hand": lambda: (z - target).square().sum() / 3,
            "logits sum": lambda: F.softplus(-z * (2 * target - 1)).sum(),
        }[self.kind]()


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", ["l1 sum", "l1 mean", "smooth sum", "mse sum by hand", "logits sum"])
def test_the_fallback_finds_the_scale_of_any_loss(kind: str, accumulate: int) -> None:
    def make() -> Net:
        net = Lossy(nn.Sequential(nn.Linear(6, 3), nn.Tanh(), Bare()))
        net.kind = kind
        return net

    module, recorder, keep = recorded(make, {"accumulate_grad_batches": accumulate}, uncaptured="fallback")
    assert recorder.coverage.share == 1.0 and not recorder.coverage.uncaptured
    module.seen = [step for step in module.seen if len(step[0]) == BATCH]
    for step, (_, signals, _) in enumerate(keep.steps):
        expected = [truth(module, k, mean="mean" in kind) for k in range(step * accumulate, (step + 1) * accumulate)]
        torch.testing.assert_close(signals[:, 0], torch.cat(expected) / accumulate, **EXACT)


def test_a_sum_over_rows_is_one_in_batches_of_any_size() -> None:
    """The factor that the first batch showed was its number of rows, and was taken for that of smaller ones."""
    torch.manual_seed(0)
    model, keep = nn.Sequential(nn.Linear(6, 3), nn.Tanh(), Bare()).double(), Keep()
    sgd, (x, y) = torch.optim.SGD(model.parameters(), lr=0.02), data()

    def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.l1_loss(net(batch[0]), F.one_hot(batch[1], 3).double(), reduction="sum")

    options = {"methods": [keep], "discount": False, "refresh_every": 1, "uncaptured": "fallback", "on_error": "raise"}
    expected = []
    with Recorder(model, sgd, len(x), {"val": (x, y)}, loss, **options) as recorder:
        for rows in torch.arange(9).split([6, 2, 1]):
            batch = x[rows], y[rows]
            expected.append(by_loop(model, loss, batch, [lambda net: loss(net, (x, y))], 1.0))
            with recorder.batch(rows, batch):
                value = loss(model, batch)
                recorder.see(value)
                value.backward()
            sgd.step()
            sgd.zero_grad()
    for (_, signals, _), right in zip(keep.steps, expected, strict=True):
        torch.testing.assert_close(signals, right[:, :1], **EXACT)


def convolution() -> nn.Module:
    """A network that is recorded by its layers' hooks or not at all."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 4, 3), nn.Tanh(), nn.Conv1d(4, 3, 4), nn.Flatten())


class Contrastive(Net):
    """``views``: two of them, joined; else one after the other, and a temperature of its own."""

    views = True

    def __init__(self) -> None:
        super().__init__(convolution())
        self.t = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def loss(self, net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if self.views:
            z, other = F.normalize(net(torch.cat([x, x + 0.1])), dim=1).chunk(2)
        else:
            z, other = F.normalize(net(x), dim=1), F.normalize(net(x + 0.1), dim=1)
        return F.cross_entropy(z @ other.T * self.t.exp() / 0.5, torch.arange(len(x)))


@pytest.mark.parametrize("views", [True, False])
def test_the_fallback_refuses_a_loss_that_compares_rows(views: bool) -> None:
    def make() -> Net:
        net = Contrastive()
        net.views = views
        return net

    _, recorder, keep = recorded(make, uncaptured="fallback")
    told = recorder.coverage.uncaptured
    assert "t" in told and all("compares rows with one another" in why for why in told.values())
    assert recorder.failed == views and len(keep.steps) == (0 if views else 4)
    sizes = {n: p.numel() for n, p in make().named_parameters()}
    assert recorder.coverage.share == pytest.approx(1 - sum(sizes[n] for n in told) / sum(sizes.values()))


def test_the_fallback_refuses_features_centred_over_the_batch() -> None:
    class Centred(Bare):
        def forward(self, z: Tensor) -> Tensor:
            return super().forward(z - z.mean(0))

    _, recorder, _ = recorded(
        lambda: Net(nn.Sequential(nn.Linear(6, 3), Centred(), nn.Linear(3, 3))), uncaptured="fallback"
    )
    assert {n for n in recorder.coverage.uncaptured if "compares rows" in recorder.coverage.uncaptured[n]} >= {
        "net.1.w"
    }


def test_with_dropout_the_fallback_is_named_as_approximate() -> None:
    _, recorder, keep = recorded(
        lambda: Net(nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.3), Bare())), uncaptured="fallback"
    )
    assert not recorder.coverage.uncaptured and len(keep.steps) == 4
    assert "without dropout" in recorder.coverage.approximate["net.2"]


class Averaged(Net):
    """The mean loss of two views, joined."""

    def loss(self, net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(net(torch.cat([x, x + 0.1])), y.repeat(2))


def test_the_fallback_takes_joined_views_of_a_loss_by_rows() -> None:
    module, _, keep = recorded(lambda: Averaged(convolution()), uncaptured="fallback")
    check(module, keep)


@pytest.mark.skipif(not TELLS, reason="this torch does not tell what activation checkpointing saved")
def test_joined_views_of_linear_layers_need_no_fallback() -> None:
    module, recorder, keep = recorded(Averaged, uncaptured="raise")
    check(module, keep)
    assert recorder.capture.bare.layouts
