"use strict";
// The page's plots: Bokeh models that charts.py made without data, filled for the open query and painted in the page's colours.

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
  for (const key of ["volcano.rest", "volcano.low", "volcano.high", "methods.both"]) {
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
  drawMethod(now, drawn);
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

function drawMethod(now, drawn) {
  if (!page.methods.length) return;
  const found = other(), both = found ? drawn.filter((k) => finite(found.scores[k])) : [];
  shown("methods", now.methods.some(Boolean));
  shown("course", Boolean(found?.course));
  fill("methods.both", points(both, (k) => found.scores[k], "x y row class"));
  at("agreement").textContent = both.length ? found.agreement : "not asked this query";
  if (both.length) {
    const plot = plots.get("methods");
    const reach = span(both.map((k) => now.mu[k])), tall = span(both.map((k) => found.scores[k]));
    range(plot.x_range, -reach, reach);
    range(plot.y_range, -tall, tall);
    plot.left[0].axis_label = found.name;
  }
  if (found?.course) {
    const { stages, lines, low, high, unit } = found.course, plot = plots.get("course"), side = colors();
    plot.left[0].axis_label = unit ? `${found.name}, as a ${unit}` : found.name;
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
  fill("methods.chosen", on(known && other() ? other().scores[k] : NaN));
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

