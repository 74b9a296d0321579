"""The rows themselves on the page: what shows which sample, and that reading them harms nobody."""

from __future__ import annotations

import io
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import PIL.Image
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from ine_callback import InfluenceCallback
from ine_callback.methods.bif.scores import BIFScores
from ine_callback.report import Image, InfluenceReport, Text, Values, example_report, rendered
from ine_callback.report.html import page
from ine_callback.report.samples import Samples, classes_of
from ine_callback.utilities.isolation import unmoved
from tests.helpers.report import pages


def pixels(shown: Any) -> np.ndarray:
    assert isinstance(shown, Image)
    return np.asarray(PIL.Image.open(io.BytesIO(shown.data)))


@pytest.mark.parametrize(
    ("sample", "shape"),
    [
        (torch.rand(1, 8, 8), (8, 8)),
        (torch.rand(3, 20, 30), (20, 30, 3)),
        (np.zeros((20, 30, 3), np.uint8), (20, 30, 3)),
        ((torch.rand(28, 28), 3), (28, 28)),
        ({"image": PIL.Image.new("CMYK", (9, 7)), "label": 1}, (7, 9, 3)),
        (np.zeros((3, 1000, 500)), (160, 80, 3)),
    ],
)
def test_pixels_become_a_thumbnail(sample: Any, shape: tuple[int, ...]) -> None:
    assert pixels(rendered(sample)).shape == shape


def test_pixels_keep_their_shades() -> None:
    assert pixels(Image.of(np.array([[0.0, 1.0], [0.5, 0.25]]))).tolist() == [[0, 255], [128, 64]]
    assert pixels(Image.of(np.array([[-2.0, 2.0], [0.0, np.nan]]))).tolist() == [[0, 255], [128, 128]]
    assert pixels(Image.of(np.array([[0, 7], [255, 1]], np.uint8))).tolist() == [[0, 7], [255, 1]]


def test_metadata_of_a_picture_stays_out_of_the_file() -> None:
    picture = PIL.Image.new("RGB", (8, 8))
    picture.info["icc_profile"] = b"secret"  # Pillow writes it by itself
    assert not PIL.Image.open(io.BytesIO(Image.of(picture).data)).info


@pytest.mark.parametrize("data", [b"<svg onload=alert(1)>", b"", b"\x89PNG\r\n\x1a\n" + bytes(100_001)])
def test_other_bytes_are_no_image(data: bytes) -> None:
    with pytest.raises(ValueError, match="Image: "):
        Image(data)


def test_texts_and_values_are_known_by_their_type() -> None:
    assert rendered("to be") == rendered(("to be", 1)) == rendered({"text": "to be", "label": 1}) == Text("to be")
    assert (
        rendered(torch.tensor([1.0, 2.5])) == rendered((torch.tensor([1.0, 2.5]), 1)) == Values({"x0": 1.0, "x1": 2.5})
    )
    assert rendered((torch.tensor([7, 4]), torch.tensor([4, 9]))) == Text("7 4")
    with pytest.raises(TypeError, match="pass render="):
        rendered(object())
    with pytest.raises(ValueError, match="2 weights for 1 tokens"):
        Text("to be", [0.1, 0.2])


def test_z_scores_are_those_of_the_data_set() -> None:
    table = np.random.default_rng(0).normal(3.0, 2.0, (200, 4))
    shown, _ = Samples([dict(zip("abcd", row, strict=True)) for row in table]).read([7])
    assert isinstance(shown[7], Values)
    expected = (table[7] - table.mean(0)) / table.std(0)
    np.testing.assert_allclose([z for _, _, z in shown[7].lines], expected, atol=0.006)


@pytest.mark.parametrize(
    "render", [lambda sample: "<b>markup</b>", lambda sample: 1 / 0, lambda sample: Image(b"<svg>")]
)
def test_what_goes_wrong_is_told_on_the_page(render: Callable[[Any], Any]) -> None:
    text = page(example_report(), samples=["a"] * 60, render=render)
    assert "Row 3 could not be shown: " in text and "more rows." in text and "markup</b>" not in text
    assert 'id="samples"' not in text


def test_values_that_have_no_columns_have_no_z_scores() -> None:
    shown, faults = Samples([{"a": 1.0}, {"a": 1.0, "b": 1e308}, {"a": "x", "b": -1e308}]).read([0, 1, 2])
    assert not faults and [len(one.lines) for one in shown.values()] == [1, 2, 2]  # type: ignore[union-attr]
    assert all(z is None for one in shown.values() for _, _, z in one.lines)  # type: ignore[union-attr]


def test_a_data_set_that_is_slow_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ine_callback.report.samples.MAX_SECONDS", -1.0)
    shown, faults = Samples(["a", "b"]).read([0, 1])
    assert not shown and "took" in faults[0] and list(faults) == [0, 1]


def test_labels_must_fit() -> None:
    with pytest.raises(ValueError, match="2 labels for 60 rows"):
        page(example_report(), labels=[1, 2])
    with pytest.raises(ValueError, match="2,000 different labels; give at most 1,000 classes"):
        page(example_report(2000), labels=np.arange(2000) / 7)


def test_classes_are_found_without_reading_a_row() -> None:
    class Named(Dataset[Any]):
        targets, classes = [1, 0, 1], ["cat", "dog"]

    assert classes_of(Named(), 3) is not None
    names, which = classes_of(Named(), 3)  # type: ignore[misc]
    assert names == ["0 cat", "1 dog"] and which.tolist() == [1, 0, 1]
    tensors = TensorDataset(torch.rand(4, 2), torch.tensor([5, 5, 9, 5]))
    assert classes_of(Subset(tensors, [2, 0]), 2)[1].tolist() == [1, 0]  # type: ignore[index]
    assert classes_of(TensorDataset(torch.rand(4, 2), torch.rand(4)), 4) is None  # no classes, but targets
    assert classes_of(tensors, 5) is None and classes_of(["a"], 1) is None


def test_tokens_are_coloured_by_their_scores() -> None:
    report = pages.report_of()
    assert isinstance(report.bif, BIFScores) and report.bif.tokens is not None
    tokens = [f"w{k} " for k in range(pages.TERMS)]
    text = page(report, ["self"], samples=[tokens] * report.rows, render=Text)
    row = report.top(1, "self").rows[0]
    figure = text.split(f'<figure data-row="{row}">')[1].split("</figure>")[0]
    terms = report.bif.tokens.of(list(report.bif.rows).index(row))[:, 0]
    best = int(np.abs(terms).argmax())
    sign, colour = ("", "helps") if terms[best] > 0 else ("-", "harms")
    assert re.search(rf'<span data-w="{sign}1" class="{colour}" style="--w:1\.0">w{best} </span>', figure)
    assert figure.count("<span") == len(tokens)


def test_a_class_s_rows_meet_its_query() -> None:
    """Rows of a class were made to help their own class by 3 null deviations of 0.05 each."""
    text = page(pages.report_of(), labels=pages.labels_of(240))
    heat = text.split('class="heat"')[1].split("</table>")[0]
    lines = [re.findall('td class="(helps|harms)"', line) for line in heat.split('scope="row"')[1:]]
    assert [line[k] for k, line in enumerate(lines)] == ["helps"] * 3
    assert [line[k - 1] for k, line in enumerate(lines)] == ["harms"] * 3
    assert "Which class helps which" not in page(example_report(), labels=pages.labels_of(60))


# ---- at the end of a fit ----


class Augmented(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Rows with random noise from every generator that a data set can have; ``broken`` after training."""

    def __init__(self, broken: bool = False) -> None:
        self.own, self.transforms = torch.Generator().manual_seed(0), [{"legacy": np.random.RandomState(0)}]
        self.broken, self.read = broken, 0

    def __len__(self) -> int:
        return 24

    def __getitem__(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.read += 1
        if self.broken and self.read > 48:
            raise OSError("the file is gone")
        noise = torch.rand(4) + torch.rand(4, generator=self.own) + self.transforms[0]["legacy"].rand()
        return noise + random.random() + np.random.rand(), torch.tensor(row % 2)

    def states(self) -> list[Any]:
        legacy = [self.transforms[0]["legacy"].get_state(), np.random.get_state()]
        return [self.own.get_state().tolist(), torch.get_rng_state().tolist(), random.getstate(), str(legacy)]


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 2)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(dataset: Augmented, callbacks: list[Any]) -> list[Any]:
    L.seed_everything(1, verbose=False)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    L.Trainer(max_epochs=2, accelerator="cpu", callbacks=callbacks, **quiet).fit(
        Net(), DataLoader(dataset, batch_size=4)
    )
    return dataset.states()


@pytest.mark.parametrize("broken", [False, True])
def test_a_fit_s_report_shows_rows_and_random_state_stays(tmp_path: Path, broken: bool) -> None:
    recorded = Augmented(broken)
    influence = InfluenceCallback("self", dirpath=tmp_path, on_error="raise")
    assert fit(recorded, [influence]) == fit(Augmented(), [])
    assert recorded.read > 48  # rows of two epochs, and those shown
    text = (tmp_path / "report.html").read_text("utf-8")
    assert ("could not be shown: OSError: the file is gone" in text) == broken
    assert ("<dt>x3</dt>" in text) != broken
    assert InfluenceReport.load(tmp_path).queries == ("self",)


def test_rows_stay_out_of_the_page_where_they_are_not_wanted(tmp_path: Path) -> None:
    dataset = Augmented()
    fit(dataset, [InfluenceCallback("self", dirpath=tmp_path, show_rows=False, on_error="raise")])
    assert dataset.read == 48 and "<dt>x3</dt>" not in (tmp_path / "report.html").read_text("utf-8")


def test_reading_inside_leaves_no_trace() -> None:
    dataset = Augmented()
    before = dataset.states()
    with unmoved(dataset):
        assert not torch.equal(dataset[0][0], dataset[0][0])
        assert dataset.states() != before
    assert dataset.states() == before
