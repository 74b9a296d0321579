"""The report's page in a browser: it opens without network, works, stays responsive, and runs nothing from data."""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ine_callback.report import Text, pagedata
from tests.helpers.report import pages
from tests.helpers.report.hostile import PAYLOADS

api = pytest.importorskip("playwright.sync_api", reason="needs playwright, of the extra dev")
HOSTILE = "".join(PAYLOADS.values())
ROWS, WIDE, PHONE = 240, {"width": 1280, "height": 900}, {"width": 390, "height": 844}
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One headless Chromium: the system's, or playwright's own."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    found = next((path for path in map(shutil.which, names) if path), None)
    with api.sync_playwright() as play:
        try:
            one = play.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except api.Error as error:
            pytest.skip(f"no Chromium: {str(error).splitlines()[0]}")
        yield one
        one.close()


def write(path: Path) -> None:
    """A page of everything, of many rows, or of hostile text."""
    if path.name == "tokens.html":
        letters = [[chr(97 + (row + k) % 26) for k in range(pages.TERMS)] for row in range(ROWS)]
        pages.report_of(ROWS).write_html(path, samples=letters, render=Text)
    elif path.name == "all.html":
        images = np.random.default_rng(0).random((ROWS, 1, 8, 8))
        pages.report_of(ROWS).write_html(path, samples=images, labels=pages.labels_of(ROWS))
    elif path.name.startswith("store"):
        images = np.random.default_rng(0).random((ROWS, 1, 8, 8))
        pages.stored(pages.report_of(ROWS)).write_html(path, samples=images, labels=pages.labels_of(ROWS))
    elif path.name == "methods.html":
        pages.report_of(ROWS).with_attributions(pages.other(ROWS)).write_html(path)
    elif path.name == "many.html":
        pages.report_of(20_000, chains=False).write_html(path, labels=pages.labels_of(20_000))
    else:
        texts = [(HOSTILE, {HOSTILE: HOSTILE})[row % 2] for row in range(ROWS)]
        report = pages.stored(pages.report_of(ROWS, HOSTILE)).with_attributions(pages.other(ROWS, HOSTILE))
        report.write_html(path, samples=texts, labels=pages.labels_of(ROWS, HOSTILE))


@pytest.fixture(scope="module")
def opened(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    """Opens a page offline; at the end nothing may have gone wrong in any, and nothing been asked of a network."""
    faults: list[str] = []
    folder = tmp_path_factory.mktemp("pages")

    def open_page(name: str, **options: Any) -> Any:
        page = browser.new_context(offline=True, viewport=WIDE, **options).new_page()
        page.on("console", lambda one: faults.append(one.text) if one.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("dialog", lambda one: faults.append(one.message))
        page.on("request", lambda one: None if one.url.startswith(("file:", "data:")) else faults.append(one.url))
        if not (folder / name).exists():  # a test process may run few of these tests
            write(folder / name)
        page.goto((folder / name).as_uri())
        if options.get("java_script_enabled", True):
            page.wait_for_selector("#panel[aria-busy=false]")
        return page

    yield open_page
    assert not faults


@pytest.fixture(scope="module")
def shared(opened: Open) -> Any:
    """The page of everything."""
    return opened("all.html")


@pytest.fixture
def page(shared: Any) -> Any:
    """The same at its first tab, wide, light and unfiltered."""
    shared.set_viewport_size(WIDE)
    shared.evaluate("Object.assign(state, { text: '', side: 'all', cls: 'all' }); open(0)")
    return shared


def first_rows(page: Any, count: int = 3) -> list[int]:
    return [int(text) for text in page.locator("#table tbody td:first-child").all_inner_texts()[:count]]


def test_plots_are_drawn_and_follow_the_tabs(page: Any) -> None:
    for name in ("volcano", "null", "methods", "course", "tradeoff"):
        image = Image.open(io.BytesIO(page.locator(f"#plot-{name}").screenshot())).convert("HSV")
        colored = (np.asarray(image)[..., 1] > 100).sum()  # points and lines; axes and the null are grey
        assert colored > 100, name
    before = page.evaluate("[...sources.get('volcano.rest').data.x]")
    page.get_by_role("tab", name="class/dog").click()
    assert page.evaluate("[...sources.get('volcano.rest').data.x]") != before
    assert page.locator("#plot-methods").is_hidden()  # no chains asked this query
    page.keyboard.press("ArrowLeft")
    assert page.get_by_role("tab", selected=True).inner_text() == "class/cat"
    assert page.locator("#question").inner_text() == "What about class/cat?"
    assert page.get_by_role("tab", selected=True).evaluate("tab => tab === document.activeElement")


def test_the_worst_rows_are_there_with_their_images_and_a_click_shows_them(page: Any) -> None:
    report = pages.report_of(ROWS)
    cards = page.locator("#first .card-row")
    worst = report.top(8, "self").rows.tolist()
    assert [int(card.get_attribute("data-row")) for card in cards.all()] == worst
    assert cards.locator("img").count() == 8 and page.locator("#gallery").is_hidden()
    cards.nth(2).click()
    assert page.locator("#detail-title").inner_text() == f"Row {worst[2]}"
    assert page.locator("#detail img").count() == 1
    assert page.locator("#table tr[aria-current=true] td").first.inner_text() == str(worst[2])
    row = page.evaluate("sources.get('volcano.high').data.row[5]")
    page.locator("#plot-volcano").scroll_into_view_if_needed()
    x, y = page.evaluate(
        "(() => { const {x, y} = sources.get('volcano.high').data, view = Bokeh.index.find_one(plots.get('volcano'));"
        "const box = view.el.getBoundingClientRect(), {x_scale, y_scale} = view.frame;"
        "return [box.x + x_scale.compute(x[5]), box.y + y_scale.compute(y[5])] })()"
    )
    page.mouse.click(x, y)
    page.wait_for_selector(f"#detail-title:text-is('Row {row}')", timeout=5000)


def test_the_table_sorts_and_filters(page: Any) -> None:
    report = pages.report_of(ROWS)
    assert first_rows(page) == report.top(3, "self").rows.tolist()
    page.get_by_role("button", name="μ ▼").click()
    assert first_rows(page) == report.bottom(3, "self").rows.tolist()
    assert page.locator("#table th[aria-sort=ascending]").inner_text() == "μ ▲"
    page.get_by_role("button", name="mean loss", exact=True).click()
    assert first_rows(page) == report.suspect_labels(3).tolist()
    page.locator("#side").select_option("suspect")
    assert page.locator("#count").inner_text().endswith(f"of {report.drop_list().size} rows")
    page.locator("#side").select_option("all")
    page.locator("#class").select_option(label="owl")
    assert {row % 3 for row in first_rows(page, 25)} == {2}
    page.locator("#class").select_option("all")
    page.locator("#text").fill("17, 4")
    assert sorted(first_rows(page)) == [4, 17]
    page.locator("#text").fill("")
    page.get_by_role("button", name="Next page").click()
    assert page.locator("#count").inner_text() == "26–50 of 240 rows"
    page.locator("#side").select_option("unseen")
    assert first_rows(page) == [239]


@pytest.mark.long
def test_twenty_thousand_rows_stay_responsive(opened: Open) -> None:
    page = opened("many.html")
    assert page.locator("#count").inner_text() == "1–25 of 20,000 rows"
    timed = "action => { const from = performance.now(); action(); return performance.now() - from }"
    for action in (
        "document.querySelector('[data-by=loss]').click()",
        "at('text').value = 'dog'; at('text').dispatchEvent(new Event('input'))",
        "at('tab-1').click()",
    ):
        assert page.evaluate(f"({timed})(() => {{ {action} }})") < 1000, (
            action
        )  # tens of milliseconds on an idle machine
    assert page.locator("#count").inner_text() == "1–25 of 6,667 rows"


def test_hostile_text_stays_text(opened: Open) -> None:
    page = opened("hostile.html")
    for tab in page.get_by_role("tab").all():
        tab.click()
    page.locator("#first .card-row").first.click()
    page.locator("#table tbody tr").nth(3).click()
    page.locator("#plot-volcano").hover()
    assert page.evaluate("document.querySelectorAll('script').length") == 4
    foreign = "iframe, base, object, img, link, main style, [onload], [onerror], [onmouseover], [href^=java]"
    assert page.evaluate(f"document.querySelectorAll('{foreign}').length") == 0
    assert page.evaluate("document.documentElement.dataset.owned") is None
    page.set_viewport_size(PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    assert HOSTILE[:200] in page.locator("[role=tab]").first.text_content()
    assert "<script>" in page.locator("#class").text_content() and "<script>" in page.locator("#detail").text_content()


def test_only_the_page_s_own_scripts_run(browser: Any, tmp_path: Path) -> None:
    """What escaping let through would be stopped by the policy; without the policy we would see it."""
    text = pages.report_of(ROWS).write_html(tmp_path / "r.html", []).read_text("utf-8")
    guarded = text.replace("</main>", PAYLOADS["element"] + PAYLOADS["handler"] + "</main>")
    bare = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", guarded)
    page = browser.new_page()
    owned = []
    for each in (guarded, bare):
        (tmp_path / "r.html").write_text(each, "utf-8")
        page.goto((tmp_path / "r.html").as_uri())
        owned.append(page.evaluate("document.documentElement.dataset.owned"))
    assert owned == [None, "1"]


def test_the_volcano_is_walked_with_the_keys(page: Any) -> None:
    plot, mu = page.locator("#plot-volcano"), "query().mu[place.get(state.row)]"
    page.keyboard.press("Tab")  # the reader has no mouse
    plot.focus()
    assert plot.evaluate("one => getComputedStyle(one).outlineStyle") == "solid"
    page.keyboard.press("End")
    ends = page.evaluate("[Math.min(...query().mu.filter(finite)), Math.max(...query().mu.filter(finite))]")
    assert page.evaluate(mu) == ends[1] and page.evaluate("sources.get('volcano.chosen').data.x[0]") == ends[1]
    page.keyboard.press("ArrowLeft")
    second = page.evaluate("query().mu.filter(finite).sort((a, b) => b - a)[1]")
    assert page.evaluate(mu) == second
    row = page.evaluate("state.row")
    assert page.locator("#detail-title").inner_text() == f"Row {row}"  # in a region that is read out
    page.keyboard.press("Home")
    page.keyboard.press("ArrowDown")  # there is nothing below
    assert page.evaluate(mu) == ends[0]
    assert plot.evaluate("one => one === document.activeElement")


def test_plots_say_in_words_what_they_show(page: Any) -> None:
    flagged = int((pages.report_of(ROWS).scores.q[:, 0] <= 0.05).sum())
    said = {name: page.locator(f"#plot-{name}").get_attribute("aria-label") for name in ("volcano", "null", "course")}
    assert f"{flagged} flagged" in said["volcano"] and "Arrow keys" in said["volcano"]
    assert "null check" in said["null"] and "3 stages" in said["course"]
    page.get_by_role("tab", name="class/dog").click()
    assert page.locator("#plot-volcano").get_attribute("aria-label") != said["volcano"]


def test_tokens_have_the_colours_of_the_chosen_query(opened: Open) -> None:
    page, report = opened("tokens.html"), pages.report_of(ROWS)
    chains = report.bif
    assert chains.tokens is not None
    row = int(chains.rows[3])
    page.evaluate(f"choose({row})")
    for name in ("self", "margin"):
        page.get_by_role("tab", name=name, exact=True).click()
        scores = chains.tokens.of(3)[:, chains.column(name)]
        found = page.locator("#detail [data-w]").evaluate_all(
            "all => all.map((one) => (one.className === 'harms' ? -1 : 1) * one.style.getPropertyValue('--w'))"
        )
        np.testing.assert_allclose(found, scores / np.abs(scores).max(), atol=2e-3)
    page.get_by_role("tab", name="class/dog").click()  # no chains asked this query
    assert page.locator("#detail [data-w].helps, #detail [data-w].harms").count() == 0


def test_each_method_has_a_tab_and_its_plots(opened: Open) -> None:
    page, report = opened("methods.html"), pages.report_of(ROWS).with_attributions(pages.other(ROWS))
    tabs, sections = page.locator("#methods [role=tab]"), page.locator("#methods > section")
    assert tabs.all_inner_texts() == ["BIF", "other"]

    def shown() -> tuple[list[bool], str, str]:
        open_tab = page.locator("#methods [role=tab][aria-selected=true]").inner_text()
        return [one.is_visible() for one in sections.all()], open_tab, page.locator("#method").input_value()

    def drawn() -> list[float]:
        found: list[float] = page.evaluate("[...sources.get('methods.both').data.y]")
        return found

    page.locator("#rows").get_by_role("tab", name="margin").click()
    assert shown() == ([True, False], "BIF", "0") and page.locator("#plot-course").is_visible()
    assert page.locator("#course-by").inner_text() == "BIF"
    np.testing.assert_allclose(drawn(), report.bif.scores[:, report.bif.column("margin")], rtol=1e-6)
    page.locator("#method").select_option("1")
    assert shown() == ([False, True], "other", "1") and page.locator("#plot-course").is_hidden()  # it ran once
    np.testing.assert_allclose(drawn(), pages.other(ROWS).columns["halves"][:, 0], rtol=1e-6)
    assert page.evaluate("plots.get('methods').left[0].axis_label") == "other"
    assert "other against μ, rank agreement" in page.locator("#plot-methods").get_attribute("aria-label")
    tabs.nth(1).focus()
    page.keyboard.press("ArrowLeft")
    assert shown() == ([True, False], "BIF", "0") and tabs.nth(0).evaluate("tab => tab === document.activeElement")
    heads = [head.strip(" ▲▼") for head in page.locator("#table thead th").all_inner_texts()]
    assert heads[-2:] == ["BIF", "other"]
    line = page.locator("#table tbody tr", has=page.get_by_text(re.compile(r"^1$"))).first.locator("td, th")
    assert line.all_inner_texts()[-1] == "–"  # it scored even rows alone
    page.locator("#rows").get_by_role("tab", name="self").click()
    tabs.nth(1).click()
    assert page.locator("#agreement").inner_text() == "not asked this query" and drawn() == []
    page.locator("#rows").get_by_role("tab", name="class/dog").click()
    assert page.locator("#plot-methods").is_hidden()  # nobody was asked it


def test_the_chosen_row_s_nearest_rows_are_shown_and_lead_on(opened: Open) -> None:
    page, report = opened("store.html"), pages.stored(pages.report_of(ROWS))
    (row, twin), *_ = pages.TWINS
    page.get_by_role("tab", name="margin", exact=True).click()
    page.locator(f"#alike [data-choose='{row}']").click()
    assert page.locator("#detail-title").inner_text() == f"Row {row}"
    found, cards = report.neighbours(row, 6), page.locator("#detail .near .card-row")
    assert [int(text.split()[1]) for text in cards.locator(".who").all_inner_texts()] == found.rows.tolist()
    said = cards.first.inner_text().replace("−", "-").split("\n")
    assert said[:3] == [f"row {twin}", f"class {pages.labels_of(ROWS)[twin]}", f"cos {found.cosines[0]:.2f}"]
    assert float(said[3].removeprefix("μ ")) == pytest.approx(report.scores.mu[twin, 1], abs=0.006)
    assert cards.locator("img").count() > 0
    cards.first.click()
    assert page.locator("#detail-title").inner_text() == f"Row {twin}"
    assert page.locator("#detail .near .who").first.inner_text() == f"row {row}"
    page.evaluate("choose(239)")  # was never observed
    assert "no neighbours" in page.locator("#detail").inner_text() and cards.count() == 0
    groups = page.locator("#alike .groups")
    assert groups.first.locator("li").count() == len(pages.TWINS)
    assert "rows lower margin" in groups.last.inner_text() and "near duplicate" in page.locator(".answers").inner_text()
    page.set_viewport_size(PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


def test_a_large_page_says_which_neighbours_it_leaves_out(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pagedata, "PRODUCTS", 240 * 100 * 50)  # enough for 50 rows
    page = opened("store few.html")
    rows = page.evaluate("[...near.of.keys()]")
    worst = page.evaluate("Number(document.querySelector('#first .card-row').dataset.row)")
    assert len(rows) == 50 and worst in rows
    page.evaluate(f"choose({next(row for row in range(ROWS - 1) if row not in rows)})")
    assert "Neighbours of 50 rows are in this file" in page.locator("#detail").inner_text()


def test_tooltips_follow_the_scheme(page: Any) -> None:
    page.emulate_media(color_scheme="dark")
    try:
        at = page.evaluate(
            """() => { const view = Bokeh.index.roots.find((one) => one.model === plots.get('volcano'));
            const k = sources.get('volcano.high').data; return [view.frame.x_scale.compute(k.x[0]),
            view.frame.y_scale.compute(k.y[0])]; }"""
        )
        page.locator("#plot-volcano").scroll_into_view_if_needed()
        box = page.locator("#plot-volcano").bounding_box()
        page.mouse.move(box["x"] + at[0] - 3, box["y"] + at[1] - 3)
        page.mouse.move(box["x"] + at[0], box["y"] + at[1])
        tip = page.locator(".bk-Tooltip").first
        tip.wait_for(state="visible", timeout=5000)
        ground = tip.evaluate("one => getComputedStyle(one).backgroundColor")
        assert int(re.findall(r"\d+", ground)[0]) < 80
        said = tip.evaluate(
            """one => { const all = (at) => [at.textContent, ...[...at.querySelectorAll('*')].map((each) =>
            each.shadowRoot ? all(each.shadowRoot) : '')].join(' '); return all(one.shadowRoot ?? one); }"""
        )
        assert "row" in said and "95 %" in said
    finally:
        page.emulate_media(color_scheme="light")
        page.mouse.move(0, 0)


def test_dark_scheme_and_its_switch(page: Any) -> None:
    shade = "parseInt(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])"
    axis = "plots.get('volcano').below[0].axis_label_text_color"
    light = page.evaluate(axis)
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(shade) < 60 and page.evaluate(axis) != light
    page.get_by_role("button", name="Switch between light and dark").click()
    assert page.evaluate(shade) > 200 and page.evaluate(axis) == light


def test_a_phone_s_width_is_enough(page: Any) -> None:
    page.set_viewport_size(PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


def test_without_script_tables_and_rows_are_there(opened: Open) -> None:
    page = opened("all.html", java_script_enabled=False)
    assert (
        page.locator("h2", has_text="margin").first.is_visible() and page.locator("noscript table").first.is_visible()
    )
    assert page.locator("#samples img").first.is_visible() and not page.locator("#table").is_visible()
