"""Sensitivity of blocks: which layers are a block, what is summed, what is refused, and reports that tell it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ine_callback import InfluenceCallback, InfluenceReport
from ine_callback.applications.layer_sensitivity import LayerSensitivity, layer_sensitivity
from ine_callback.errors import InfluenceError
from ine_callback.methods import FitContext, FitEndMethod, PerSamplePass
from ine_callback.report import example_report
from ine_callback.scores import Attribution, Floats, LayerScores, example_attribution
from tests.helpers.attributions import OTHER, VAL

STACK = ("embed.weight", *(f"net.B.{k}.{name}.weight" for k in (0, 1, 2) for name in ("a", "b")), "head.weight")


def attribution(names: Sequence[str], scores: Floats | None = None) -> Attribution:
    if scores is None:
        scores = np.random.default_rng(0).standard_normal((11, len(names), 2))
    return Attribution(
        "IF", np.arange(len(scores)), (VAL, OTHER), scores.sum(1), layers=LayerScores(tuple(names), scores)
    )


def grouped(names: Sequence[str], blocks: str | None = None) -> dict[str, tuple[str, ...]]:
    found = layer_sensitivity(attribution(names), blocks=blocks)
    inside = [name for layers in found.layers for name in layers]
    assert sorted([*inside, *found.left_out]) == sorted(names)
    return dict(zip(found.blocks, found.layers, strict=True))


@pytest.mark.parametrize("aggregate", ["positive", "top25", "all"])
def test_sums_by_hand(aggregate: Any) -> None:
    found = attribution(STACK)
    assert found.layers is not None
    quality = layer_sensitivity(found, aggregate=aggregate)
    expected = np.zeros((3, 2))
    for block in range(3):
        for query in range(2):
            for matrix in (1 + 2 * block, 2 + 2 * block):
                scores = sorted(found.layers.scores[:, matrix, query].tolist(), reverse=True)
                if aggregate != "all":
                    scores = [score for score in scores if score > 0]
                if aggregate == "top25":
                    scores = scores[: -(-len(scores) // 4)]
                expected[block, query] += sum(scores) / 2  # the mean of two matrices
    np.testing.assert_allclose(quality.scores, expected, rtol=1e-12)
    assert quality.blocks == ("net.B.0", "net.B.1", "net.B.2") and quality.left_out == ("embed.weight", "head.weight")
    np.testing.assert_array_equal(quality.of("other"), quality.scores[:, 1])
    one = layer_sensitivity(found, "other", aggregate=aggregate)
    assert one.queries == ("other",)
    np.testing.assert_array_equal(one.of(), quality.of("other"))


def test_helpful_rows_make_a_block_sensitive_and_harmful_ones_do_not() -> None:
    scores = np.zeros((4, 2, 1))
    scores[:, 0], scores[:, 1] = 1.0, -1.0
    names, rows = ("B.0.weight", "B.1.weight"), np.arange(4)
    found = Attribution("IF", rows, (VAL,), scores.sum(1), layers=LayerScores(names, scores))
    assert layer_sensitivity(found).of().tolist() == [4.0, 0.0]
    assert layer_sensitivity(found, aggregate="all").of().tolist() == [4.0, -4.0]


def test_blocks_are_found_in_their_order_without_biases_and_norms() -> None:
    names = [f"transformer.h.{k}.{name}" for k in (0, 2, 10, 1) for name in (
        "ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias", "ln_2.weight", "mlp.c_fc.weight",
    )]  # fmt: skip
    names += ["transformer.wte.weight", "transformer.ln_f.weight"]
    found = grouped(names)
    assert list(found) == [f"transformer.h.{k}" for k in (0, 1, 2, 10)]
    assert found["transformer.h.10"] == ("transformer.h.10.attn.c_attn.weight", "transformer.h.10.mlp.c_fc.weight")


@pytest.mark.parametrize(
    "norm", ["norm1", "input_layernorm", "ln_2", "LayerNorm", "ln", "norm_first.norm", "bn1", "norm_2"]
)
def test_norm_layers_are_no_matrices(norm: str) -> None:
    found = grouped([f"B.{k}.{name}.weight" for k in (0, 1) for name in ("kiln", norm)])
    assert found == {"B.0": ("B.0.kiln.weight",), "B.1": ("B.1.kiln.weight",)}


@pytest.mark.parametrize(
    ("names", "blocks"),
    [
        (["0.weight", "2.weight", "4.weight"], ["0", "2", "4"]),  # layers in a row
        (["0.weight", "1.up.weight", "2.up.weight", "3.up.weight", "4.weight"], ["1", "2", "3"]),
        (["h.0.attn.w", "h.0.mlp.w", "h.1.attn.w", "h.1.experts.0.w", "h.1.experts.1.w"], ["h.0", "h.1"]),  # one is MoE
        (["enc.0.w", "enc.1.w", "dec.0.w", "dec.1.w", "dec.2.w"], ["dec.0", "dec.1", "dec.2"]),
        (["m.0.h.0.w", "m.0.h.1.w", "m.0.h.2.w", "m.1.w"], ["m.0.h.0", "m.0.h.1", "m.0.h.2"]),
    ],
)
def test_the_prefix_that_numbers_most_layers_is_taken(names: list[str], blocks: list[str]) -> None:
    assert list(grouped(names)) == blocks


def test_blocks_by_an_expression() -> None:
    names = ["layer1.0.conv.weight", "layer1.1.conv.weight", "layer1.1.bn.weight", "layer1.10.conv.weight", "fc.weight"]
    expected = {name.rpartition(".conv")[0]: (name,) for name in names if "conv" in name}
    for given in (names, names[::-1]):  # methods may hold layers in the order of the backward pass
        found = grouped(given, r"(layer\d+\.\d+)\.conv")
        assert found == expected and list(found) == list(expected)
    assert list(grouped(STACK, r"(?:net\.)(B\.\d)\.a")) == ["B.0", "B.1", "B.2"]


@pytest.mark.parametrize(
    ("names", "blocks", "message"),
    [
        (["a.weight", "b.weight"], None, "fewer than two blocks found among a.weight, b.weight"),
        (["h.0.w", "g.0.w"], None, "fewer than two blocks"),
        (STACK, r"net\.B\.\d", "has 0 groups; give one"),
        (STACK, r"(net)\.(B)", "has 2 groups"),
        (STACK, r"(net\.B\.0)\.", "fewer than two blocks"),
        (STACK, r"(net", "is no regular expression"),
    ],
)
def test_blocks_that_are_none_are_refused(names: Sequence[str], blocks: str | None, message: str) -> None:
    with pytest.raises(InfluenceError, match=message):
        layer_sensitivity(attribution(names), blocks=blocks)


def test_rows_without_scores_are_left_out_and_other_gaps_are_refused() -> None:
    scores = np.random.default_rng(1).standard_normal((6, len(STACK), 2))
    scores[4, :, 0] = np.nan  # unscored on the first query alone
    found = layer_sensitivity(attribution(STACK, scores))
    assert found.rows == (5, 6)
    np.testing.assert_allclose(found.of("val"), layer_sensitivity(attribution(STACK, scores[[0, 1, 2, 3, 5]])).of())
    scores[:, 0, 0] = np.inf  # of a layer outside the blocks
    np.testing.assert_array_equal(layer_sensitivity(attribution(STACK, scores)).scores, found.scores)
    scores[2, 3, 1] = np.nan
    with pytest.raises(InfluenceError, match=r"a score of layer 'net\.B\.1\.a\.weight' is nan; raise"):
        layer_sensitivity(attribution(STACK, scores))
    assert len(layer_sensitivity(attribution(STACK, scores), "val")) == 3
    scores[:, :, 1] = np.nan
    with pytest.raises(InfluenceError, match="no row has a score"):
        layer_sensitivity(attribution(STACK, scores))


def test_other_bad_requests() -> None:
    with pytest.raises(InfluenceError, match=r"'example': the method kept no scores by layer.*per_layer=True"):
        layer_sensitivity(example_attribution())
    with pytest.raises(InfluenceError, match="aggregate='most'; choose one of positive, top25, all"):
        layer_sensitivity(attribution(STACK), aggregate="most")  # type: ignore[arg-type]
    with pytest.raises(KeyError, match="no query 'test'"):
        layer_sensitivity(attribution(STACK), "test")
    with pytest.raises(KeyError, match="no query 'test'; choose one of 'val', 'other'"):
        layer_sensitivity(attribution(STACK)).of("test")


def test_the_table_says_how_much_depth_tells() -> None:
    names = ("IF\x1b[31m", ("val",), ("B.0", "B.1", "B.2"))
    found = LayerSensitivity(*names, np.array([[1.0], [2.0], [8.0]]), (("x",),) * 3, ("head",), "positive", (9,))
    text = str(found)
    assert "+1.00" in text and "0.125" in text and "In no block: head" in text and "\x1b" not in text
    assert "depth" in str(replace(found, scores=found.scores * 0))  # no correlation, no division by 0
    assert found.to_pandas().loc["B.2", "val"] == 8.0 and found._repr_html_().startswith("<pre>")


def test_reports_tell_it_also_from_disk(tmp_path: Path) -> None:
    report = example_report(12).with_attributions(example_attribution(), attribution(STACK))
    again = InfluenceReport.load(report.save(tmp_path))
    found = again.layers()
    np.testing.assert_array_equal(found.scores, layer_sensitivity(attribution(STACK)).scores)
    assert (found.method, found.queries) == ("IF", ("val", "other"))
    np.testing.assert_array_equal(again.layer_plan("IF", "other").sensitivity, found.of("other"))
    assert again.layers(blocks=r"(B\.[01])", aggregate="top25").blocks == ("B.0", "B.1")
    ax = Figure().subplots()
    assert again.plot.layers("other", ax=ax) is ax and ax.get_title(loc="left") == "Sensitivity of blocks: other"
    np.testing.assert_allclose([bar.get_height() for bar in ax.patches], found.of("other") / found.of("other").max())


def test_reports_without_scores_by_layer_say_so() -> None:
    with pytest.raises(ValueError, match=r"no scores by layer of any method; train with .*per_layer=True"):
        example_report(12).layers()
    with pytest.raises(ValueError, match=r"no scores by layer by 'BIF'.*\['IF'\]"):
        example_report(12).with_attributions(attribution(STACK)).layer_plan("BIF")


class ByLayer(FitEndMethod):
    """Inner product of each row's gradient with the query's, layer by layer."""

    name = "gradient dot"

    def run(self, context: FitContext) -> Any:
        scores: dict[str, Tensor] = {}
        directions: dict[Any, Tensor] = {}

        def take(rows: Tensor, gradients: Any) -> None:
            if not directions:
                directions.update(context.query_gradients())
            for block in gradients:
                column = scores.setdefault(block.name, torch.zeros(context.rows, 1))
                column[rows] = gradients.products({block: directions[block]}).cpu()

        yield PerSamplePass(), take
        by_layer = torch.stack(list(scores.values()), 1).double().numpy()
        found = LayerScores(tuple(scores), by_layer)
        return Attribution(self.name, np.arange(context.rows), context.infos, by_layer.sum(1), layers=found)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(torch.relu(self.up(self.norm(x))))
        return out


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(*(Block() for _ in range(3)), nn.Linear(6, 2))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    validation_step = training_step  # type: ignore[assignment]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_trained_network_against_autograd() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(48, 6), torch.randint(0, 2, (48,))
    train, val = TensorDataset(x[:32], y[:32]), TensorDataset(x[32:], y[32:])
    model, influence = Net(), InfluenceCallback(queries="val", methods=[ByLayer()], on_error="raise")
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = L.Trainer(max_epochs=2, accelerator="cpu", callbacks=[influence], **quiet)
    trainer.fit(model, DataLoader(train, 8, shuffle=True), DataLoader(val, 16))
    found = influence.report.layers()
    assert found.blocks == ("net.0", "net.1", "net.2") and "net.3.weight" in found.left_out

    model = model.double()
    x = x.double()
    parameters = dict(model.named_parameters())

    def gradients(rows: slice) -> dict[str, Tensor]:
        loss = nn.functional.cross_entropy(model.net(x[rows]), y[rows])
        return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))

    asked, each = gradients(slice(32, 48)), [gradients(slice(k, k + 1)) for k in range(32)]
    for block, value in zip(found.blocks, found.of("val"), strict=True):
        matrices = [f"{block}.up.weight", f"{block}.down.weight"]
        sums = [sum(max(0.0, float((row[name] * asked[name]).sum())) for row in each) for name in matrices]
        assert value == pytest.approx(np.mean(sums), rel=1e-4)  # the gradients of the pass are float32
