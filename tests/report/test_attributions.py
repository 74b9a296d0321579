"""Scores by methods on trained models in a report: stored to the last bit, shown, exported, compared and combined."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of
from scipy.special import stdtr
from torch.utils.data import DataLoader

from ine_callback import InfluenceReport
from ine_callback.cli import main
from ine_callback.report import attribution_store, example_report, legacy, store
from ine_callback.report.attribution_combine import END_FRACTION, combine_attributions
from ine_callback.scores import (
    Attribution,
    Check,
    LayerScores,
    QueryInfo,
    TokenScores,
    attribute_name,
    example_attribution,
)
from tests.fixtures import make
from tests.helpers.attributions import assert_same
from tests.helpers.report import pages

FIXTURES = Path(make.__file__).parent
VAL, OTHER = QueryInfo("val", "loss", "Does it help?"), QueryInfo("other", "margin", "And this?")
NUMBERS = st.floats(width=64)  # NaN and infinities too
TEXTS = st.text(max_size=20)  # halves of surrogate pairs, control characters, nothing


@st.composite
def attributions(draw: Any) -> Attribution:
    """Any attribution there can be."""
    rows = draw(st.lists(st.integers(0, 10**12), min_size=1, max_size=4, unique=True))
    kinds = st.sampled_from(["loss", "margin", "self", "custom"])
    names = draw(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=2, unique=True))
    shape = (len(rows), len(names))

    def matrix(*shape: int) -> Any:
        return draw(arrays_of.arrays(np.float64, shape, elements=NUMBERS))

    def maybe(*shape: int) -> Any:
        return matrix(*shape) if draw(st.booleans()) else None

    columns = {name: matrix(*shape) for name in draw(st.lists(TEXTS, max_size=3, unique=True))}
    lengths = draw(st.lists(st.integers(0, 3), min_size=len(rows), max_size=len(rows)))
    terms = sum(lengths)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = TokenScores(offsets, *(each(terms, shape[1]) for each in (matrix, maybe, maybe))) if terms else None
    layers = draw(st.lists(TEXTS, max_size=3))
    check = st.builds(Check, TEXTS, NUMBERS, TEXTS, st.booleans(), TEXTS)
    shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)
    settings = st.recursive(
        st.none() | st.booleans() | NUMBERS | TEXTS, lambda each: st.lists(each, max_size=2), max_leaves=3
    )
    return Attribution(
        draw(st.text(min_size=1, max_size=9).filter(str.strip)), np.array(rows),
        tuple(QueryInfo(name, draw(kinds), draw(st.text(st.characters(exclude_categories=["Cs"])))) for name in names),
        matrix(*shape), maybe(*shape), maybe(*shape), maybe(*shape), columns=columns,
        ranked_by=draw(st.sampled_from(["", *columns])),
        doubtful=draw(arrays_of.arrays(np.bool_, shape)) if draw(st.booleans()) else None,
        layers=LayerScores(tuple(layers), matrix(shape[0], len(layers), shape[1])) if layers else None, tokens=tokens,
        checks=tuple(draw(st.lists(check, max_size=2))), settings=draw(st.dictionaries(TEXTS, settings, max_size=2)),
        arrays={name: matrix(*draw(shapes)) for name in draw(st.lists(TEXTS, max_size=2, unique=True))},
        notes=tuple(draw(st.lists(TEXTS, max_size=2))), title=draw(TEXTS), headline=draw(TEXTS), legend=draw(TEXTS),
        at=draw(st.just("end") | st.integers(0, 10**6)),
    )  # fmt: skip


def saved(folder: Path, *found: Attribution) -> tuple[Attribution, ...]:
    example = example_report(12)
    return InfluenceReport.load(InfluenceReport(example.scores, example.run, found).save(folder)).attributions


@given(found=st.lists(attributions(), min_size=1, max_size=3, unique_by=lambda each: (each.method, each.at)))
def test_everything_is_loaded_as_it_was_saved(found: list[Attribution], tmp_path_factory: Any) -> None:
    loaded = saved(tmp_path_factory.mktemp("report"), *found)
    assert_same([settled(each) for each in loaded], [settled(each) for each in found])


def settled(found: Attribution) -> Attribution:
    """JSON's null is no number."""
    return replace(found, settings=json.loads(json.dumps(found.settings)))


def whole(method: str = "my method", **fields: Any) -> Attribution:
    """Three rows on two queries, with everything."""
    g = np.random.default_rng(0)
    scores = g.standard_normal((3, 2))
    parts: dict[str, Any] = {
        "se": np.abs(scores), "p": scores**2 % 1, "q": scores**4 % 1,
        "columns": {"": scores, "se": scores + 1, "column é\n\0": scores + 2, "column é\n\0_se": scores + 3},
        "ranked_by": "column é\n\0", "doubtful": scores > 0,
        "layers": LayerScores(("net.0", "", "net.0"), g.standard_normal((3, 3, 2))),
        "tokens": TokenScores(np.array([0, 2, 2, 5]), g.standard_normal((5, 2)), None, g.random((5, 2))),
        "checks": (Check("finite", np.nan, "below 1", False, "wait"), Check("large", -np.inf, "above", True, "go")),
        "settings": {"a": {"b": [1, None, "x"]}}, "arrays": {"trace": g.random((2, 0, 3)), "scalar": np.array(3.0)},
        "notes": ("one", "two"), "title": "My method", "headline": "fast", "legend": "read", "at": 3,
    }  # fmt: skip
    scores[1, 0], scores[2, 1] = np.nan, -np.inf
    return Attribution(method, np.array([7, 2, 9]), (VAL, OTHER), scores, **parts | fields)


def test_single_fields_by_hand(tmp_path: Path) -> None:
    found, bare = whole(), Attribution("bare", [4], (VAL,), [[1]])  # type: ignore[arg-type]
    loaded = saved(tmp_path, found, bare)
    assert_same(loaded, [found, bare])
    assert loaded[0].tokens is not None and loaded[0].tokens.of(1).shape == (0, 2) and loaded[0].tokens.se is None
    assert loaded[0].trace.shape == (2, 0, 3) and float(loaded[0].scalar) == 3.0
    assert np.isnan(loaded[0].scores[1, 0]) and loaded[0].scores[2, 1] == -np.inf
    assert np.isnan(loaded[0].checks[0].value) and loaded[0].checks[1].value == -np.inf
    one = loaded[1]
    assert (one.se, one.p, one.q, one.doubtful, one.layers, one.tokens, one.checks) == (None,) * 6 + ((),)
    assert one.scores.dtype == np.float64 and one.rows.dtype == np.int64 and one.reliable


EVERY = {*store.FILES} - {store.MARGINS}  # what every report has


def test_parts_that_are_not_there_leave_no_files(tmp_path: Path) -> None:
    saved(tmp_path, whole())
    assert {path.name for path in tmp_path.iterdir()} == {*EVERY, *attribution_store.FILES}
    saved(tmp_path, example_attribution())
    names = {"attributions.json", "attributions.parquet"}
    assert {path.name for path in tmp_path.iterdir()} == {*EVERY, *names}
    assert saved(tmp_path) == () and {path.name for path in tmp_path.iterdir()} == EVERY


def test_a_hundred_columns_and_a_long_trace_are_saved(tmp_path: Path) -> None:
    columns = {f"c{k}": np.full((5, 1), float(k)) for k in range(100)}
    found = replace(example_attribution(), columns=columns, arrays={"trace": np.arange(3e6)})
    assert_same(saved(tmp_path, found), [found])


def test_arrays_belong_to_the_attribution() -> None:
    """A method may fill its own buffer again at the next stage."""
    buffer = np.zeros((2, 1))
    found = Attribution("x", [0, 1], (VAL,), buffer, columns={"c": buffer}, arrays={"a": buffer})  # type: ignore[arg-type]
    buffer += 1
    assert not found.scores.any() and not found.c.any() and not found.a.any()
    with pytest.raises(ValueError, match="read-only"):
        found.scores[0] = 3
    assert replace(found, title="y").scores is found.scores  # no copy of a copy
    tensor = Attribution("x", torch.arange(2), (VAL,), torch.ones(2, 1))  # type: ignore[arg-type]
    assert tensor.scores.tolist() == [[1.0], [1.0]] and tensor.rows.tolist() == [0, 1]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "method": ({"method": ""}, "method='' is no name"),
    "queries": ({"queries": ()}, r"queries are \[\]; give at least one"),
    "queries twice": ({"queries": (VAL, VAL)}, r"queries are \['val', 'val'\]"),
    "a query's kind": ({"queries": (QueryInfo("val", "x", "?"), OTHER)}, "query kind 'x' is none of"),  # type: ignore[arg-type]
    "no rows": ({"rows": np.arange(0)}, "rows must list dataset indices"),
    "rows twice": ({"rows": [1, 2, 1]}, "rows must list dataset indices, at least one and each once"),
    "rows below 0": ({"rows": [1, 2, -1]}, "rows must list dataset indices"),
    "rows with fractions": ({"rows": [1.0, 2.0, 3.0]}, "rows has type float64, expected int64"),
    "scores": ({"scores": np.zeros((2, 3))}, r"scores has shape \(2, 3\), expected \(3, 2\)"),
    "no scores": ({"scores": None}, "scores has type object"),
    "se": ({"se": np.zeros(3)}, r"se has shape \(3,\), expected \(3, 2\)"),
    "q": ({"q": 0.5}, r"q has shape \(\), expected"),
    "a column": ({"columns": {"c": np.zeros((3, 1))}, "ranked_by": ""}, r"columns\['c'\] has shape \(3, 1\)"),
    "an array": ({"arrays": {"a": ["x"]}}, r"arrays\['a'\] has type <U1"),
    "ranked_by": ({"ranked_by": "best"}, "ranked_by='best' is none of its columns"),
    "doubtful": ({"doubtful": np.zeros((3, 2))}, "doubtful has type float64, expected bool"),
    "layers": ({"layers": LayerScores(("a",), np.zeros((3, 2, 2)))}, r"layers.scores has shape \(3, 2, 2\), expected"),
    "no layers": ({"layers": LayerScores((), np.zeros((3, 0, 2)))}, "layers names no layer"),
    "offsets": ({"tokens": TokenScores(np.array([0, 2, 5]), np.zeros((5, 2)))}, r"tokens.offsets has shape \(3,\)"),
    "falling offsets": (
        {"tokens": TokenScores(np.array([0, 3, 2, 5]), np.zeros((5, 2)))}, "tokens.offsets must rise from 0",
    ),
    "terms": ({"tokens": TokenScores(np.array([0, 2, 2, 4]), np.zeros((5, 2)))}, r"tokens.scores has shape \(5, 2\)"),
    "title": ({"title": None}, "title is None, expected text"),
    "a note": ({"notes": (3,)}, "a note is 3, expected text"),
    "a check": ({"checks": (Check("a", 1.0, 3, True, "x"),)}, "a check's limit is 3, expected text"),  # type: ignore[arg-type]
    "at": ({"at": 1.5}, "at=1.5 is neither a number of epochs nor 'end'"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_belong_together_is_named(case: str) -> None:
    fields, told = WRONG[case]
    with pytest.raises(ValueError, match=told):
        replace(whole(), **fields)


def test_a_report_takes_each_method_and_stage_once() -> None:
    example, found = example_report(12), example_attribution()
    with pytest.raises(ValueError, match=r"two attributions are by 'example' at stage 'end'; keep one"):
        InfluenceReport(example.scores, example.run, [found, found])
    with pytest.raises(ValueError, match="attributions hold str; give a list of Attribution"):
        InfluenceReport(example.scores, example.run, "found")  # type: ignore[arg-type]
    both = example.with_attributions(replace(found, at=1), found, whole())
    again = both.with_attributions(replace(found, title="new"))
    assert [(each.method, each.at, each.title) for each in again.attributions] == [
        ("my method", 3, "My method"), ("example", "end", "new"),
    ]  # fmt: skip


def test_a_methods_scores_are_found_by_its_name() -> None:
    report = example_report().with_attributions(replace(example_attribution(), at=1), example_attribution(), whole())
    assert report.attribution("example").at == "end" and report.attribution("my method").method == "my method"
    assert [each.at for each in report.stages("example")] == [1, "end"] and report.stages("none") == ()
    with pytest.raises(AttributeError, match=r"Attribution by 'example': no field, column or array 'laplace'"):
        _ = report.attribution("example").laplace
    assert [attribute_name(name) for name in ("LoGra", "a  b-c", "9", "Ü?")] == ["logra", "a_b_c", "9", "ü"]


# ---- files of versions until 0.1 ----


@pytest.fixture(scope="module")
def former() -> InfluenceReport:
    return InfluenceReport.load(FIXTURES / "report")


def test_former_reports_are_read_whole(former: InfluenceReport) -> None:
    stages = former.stages("BIF")
    assert [each.at for each in stages] == [1, "end"] and former.bif is stages[1]
    meta = json.loads((FIXTURES / "report" / "bif.json").read_text())["stages"][1]
    table = pa.parquet.read_table(FIXTURES / "report" / "bif.parquet").to_pandas()
    lines = table[table["at"] == "end"]
    found = former.bif
    np.testing.assert_array_equal(found.rows, lines["row"])
    names = ("scores", "se", "p", "q", "plain", "plain_se", "laplace", "trend")
    for name, there in (*((name, name) for name in names), ("effective_draws", "size")):
        np.testing.assert_array_equal(getattr(found, name)[:, 0], lines[there])
    np.testing.assert_array_equal(found.loss, meta["loss"])
    np.testing.assert_array_equal(found.row_sd, lines["row_sd"])
    np.testing.assert_allclose(
        found.correlation[:, 0], lines["scores"] / (lines["row_sd"] * meta["query_sd"][0]), rtol=1e-14
    )
    assert found.tokens is not None and found.tokens.offsets.tolist() == list(range(0, 97, 4))
    np.testing.assert_allclose(np.stack([found.tokens.of(k).sum(0) for k in range(24)]), found.scores, rtol=1e-4)
    assert [check.name for check in found.checks] == [screen["name"] for screen in meta["screens"]]
    assert found.settings == meta["settings"] and found.notes == tuple(meta["notes"])


def test_former_reports_are_shown_compared_and_combined(former: InfluenceReport, tmp_path: Path) -> None:
    assert "Bayesian influence (BIF)" in str(former) and "After epoch 1" in str(former)
    assert "Bayesian influence" in former.write_html(tmp_path / "r.html").read_text("utf-8")
    compared = former.compare(former)
    assert [(each.method, each.at, each.rank_correlation, each.top) for each in compared.methods] == [
        ("BIF", 1, pytest.approx(1), 1.0), ("BIF", "end", pytest.approx(1), 1.0),
    ]  # fmt: skip
    scores = replace(former.scores, mu=-former.scores.mu)
    other = InfluenceReport(
        scores, replace(former.run, seed=5), [replace(each, scores=-each.scores) for each in former.attributions]
    )
    both = InfluenceReport.combine([former, other])
    assert [each.at for each in both.stages("BIF")] == [1, "end"] and np.abs(both.bif.scores).max() == 0


def test_a_former_report_that_is_saved_again_has_the_new_files(former: InfluenceReport, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FIXTURES / "report", tmp_path / "report"))
    former.save(folder)
    assert not set(legacy.FILES) & {path.name for path in folder.iterdir()}
    again = InfluenceReport.load(folder)
    assert_same([again.scores, again.run, *again.attributions], [former.scores, former.run, *former.attributions])


class Order(L.Callback):
    """The rows of each epoch in their order, told by their contents."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.rows.append([])

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        (rows,) = trainer.train_dataloader.dataset.tensors
        self.rows[-1] += [int((rows == row).all(1).nonzero()) for row in batch[0]]


@pytest.mark.filterwarnings("ignore")
def test_a_former_checkpoint_is_resumed_to_the_same_report(former: InfluenceReport) -> None:
    def trained(train: Any, val: Any, checkpoint: Path | None) -> tuple[InfluenceReport, list[list[int]]]:
        L.seed_everything(0, verbose=False)
        influence, order = make.influence(), Order()
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        trainer = L.Trainer(max_epochs=2, callbacks=[influence, order], enable_checkpointing=False, **quiet)  # type: ignore[arg-type]
        trainer.fit(make.Sequences(), train, val, ckpt_path=checkpoint)
        assert influence.report is not None
        return influence.report, order.rows

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train, val = make.data()
        _, rows = trained(train, val, None)
        second = DataLoader(train.dataset, batch_size=6, sampler=rows[1])
        report, _ = trained(second, val, FIXTURES / "recording.ckpt")
    finally:
        torch.set_num_threads(threads)
    assert not [note for note in report.run.notes if "lost" in note or "missing" in note]
    assert [each.at for each in report.attributions] == [1, "end"] and report.run.steps == former.run.steps
    assert_same(report.attributions[0], former.attributions[0])  # made before the checkpoint
    # the chains at the end have other random numbers than without the interruption: tests/integrations compares them
    for (name, here), (_, there) in zip(numbers(report.scores), numbers(former.scores), strict=True):
        np.testing.assert_allclose(here, there, rtol=1e-3, atol=1e-6, err_msg=name)


def numbers(value: Any) -> list[tuple[str, np.ndarray]]:
    """All arrays in a dataclass."""
    found: list[tuple[str, np.ndarray]] = []
    for name, each in vars(value).items():
        inner = each.items() if isinstance(each, dict) else [(name, each)]
        found += [(key, part) for key, part in inner if isinstance(part, np.ndarray)]
    return found


# ---- exported, shown, compared, combined ----


def test_columns_for_other_programs() -> None:
    found = whole()
    report = example_report(12).with_attributions(replace(found, at=1, scores=found.scores * 0), found)
    report = report.with_attributions(Attribution("mu", [3], (VAL,), [[5.0]]), Attribution("q", [3], (VAL,), [[6.0]]))  # type: ignore[arg-type]
    report = report.with_attributions(Attribution("far", [3, 99], (VAL,), [[7.0], [8.0]]))  # type: ignore[arg-type]
    frame, table = report.to_pandas(), report.to_arrow()
    names = ["my_method", "my_method_se", "my_method_q", "mu_2", "q_2", "far"]
    assert [name for name in frame.columns if name not in example_report(12).to_pandas().columns] == names
    np.testing.assert_array_equal(frame["mu"], example_report(12).to_pandas()["mu"])  # f-INE's stays f-INE's
    val = frame[frame["query"] == "val"].set_index("row")
    for row, scores, se, q in zip(found.rows, found.ranking, found.ranking_se, found.q, strict=True):  # type: ignore[arg-type]
        if row < 12:
            assert (val.loc[row, ["my_method", "my_method_se", "my_method_q"]] == [scores[0], se[0], q[0]]).all()
    assert frame["my_method"].notna().sum() == 3 and frame["my_method_q"].notna().sum() == 3  # val alone is common
    assert (val.loc[3, ["mu_2", "q_2", "far"]] == [5.0, 6.0, 7.0]).all() and frame["far"].notna().sum() == 1
    for name in names:
        column = np.array([np.nan if each is None else each for each in table[name].to_pylist()])
        np.testing.assert_array_equal(column, frame[name])
    assert table["my_method"].null_count == 33


def agreement_by_hand(one: np.ndarray, other: np.ndarray) -> tuple[float, float, float]:
    ranks = [np.argsort(np.argsort(each)) for each in (one, other)]
    k = max(1, round(END_FRACTION * len(one)))
    ends = []
    for sign in (-1, 1):
        a, b = (set(np.argsort(sign * each)[:k].tolist()) for each in (one, other))
        ends.append(len(a & b) / len(a | b))
    return (float(np.corrcoef(*ranks)[0, 1]), *ends)


def test_two_reports_are_compared_over_the_rows_that_both_scored() -> None:
    g = np.random.default_rng(1)
    scores = g.standard_normal((50, 1))
    other = scores + g.standard_normal((50, 1))
    other[4] = np.nan
    one = Attribution("m", np.arange(50), (VAL,), scores, checks=(Check("a", 1.0, "x", False, "y"),))
    two = Attribution("m", np.arange(50)[::-1] + 10, (OTHER, VAL), np.concatenate([other * 0, other], 1)[::-1])
    here, there = example_report(60, seed=1), example_report(60, seed=2)
    found = here.with_attributions(one, replace(one, method="alone"), replace(one, at=2))
    (agreed,) = found.compare(there.with_attributions(two)).methods
    keep = np.array([row for row in range(10, 50) if row != 14])
    expected = agreement_by_hand(scores[keep, 0], other[keep - 10, 0])
    assert (agreed.method, agreed.at, agreed.query, agreed.scored, agreed.passed) == (
        "m",
        "end",
        "val",
        39,
        (False, True),
    )
    assert (agreed.rank_correlation, agreed.top, agreed.bottom) == pytest.approx(expected)
    text = str(found.compare(there.with_attributions(two)))
    assert "m, end of training" in text and "no and yes" in text
    assert here.compare(there).methods == () and "Other methods" not in str(here.compare(there))


def test_runs_are_combined_by_their_scatter() -> None:
    """One row alone has no others to learn a variance from: the plain t test."""
    values, extra = np.array([1.0, 2.0, 6.0]), np.array([3.0, 4.0, 8.0])
    runs = [
        [
            Attribution(
                "m", [4, 9], (VAL,), [[v], [0.0]], [[0.1], [0.1]], columns={"c": [[e], [1.0]], "c_se": [[1], [1]]}
            )
        ]  # type: ignore[arg-type, list-item]
        for v, e in zip(values, extra, strict=True)
    ]
    (found,), notes = combine_attributions(runs)
    se = values.std(ddof=1) / np.sqrt(3)
    assert found.scores[0, 0] == pytest.approx(3.0) and found.se is not None and found.se[0, 0] == pytest.approx(se)
    assert found.p is not None and found.p[0, 0] == pytest.approx(2 * stdtr(2, -3.0 / se))
    assert found.c[0, 0] == pytest.approx(5.0) and found.c_se[0, 0] == pytest.approx(extra.std(ddof=1) / np.sqrt(3))
    assert found.scores[1, 0] == 0 and found.se[1, 0] == 0 and np.isnan(found.p[1, 0])  # no scatter, no test
    assert not notes and found.headline == "mean of 3 runs · 2 rows" and "mean of 3 runs" in found.legend


def test_p_values_of_combined_null_scores_are_uniform() -> None:
    """Two runs of nothing but noise, with rows of unlike variance: a normal p-value would flag a third of them."""
    g = np.random.default_rng(0)
    spread = np.exp(0.3 * g.standard_normal(4000))[:, None]
    runs = [[Attribution("m", np.arange(4000), (VAL,), spread * g.standard_normal((4000, 1)))] for _ in range(2)]
    (found,), _ = combine_attributions(runs)
    assert found.p is not None and found.q is not None
    assert [float((found.p < level).mean()) for level in (0.05, 0.01)] == pytest.approx([0.05, 0.01], abs=0.012)
    assert (found.q < 0.05).sum() == 0


def test_what_not_all_runs_have_is_left_out_and_named() -> None:
    a, b = example_report(12, seed=1), example_report(12, seed=2)
    base = whole(columns={"c": np.ones((3, 2))}, ranked_by="c", checks=(Check("ok", 1.0, "x", True, "y"),))
    far = replace(base, method="far", rows=[0, 1, 3])
    one = a.with_attributions(base, far, replace(base, method="alone"))
    failed = Check("ok", 9.0, "x", False, "y")
    two = b.with_attributions(
        replace(base, rows=[9, 7, 5], checks=(failed,), columns={}, ranked_by="", notes=("two", "three")),
        replace(far, rows=[8, 9, 10]),
    )
    both = InfluenceReport.combine([one, two])
    (found,) = both.attributions
    assert found.method == "my method" and found.rows.tolist() == [7, 9] and found.at == 3
    first, second = base.scores[0], base.scores[1]  # row 7 in the two runs, on "val" NaN in the second
    np.testing.assert_allclose(found.scores[0], [first[0], (first[1] + second[1]) / 2])
    assert found.checks == (failed,) and not found.reliable and found.ranked_by == "" and found.columns == {}
    assert found.layers is None and found.tokens is None and found.arrays == {}
    assert found.notes == ("one", "two", "three")
    told = [note for note in both.run.notes if "left out of the combined report" in note]
    assert told == [
        "far, after epoch 3, is left out of the combined report: no row and query is in all runs.",
        "alone, after epoch 3, is left out of the combined report: 1 of 2 runs have it.",
    ]


def test_rows_without_a_score_are_in_no_list() -> None:
    found = replace(example_attribution(), scores=[[np.nan], [2.0], [-1.0], [np.nan], [1.0]])  # type: ignore[arg-type]
    assert found.top(9).tolist() == [1, 4, 2] and found.bottom(9, "val").tolist() == [2, 4, 1]
    with pytest.raises(KeyError, match="no query 'x'; choose one of 'val'"):
        found.top(1, "x")


# ---- the command line ----


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(pages.report_of(60).with_attributions(pages.other(60)).save(tmp_path / "report"))


def test_a_methods_scores_are_shown_by_the_command_line(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", folder, "--method", "other", "--query", "margin", "--top", "3"]) == 0
    text = capsys.readouterr().out
    found = pages.other(60)
    assert "Another method (other)" in text and "UNRELIABLE" in text and "A note." in text
    assert "f-INE" not in text and str(found.top(1)[0]) in text
    assert main(["show", folder, "--method", "BIF"]) == 0
    assert "After epoch 2" in capsys.readouterr().out
    assert main(["show", folder, "--method", "other", "--json", "--top", "2"]) == 0
    told = json.loads(capsys.readouterr().out)
    lists = {"margin": {"top": found.top(2).tolist(), "bottom": found.bottom(2).tolist()}}
    assert told == {"method": "other", "at": "end", "reliable": False, "queries": lists}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--method", "none"], "no method 'none' ran on the trained model; there are: BIF, other"),
        (["--method", "other", "--query", "self"], "no query 'self'; choose one of 'margin'"),
        (["--method", "other", "--flagged"], "--flagged and --bottom list f-INE's scores"),
        (["--method", "other", "--bottom", "3"], "--flagged and --bottom list f-INE's scores"),
    ],
)
def test_what_the_command_line_cannot_show_is_told(
    folder: str, words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", folder, *words]) not in (0, 1)
    assert told in capsys.readouterr().err
