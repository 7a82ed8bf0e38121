"""The looks and the behaviour of the report: one HTML page that needs nothing from anywhere else."""

from __future__ import annotations

STYLE = """
:root { --ink: #1d2733; --soft: #5b6776; --line: #e3e8ee; --ground: #f5f7fa; --accent: #1f6feb; --card: #fff;
  --hover: #f3f7fd; color-scheme: light dark; }
.tile.first { background: var(--accent); border-color: var(--accent); color: #fff; }
.tile.first span { color: #dbe8ff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4eaf1; --soft: #9aa8b8; --line: #2c3643; --ground: #10151d; --accent: #5a9bff; --card: #19212c;
    --hover: #222d3b; }
  img.plot { filter: invert(1) hue-rotate(180deg); }
  .tile.first { color: #0b1220; }
  .tile.first span { color: #17305c; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
header { background: linear-gradient(115deg, #14213a, #23508f); color: #fff; padding: 2.2rem 1rem 4.6rem; }
header h1 { margin: 0 0 .3rem; font-size: 1.8rem; letter-spacing: -.01em; }
header p { margin: 0; color: #c7d6ee; }
main, header > div { max-width: 1180px; margin: auto; padding: 0 1rem; }
main { margin-top: -3.2rem; padding-bottom: 4rem; }
section, .tile { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  box-shadow: 0 1px 3px rgba(20, 33, 58, .06); }
section { padding: 1.2rem 1.4rem 1.4rem; margin-top: 1.1rem; }
h2 { margin: 0 0 .2rem; font-size: 1.15rem; }
.note { margin: 0 0 .9rem; color: var(--soft); font-size: .9rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(118px, 1fr)); gap: .7rem; }
.tile { padding: .8rem 1rem; }
.tile b { display: block; font-size: 1.55rem; letter-spacing: -.02em; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .82rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(460px, 100%), 1fr)); gap: 1.1rem; }
.pair > * { min-width: 0; }
@media (min-width: 900px) { .pair.uneven { grid-template-columns: 2.2fr 1fr; } }
img.plot { display: block; max-width: 100%; height: auto; margin: auto; }
.scroll { overflow: auto; max-height: 560px;  /* a shadow where there is more to the right */
  background: linear-gradient(to left, var(--card) 40%, transparent) right -2px top / calc(2.4rem + 2px) 100%
      no-repeat local,
    linear-gradient(to left, #00000050, transparent) right / 1rem 100% no-repeat scroll; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .38rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
td.text, th.text { text-align: left; }
td.text { white-space: normal; min-width: 8.5rem; }
td.text + td.text { min-width: 11rem; }
thead th { position: sticky; top: 0; background: var(--card); z-index: 1; }
th button { all: unset; cursor: pointer; color: var(--soft); font-weight: 600; }
th button:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; border-radius: 3px; }
th[aria-sort=ascending] button::after { content: " \\25B2"; }
th[aria-sort=descending] button::after { content: " \\25BC"; }
th[aria-sort] button { color: var(--accent); }
tbody tr:hover { background: var(--hover); }
.bar { display: inline-block; height: .55rem; border-radius: 3px; background: var(--accent); margin-right: .5rem;
  vertical-align: middle; }
.dot { display: inline-block; width: .8em; height: .8em; border-radius: 3px; margin-right: .45em;
  vertical-align: -.06em; background: var(--colour); }
.controls { display: flex; flex-wrap: wrap; gap: .4rem 1.2rem; align-items: center; margin-bottom: .9rem;
  font-size: .9rem; }
.controls label { display: inline-flex; align-items: center; gap: .35rem; cursor: pointer; }
.controls .dot { margin-right: 0; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
a:focus-visible { outline: 2px solid var(--accent); }
a.tile { display: block; color: inherit; }
.linked { position: relative; width: fit-content; max-width: 100%; margin: auto; }
.linked a { position: absolute; border-radius: 3px; }
.linked a:hover { outline: 2px solid var(--accent); }
td code { overflow-wrap: anywhere; }
table.confusion { width: auto; }
table.confusion th { font-weight: 400; position: static; max-width: 12rem; overflow: hidden; text-overflow: ellipsis; }
table.confusion tr:first-child th { vertical-align: bottom; color: var(--soft); }
table.confusion tr:first-child span { writing-mode: vertical-rl; transform: rotate(180deg); max-height: 9rem; }
table.confusion td { padding: 0; min-width: 2.4rem; text-align: center;
  background: color-mix(in srgb, var(--accent) calc(100% * var(--share, 0)), transparent); }
table.confusion td a { display: block; padding: .38rem .5rem; text-align: center; color: var(--ink); }
table.confusion td.dark a { color: var(--card); font-weight: 600; }
pre { overflow: auto; font-size: .82rem; max-height: 30rem; }
summary { cursor: pointer; font-weight: 600; }
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
