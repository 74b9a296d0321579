// The page's own script, after plots.js. Text from data goes into the page through textContent alone, or onto Bokeh's canvas.

const page = JSON.parse(document.getElementById("data").textContent);
const documents = JSON.parse(document.getElementById("charts").textContent);
const at = (id) => document.getElementById(id);
const PAGE = 25, CARDS = 8;

// ---- numbers ----

function bytes(text) {
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)).buffer;
}
const floats = (text) => new Float32Array(bytes(text));
const ints = (text) => new Int32Array(bytes(text));

const rows = ints(page.rows), seen = ints(page.seen), loss = floats(page.loss);
const classOf = page.classes && ints(page.classes.of);
const place = new Map(Array.from(rows, (row, k) => [row, k])); // of a row id in the arrays
const near = page.neighbours && { nearest: ints(page.neighbours.nearest), cosines: floats(page.neighbours.cosines),
  of: new Map(Array.from(ints(page.neighbours.rows), (row, k) => [row, k])) };
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
    for (const method of query.methods) if (method) method.scores = floats(method.scores);
    const limit = -Math.log10(page.flag) - 1e-6; // heights are rounded to 32 bits
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
  if (!found) return null;
  const copy = found.cloneNode(true);
  for (const token of copy.querySelectorAll("[data-w]")) { // a token's score on each query
    const weight = Number(token.dataset.w.split(" ")[state.query] ?? 0);
    token.className = weight > 0 ? "helps" : weight < 0 ? "harms" : "";
    token.style.setProperty("--w", Math.abs(weight));
  }
  return copy;
}

// ---- state ----

const state = { query: page.first, method: 0, row: null, text: "", side: "all", cls: "all", by: "mu", up: false, page: 0 };
let order = [];
const query = () => unpacked(page.queries[state.query]);

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
    ...(near ? neighbours() : []),
  );
  for (const button of document.querySelectorAll(".card-row[data-row]")) {
    button.classList.toggle("chosen", Number(button.dataset.row) === state.row);
  }
}

function neighbours() { // of the chosen row, in gradient space
  const found = near.of.get(state.row), each = page.neighbours.each, list = element("div", { class: "near" });
  const lead = element("h3", {}, "Acts alike");
  if (found === undefined) return [lead, element("p", { class: "soft" }, page.neighbours.note)];
  for (let at = found * each; at < (found + 1) * each; at += 1) list.append(neighbour(near.nearest[at], near.cosines[at]));
  return [lead, element("p", { class: "soft" }, "The nearest rows in gradient space, with their cosine and μ on this query."), list];
}

function neighbour(row, cosine) {
  const k = place.get(row), now = query(), made = element("button", { class: "card-row", type: "button" });
  const sample = sampleOf(row);
  if (sample) made.append(sample);
  made.append(element("span", { class: "who" }, `row ${row}`));
  if (k === undefined) made.disabled = true; // its scores are not in the file
  if (k !== undefined && classOf) {
    const other = className(k) !== className(place.get(state.row));
    made.append(element("span", { class: other ? "class suspect" : "class" }, `class ${className(k)}`));
  }
  made.append(element("span", { class: "soft" }, `cos ${number(cosine, 2)}`));
  if (k !== undefined) made.append(element("span", { class: `mu ${tone(now, k)}` }, `μ ${signed(now.mu[k], now.places)}`));
  made.addEventListener("click", () => choose(row));
  return made;
}

// ---- the table of all rows ----

const COLUMNS = {
  row: { title: "row", value: (k) => rows[k], text: (k) => String(rows[k]) },
  class: { title: "class", value: (k) => classOf[k], text: className, left: true },
  mu: { title: "μ", value: (k) => query().mu[k], text: (k) => signed(query().mu[k], query().places) },
  interval: { title: "95 % interval", value: (k) => query().se[k], text: (k) => interval(query(), k) },
  q: { title: "q", value: (k) => -query().height[k], text: (k) => probability(query().height[k]) },
  loss: { title: "mean loss", value: (k) => loss[k], text: (k) => number(loss[k], 3) },
  seen: { title: "seen", value: (k) => seen[k], text: (k) => (seen[k] ? `${seen[k]}×` : "never") },
};
page.methods.forEach((title, index) => { // a column of each fit-end method's scores
  const scores = () => query().methods[index].scores;
  COLUMNS[`method ${index}`] = {
    title, value: (k) => scores()[k], text: (k) => (finite(scores()[k]) ? `${scores()[k] > 0 ? "+" : ""}${sign(scores()[k].toPrecision(3))}` : "–"),
    there: () => Boolean(query().methods[index]),
  };
});
const columns = () => Object.keys(COLUMNS).filter((key) => (key !== "class" || classOf) && COLUMNS[key].there?.() !== false);
const other = () => query().methods[state.method] ?? null; // the fit-end method whose plots are shown

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
  const now = query(), made = element("tr", rows[k] === state.row ? { class: "chosen", "aria-current": "true" } : {});
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
  document.querySelectorAll("#rows [role=tab]").forEach((tab, k) => {
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
  describe();
  draw();
  if (state.row === null && order.length) state.row = rows[order[0]];
  detail();
  ring();
  table();
}

// ---- plots without a mouse ----

function describe() { // in words what each plot shows, for who does not see it
  const now = query(), scored = everyRow.filter((k) => finite(now.mu[k])).length;
  const flagged = everyRow.filter((k) => now.flagged[k]), suspect = flagged.filter((k) => now.mu[k] * now.suspect > 0);
  const keys = "Arrow keys go through the rows in the order of μ; the chosen row is described beside.";
  const texts = {
    volcano: `${scored} rows by μ and evidence: ${flagged.length} flagged, ${suspect.length} of them to look at. ${keys}`,
    null: `Scores of ${scored} rows over those that chance gives; null check ${now.check}.`,
    methods: `${page.methods[state.method] ?? "No other method"} against μ, ${other()?.agreement || "no agreement known"}. ${keys}`,
    course: `Influence of the most extreme rows at ${other()?.course?.stages.length ?? 0} stages of training.`,
    tradeoff: `Trade-off curves of ${now.groups?.length ?? 0} classes; their numbers are in the table beside.`,
  };
  for (const [plot, text] of Object.entries(texts)) at(`plot-${plot}`)?.setAttribute("aria-label", text);
}

function steer(event) {
  if (event.target !== event.currentTarget) return; // a button of the plot's own
  const now = query(), ranked = everyRow.filter((k) => finite(now.mu[k])).sort((a, b) => now.mu[a] - now.mu[b] || a - b);
  const here = ranked.indexOf(place.get(state.row)), last = ranked.length - 1;
  const steps = { ArrowRight: here + 1, ArrowUp: here + 1, ArrowLeft: here - 1, ArrowDown: here - 1, Home: 0, End: last };
  if (!(event.key in steps) || last < 0) return;
  event.preventDefault();
  choose(rows[ranked[Math.min(Math.max(steps[event.key], 0), last)]]);
}

function dark() {
  const scheme = document.documentElement.style.colorScheme;
  return scheme ? scheme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function tabbed(selector, show) { // a row of tabs, for mouse and keys
  const tabs = [...document.querySelectorAll(selector)];
  tabs.forEach((tab, index) => {
    tab.addEventListener("click", () => show(index));
    tab.addEventListener("keydown", (event) => {
      const steps = { ArrowRight: 1, ArrowLeft: -1, Home: -index, End: tabs.length - 1 - index };
      if (!(event.key in steps)) return;
      event.preventDefault();
      const next = (index + steps[event.key] + tabs.length) % tabs.length;
      show(next);
      tabs[next].focus();
    });
  });
}

function method(index, redraw = true) { // the fit-end method to show
  state.method = index;
  document.querySelectorAll("#methods [role=tab]").forEach((tab, k) => {
    tab.setAttribute("aria-selected", String(k === index));
    tab.tabIndex = k === index ? 0 : -1;
  });
  document.querySelectorAll("#methods > section").forEach((section, k) => { section.hidden = k !== index; });
  if (at("method")) at("method").value = String(index);
  at("course-by").textContent = page.methods[index];
  if (!redraw) return;
  describe();
  draw();
  ring();
}

function start() {
  if (at("gallery")) at("gallery").hidden = true; // cards and the chosen row show copies
  tabbed("#rows [role=tab]", open);
  tabbed("#methods [role=tab]", method);
  at("method")?.addEventListener("change", (event) => method(Number(event.target.value)));
  if (page.methods.length) method(0, false);
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
  for (const chip of document.querySelectorAll("[data-choose]")) { // rows of the groups that act alike
    const row = Number(chip.dataset.choose), image = sampleOf(row)?.querySelector("img");
    if (image) chip.prepend(image);
    chip.disabled = !place.has(row);
    chip.addEventListener("click", () => { choose(row); at("detail").scrollIntoView({ block: "start" }); });
  }
  for (const plot of ["volcano", "methods"]) at(`plot-${plot}`)?.addEventListener("keydown", steer);
  if (page.queries.length) open(page.first);
  embed().then(draw).then(() => at("panel").setAttribute("aria-busy", "false"));
}

start();
