"use strict";
// The page's own script. Text from data goes into the page through textContent alone, or onto Bokeh's canvas.

const page = JSON.parse(document.getElementById("data").textContent);
const documents = JSON.parse(document.getElementById("charts").textContent);
const at = (id) => document.getElementById(id);
const PAGE = 25, CARDS = 9;

// ---- numbers ----

function bytes(text) {
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)).buffer;
}
const floats = (text) => new Float32Array(bytes(text));
const ints = (text) => new Int32Array(bytes(text));

const rows = ints(page.rows), seen = ints(page.seen), loss = floats(page.loss);
const classOf = page.classes && ints(page.classes.of);
const place = new Map(Array.from(rows, (row, k) => [row, k])); // of a row id in the arrays
const everyRow = Array.from(rows.keys());

const sign = (text) => text.replace("-", "−");
const finite = Number.isFinite;

function number(value, places) {
  if (!finite(value)) return "–";
  return sign(Math.abs(value) >= 1e6 ? value.toExponential(2) : value.toFixed(places));
}
function signed(value, places) {
  return finite(value) ? (value > 0 ? "+" : "") + number(value, places) : "–";
}
function probability(height) {
  const q = 10 ** -height;
  return !finite(height) ? "–" : q < 0.001 ? "<0.001" : q.toFixed(3);
}
const className = (k) => (classOf ? page.classes.names[classOf[k]] : "");

function unpacked(query) {
  if (!query.ready) {
    for (const name of ["mu", "se", "height"]) query[name] = floats(query[name]);
    if (query.bif) query.bif = floats(query.bif);
    const limit = -Math.log10(page.flag);
    query.flagged = everyRow.map((k) => query.height[k] >= limit && query.mu[k] !== 0);
    query.ready = true;
  }
  return query;
}
const tone = (query, k) => (query.mu[k] * query.suspect > 0 ? "suspect" : "good");
const interval = (query, k) => {
  const reach = 1.96 * query.se[k];
  if (!finite(reach)) return "–";
  return `${signed(query.mu[k] - reach, query.places)} … ${signed(query.mu[k] + reach, query.places)}`;
};

// ---- elements ----

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children); // strings become text nodes
  return made;
}

const heads = (names) => element("tr", {}, ...names.map((name) => element("th", { scope: "col" }, name)));

function sampleOf(row) {
  const found = document.querySelector(`#samples [data-row="${row}"] .sample`);
  return found ? found.cloneNode(true) : null;
}

// ---- state ----

const state = { query: page.first, row: null, text: "", side: "all", cls: "all", by: "mu", up: false, page: 0 };
let order = [];
const query = () => unpacked(page.queries[state.query]);

// ---- plots ----

const sources = new Map(); // "plot.source" to the data sources of that name
const plots = new Map();

async function embed() {
  for (const [name, item] of Object.entries(documents)) {
    const target = at(`plot-${name}`);
    if (!target) continue;
    const views = await Bokeh.embed.embed_item({ ...item, target_id: target.id });
    const plot = [...views][0].model;
    plots.set(name, plot);
    for (const model of plot.document._all_models.values()) {
      if (model.type === "ColumnDataSource" && model.name) sources.set(`${name}.${model.name}`, model);
    }
  }
  for (const key of ["volcano.rest", "volcano.low", "volcano.high", "chains.both"]) {
    const source = sources.get(key);
    if (source) source.selected.properties.indices.change.connect(() => {
      const [first] = source.selected.indices;
      if (first === undefined) return;
      choose(source.data.row[first], true);
      source.selected.indices = [];
    });
  }
  paint();
}

function fill(key, data) {
  const source = sources.get(key);
  if (source) source.data = data;
}

function points(which, height, names) {
  const now = query();
  const columns = {
    x: (k) => now.mu[k], y: height, row: (k) => rows[k], class: (k) => className(k) || "–", loss: (k) => loss[k],
    low: (k) => now.mu[k] - 1.96 * now.se[k], high: (k) => now.mu[k] + 1.96 * now.se[k], q: (k) => 10 ** -now.height[k],
  };
  return Object.fromEntries(names.split(" ").map((name) => [name, which.map(columns[name])]));
}

function span(values) {
  let reach = 0;
  for (const value of values) if (finite(value)) reach = Math.max(reach, Math.abs(value));
  return 1.08 * (reach || 1);
}

function range(target, start, end) {
  target.setv({ start, end, reset_start: start, reset_end: end });
}

function name(plot, wanted) { // legend
  const legend = plots.get(plot)?.above.find((model) => model.type === "Legend");
  for (const item of legend?.items ?? []) {
    const kind = item.renderers[0].name;
    if (wanted[kind] !== undefined) item.label = { value: wanted[kind] };
  }
}

function draw() {
  if (!plots.size) return;
  const now = query(), drawn = everyRow.filter((k) => finite(now.mu[k]) && finite(now.height[k]));
  const groups = { rest: [], low: [], high: [] };
  for (const k of drawn) groups[now.flagged[k] ? (now.mu[k] > 0 ? "high" : "low") : "rest"].push(k);
  for (const [side, which] of Object.entries(groups)) {
    fill(`volcano.${side}`, points(which, (k) => now.height[k], "x y row class low high q loss"));
  }
  const volcano = plots.get("volcano"), reach = span(drawn.map((k) => now.mu[k]));
  const limit = -Math.log10(page.flag), top = Math.max(span(drawn.map((k) => now.height[k])), 1.5 * limit);
  range(volcano.x_range, -reach, reach);
  range(volcano.y_range, -0.04 * top, top);
  fill("volcano.limit", { x: [-reach, reach], y: [limit, limit] });
  name("volcano", { null: "not flagged", low: `${now.negative} ${now.low}`, high: `${now.positive} ${now.high}` });
  volcano.below[0].axis_label = `← ${now.low}     ${now.axis}     ${now.high} →`;
  drawNull(now);
  drawChains(now, drawn);
  drawGroups(now);
  paint();
  ring();
}

function drawNull(now) {
  const edges = floats(now.null.edges), density = floats(now.null.rows), chance = floats(now.null.null);
  const floor = now.null.floor, middle = density.length / 2, plot = plots.get("null");
  const bars = Array.from(chance.keys()).filter((k) => chance[k] > floor);
  fill("null.null", {
    left: bars.map((k) => edges[k]), right: bars.map((k) => edges[k + 1]), top: bars.map((k) => chance[k]),
    bottom: bars.map(() => floor),
  });
  for (let [side, from, to] of [["low", 0, middle], ["high", middle, 2 * middle]]) {
    while (from < to && density[from] < floor) from += 1; // no line along the floor where no rows are
    while (to > from && density[to - 1] < floor) to -= 1;
    const bins = Array.from({ length: to - from }, (_, k) => Math.max(density[from + k], floor));
    const x = Array.from(edges.subarray(from, to + 1)), y = [...bins, bins.at(-1)];
    if (side === "low") { x.unshift(x[0]); y.unshift(floor); } else { x.push(x.at(-1)); y.push(floor); }
    fill(`null.${side}`, bins.length ? { x, y } : { x: [], y: [] });
  }
  range(plot.x_range, edges[0], edges.at(-1));
  range(plot.y_range, floor, 4);
  plot.below[0].axis_label = `← ${now.low}     z = μ / its sd under the null     ${now.high} →`;
  const chances = now.null.draws ? `null, ${now.null.draws.toLocaleString("en")} draws` : "standard normal null";
  name("null", { null: chances, low: `${now.low} rows`, high: `${now.high} rows` });
}

function drawChains(now, drawn) {
  const both = now.bif ? drawn.filter((k) => finite(now.bif[k])) : [];
  shown("chains", both.length > 0);
  shown("course", Boolean(now.course));
  if (both.length) {
    const plot = plots.get("chains");
    fill("chains.both", points(both, (k) => now.bif[k], "x y row class"));
    const reach = span(both.map((k) => now.mu[k])), tall = span(both.map((k) => now.bif[k]));
    range(plot.x_range, -reach, reach);
    range(plot.y_range, -tall, tall);
    at("agreement").textContent = now.agreement;
  }
  if (now.course) {
    const { stages, lines, low, high } = now.course, plot = plots.get("course"), side = colors();
    const colour = (line) => (line.score.at(-1) > 0 ? side.good : side.suspect);
    plot.x_range.factors = stages;
    fill("course.middle", { x: stages, low, high });
    fill("course.lines", {
      xs: lines.map(() => stages), ys: lines.map((line) => line.score), row: lines.map((line) => line.row),
      side: lines.map(colour),
    });
    const all = lines.flatMap((line) => line.score.map((score, k) => ({ score, x: stages[k], line })));
    fill("course.points", {
      x: all.map((one) => one.x), y: all.map((one) => one.score), row: all.map((one) => one.line.row),
      side: all.map((one) => colour(one.line)),
    });
  }
}

function drawGroups(now) {
  if (!now.groups) return;
  const side = colors(), alpha = Array.from({ length: 41 }, (_, k) => k / 40);
  fill("tradeoff.chance", { x: [0, 1], y: [1, 0] });
  fill("tradeoff.curves", {
    xs: now.groups.map(() => alpha), ys: now.groups.map((one) => Array.from(floats(one.curve))),
    name: now.groups.map((one) => one.name), size: now.groups.map((one) => one.size),
    mean: now.groups.map((one) => one.mean), z: now.groups.map((one) => one.z),
    color: now.groups.map((one) => (one.mean * now.suspect > 0 ? side.suspect : side.good)),
  });
  const lines = [...now.groups].sort((a, b) => now.suspect * (b.mean - a.mean)).map((one) => element("tr", {},
    element("th", { scope: "row" }, one.name), element("td", {}, one.size.toLocaleString("en")),
    element("td", { class: `mu ${one.mean * now.suspect > 0 ? "suspect" : "good"}` }, signed(one.mean, now.places + 1)),
    element("td", {}, signed(one.z, 1)),
  ));
  at("groups").replaceChildren(element("thead", {}, heads(["class", "rows", "mean μ", "z"])), element("tbody", {}, ...lines));
}

function shown(plot, visible) {
  const figure = at(`plot-${plot}`)?.closest("figure");
  if (figure) figure.hidden = !visible;
}

function ring() {
  const now = query(), k = place.get(state.row), known = k !== undefined && finite(now.mu[k]);
  const on = (y) => (known && finite(y) ? { x: [now.mu[k]], y: [y] } : { x: [], y: [] });
  fill("volcano.chosen", on(known ? now.height[k] : NaN));
  fill("chains.chosen", on(known && now.bif ? now.bif[k] : NaN));
}

// ---- colours ----

function colors() {
  const style = (name) => {
    at("probe").style.color = `var(--${name})`;
    return getComputedStyle(at("probe")).color;
  };
  const found = Object.fromEntries(["ink", "soft", "line", "null", "good", "suspect"].map((each) => [each, style(each)]));
  const now = query();
  return { ...found, high: now.suspect > 0 ? found.suspect : found.good, low: now.suspect > 0 ? found.good : found.suspect };
}

function paint() {
  const color = colors();
  for (const plot of plots.values()) {
    for (const axis of [...plot.below, ...plot.left]) {
      axis.setv({ axis_label_text_color: color.soft, major_label_text_color: color.soft, axis_line_color: color.line,
                  major_tick_line_color: color.line });
    }
    for (const grid of plot.center.filter((model) => model.type === "Grid")) grid.grid_line_color = color.line;
    for (const legend of plot.above.filter((model) => model.type === "Legend")) legend.label_text_color = color.soft;
    for (const renderer of plot.renderers) {
      const ours = color[renderer.name];
      if (!ours) continue;
      for (const glyph of [renderer.glyph, renderer.nonselection_glyph, renderer.selection_glyph]) {
        if (!glyph?.setv) continue;
        if (glyph.properties.fill_color && renderer.name !== "ink") glyph.fill_color = ours;
        if (["Step", "Line"].includes(glyph.type) || renderer.name === "ink") glyph.line_color = ours;
      }
    }
  }
}

function dark() {
  const scheme = document.documentElement.style.colorScheme;
  return scheme ? scheme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

// ---- cards: the most extreme rows themselves ----

function cards(target, title, end) {
  const now = query();
  const which = everyRow.filter((k) => now.mu[k] * end > 0).sort((a, b) => end * (now.mu[b] - now.mu[a])).slice(0, CARDS);
  at(`${target}-title`).textContent = title;
  at(target).replaceChildren(...(which.length ? which.map((k) => card(now, k)) : [element("p", { class: "soft" }, "None.")]));
}

function card(now, k) {
  const made = element("button", { class: "card-row", type: "button", "data-row": rows[k] });
  const sample = sampleOf(rows[k]);
  if (sample) made.append(sample);
  made.append(element("span", { class: "who" }, `row ${rows[k]}`));
  if (classOf) made.append(element("span", { class: "class" }, `class ${className(k)}`));
  made.append(
    element("span", { class: `mu ${tone(now, k)}` }, `μ ${signed(now.mu[k], now.places)}`),
    element("span", { class: "soft" }, `q ${probability(now.height[k])}`),
  );
  made.addEventListener("click", () => choose(rows[k], true));
  return made;
}

// ---- the row that the reader chose ----

function choose(row, scroll = false) {
  state.row = row;
  detail();
  ring();
  const found = order.indexOf(place.get(row));
  if (found >= 0) state.page = Math.floor(found / PAGE);
  table();
  if (scroll && innerWidth <= 1100) at("detail").scrollIntoView({ block: "start" }); // beside the rest where there is room
}

function detail() {
  const k = place.get(state.row), box = at("detail-body");
  if (k === undefined) return;
  const facts = element("dl", {});
  const fact = (name, value) => facts.append(element("dt", {}, name), element("dd", {}, value));
  if (classOf) fact("class", className(k));
  fact("95 % interval", interval(query(), k));
  fact("seen", seen[k] ? `${seen[k]}×` : "never");
  fact("mean loss", number(loss[k], 3));
  const body = element("tbody");
  page.queries.forEach((one, index) => {
    const each = unpacked(one);
    const line = element("tr", index === state.query ? { class: "now" } : {}, element("th", { scope: "row" }, each.name));
    line.append(
      element("td", { class: `mu ${tone(each, k)}` }, signed(each.mu[k], each.places)),
      element("td", {}, probability(each.height[k])),
    );
    body.append(line);
  });
  const missing = document.querySelector("#samples [data-row]") ? "This row itself is not in the file." : "";
  box.replaceChildren(
    element("h3", { id: "detail-title" }, `Row ${state.row}`),
    sampleOf(state.row) ?? element("p", { class: "soft" }, missing), facts,
    element("div", { class: "scroll" }, element("table", {}, element("thead", {}, heads(["query", "μ", "q"])), body)),
  );
  for (const button of document.querySelectorAll(".card-row")) {
    button.classList.toggle("chosen", Number(button.dataset.row) === state.row);
  }
}

// ---- the table of all rows ----

const COLUMNS = {
  row: { title: "row", value: (k) => rows[k], text: (k) => String(rows[k]) },
  class: { title: "class", value: (k) => classOf[k], text: className, left: true },
  mu: { title: "μ", value: (k) => query().mu[k], text: (k) => signed(query().mu[k], query().places) },
  interval: { title: "95 % interval", value: (k) => query().se[k], text: (k) => interval(query(), k) },
  q: { title: "q", value: (k) => -query().height[k], text: (k) => probability(query().height[k]) },
  bif: { title: "BIF", value: (k) => query().bif[k], text: (k) => (finite(query().bif[k]) ? sign(query().bif[k].toPrecision(3)) : "–") },
  loss: { title: "mean loss", value: (k) => loss[k], text: (k) => number(loss[k], 3) },
  seen: { title: "seen", value: (k) => seen[k], text: (k) => (seen[k] ? `${seen[k]}×` : "never") },
};
const columns = () => Object.keys(COLUMNS).filter((key) => (key !== "class" || classOf) && (key !== "bif" || query().bif));

function arrange() { // filter and sort
  const now = query(), words = state.text.toLowerCase().split(/[\s,;]+/).filter(Boolean);
  const sides = {
    all: () => true, flagged: (k) => now.flagged[k], suspect: (k) => now.flagged[k] && now.mu[k] * now.suspect > 0,
    other: (k) => now.flagged[k] && now.mu[k] * now.suspect < 0, unseen: (k) => !seen[k],
  };
  const word = (k) => words.some((each) => String(rows[k]) === each || className(k).toLowerCase().includes(each));
  const cls = state.cls === "all" ? null : Number(state.cls);
  const kept = everyRow.filter((k) => sides[state.side](k) && (cls === null || classOf[k] === cls) && (!words.length || word(k)));
  const values = Float64Array.from(everyRow, COLUMNS[columns().includes(state.by) ? state.by : "mu"].value);
  const side = state.up ? 1 : -1;
  order = kept.sort((a, b) => {
    const x = values[a], y = values[b];
    if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y); // without a score: last
    return side * (x - y) || a - b;
  });
  state.page = 0;
  table();
}

function table() {
  const keys = columns(), pages = Math.max(1, Math.ceil(order.length / PAGE));
  state.page = Math.min(Math.max(state.page, 0), pages - 1);
  const head = element("tr", {}, ...keys.map((key) => {
    const chosen = key === state.by, cell = element("th", { scope: "col", class: COLUMNS[key].left ? "left" : "" });
    cell.setAttribute("aria-sort", chosen ? (state.up ? "ascending" : "descending") : "none");
    const button = element("button", { type: "button", "data-by": key }, COLUMNS[key].title, chosen ? (state.up ? " ▲" : " ▼") : "");
    button.addEventListener("click", () => {
      state.up = chosen ? !state.up : key === "row" || key === "q" || key === "class";
      state.by = key;
      arrange();
      document.querySelector(`#table [data-by="${key}"]`).focus();
    });
    cell.append(button);
    return cell;
  }));
  const lines = order.slice(state.page * PAGE, (state.page + 1) * PAGE).map((k) => line(keys, k));
  at("table").replaceChildren(
    element("caption", {}, "All rows on this query"), element("thead", {}, head), element("tbody", {}, ...lines),
  );
  const from = order.length ? state.page * PAGE + 1 : 0, held = rows.length < page.total ? ` held here, of ${page.total.toLocaleString("en")}` : "";
  at("count").textContent = `${from}–${Math.min(from + PAGE - 1, order.length)} of ${order.length.toLocaleString("en")} rows${held}`;
  at("previous").disabled = state.page === 0;
  at("next").disabled = state.page === pages - 1;
}

function line(keys, k) {
  const now = query(), made = element("tr", rows[k] === state.row ? { class: "chosen", "aria-selected": "true" } : {});
  for (const key of keys) {
    const text = COLUMNS[key].text(k), cell = element("td", COLUMNS[key].left ? { class: "left" } : {});
    if (key === "row") cell.append(element("button", { type: "button", class: "link", "aria-label": `show row ${text}` }, text));
    else cell.textContent = text;
    if (key === "mu" && finite(now.mu[k])) cell.className = `mu ${tone(now, k)}`;
    made.append(cell);
  }
  made.addEventListener("click", () => choose(rows[k], true));
  return made;
}

// ---- tabs and controls ----

function open(index) {
  state.query = index;
  const now = query();
  document.querySelectorAll("[role=tab]").forEach((tab, k) => {
    tab.setAttribute("aria-selected", String(k === index));
    tab.tabIndex = k === index ? 0 : -1;
  });
  at("panel").setAttribute("aria-labelledby", `tab-${index}`);
  at("question").textContent = now.question;
  at("check").textContent = `null check ${now.check}`;
  at("check").className = `tag ${now.check.split(" ")[0]}`;
  const ends = [[now.lower, -1], [now.upper, 1]]; // the end to inspect comes first
  if (now.suspect > 0) ends.reverse();
  cards("first", ...ends[0]);
  cards("second", ...ends[1]);
  for (const [value, text] of [["suspect", now.suspect > 0 ? now.high : now.low], ["other", now.suspect > 0 ? now.low : now.high]]) {
    at("side").querySelector(`[value=${value}]`).textContent = `flagged, ${text}`;
  }
  state.by = "mu";
  state.up = now.suspect < 0;
  arrange();
  draw();
  if (state.row === null && order.length) state.row = rows[order[0]];
  detail();
  ring();
  table();
}

function start() {
  if (at("gallery")) at("gallery").hidden = true; // cards and the chosen row show copies
  const tabs = [...document.querySelectorAll("[role=tab]")];
  tabs.forEach((tab, index) => {
    tab.addEventListener("click", () => open(index));
    tab.addEventListener("keydown", (event) => {
      const steps = { ArrowRight: 1, ArrowLeft: -1, Home: -index, End: tabs.length - 1 - index };
      if (!(event.key in steps)) return;
      event.preventDefault();
      const next = (index + steps[event.key] + tabs.length) % tabs.length;
      open(next);
      tabs[next].focus();
    });
  });
  if (page.classes) {
    at("class").append(...page.classes.names.map((text, index) => element("option", { value: index }, text)));
  } else at("class").closest("label").hidden = true;
  at("text").addEventListener("input", () => { state.text = at("text").value; arrange(); });
  at("side").addEventListener("change", () => { state.side = at("side").value; arrange(); });
  at("class").addEventListener("change", () => { state.cls = at("class").value; arrange(); });
  at("previous").addEventListener("click", () => { state.page -= 1; table(); });
  at("next").addEventListener("click", () => { state.page += 1; table(); });
  at("theme").addEventListener("click", () => {
    document.documentElement.style.colorScheme = dark() ? "light" : "dark";
    draw();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  for (const link of document.querySelectorAll("[data-open]")) {
    link.addEventListener("click", () => open(Number(link.dataset.open)));
  }
  if (page.queries.length) open(page.first);
  embed().then(draw).then(() => at("panel").setAttribute("aria-busy", "false"));
}

start();
