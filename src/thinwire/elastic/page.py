"""The page that shows a run while it goes: one file, nothing fetched but `/status`, fit for a phone, light and dark.

Colours are Okabe and Ito's, as in the report; what they tell is told in words as well.
"""

from __future__ import annotations

# ruff: noqa: E501 (lines of a page)
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>thinwire</title>
<link rel="icon" href="data:,">
<style>
:root {
  color-scheme: light dark;
  --ink: #1b2126; --soft: #5a6570; --line: #dfe4e8; --card: #ffffff; --page: #f4f6f8; --note: #fdf3dc;
  --blue: #0072b2; --orange: #b34700; --green: #00704f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e8ecef; --soft: #9ba7b2; --line: #323a42; --card: #1a2026; --page: #11151a; --note: #3a3119;
    --blue: #56b4e9; --orange: #ff8a3d; --green: #2fc79a;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 20px 16px 48px; max-width: 1100px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif;
}
h1 { margin: 0; font-size: 22px; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 0 0 10px; font-size: 16px; }
p { margin: 4px 0; overflow-wrap: anywhere; }
.soft { color: var(--soft); }
.note { background: var(--note); border-radius: 8px; padding: 10px 14px; margin-top: 14px; }
section { margin-top: 14px; padding: 16px; border: 1px solid var(--line); border-radius: 10px; background: var(--card); }
.numbers { display: grid; grid-template-columns: repeat(auto-fill, minmax(120px, 1fr)); gap: 14px; margin: 0; }
.numbers dt { color: var(--soft); font-size: 13px; }
.numbers dd { margin: 0; font-size: 20px; font-weight: 600; font-variant-numeric: tabular-nums; }
.numbers small { display: block; font-size: 13px; font-weight: 400; color: var(--soft); }
.bar { height: 8px; border-radius: 4px; background: var(--line); overflow: hidden; margin: 12px 0 0; }
.bar i { display: block; height: 100%; background: var(--blue); transition: width .4s; }
svg { display: block; width: 100%; height: 150px; }
svg text { fill: var(--soft); font-size: 12px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 12px 7px 0; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { font-weight: 500; }
th:first-child, td:nth-child(2) { text-align: left; white-space: normal; overflow-wrap: anywhere; }
thead th { color: var(--soft); font-size: 13px; }
tbody tr:last-child > * { border-bottom: 0; }
th:last-child, td:last-child { padding-right: 0; }
.state { font-weight: 600; }
.state.computing { color: var(--blue); } .state.with { color: var(--green); } .state.silent { color: var(--orange); }
ol { margin: 0; padding: 0; list-style: none; } li { padding: 3px 0; overflow-wrap: anywhere; }
form { display: flex; gap: 8px; flex-wrap: wrap; } input, button { font: inherit; padding: 8px 12px; border-radius: 8px;
  border: 1px solid var(--line); background: var(--card); color: var(--ink); } input { flex: 1 1 220px; }
button { background: var(--blue); border-color: var(--blue); color: var(--page); font-weight: 600; }
[hidden] { display: none !important; }
@media (max-width: 640px) {
  body { padding: 12px 10px 32px; }
  thead { display: none; }
  table, tbody { display: block; }
  tr { display: grid; grid-template-columns: repeat(2, 1fr); gap: 2px 14px; padding: 10px 0;
    border-bottom: 1px solid var(--line); }
  tbody tr:last-child { border-bottom: 0; }
  th, td { display: flex; justify-content: space-between; gap: 10px; border: 0; padding: 0; text-align: right; }
  th:first-child, td:nth-child(2) { grid-column: 1 / -1; }
  td:nth-child(n+3)::before { content: attr(data-name); color: var(--soft); font-size: 13px; }
}
</style>
<h1 id="title">thinwire</h1>
<p class="soft" id="about"></p>
<section id="ask" hidden>
  <h2>The run's token</h2>
  <p id="why" class="soft"></p>
  <form><input name="token" type="password" autocomplete="off" aria-label="token" placeholder="as thinwire up printed it">
  <button>Show the run</button></form>
</section>
<p class="note" id="trouble" role="status" hidden></p>
<p class="note" id="waiting" role="status" hidden></p>
<main id="run" hidden>
  <section>
    <dl class="numbers" id="numbers"></dl>
    <div class="bar" role="progressbar" aria-label="steps"><i id="done"></i></div>
  </section>
  <section><h2>Training loss</h2><svg id="curve" role="img" aria-label="training loss by step"></svg></section>
  <section>
    <h2>Members</h2>
    <table><thead><tr><th>member</th><th style="text-align:left">now</th><th>step</th><th>loss</th><th>work</th>
    <th>rate</th><th>sent</th><th>received</th><th>seen</th></tr></thead><tbody id="members"></tbody></table>
  </section>
  <section id="findings-card" hidden><h2>Findings</h2><ol id="findings"></ol></section>
  <section id="changes-card" hidden><h2>Came and left</h2><ol id="changes"></ol></section>
</main>
<script>
"use strict";
const at = id => document.getElementById(id);
const none = "\\u2013";
const KEY = "thinwire token";
let token = decodeURIComponent(location.hash.slice(1)).replace(/^token=/, "") || sessionStorage.getItem(KEY) || "";
if (location.hash) history.replaceState(null, "", location.pathname);
let lastHeard = 0;

function made(tag, text, attributes) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  for (const name in attributes || {}) node.setAttribute(name, attributes[name]);
  return node;
}
function show(id, text) { at(id).hidden = !text; at(id).textContent = text || ""; }
const number = (value, digits) => value === null || value === undefined ? none : value.toFixed(digits);
function bytes(value) {
  if (value === null || value === undefined) return none;
  for (const [unit, size] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]])
    if (value >= size) return (value / size).toFixed(value / size < 10 ? 2 : 1) + " " + unit;
  return value + " B";
}
function short(value) {
  if (value >= 1e6) return (value / 1e6).toFixed(2) + "M";
  return value >= 1e4 ? (value / 1e3).toFixed(1) + "k" : value < 10 ? value.toFixed(1) : value.toFixed(0);
}
function since(seconds) {
  if (seconds < 0) seconds = 0;
  if (seconds < 60) return Math.round(seconds) + " s";
  if (seconds < 3600) return Math.round(seconds / 60) + " min";
  return (seconds / 3600).toFixed(1) + " h";
}
function state(row, now) {
  if (!row.answers) return ["silent", "does not answer"];
  const long = row.since === null ? "" : " for " + since(now - row.since);
  return [row.phase === "computing" ? "computing" : "with", row.phase + long];
}
function drawCurve(points) {
  const svg = at("curve"), told = points.filter(p => p[1] !== null);
  svg.replaceChildren();
  const width = svg.clientWidth || 600, height = 150, left = 46, bottom = 22, top = 8, right = 8;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const put = (tag, attributes, text) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const name in attributes) node.setAttribute(name, attributes[name]);
    if (text !== undefined) node.textContent = text;
    svg.append(node);
  };
  if (told.length < 2) { put("text", {x: left, y: height / 2}, "a curve is drawn from the second round on"); return; }
  const xs = told.map(p => p[0]), ys = told.map(p => p[1]);
  const low = Math.min(...ys), high = Math.max(...ys), first = xs[0], last = xs[xs.length - 1];
  const x = v => left + (v - first) / Math.max(1, last - first) * (width - left - right);
  const y = v => top + (high - v) / Math.max(1e-9, high - low) * (height - top - bottom);
  for (const v of [high, low]) {
    put("line", {x1: left, x2: width - right, y1: y(v), y2: y(v), stroke: "var(--line)"});
    put("text", {x: left - 6, y: y(v) + 4, "text-anchor": "end"}, v.toFixed(2));
  }
  put("text", {x: left, y: height - 4}, "step " + first);
  put("text", {x: width - right, y: height - 4, "text-anchor": "end"}, "step " + last);
  put("polyline", {points: told.map(p => x(p[0]).toFixed(1) + "," + y(p[1]).toFixed(1)).join(" "), fill: "none",
    stroke: "var(--blue)", "stroke-width": 2, "stroke-linejoin": "round"});
}
function draw(view) {
  const run = view.run, now = view.now, rows = view.members;
  document.title = `${run.step}/${run.steps} thinwire`;
  at("title").textContent = `${run.method} on ${run.task}`;
  at("about").textContent = `run ${run.id}, thinwire ${run.version}, told by ${view.asked}` +
    (run.ended ? `; it has ended: ${run.ended}` : "");
  const losses = view.curve.filter(p => p[1] !== null);
  const sum = name => rows.reduce((total, row) => total + (row[name] || 0), 0);
  const rate = sum("tokens_per_s") ? [short(sum("tokens_per_s")), "tokens a second"] : [short(sum("units_per_s")), "units a second"];
  const epoch = run.units_per_epoch ? `epoch ${run.epochs_done + 1}: ${run.units_done - run.epochs_done * run.units_per_epoch} of ${run.units_per_epoch} units` : "";
  const numbers = [["step", `${run.step}`, `of ${run.steps}`], ["members", `${rows.length}`, rows.filter(r => r.answers).length + " answer"],
    ["training loss", losses.length ? losses[losses.length - 1][1].toFixed(3) : none, "mean of the last round"],
    ["held-out loss", number(run.valid_loss, 3), run.evaluated_at ? `at step ${run.evaluated_at}` : ""],
    ["samples", run.units_done === undefined ? none : `${run.units_done} units`, epoch], ["rate", ...rate],
    ["sent", bytes(sum("sent_bytes")), "by all who are there"]];
  at("numbers").replaceChildren(...numbers.map(([name, value, more]) => {
    const box = made("div"), dd = made("dd", value);
    dd.append(made("small", more));
    box.append(made("dt", name), dd);
    return box;
  }));
  at("done").style.width = Math.min(100, 100 * run.step / run.steps) + "%";
  drawCurve(view.curve);
  at("members").replaceChildren(...rows.map(row => {
    const [kind, words] = state(row, now), line = made("tr");
    const now_ = made("td");
    now_.append(made("span", (kind === "silent" ? "\\u25b2 " : kind === "computing" ? "\\u25cf " : "\\u25cb ") + words, {class: "state " + kind}));
    line.append(made("th", row.name, {scope: "row"}), now_);
    const cells = [["step", row.step ?? none], ["loss", number(row.loss, 3)],
      ["work", row.share === null ? none : (100 * row.share).toFixed(0) + " %"],
      ["rate", row.tokens_per_s ? short(row.tokens_per_s) + " tok/s" : row.units_per_s ? short(row.units_per_s) + " units/s" : none],
      ["sent", bytes(row.sent_bytes)], ["received", bytes(row.received_bytes)],
      ["seen", row.last_seen === null ? none : since(now - row.last_seen) + " ago"]];
    for (const [name, value] of cells) line.append(made("td", value, {"data-name": name}));
    return line;
  }));
  show("waiting", view.waiting && !run.ended ? `Waiting for ${view.waiting.for.join(", ")} for ${since(now - view.waiting.since)}.` : "");
  const list = (name, items, words) => {
    at(name + "-card").hidden = !items.length;
    at(name).replaceChildren(...items.slice(-12).reverse().map(item => made("li", since(now - item.at) + " ago: " + words(item))));
  };
  list("findings", view.findings, item => `${item.kind}: ${item.who}: ${item.evidence}`);
  list("changes", view.changes, item => [item.came.length ? item.came.join(", ") + " came" : "", item.left.length ? item.left.join(", ") + " left" : ""].filter(Boolean).join("; "));
  at("run").hidden = false;
}
function askForToken(why) { at("ask").hidden = false; at("run").hidden = true; at("why").textContent = why; }
async function look() {
  if (!token) return askForToken("It is on the line that `thinwire up` printed.");
  try {
    const answer = await fetch("status", {headers: {Authorization: "Bearer " + token}, cache: "no-store"});
    if (answer.status === 401) {
      sessionStorage.removeItem(KEY); token = "";
      return askForToken("That was not this run's token.");
    }
    if (!answer.ok) throw new Error("the member answers " + answer.status);
    sessionStorage.setItem(KEY, token);
    at("ask").hidden = true;
    const view = await answer.json();
    lastHeard = Date.now();
    show("trouble", "");
    draw(view);
  } catch (error) {
    const how = lastHeard ? "since " + since((Date.now() - lastHeard) / 1000) + "; what is shown is from then" : "";
    show("trouble", `This member does not answer ${how} (${error.message}). Any other member's address shows the same run.`);
  }
  setTimeout(look, 2000);
}
document.querySelector("form").addEventListener("submit", event => {
  event.preventDefault();
  token = new FormData(event.target).get("token").trim();
  look();
});
look();
</script>
</html>
"""
