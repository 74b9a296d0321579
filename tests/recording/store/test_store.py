"""The gradient store holds what the run did with each row, and any later query gets its scores from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ine_callback import GradientStore, InfluenceReport, ask
from ine_callback.errors import InfluenceError
from ine_callback.recording import snapshots
from ine_callback.recording.store.recording import StoreRecording
from ine_callback.recording.store.vectors import RowVectors
from ine_callback.report.reading import ReportError
from ine_callback.scoring.compression import Compression
from ine_callback.stats.ranks import spearman
from tests.helpers.stored import ALL, ROWS, Functional, Raw, Training, data, loss_of, network


def trained(store: GradientStore | None, optimizer: str = "sgd", **options: object) -> Training:
    one = Training(store, optimizer, **options)
    with one.recorder:
        one.steps()
    return one


@pytest.mark.parametrize(("refresh_every", "tolerance"), [(12, 2e-3), (5, 0.05)])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_row_s_vector_gives_the_signals_of_a_query_recorded_in_the_run(
    optimizer: str, refresh_every: int, tolerance: float
) -> None:
    # two ways that share the discount's parts alone: the store discounts rows, directions discount queries. The
    # store's basis is that of the refreshes after 0 and 12 steps; after 15 steps it is that of the tenth
    g = torch.Generator().manual_seed(3)
    directions = [[torch.randn(p.shape, generator=g) for p in network().parameters()] for _ in range(4)]
    method = Raw(closing=False)
    one = trained(ALL, optimizer, queries={"w": Functional(directions)}, methods=[method], refresh_every=refresh_every)
    store = one.recorder.store
    assert store is not None
    vectors = store.vectors.vectors(ROWS)
    named = dict(zip(one.model.parameters(), range(6), strict=True))
    entries = torch.zeros(4, store.compression.size)
    for block in one.recorder.signals.table:
        v = block.to_layout([torch.stack([w[named[p]] for w in directions]) for p in block.parameters])
        place = store.compression.places[block.key]
        entries[:, place] = store.compression.bases[block.key].of_vectors(v)
    found = vectors @ entries.T
    assert store.compression.size == sum(p.numel() for p in one.model.parameters())
    torch.testing.assert_close(found, method.raw, rtol=tolerance, atol=tolerance * float(method.raw.abs().max()))


@pytest.mark.parametrize("rows", [ROWS, None])
def test_a_discount_that_waits_for_the_next_refresh_is_that_of_each_step(rows: int | None) -> None:
    # every row comes twice between the refreshes after 5 and 10 steps, and after 5 the store has another basis
    room, without = (GradientStore(working=40, device_bytes=size) for size in (2**30, 4 * 41 * (ROWS + 1)))
    delayed, at_once = (trained(settings, "adamw", rows=rows, refresh_every=5) for settings in (room, without))
    for one, waits in ((delayed, True), (at_once, False)):
        assert one.recorder.store is not None and (one.recorder.store.vectors._delayed is not None) == waits
    expected, found = (one.recorder.store.vectors.vectors(ROWS) for one in (at_once, delayed))  # type: ignore[union-attr]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("weights", ["random", "fixed"])
def test_queries_asked_later_get_the_run_s_scores(weights: str) -> None:
    one = trained(ALL, initial_weights=weights)
    report, (x, y) = one.recorder.report(), data()
    before = [p.clone() for p in one.model.parameters()]
    found = report.ask({"val": (x[:6] + 0.1, y[:6]), "other": (x[6:12] - 0.1, y[6:12])}, one.model, loss=loss_of)
    for k in range(2):
        assert spearman(found.scores[:, k], report.scores.mu[:, k]) > 0.9
    assert found.se is not None and np.isfinite(found.se).all() and found.reliable
    np.testing.assert_allclose(found.captured, 1.0, atol=1e-5)
    assert all(torch.equal(p, q) for p, q in zip(before, one.model.parameters(), strict=True))


def test_from_fixed_weights_the_store_is_the_closing_pass_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "MAX_BYTES", 0)  # the pass is at the final weights alone, where queries are, too
    x, y = data()
    queries = {str(k): (x[k : k + 1], y[k : k + 1]) for k in range(4)}
    one = trained(ALL, initial_weights="fixed", queries=queries)
    report, recorded = one.recorder.report(), one.recorder.store
    assert recorded is not None and report.store is not None and recorded.final is not recorded.compression
    found = report.store.products(report.store.of_query(recorded.query_entries()))
    for a, b in zip(found.T, report.scores.mu.T, strict=True):
        assert np.corrcoef(a, b)[0, 1] > 1 - 1e-6


def test_fewer_bytes_keep_the_leading_part() -> None:
    exact, (x, y) = trained(ALL), data()
    asked = {"new": (x[20:30] * 1.1, y[20:30])}
    whole = exact.recorder.report().ask(asked, exact.model, loss=loss_of).scores[:, 0]
    found = {}
    for size in (12, 36):
        small = trained(GradientStore(bytes_per_row=4 + size, dtype="int8", working=512))
        report = small.recorder.report()
        assert report.store is not None and report.store.rows.nbytes == size * ROWS
        found[size] = spearman(report.ask(asked, small.model, loss=loss_of).scores[:, 0], whole)
    assert found[36] > 0.97 and found[36] > found[12] > 0.5


@pytest.mark.parametrize("weights", ["random", "fixed"])
def test_mixed_widths_have_more_numbers_in_the_same_bytes_and_tell_more(weights: str) -> None:
    exact, (x, y) = trained(ALL, initial_weights=weights), data()
    asked = {str(k): (x[k : k + 2] * 1.1, y[k : k + 2]) for k in range(8)}
    whole = exact.recorder.report().ask(asked, exact.model, loss=loss_of).scores
    found = {}
    for dtype in ("int8", "mixed"):
        small = trained(GradientStore(20, dtype, working=512), initial_weights=weights)
        report = small.recorder.report()
        store = report.store
        assert store is not None and store.rows.shape[1] + 2 * len(store.bands) <= 20
        scores = report.ask(asked, small.model, loss=loss_of).scores
        found[dtype] = store.dimensions, np.mean([spearman(a, b) for a, b in zip(scores.T, whole.T, strict=True)])
    assert found["mixed"][0] > 1.3 * found["int8"][0] and found["mixed"][1] > found["int8"][1] + 0.005


def test_the_training_and_the_run_s_scores_are_the_same_with_a_store() -> None:
    plain, stored = trained(None), trained(GradientStore())
    for one, other in zip(plain.model.parameters(), stored.model.parameters(), strict=True):
        assert torch.equal(one, other)
    np.testing.assert_array_equal(plain.recorder.report().scores.mu, stored.recorder.report().scores.mu)
    assert plain.recorder.report().store is None


PARTS = [(Compression, "refresh"), (Compression, "take"), (Compression, "settle"), (RowVectors, "update")]
PARTS += [(StoreRecording, "take_pass"), (StoreRecording, "take_queries")]


@pytest.mark.parametrize(("owner", "name"), PARTS, ids=[f"{owner.__name__}.{name}" for owner, name in PARTS])
def test_a_failure_in_the_store_costs_the_store_alone(owner: type, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, calls, real = trained(None), [0], getattr(owner, name)

    def fails_later(self: object, *args: object, **options: object) -> object:
        calls[0] += 1
        if calls[0] > 1 or name in ("take_pass", "take_queries"):
            raise MemoryError("the store is full")
        return real(self, *args, **options)

    monkeypatch.setattr(owner, name, fails_later)
    broken = trained(GradientStore())
    report, expected = broken.recorder.report(), plain.recorder.report()
    assert report.store is None and not broken.recorder.failed and calls[0]
    assert "no gradient store, though one was asked for: MemoryError: the store is full" in report.run.notes
    np.testing.assert_array_equal(report.scores.mu, expected.scores.mu)


def test_rows_that_come_without_a_known_number_grow_the_store() -> None:
    known, grown = trained(GradientStore()), trained(GradientStore(), rows=None)
    one, other = known.recorder.report().store, grown.recorder.report().store
    assert one is not None and other is not None
    np.testing.assert_array_equal(one.rows, other.rows)


@pytest.mark.parametrize("settings", [GradientStore(), GradientStore(30), GradientStore(dtype="int8")])
def test_what_is_saved_answers_the_same(tmp_path: Path, settings: GradientStore) -> None:
    one, (x, y) = trained(settings), data()
    report = one.recorder.report()
    again = InfluenceReport.load(report.save(tmp_path))
    assert again.store is not None and isinstance(again.store.rows, np.memmap)
    assert isinstance(again.store.components, np.memmap)
    asked = {"new": (x[:3], y[:3])}
    mine, theirs = (r.ask(asked, one.model, loss=loss_of).scores for r in (report, again))
    np.testing.assert_array_equal(mine, theirs)
    trained(None).recorder.report().save(tmp_path)  # a report without a store leaves none behind
    assert InfluenceReport.load(tmp_path).store is None and not (tmp_path / "store.npy").exists()


@pytest.mark.parametrize("name", ["store.npy", "store-components.npy", "store-arrays.npz", "store-weights.npz"])
def test_damaged_files_and_pickles_are_refused(tmp_path: Path, name: str) -> None:
    trained(GradientStore()).recorder.report().save(tmp_path)
    np.save(tmp_path / "bad.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "bad.npy").rename(tmp_path / name)
    with pytest.raises(ReportError, match=name):
        InfluenceReport.load(tmp_path)


Damage = Callable[[dict[str, Any], dict[str, Any]], object]
DAMAGES: dict[str, Damage] = {
    "no such width": lambda meta, _: meta["bands"][0].update(width=3),
    "a part of a byte": lambda meta, _: meta["bands"][-1].update(count=meta["bands"][-1]["count"] + 1),
    "other bytes": lambda meta, _: meta["bands"][-1].update(count=meta["bands"][-1]["count"] + 8),
    "another width": lambda meta, _: meta["bands"][-1].update(width=2 * meta["bands"][-1]["width"]),
    "without bands": lambda meta, _: meta.update(bands=[]),
    "bands are no list": lambda meta, _: meta.update(bands=3),
    "bands are no bands": lambda meta, _: meta.update(bands="8"),
    "a band without a count": lambda meta, _: meta["bands"][0].pop("count"),
    "one band in two": lambda meta, _: meta.update(bands=[{"width": 8, "count": 1}, *meta["bands"]]),
    "a scale for each row": lambda _, arrays: arrays.update(scale=arrays["scale"][:, 0]),
    "scales of another type": lambda _, arrays: arrays.update(scale=arrays["scale"].astype(np.float32)),
    "components of other bands": lambda _, arrays: arrays.update(components=arrays["components"][:, 1:]),
    "components of another type": lambda _, arrays: arrays.update(components=arrays["components"].astype(np.float32)),
    "moments of other bands": lambda _, arrays: arrays.update(moments=arrays["moments"][:, 1:]),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_bands_that_do_not_fit_are_refused(tmp_path: Path, name: str) -> None:
    report = trained(GradientStore(30)).recorder.report()
    assert report.store is not None and len(report.store.bands) > 1
    report.save(tmp_path)
    meta = json.loads((tmp_path / "store.json").read_text("utf-8"))
    with np.load(tmp_path / "store-arrays.npz") as found:
        arrays = dict(found) | {"components": np.load(tmp_path / "store-components.npy")}
    DAMAGES[name](meta, arrays)
    (tmp_path / "store.json").write_text(json.dumps(meta), "utf-8")
    np.save(tmp_path / "store-components.npy", arrays.pop("components"))
    np.savez(tmp_path / "store-arrays.npz", **arrays)
    with pytest.raises(ReportError, match=r"store(-arrays|-components)?\.(json|npz|npy)"):
        InfluenceReport.load(tmp_path)


def test_a_store_of_the_former_format_is_read(tmp_path: Path) -> None:
    one, (x, y) = trained(GradientStore(dtype="int8")), data()
    report = one.recorder.report()
    meta = report.save(tmp_path) / "store.json"
    known = json.loads(meta.read_text("utf-8"))
    assert known["format_version"] == 2 and not known.pop("bands")  # the former format had none
    meta.write_text(json.dumps(known | {"format_version": 1}), "utf-8")
    components = tmp_path / "store-components.npy"  # nor this file
    with np.load(tmp_path / "store-arrays.npz") as found:
        np.savez(tmp_path / "store-arrays.npz", components=np.load(components), **found)
    components.unlink()
    asked = {"new": (x[:3], y[:3])}
    mine, theirs = (r.ask(asked, one.model, loss=loss_of).scores for r in (report, InfluenceReport.load(tmp_path)))
    np.testing.assert_array_equal(mine, theirs)
    known["format_version"] = 3
    meta.write_text(json.dumps(known), "utf-8")
    with pytest.raises(ReportError, match=r"its format is not 'ine_callback\.store' 1 or 2"):
        InfluenceReport.load(tmp_path)


def test_a_row_that_was_never_seen_has_no_score() -> None:
    one, (x, y) = Training(GradientStore(), rows=ROWS + 2), data()
    with one.recorder:
        one.steps()
    found = ask(one.recorder.report(), {"new": (x[:3], y[:3])}, one.model, loss=loss_of)
    assert np.isnan(found.scores[ROWS:]).all() and np.isfinite(found.scores[:ROWS]).all()
    assert len(found.top(100)) == ROWS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bytes_per_row": 4, "dtype": "int8"}, "bytes_per_row=4 must be an integer of at least 5"),
        ({"bytes_per_row": 15}, "bytes_per_row=15 must be an integer of at least 16"),
        ({"dtype": "float64"}, "dtype='float64' is none of mixed, int8"),
        ({"working": 0}, "working=0 must be"),
        ({"device_bytes": -1}, "device_bytes=-1 must be"),
    ],
)
def test_impossible_settings_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(InfluenceError, match=message):
        GradientStore(**options)  # type: ignore[arg-type]


def test_what_cannot_be_stored_or_asked_is_refused_with_the_remedy() -> None:
    with pytest.raises(InfluenceError, match=r"store= needs the discount.*discount=True"):
        trained(GradientStore(), discount=False)
    model, (x, y) = network(), data()
    report = trained(GradientStore()).recorder.report()
    with pytest.raises(InfluenceError, match=r"Sequential has no parameter '0\.weight'"):
        report.ask({"q": (x, y)}, nn.Sequential(nn.ReLU(), nn.Linear(5, 3)), loss=loss_of)
    other = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.LayerNorm(7), nn.Linear(7, 3))
    with pytest.raises(InfluenceError, match="has another shape than in the run"):
        report.ask({"q": (x, y)}, other, loss=loss_of)
    with pytest.raises(InfluenceError, match="no gradient store; train with store=GradientStore"):
        trained(None).recorder.report().ask({"q": (x, y)}, model, loss=loss_of)
