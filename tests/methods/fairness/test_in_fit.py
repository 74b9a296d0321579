"""Fair subspaces in a fit: training as it is, the free function's numbers, the report's plot, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ine_callback import FINE, FairSettings, FairSubspaces, InfluenceReport, fair_subspaces
from ine_callback.errors import InfluenceError
from ine_callback.report import example_report
from tests.helpers.attributions import assert_same
from tests.helpers.bif.training import ROWS, Model, data
from tests.helpers.contexts import bound, numbers
from tests.helpers.fit_end import Dots, assert_untouched, fit


def group(batch: Any) -> Tensor:
    return (batch[0][:, 0] > 0).long()


def features(model: Model, x: Tensor) -> Tensor:
    """What the last layer gets, in evaluation mode."""
    model.eval()
    found: Tensor = model.net[:-1](x).detach()
    model.train()
    return found


def test_a_fit_finds_the_subspaces_of_its_features(alone: tuple[Model, Any], tmp_path: Path) -> None:
    method = FairSubspaces(sensitive=group, permutations=19, at=[1, "end"])
    model, influence, _ = fit([FINE(), method, Dots()], raises=True, dirpath=tmp_path)
    assert_untouched(model, alone)
    assert_same(influence.report.scores, alone[1].scores)
    x, y = data()
    free = fair_subspaces(features(model, x[:ROWS]), y[:ROWS], group((x[:ROWS],)), FairSettings(permutations=19))
    found = influence.report.subspaces
    assert [p.loss for p in found.path] == pytest.approx([p.loss for p in free.path], abs=1e-5)  # features are float32
    assert found.attribution.scores == pytest.approx(free.attribution.scores, abs=1e-5)
    assert any("'net.4'" in note for note in found.attribution.notes)
    assert found.attribution.settings["features"] == "penultimate"
    assert influence.report.stages("fair")[0].at == 1
    loaded = InfluenceReport.load(tmp_path)
    assert_same(loaded.attribution("fair"), found.attribution)
    again = loaded.subspaces
    assert again.path == found.path and again.directions == found.directions
    rows = features(model, x[:5])
    assert torch.equal(again.projection(keep=0)(rows), found.projection(keep=0)(rows))
    assert again.projection(keep=0)(rows).dtype == torch.float32


def test_the_report_shows_the_path(tmp_path: Path) -> None:
    _, influence, _ = fit([FINE(), FairSubspaces(sensitive=group, features="input", permutations=19)], raises=True)
    report, found = influence.report, influence.report.subspaces
    assert "Fair subspaces" in str(report) and str(found).splitlines()[-1] in str(report)
    axes = report.plot.fairness()
    assert [line.get_label() for line in axes.containers] == ["equalised-odds gap", "parity gap"]
    drawn = np.asarray(axes.containers[1][0].get_xydata())
    assert drawn == pytest.approx(np.array([(p.gap, p.loss) for p in found.path]))
    assert len(axes.texts) == len(found.path)
    page = report.write_html(tmp_path / "page.html").read_text()
    assert page.count('<img src="data:image/png;base64,iVBOR') == 1 and "cosine" in page
    frame = report.to_pandas()
    assert frame["fair/gap"][:ROWS].to_numpy() == pytest.approx(found.attribution.scores[:, 0])
    assert "fair/risk" in frame.columns
    with pytest.raises(ValueError, match=r"did not run here; train with methods=\[FINE\(\), FairSubspaces"):
        _ = example_report().subspaces


def test_attribute_and_target_are_named_in_several_ways() -> None:
    x, y = data()
    asked: list[dict[str, Any]] = [
        {"sensitive": group},
        {"sensitive": group((x[:ROWS],)).tolist()},
        {"sensitive": group((x[:ROWS],)), "target": 1},
        {"sensitive": group, "target": y[:ROWS].tolist(), "at": ["end"]},
    ]
    paths = []
    for options in asked:
        _, influence, _ = fit([FairSubspaces(features="input", permutations=19, **options)], raises=True)
        paths.append(influence.report.subspaces.path)
    assert all(path == paths[0] for path in paths)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sensitive": "group"}, r"sensitive='group': a batch of type (list|tuple) has nothing there"),
        ({"sensitive": 7}, "sensitive=7: a batch of type"),
        ({"sensitive": 0}, r"a batch of 64 rows gives a tensor of shape \(64, 4\)"),
        ({"sensitive": [0, 1, 1]}, "sensitive has 3 values, and there is a row 63"),
        ({"sensitive": lambda batch: None}, "a batch of 64 rows gives NoneType"),
        ({"sensitive": 1, "features": "nothing"}, "FairSubspaces: features='nothing' is no layer"),
        ({"sensitive": 1}, "FairSubspaces: the loss has no labels to be read; name the target"),
    ],
)
def test_what_a_batch_lacks_is_named(options: Any, message: str) -> None:
    module = nn.Sequential(nn.Linear(4, 1, dtype=torch.float64))

    def loss(module: nn.Module, batch: Any) -> Tensor:
        return (module(batch[0])[:, 0] - batch[1]).square().mean()

    context = bound(module, loss, (numbers(69, 4), numbers(69)))
    with pytest.raises(InfluenceError, match=message):
        FairSubspaces(**{"features": "input"} | options).run(context)


def test_missing_settings_are_refused_before_training() -> None:
    with pytest.raises(InfluenceError, match="sensitive=None names no attribute"):
        FairSubspaces()
    with pytest.raises(InfluenceError, match="features=3 names none"):
        FairSubspaces(sensitive=2, features=3)  # type: ignore[arg-type]


def test_a_group_that_is_too_small_costs_nothing_else(alone: tuple[Model, Any]) -> None:
    with pytest.warns(
        UserWarning, match="fair failed: InfluenceError: FairSubspaces: '1' of the sensitive attribute has 9"
    ):
        model, influence, _ = fit([FINE(), FairSubspaces(sensitive=[*[0] * 87, *[1] * 9])])
    assert_untouched(model, alone)
    assert not influence.report.attributions


def test_it_is_built_from_yaml() -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--method", type=FairSubspaces)
    start = (
        "{class_path: ine_callback.methods.FairSubspaces, init_args: {sdr: save, slices: 5, at: [2, end], sensitive: "
    )
    for text, sensitive in (("group", "group"), ("2", 2), ("[0, 1, 0]", [0, 1, 0])):
        built = parser.instantiate_classes(parser.parse_args(["--method", start + text + "}}"])).method
        assert built == FairSubspaces(sensitive=sensitive, sdr="save", slices=5, at=[2, "end"])
