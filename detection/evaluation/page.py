"""The looks and the behaviour of the report: one HTML page that needs nothing from anywhere else."""

from __future__ import annotations

STYLE = """
:root { --ink: #1d2733; --soft: #5b6776; --line: #e3e8ee; --ground: #f5f7fa; --accent: #1f6feb; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
header { background: linear-gradient(115deg, #14213a, #23508f); color: #fff; padding: 2.2rem 1rem 4.6rem; }
header h1 { margin: 0 0 .3rem; font-size: 1.8rem; letter-spacing: -.01em; }
header p { margin: 0; color: #c7d6ee; }
main, header > div { max-width: 1180px; margin: auto; padding: 0 1rem; }
main { margin-top: -3.2rem; padding-bottom: 4rem; }
section, .tile { background: #fff; border: 1px solid var(--line); border-radius: 12px;
  box-shadow: 0 1px 3px rgba(20, 33, 58, .06); }
section { padding: 1.2rem 1.4rem 1.4rem; margin-top: 1.1rem; }
h2 { margin: 0 0 .2rem; font-size: 1.15rem; }
.note { margin: 0 0 .9rem; color: var(--soft); font-size: .9rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(118px, 1fr)); gap: .7rem; }
.tile { padding: .8rem 1rem; }
.tile b { display: block; font-size: 1.55rem; letter-spacing: -.02em; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .82rem; }
.tile.first { background: var(--accent); border-color: var(--accent); color: #fff; }
.tile.first span { color: #dbe8ff; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(460px, 100%), 1fr)); gap: 1.1rem; }
.pair > * { min-width: 0; }
@media (min-width: 900px) { .pair.uneven { grid-template-columns: 2.2fr 1fr; } }
img.plot { display: block; max-width: 100%; height: auto; margin: auto; }
.scroll { overflow: auto; max-height: 560px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .38rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
td.text, th.text { text-align: left; }
td.text { white-space: normal; }
thead th { position: sticky; top: 0; background: #fff; }
th button { all: unset; cursor: pointer; color: var(--soft); font-weight: 600; }
th button:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; border-radius: 3px; }
th[aria-sort=ascending] button::after { content: " \\25B2"; }
th[aria-sort=descending] button::after { content: " \\25BC"; }
th[aria-sort] button { color: var(--accent); }
tbody tr:hover { background: #f3f7fd; }
.bar { display: inline-block; height: .55rem; border-radius: 3px; background: var(--accent); margin-right: .5rem;
  vertical-align: middle; }
.dot { display: inline-block; width: .8em; height: .8em; border-radius: 3px; margin-right: .45em;
  vertical-align: -.06em; background: var(--colour); }
.controls { display: flex; flex-wrap: wrap; gap: .4rem 1.2rem; align-items: center; margin-bottom: .9rem;
  font-size: .9rem; }
.controls label { display: inline-flex; align-items: center; gap: .35rem; cursor: pointer; }
.controls .dot { margin-right: 0; }
.gallery { display: grid; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(340px, 100%), 1fr)); gap: 1rem; }
figure { margin: 0; border: 1px solid var(--line); border-radius: 10px; overflow: hidden; background: #10151d; }
figure .frame { position: relative; }
figure img, figure svg { display: block; width: 100%; height: auto; }
figure svg { position: absolute; inset: 0; height: 100%; }
figure rect { fill: transparent; stroke: var(--colour); stroke-width: 2.5; vector-effect: non-scaling-stroke; }
figure rect.object { stroke-dasharray: 6 4; }
figure rect:hover { fill: var(--colour); fill-opacity: .25; }
figcaption { padding: .5rem .8rem; background: #fff; font-size: .85rem; color: var(--soft); }
figcaption b { color: var(--ink); overflow-wrap: anywhere; }
footer { max-width: 1180px; margin: -2.5rem auto 2rem; padding: 0 1rem; color: var(--soft); font-size: .82rem; }
"""

SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const value = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const numeric = [...body.rows].every(row => value(row) === "" || !isNaN(value(row)));
    const falling = head.ariaSort === null ? numeric : head.ariaSort === "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", falling ? "descending" : "ascending");
    const compare = (a, b) => numeric ? a - b : a.localeCompare(b);
    const known = row => value(row) !== "";
    const rows = [...body.rows].sort((a, b) => known(b) - known(a)
      || (falling ? compare(value(b), value(a)) : compare(value(a), value(b))));
    body.append(...rows);
  }));
}
const slider = document.querySelector("#score");
function showBoxes() {
  const least = slider.valueAsNumber;
  const wanted = new Set([...document.querySelectorAll("input[data-kind]:checked")].map(box => box.dataset.kind));
  document.querySelector("#score-value").textContent = least.toFixed(2);
  for (const rect of document.querySelectorAll("figure rect"))
    rect.style.display = wanted.has(rect.dataset.kind) && (rect.dataset.score ?? 1) >= least ? "" : "none";
}
if (slider) {
  slider.addEventListener("input", showBoxes);
  document.querySelectorAll("input[data-kind]").forEach(box => box.addEventListener("change", showBoxes));
  showBoxes();
}
"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header><div><h1>{title}</h1><p>{facts}</p></div></header>
<main>
{body}
</main>
<footer>{footer}</footer>
<script>{script}</script>
</body>
</html>
"""
