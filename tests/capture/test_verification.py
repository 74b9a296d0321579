"""Verification finds wrong gradients, also later and in the fallback; what does not stay in ``grad`` does not count."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ine_callback import InfluenceCallback, Recorder
from tests.helpers.oracle import Keep

ROWS, BATCH = 24, 6
EXACT = {"rtol": 1e-8, "atol": 1e-10}


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(ROWS, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (ROWS,), generator=generator)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


class Net(L.LightningModule):
    """Cross entropy; ``seen`` keeps what each step was differentiated at: inputs, targets and weights."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = (net or mlp()).double()
        self.seen: list[tuple[Tensor, Tensor, nn.Module]] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def differentiate(self, x: Tensor, y: Tensor) -> Tensor:
        if self.training and not torch.is_inference_mode_enabled():
            self.seen.append((x.detach().clone(), y, copy.deepcopy(self.net)))
        return self.loss(self.net, x, y)

    def loss(self, net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(net(x), y)

    def query(self, net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return self.loss(net, x, y)

    def training_step(self, batch: Any, index: int) -> Any:
        return self.differentiate(*batch)

    def validation_step(self, batch: Any, index: int) -> Tensor:
        return self.query(self.net, *batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module: L.LightningModule, callbacks: list[L.Callback], **trainer: Any) -> None:
    x, y = data()
    torch.manual_seed(1)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options: dict[str, Any] = {"max_epochs": 1, "accelerator": "cpu", "enable_checkpointing": False, **quiet, **trainer}
    train = DataLoader(TensorDataset(x, y), BATCH)
    L.Trainer(callbacks=callbacks, **options).fit(module, train, DataLoader(TensorDataset(x, y), ROWS))


def recorded(make: Callable[[], Net], trainer: dict[str, Any] | None = None, **options: Any) -> tuple[Net, Any, Keep]:
    """The module, its callback and its steps; the weights must be those of a plain run."""
    keep, plain, module = Keep(), make(), make()
    fit(plain, [], **trainer or {})
    settings = {"queries": "val", "methods": [keep], "discount": False, "refresh_every": 1, "rank": None}
    callback = InfluenceCallback(**{**settings, **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(module, [callback], **trainer or {})
    for one, other in zip(plain.parameters(), module.parameters(), strict=True):
        assert torch.equal(one, other)
    module.seen = [step for step in module.seen if len(step[0]) == BATCH or len(step[0]) == 2 * BATCH]
    return module, callback._recorder, keep


def truth(module: Net, step: int, names: set[str] | None = None, mean: bool = True) -> Tensor:
    """<v, each row's contribution> of one step, of the named parameters, by a pass a row."""
    x, y, net = module.seen[step]
    parameters = [p for n, p in net.named_parameters() if names is None or n in names]
    net.eval()
    v = torch.autograd.grad(module.query(net, *data()), parameters, allow_unused=True)
    out = []
    for row in range(len(x)):
        value = module.loss(net, x[row : row + 1], y[row : row + 1]) / (len(x) if mean else 1)
        g = torch.autograd.grad(value, parameters, allow_unused=True)
        out.append(sum((a * b).sum() for a, b in zip(v, g, strict=True) if a is not None and b is not None))
    return torch.stack([torch.as_tensor(one, dtype=torch.float64) for one in out]).detach()


def check(module: Net, keep: Keep, names: set[str] | None = None, steps: int = 4) -> None:
    assert len(keep.steps) == steps == len(module.seen)
    for step, (_, signals, _) in enumerate(keep.steps):
        torch.testing.assert_close(signals[:, 0], truth(module, step, names), **EXACT)


# -- wrong factors -----------------------------------------------------------------------------------------------------


class Tripled(nn.Linear):
    def forward(self, z: Tensor) -> Tensor:
        return super().forward(z) * 3


class Equalized(nn.Linear):
    """StyleGAN's mapping layer: weights of unit size, scaled in the forward pass."""

    def forward(self, z: Tensor) -> Tensor:
        return F.linear(z, self.weight * 0.01, self.bias * 0.01)


class ScaledStd(nn.Conv1d):
    """nfnet's convolution: the weight is standardised in the forward pass."""

    def forward(self, z: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2), keepdim=True)) / (w.var((1, 2), keepdim=True) + 1e-6).sqrt()
        return F.conv1d(z, w, self.bias)


class Shift(nn.LayerNorm):
    def forward(self, z: Tensor) -> Tensor:
        return z * self.weight * 3 + self.bias * 3


def _wrong(kind: str) -> nn.Module:
    if kind == "all tripled":
        return nn.Sequential(Tripled(6, 8), nn.Tanh(), Tripled(8, 3))
    if kind == "standardised":
        convs = [nn.Unflatten(1, (1, 6)), ScaledStd(1, 4, 3), nn.Tanh(), ScaledStd(4, 4, 2), nn.Flatten()]
        return nn.Sequential(*convs, nn.Linear(12, 3))
    layers: dict[str, Callable[[int, int], nn.Module]] = {"tripled": Tripled, "equalized": Equalized}
    if kind == "shift":
        return nn.Sequential(nn.Linear(6, 8), Shift(8), nn.Tanh(), Shift(8), nn.Linear(8, 3))
    return nn.Sequential(layers[kind](6, 8), nn.Tanh(), layers[kind](8, 8), nn.Tanh(), nn.Linear(8, 3))


@pytest.mark.parametrize("kind", ["tripled", "equalized", "standardised", "shift"])
def test_wrong_layers_are_found_even_if_they_are_the_majority(kind: str) -> None:
    module, recorder, keep = recorded(lambda: Net(_wrong(kind)))
    own = (Tripled, Equalized, ScaledStd, Shift)
    wrong = {n for n, m in module.net.named_modules() if isinstance(m, own)}
    names = {n for n, _ in module.net.named_parameters()}
    # a standardised weight's bias is used as it is
    kept = {n for n in names if n.rpartition(".")[0] not in wrong or (kind == "standardised" and n.endswith("bias"))}
    left = {n.removeprefix("net.") for n in recorder.coverage.uncaptured}
    assert left >= names - kept and not left & {n for n in kept if n.rpartition(".")[0] not in wrong}
    check(module, keep, names - left)


def test_layers_that_are_all_wrong_by_one_factor_are_found() -> None:
    _, recorder, keep = recorded(lambda: Net(_wrong("all tripled")))
    assert not keep.steps and recorder.failed and recorder.coverage.share == 0


@pytest.mark.parametrize("clip", ["after the batch", "inside of it"])
def test_clipping_in_a_bare_loop_does_not_change_what_verification_finds(clip: str) -> None:
    """Verification reads gradients before they are clipped."""
    torch.manual_seed(0)
    net, (x, y) = nn.Sequential(Equalized(6, 8), nn.Tanh(), nn.Linear(8, 3)).double(), data()
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    loss = lambda module, batch: F.cross_entropy(module(batch[0]), batch[1])  # noqa: E731
    recorder = Recorder(net, sgd, ROWS, {"val": (x, y)}, loss, on_error="raise")
    with recorder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with recorder.batch(torch.arange(ROWS), (x, y)):
            loss(net, (x, y)).backward()
            if clip == "inside of it":
                torch.nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
                sgd.step()
        if clip == "after the batch":
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
            sgd.step()
    assert set(recorder.coverage.uncaptured) == {"0.weight", "0.bias"}


# -- several backward passes in one step -------------------------------------------------------------------------------


class Adversarial(Net):
    """Inner passes in the training step, in some of the steps; ``kind`` says how."""

    kind, first = "", 1

    def training_step(self, batch: Any, index: int) -> Any:
        x, y = batch
        if index >= self.first:
            x = x + 0.1 * getattr(self, self.kind)(x, y)
        return self.differentiate(x, y)

    def _leaf(self, x: Tensor) -> Tensor:
        return x.detach().clone().requires_grad_()

    def thrown_away(self, x: Tensor, y: Tensor) -> Tensor:
        leaf = self._leaf(x)
        F.cross_entropy(self(leaf), y).backward()
        self.zero_grad()
        assert leaf.grad is not None
        return leaf.grad.sign()

    def zeroed(self, x: Tensor, y: Tensor) -> Tensor:
        leaf = self._leaf(x)
        F.cross_entropy(self(leaf), y).backward()
        self.zero_grad(set_to_none=False)
        assert leaf.grad is not None
        return leaf.grad.sign()

    def by_grad(self, x: Tensor, y: Tensor) -> Tensor:
        leaf = self._leaf(x)
        (g,) = torch.autograd.grad(F.cross_entropy(self(leaf), y), leaf)
        return g.sign()

    def projected(self, x: Tensor, y: Tensor) -> Tensor:
        """PGD: three steps."""
        moved = torch.zeros_like(x)
        for _ in range(3):
            moved = (moved + 0.5 * self.by_grad(x + moved, y)).clamp(-0.8, 0.8)
        return moved

    def only_inputs(self, x: Tensor, y: Tensor) -> Tensor:
        leaf = self._leaf(x)
        F.cross_entropy(self(leaf), y).backward(inputs=[leaf])
        assert leaf.grad is not None
        return leaf.grad.sign()

    def differentiable(self, x: Tensor, y: Tensor) -> Tensor:
        """create_graph, though nothing comes of it: what is added is detached."""
        leaf = self._leaf(x)
        (g,) = torch.autograd.grad(F.cross_entropy(self(leaf), y), leaf, create_graph=True)
        return g.detach()

    def by_weights(self, x: Tensor, y: Tensor) -> Tensor:
        """Gradients by the weights themselves, as GradNorm and MAML take them."""
        found = torch.autograd.grad(F.cross_entropy(self(x), y), list(self.parameters()))
        return torch.full_like(x, float(found[0].mean()))


KINDS = ["thrown_away", "zeroed", "by_grad", "projected", "only_inputs", "differentiable", "by_weights"]


@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_inner_passes_whose_gradients_do_not_stay_do_not_count(kind: str, first: int) -> None:
    def make() -> Net:
        net = Adversarial()
        net.kind, net.first = kind, first
        return net

    module, recorder, keep = recorded(make)
    check(module, keep)
    assert recorder.coverage.share == 1.0


class ByHand(Net):
    """Two passes of one batch, optimized by hand; ``between`` clears what the first left."""

    between = False

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:
        optimizer: Any = self.optimizers()
        x, y = batch
        optimizer.zero_grad()
        self.manual_backward(self.loss(self.net, x, y) / 2)
        if self.between:
            optimizer.zero_grad()
        self.manual_backward(self.differentiate(x, y) / (1 if self.between else 2))
        optimizer.step()


@pytest.mark.parametrize("between", [False, True])
def test_manual_backward_passes_count_unless_cleared(between: bool) -> None:
    def make() -> Net:
        net = ByHand()
        net.between = between
        return net

    module, _, keep = recorded(make)
    check(module, keep)


class LazyR1(Net):
    """A gradient penalty in every other step only: its double backward reaches weights through no layer's call."""

    def training_step(self, batch: Any, index: int) -> Any:
        x, y = batch
        value = self.differentiate(x, y)
        if index >= 2:
            leaf = x.detach().clone().requires_grad_()
            (g,) = torch.autograd.grad(self(leaf).sum(), leaf, create_graph=True)
            value = value + g.square().sum(1).mean()
        return value


def test_a_gradient_penalty_that_begins_later_is_named_with_the_step() -> None:
    module, recorder, keep = recorded(LazyR1)
    assert len(keep.steps) == 2  # then nothing is left
    check(module, keep, steps=2) if len(module.seen) == 2 else None
    for step in range(2):
        torch.testing.assert_close(keep.steps[step][1][:, 0], truth(module, step), **EXACT)
    assert recorder.failed and recorder.coverage.share < 0.05
    told = " ".join(recorder.coverage.uncaptured.values())
    assert "create_graph=True" in told and "from step 2 on (verified until step 1)" in told


# -- what joins later --------------------------------------------------------------------------------------------------


class Joining(nn.Module):
    """Something more from the third call in training on; ``kind`` says what."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.more, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.bare = nn.Parameter(torch.ones(8))
        self.kind, self.stage = kind, 0

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        if self.stage and self.kind == "layer":
            h = h + self.more(h)
        if self.stage and self.kind == "bare":
            h = h * self.bare
        if self.stage and self.kind == "borrowed":
            h = h + F.linear(h, self.more.weight)
        if self.kind == "borrowed":
            h = self.more(h)
        if self.kind == "again":
            for _ in range(1 + self.stage):
                h = torch.tanh(self.more(h))
        return self.head(h)


class Curriculum(Net):
    begins = 2

    def query(self, net: Any, x: Tensor, y: Tensor) -> Tensor:
        """Of the whole network, whatever the training is at."""
        stage, net.stage = net.stage, 1
        value = self.loss(net, x, y)
        net.stage = stage
        return value

    def training_step(self, batch: Any, index: int) -> Any:
        self.net.stage = int(index >= self.begins)
        return self.differentiate(*batch)


@pytest.mark.parametrize("kind", ["layer", "again"])
def test_a_layer_that_joins_is_recorded_from_then_on(kind: str) -> None:
    module, recorder, keep = recorded(lambda: Curriculum(Joining(kind)))
    check(module, keep)
    assert recorder.coverage.share == 1.0


def test_a_layer_that_joins_between_refreshes_is_recorded_from_then_on() -> None:
    module, recorder, keep = recorded(lambda: Curriculum(Joining("layer")), refresh_every=50, trainer={"max_epochs": 2})
    names = {"more.weight", "more.bias"}
    found = {block.name.removeprefix("net.") for block in recorder.signals.table}
    assert names <= found | {"more.bias"} and recorder.coverage.share == 1.0
    torch.testing.assert_close(keep.steps[2][1][:, 0], truth(module, 2), **EXACT)


def test_a_bare_parameter_that_joins_is_named_with_its_fraction() -> None:
    module, recorder, _ = recorded(lambda: Curriculum(Joining("bare")), trainer={"max_epochs": 2})
    (name,) = recorder.coverage.uncaptured
    assert name == "net.bare" and "no layer function for Joining" in recorder.coverage.uncaptured[name]
    sizes = [p.numel() for p in module.parameters()]
    assert recorder.coverage.share == pytest.approx(1 - 8 / sum(sizes))
    assert any("net.bare" in note and "from step" in note for note in recorder.coverage.notes)


def test_a_bare_parameter_that_joins_is_recorded_by_the_fallback() -> None:
    class RecordedRows(Curriculum):
        """The fallback asks for single rows with ``batch_idx`` 0: the stage stays that of the step."""

        def training_step(self, batch: Any, index: int) -> Any:
            if len(batch[0]) == BATCH and self.training:
                self.net.stage = int(index >= self.begins)
            return self.differentiate(*batch)

    module, recorder, keep = recorded(
        lambda: RecordedRows(Joining("bare")), trainer={"max_epochs": 2}, uncaptured="fallback"
    )
    assert not recorder.coverage.uncaptured and recorder.coverage.share == 1.0
    torch.testing.assert_close(keep.steps[-1][1][:, 0], truth(module, -1), **EXACT)


def test_a_weight_borrowed_later_is_found_and_named() -> None:
    """No call changes: the verification at a later refresh finds it."""
    module, recorder, keep = recorded(lambda: Curriculum(Joining("borrowed")), trainer={"max_epochs": 1})
    told = recorder.coverage.uncaptured
    assert set(told) == {"net.more.weight", "net.more.bias"}
    assert all("from step 2 on (verified until step 1)" in why for why in told.values())
    names = {n for n, _ in module.net.named_parameters() if not n.startswith("more")}
    for step in range(4):
        torch.testing.assert_close(keep.steps[step][1][:, 0], truth(module, step, None if step < 2 else names), **EXACT)


class LayerDrop(Net):
    """Stochastic depth by the batch: in each step another set of blocks is called."""

    def __init__(self) -> None:
        super().__init__(nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)]))
        self.now: tuple[int, ...] = (0, 1, 2)

    def loss(self, net: Any, x: Tensor, y: Tensor) -> Tensor:
        for k in self.now:
            x = x + torch.tanh(net[k](x))
        return F.cross_entropy(net[3](x), y)

    def query(self, net: Any, x: Tensor, y: Tensor) -> Tensor:
        now, self.now = self.now, (0, 1, 2)
        value = self.loss(net, x, y)
        self.now = now
        return value

    def training_step(self, batch: Any, index: int) -> Any:
        self.now = self.drops[index]
        return self.differentiate(*batch)

    drops = ((0,), (1, 2), (0, 2), (0, 1, 2))


def test_layers_that_take_part_in_some_steps_only_are_exact() -> None:
    module, recorder, keep = recorded(LayerDrop)
    assert recorder.coverage.share == 1.0 and not recorder.coverage.uncaptured
    for step, drops in enumerate(module.drops):
        module.now = drops
        torch.testing.assert_close(keep.steps[step][1][:, 0], truth(module, step), **EXACT)


class Experts(nn.Module):
    """Each row goes to one of three experts, by the sign of two features; all rows are computed, as masked."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.head = nn.ModuleList(nn.Linear(6, 6) for _ in range(3)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        which = (x[:, 0] > 0).long() + (x[:, 1] > 1).long()
        out = x
        for k, expert in enumerate(self.experts):
            mine = (which == k)[:, None]
            if bool(mine.any()):
                out = out + expert(x) * mine
        return self.head(torch.tanh(out))


def test_experts_without_a_row_in_the_first_batches_are_exact_later() -> None:
    module, recorder, keep = recorded(lambda: Net(Experts()))
    first, last = module.seen[0][0], torch.cat([x for x, *_ in module.seen])
    counts = [int(((x[:, 0] > 0) & (x[:, 1] > 1)).sum()) for x in (first, last)]
    assert counts[0] == 0 < counts[1]
    check(module, keep)
    assert recorder.coverage.share == 1.0


# -- the fallback ------------------------------------------------------------------------------------------------------


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.t = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(()))

    def forward(self, z: Tensor) -> Tensor:
        return z * self.w * self.t.exp()


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


class Contrastive(Net):
    """``views``: two of them, joined; else one after the other, and a temperature of its own."""

    views = True

    def __init__(self) -> None:
        super().__init__()
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


# -- reasons -----------------------------------------------------------------------------------------------------------


class Penalised(Net):
    kind = ""

    def training_step(self, batch: Any, index: int) -> Any:
        value = self.differentiate(*batch)
        weights = list(self.net.parameters())
        if self.kind == "l2":
            return value + 1e-1 * sum(p.square().sum() for p in weights)
        if self.kind == "norm":
            return value + 1e-1 * torch.stack([p.norm() for p in weights]).sum()
        if self.kind == "l1":
            return value + 1e-1 * torch.stack([p.abs().sum() for p in weights]).sum()
        leaf = batch[0].detach().clone().requires_grad_()
        (g,) = torch.autograd.grad(self(leaf).sum(), leaf, create_graph=True)
        return value + g.square().sum(1).mean()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("l2", "weight_decay"), ("norm", "weight_decay"), ("l1", "L1 penalty"), ("gradient", "create_graph=True")],
)
def test_the_reason_names_the_penalty(kind: str, reason: str) -> None:
    def make() -> Net:
        net = Penalised()
        net.kind = kind
        return net

    _, recorder, keep = recorded(make)
    assert not keep.steps and reason in recorder.notes[-1]
    assert "row_fn" not in recorder.notes[-1] and "no layer with a known type" not in recorder.notes[-1]


def test_the_reason_names_joined_views_and_the_fallback_only_if_it_helps() -> None:
    class Averaged(Net):
        def loss(self, net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(net(torch.cat([x, x + 0.1])), y.repeat(2))

    _, recorder, _ = recorded(Contrastive)
    assert "2 views of the rows" in recorder.notes[-1] and "fallback" not in recorder.notes[-1]
    _, recorder, _ = recorded(Averaged)
    assert "2 views of the rows" in recorder.notes[-1] and "fallback" in recorder.notes[-1]
    module, recorder, keep = recorded(Averaged, uncaptured="fallback")
    check(module, keep)
