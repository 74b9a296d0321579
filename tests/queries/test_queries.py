"""What may be asked, what is refused with which words, and every query's gradient against a loop."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ine_callback import InfluenceCallback, Query, Recorder
from ine_callback.errors import QueryError
from ine_callback.queries import (
    CallableQuery,
    LossQuery,
    MarginQuery,
    PerClassQuery,
    SelfQuery,
    gradients,
    margins,
    parse,
    scalar,
    values,
)
from ine_callback.queries.sources import LARGEST_BATCH, DataSource

EXACT = {"rtol": 1e-10, "atol": 1e-12}
X, Y = torch.randn(11, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.arange(11) % 3
DATA = TensorDataset(X, Y)


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3)).double().eval()


def loss(module: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def confidence(module: nn.Module, batch: Any) -> Tensor:
    return module(batch[0]).square().mean()


def flat_gradients(model: nn.Module, query: Query, source: DataSource | None = None) -> dict[str, Tensor]:
    bound = query.bind("q", source or DataSource("Test", loss))
    parameters = list(model.parameters())
    found = gradients(bound, model, parameters, lambda batch: batch)
    flat = torch.cat([g.flatten(1) for g in found], 1)
    return {b.info.name: row for b, row in zip(bound, flat, strict=True)}


def gradient(model: nn.Module, value: Tensor) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))])


def mean_over_rows(model: nn.Module, rows: list[int], value: Any = loss) -> Tensor:
    return sum((gradient(model, value(model, (X[[k]], Y[[k]]))) for k in rows), torch.zeros(())) / len(rows)


# -- gradients ---------------------------------------------------------------------------------------------------------

SOURCES: dict[str, Any] = {
    "loader-unequal-last": lambda: DataLoader(DATA, batch_size=4),
    "loader-shuffled": lambda: DataLoader(DATA, batch_size=3, shuffle=True),
    "loader-drop-last": lambda: DataLoader(DATA, batch_size=4, drop_last=True),
    "loader-without-batches": lambda: DataLoader([(X[:4], Y[:4]), (X[4:], Y[4:])], batch_size=None),
    "batch": lambda: (X, Y),
    "list-batch": lambda: [X, Y],
    "generator": lambda: (pair for pair in [(X[:7], Y[:7]), (X[7:], Y[7:])]),
}


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
def test_loss_query_is_the_mean_over_all_rows(make: Any) -> None:
    model = make_model()
    found = flat_gradients(model, LossQuery(make()))["q"]
    torch.testing.assert_close(found, mean_over_rows(model, list(range(11))), **EXACT)


def test_val_is_the_validation_loader_or_all_of_them() -> None:
    model = make_model()
    halves = [DataLoader(TensorDataset(X[s], Y[s]), batch_size=3) for s in (slice(0, 4), slice(4, 11))]
    found = flat_gradients(model, LossQuery("val"), DataSource("Test", loss, val=halves))["q"]
    torch.testing.assert_close(found, mean_over_rows(model, list(range(11))), **EXACT)


def test_dataset_indices_are_training_rows() -> None:
    model, rows = make_model(), [7, 0, 3, 3]
    source = DataSource("Test", loss, train=DataLoader(DATA, batch_size=2, shuffle=True))
    torch.testing.assert_close(
        flat_gradients(model, LossQuery(rows), source)["q"], mean_over_rows(model, rows), **EXACT
    )


def test_large_batches_are_cut() -> None:
    model = make_model()
    x, y = X.repeat(60, 1), Y.repeat(60)
    (bound,) = LossQuery((x, y)).bind("q", DataSource("Test", loss))
    assert len(bound.batches) == 3 and max(len(b[0]) for _, b in bound.batches) == LARGEST_BATCH
    assert sum(weight for weight, _ in bound.batches) == pytest.approx(1.0)
    torch.testing.assert_close(
        flat_gradients(model, LossQuery((x, y)))["q"], mean_over_rows(model, list(range(11))), **EXACT
    )


@pytest.mark.parametrize("data", [(X, Y), DataLoader(DATA, batch_size=4)], ids=["batch", "loader"])
def test_per_class_equals_a_loop_over_classes(data: Any) -> None:
    model = make_model()
    found = flat_gradients(model, PerClassQuery(data))
    assert list(found) == ["q/0", "q/1", "q/2"]
    for label in range(3):
        expected = mean_over_rows(model, [k for k in range(11) if Y[k] == label])
        torch.testing.assert_close(found[f"q/{label}"], expected, **EXACT)


def test_per_class_finds_its_label() -> None:
    def by_key(module: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(module(batch["x"]), batch["y"])

    model, source = make_model(), DataSource("Test", by_key)
    found = flat_gradients(model, PerClassQuery({"x": X, "y": Y}, label="y"), source)
    torch.testing.assert_close(found["q/1"], mean_over_rows(model, [1, 4, 7, 10]), **EXACT)


@pytest.mark.parametrize(
    ("batch", "label", "words"),
    [
        ({"x": X, "y": Y}, 1, "dict has no label at 1"),
        ((X, Y), "y", "tuple has no label at 'y'"),
        ((X, Y), 5, "no label at 5"),
        ((X, X), 1, "not a vector of integer classes"),
        ((X, Y.double()), 1, "not a vector of integer classes"),
    ],
)
def test_per_class_without_labels_is_refused(batch: Any, label: Any, words: str) -> None:
    with pytest.raises(QueryError, match=f"PerClassQuery 'q': .*{words}"):
        PerClassQuery(batch, label=label).bind("q", DataSource("Test", loss))


def margin_value(model: nn.Module, k: int) -> Tensor:
    """-log(p / (1 - p)), with p from the softmax itself."""
    p = model(X[[k]]).softmax(1)[0, Y[k]]
    return -(p / (1 - p)).log()


@pytest.mark.parametrize("data", [(X, Y), DataLoader(DATA, batch_size=4)], ids=["batch", "loader"])
def test_margin_equals_the_closed_form(data: Any) -> None:
    model = make_model()
    expected = torch.stack([gradient(model, margin_value(model, k)) for k in range(11)])
    torch.testing.assert_close(flat_gradients(model, MarginQuery(data))["q"], expected.mean(0), **EXACT)
    found = flat_gradients(model, MarginQuery(data, per_row=True))
    assert list(found) == [f"q/{k}" for k in range(11)]
    torch.testing.assert_close(torch.stack(list(found.values())), expected, **EXACT)


def test_margins_of_tokens_and_of_saturated_rows() -> None:
    logits, labels = torch.randn(2, 3, 5, dtype=torch.float64), torch.randint(3, (2, 5))
    p = logits.softmax(1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(margins(logits, labels), (p / (1 - p)).log(), **EXACT)
    saturated = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True)
    value = margins(saturated, torch.tensor([0]))
    value.sum().backward()
    assert float(value) == pytest.approx(200 - torch.tensor(2.0).log().item()) and saturated.grad.tolist() == [
        [1, -0.5, -0.5]
    ]


def test_margin_uses_the_given_forward() -> None:
    model = make_model()
    query = MarginQuery({"x": X, "y": Y}, forward=lambda module, batch: (module(batch["x"]), batch["y"]))
    expected = flat_gradients(model, MarginQuery((X, Y)))["q"]
    torch.testing.assert_close(flat_gradients(model, query)["q"], expected, **EXACT)
    with pytest.raises(QueryError, match=r"MarginQuery: a batch of type Tensor .*forward="):
        flat_gradients(model, MarginQuery(X))
    with pytest.raises(QueryError, match=r"labels are torch.float64, not class indices; for numbers ask for the loss"):
        flat_gradients(model, MarginQuery((X, Y.double())))


def test_callable_is_averaged_over_the_data() -> None:
    model = make_model()
    query = CallableQuery(confidence, DataLoader(DATA, batch_size=4))
    assert query.name == "confidence"
    expected = mean_over_rows(model, list(range(11)), confidence)
    torch.testing.assert_close(flat_gradients(model, query)["q"], expected, **EXACT)


def test_unused_parameters_get_zeros_and_sparse_ones_are_made_dense() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(6, 2, sparse=True), "unused": nn.Linear(2, 2)})
    query = CallableQuery(lambda module, batch: module["table"](batch).square().mean(), torch.tensor([1, 1, 4]))
    (bound,) = query.bind("q", DataSource("Test", None))
    table, weight, bias = gradients([bound], model, list(model.parameters()), lambda batch: batch)
    assert table.shape == (1, 6, 2) and sorted(table.abs().sum((0, 2)).nonzero().flatten().tolist()) == [1, 4]
    assert not weight.any() and not bias.any()


def test_half_precision_gradients_are_summed_in_single() -> None:
    model = nn.Linear(4, 3).bfloat16()
    (bound,) = LossQuery((X.bfloat16(), Y)).bind("q", DataSource("Test", loss))
    assert gradients([bound], model, list(model.parameters()), lambda batch: batch)[0].dtype is torch.float32


def test_batches_are_moved_by_the_given_function() -> None:
    moved: list[int] = []
    (bound,) = LossQuery((X, Y)).bind("q", DataSource("Test", loss))
    model = make_model()
    gradients([bound], model, list(model.parameters()), lambda batch: moved.append(len(batch[0])) or batch)
    assert moved == [11]


# -- words -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("queries", "expected"),
    [
        ("val", {"val": LossQuery}),
        ("self", {"self": SelfQuery}),
        (["val", "self"], {"val": LossQuery, "self": SelfQuery}),
        (("val", "self"), {"val": LossQuery, "self": SelfQuery}),
        (confidence, {"confidence": CallableQuery}),
        ([confidence, "self"], {"confidence": CallableQuery, "self": SelfQuery}),
        (Query.loss((X, Y)), {"loss": LossQuery}),
        (Query.loss((X, Y), name="mine"), {"mine": LossQuery}),
        (Query.per_class("val"), {"class": PerClassQuery}),
        (Query.margin("val", per_row=True), {"margin": MarginQuery}),
        (SelfQuery(), {"self": SelfQuery}),
        ({"a": "val", "b": "self", "c": confidence}, {"a": LossQuery, "b": SelfQuery, "c": CallableQuery}),
        (
            {"loader": DataLoader(DATA), "batch": (X, Y), "tensor": X},
            dict.fromkeys(["loader", "batch", "tensor"], LossQuery),
        ),
        ({"rows": [1, 2, 3], "dict": {"x": X}, 7: "val"}, dict.fromkeys(["rows", "dict", "7"], LossQuery)),
        ({"class": Query.per_class((X, Y))}, {"class": PerClassQuery}),
    ],
)
def test_accepted_forms_become_named_queries(queries: Any, expected: dict[str, type[Query]]) -> None:
    assert {name: type(query) for name, query in parse(queries, "Test").items()} == expected


@pytest.mark.parametrize(
    ("queries", "words"),
    [
        ("validation", "'validation' is not a query; the words known are 'val' and 'self'"),
        (["val", "train"], "'train' is not a query"),
        ({"a": "train"}, "'train' is not a query"),
        ([], r"queries=\[\] is empty; pass 'val'"),
        ({}, r"queries=\{\} is empty"),
        (None, r"None \(NoneType\) is not a query; pass 'val'"),
        (3, r"3 \(int\) is not a query"),
        ([0, 1], r"0 \(int\) is not a query"),
        (True, r"True \(bool\) is not a query"),
        ({"a": None}, r"None \(NoneType\) is not a query"),
        ({"a": 0.5}, r"0.5 \(float\) is not a query"),
        (nn.Linear(2, 2), r"\(Linear\) is not a query"),
        ({"a": nn.Linear(2, 2)}, r"\(Linear\) is not a query"),
        (X, r"\(Tensor\) is not a query"),
        (DataLoader(DATA), r"\(DataLoader\) is not a query; .*mapping of name to a DataLoader"),
        (["val", "val"], "two queries are called 'val'; pass a mapping"),
        ([confidence, confidence], "two queries are called 'confidence'"),
    ],
)
def test_other_forms_are_refused(queries: Any, words: str) -> None:
    with pytest.raises(QueryError, match=f"(?s)Test: .*{words}"):
        parse(queries, "Test")


@pytest.mark.parametrize("wrong", ["validation", [], None, X])
def test_the_callback_and_the_recorder_refuse_at_once(wrong: Any) -> None:
    with pytest.raises(QueryError, match="InfluenceCallback: "):
        InfluenceCallback(queries=wrong)
    model = make_model()
    with pytest.raises(QueryError, match="Recorder: "):
        Recorder(model, torch.optim.SGD(model.parameters(), lr=0.1), queries=wrong)


def recorder(queries: Any, loss: Any = loss) -> Recorder:
    model = make_model()
    return Recorder(model, torch.optim.SGD(model.parameters(), lr=0.1), 11, queries, loss, on_error="raise")


def test_equal_names_after_binding_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Recorder: two queries are called \['a/0'\]; name them differently"):
        recorder({"a": Query.margin((X[:1], Y[:1]), per_row=True), "a/0": (X, Y)}).start()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (lambda module, batch: loss(module, batch).item(), "its value is float, not a scalar tensor"),
        (lambda module, batch: F.cross_entropy(module(batch[0]), batch[1], reduction="none"), r"\(11,\), not a scalar"),
        (lambda module, batch: loss(module, batch).detach(), "has no gradient; remove no_grad/detach"),
        (lambda module, batch: None, "its value is NoneType"),
        (lambda module, batch: torch.zeros(()), "has no gradient"),
    ],
    ids=["item", "vector", "detached", "none", "constant"],
)
def test_values_without_a_gradient_are_refused_before_training(value: Any, words: str) -> None:
    with pytest.raises(QueryError, match=f"Query 'mine': .*{words}"):
        recorder({"mine": CallableQuery(value, (X, Y))}).start()
    with pytest.raises(QueryError, match=f"Query 'val': .*{words}"):
        recorder({"val": (X, Y)}, loss=value).start()


def test_a_value_of_one_element_is_a_scalar() -> None:
    (bound,) = LossQuery((X, Y)).bind("q", DataSource("Test", loss))
    assert scalar(torch.ones(1, 1, requires_grad=True), bound).shape == ()


def test_every_column_asks_its_question() -> None:
    source = DataSource("Test", loss, train=DataLoader(DATA), val=[DataLoader(DATA)])
    for query in (LossQuery("val"), PerClassQuery("val"), MarginQuery([0, 1], per_row=True), CallableQuery(confidence)):
        for bound in query.bind("name", source):
            assert bound.info.question.startswith("Does training on this row ") and bound.info.question.endswith("?")
    assert "2 chosen training rows" in MarginQuery([0, 1]).bind("q", source)[0].info.question


# -- through Lightning -------------------------------------------------------------------------------------------------


class Classifier(L.LightningModule):
    def __init__(self, steps: str = "both") -> None:
        super().__init__()
        self.net, self.steps = nn.Linear(4, 3).double(), steps

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any) -> Tensor:
        self.log("train_loss", loss(self, batch))
        return loss(self, batch)

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        value = loss(self, batch)
        self.log("val_loss", value)
        return None if self.steps == "silent" else value

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module: Classifier, queries: Any, val: Any = None, **options: Any) -> InfluenceCallback:
    callback = InfluenceCallback(queries, on_error="raise", **options)
    trainer = L.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[callback],
    )  # fmt: skip
    trainer.fit(module, DataLoader(DATA, batch_size=4), val)
    return callback


@pytest.mark.parametrize("steps", ["both", "silent"])
def test_every_kind_of_query_through_a_fit(steps: str) -> None:
    """A validation_step that returns nothing is replaced by training_step."""
    queries = {
        "val": "val",
        "self": "self",
        "rows": [3, 5],
        "class": Query.per_class(),
        "margin": Query.margin(),
        "mine": confidence,
        "batch": (X, Y),
        "loader": DataLoader(DATA, batch_size=3),
    }
    callback = fit(Classifier(steps), queries, DataLoader(DATA, batch_size=4))
    assert callback.report is not None
    names = [info.name for info in callback.report.scores.queries]
    assert names == ["val", "rows", "class/0", "class/1", "class/2", "margin", "mine", "batch", "loader", "self"]
    mu = {name: callback.report.scores.mu[:, k] for k, name in enumerate(names)}
    for name in ("batch", "loader"):  # the same data three times
        assert mu[name] == pytest.approx(mu["val"], rel=1e-9)


def test_max_query_rows_is_noted_in_the_report() -> None:
    callback = fit(Classifier(), "val", DataLoader(DATA, batch_size=4), max_query_rows=5)
    assert callback.report is not None
    assert any("a random 5 of 11 rows" in note for note in callback.report.run.notes)


def test_val_without_a_validation_loader_is_refused_before_training() -> None:
    module = Classifier()
    before = module.net.weight.clone()
    with pytest.raises(QueryError, match="InfluenceCallback: query 'val' needs a validation loader"):
        fit(module, "val")
    assert torch.equal(before, module.net.weight)


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_values_are_weighted_sums_over_batches_in_float32_or_better(kind: torch.dtype) -> None:
    model = make_model().to(kind)
    parts = [(X[:8].to(kind), Y[:8]), (X[8:].to(kind), Y[8:])]
    (query,) = LossQuery(parts[0]).bind("q", DataSource("Test", loss))
    bound = replace(query, batches=((8 / 11, parts[0]), (3 / 11, parts[1])))
    found = values([bound], model, lambda batch: batch)
    one, other = (loss(model, part).double().item() for part in parts)
    assert found.dtype == torch.promote_types(kind, torch.float32)
    assert found.tolist() == pytest.approx([(8 * one + 3 * other) / 11], rel=1e-6)
