"""How the demo page looks, and how its rows and boxes point at each other; all of it in the page itself."""

from __future__ import annotations

from typing import Any

COLUMNS: list[dict[str, Any]] = [
    {"name": "name", "label": "Class", "field": "name", "align": "left", "sortable": True},
    {"name": "score", "label": "Score", "field": "score", "align": "right", "sortable": True},
    {"name": "box", "label": "Box: x1, y1, x2, y2", "field": "box", "align": "right"},
]
ROW = """
<q-tr :props="props" :data-box="props.row.key" tabindex="0">
  <q-td key="name" :props="props">
    <span class="swatch" :style="{background: props.row.colour}"></span>{{ props.row.name }}
  </q-td>
  <q-td key="score" :props="props">{{ props.row.score }}</q-td>
  <q-td key="box" :props="props">{{ props.row.box }}</q-td>
</q-tr>
"""
# A rule of style marks whatever has the key, so that tables may be drawn anew meanwhile.
SCRIPT = """
<script>
(() => {
  const rule = document.head.appendChild(document.createElement("style")), key = e => e.target.closest?.("[data-box]");
  let kept = null;
  const mark = box => rule.textContent = box
    && `tr[data-box="${box}"] { background: var(--mark) } rect[data-box="${box}"] { stroke: #fff; fill: #ffffff40 }`;
  for (const kind of ["pointerover", "focusin"])
    document.addEventListener(kind, event => mark(key(event)?.dataset.box ?? kept));
  const keep = event => {
    const chosen = key(event);
    if (!chosen) return;
    const { box } = chosen.dataset;
    mark(kept = kept === box ? null : box);
    const other = chosen.tagName === "TR" ? "rect" : "tr";
    if (kept) document.querySelector(`${other}[data-box="${box}"]`)?.scrollIntoView({ block: "nearest" });
  };
  document.addEventListener("click", keep);
  document.addEventListener("keydown", event => {
    if (event.key === "Enter") keep(event);
    if (event.key === "Escape") mark(kept = null);
  });
})();
</script>
"""
STYLE = """
body { --ground: #eef1f4; --card: #fff; --ink: #1d2733; --soft: #5b6672; --line: #9fb3c8; --head: #f3f6f9;
  --accent: #2f5d8c; --bad: #a4161a; --bad-ground: #fdecec; --mark: #cfe3fb;
  background: var(--ground); color: var(--ink); font-family: system-ui, "Segoe UI", "Noto Sans", sans-serif; }
body.body--dark { --ground: #10151d; --card: #19212c; --ink: #e4eaf1; --soft: #9aa8b8; --line: #41536a; --head: #222d3b;
  --accent: #8ab8ea; --bad: #ffb3b3; --bad-ground: #4a1d20; --mark: #2c4a6e;
  --q-primary: var(--accent) !important; }
.nicegui-content { padding: 16px; gap: 16px; max-width: 1600px; margin: 0 auto; }
.wide { width: 100%; }
.head { width: 100%; align-items: baseline; column-gap: 16px; row-gap: 0; color: var(--soft); }
.title { font-size: 22px; font-weight: 600; color: var(--ink); }
.areas { display: grid; gap: 16px; width: 100%; grid-template: "controls stages" auto "list stages" 1fr / 340px 1fr; }
.card { background: var(--card); border-radius: 10px; box-shadow: 0 1px 3px #0002; padding: 16px; gap: 10px;
  min-width: 0; }
.controls { grid-area: controls; }
.list { grid-area: list; align-self: start; }
.stages { grid-area: stages; align-self: start; padding: 0 4px 8px; }
@media (max-width: 1000px) { .areas { grid-template: "controls" auto "stages" auto "list" auto / 100%; } }
.drop { border: 2px dashed var(--line); border-radius: 8px; }
.drop .q-uploader__header { background: var(--head); color: var(--accent); padding: 10px 4px; border-radius: 8px; }
.drop .q-uploader__subtitle, .drop .q-uploader__list { display: none; }
.line { width: 100%; flex-wrap: nowrap; align-items: center; justify-content: space-between; gap: 8px; }
.count { font-weight: 600; font-variant-numeric: tabular-nums; }
.small { color: var(--soft); font-size: 13px; line-height: 1.4; overflow-wrap: anywhere; }
.error { color: var(--bad); background: var(--bad-ground); border-radius: 6px; padding: 8px 10px;
  overflow-wrap: anywhere; }
.examples { display: grid; grid-template-columns: repeat(3, 1fr); gap: 6px; width: 100%; }
.example { padding: 0; border: 0; border-radius: 6px; height: 64px; cursor: pointer; overflow: hidden; }
.example img { width: 100%; height: 100%; object-fit: cover; }
.example:hover, .example:focus-visible { outline: 3px solid var(--accent); }
.rows { max-height: 60vh; background: none; }
.rows thead th { position: sticky; top: 0; background: var(--card); z-index: 1; }
.rows tr[data-box] { cursor: pointer; }
.rows .q-table th, .rows .q-table td { padding: 4px 6px; }
.swatch { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 8px; }
.stages .q-stepper { background: none; }
.stages .q-stepper__header { counter-reset: step; }
.stages .q-stepper__tab { padding: 14px 8px; min-height: 0; counter-increment: step; }
.stages .q-stepper__dot span { display: block; width: 100%; text-align: center; font-size: 14px; }
.stages .q-stepper__dot span::before { content: counter(step); }
.stages .q-stepper__dot .q-icon { display: none; }
.stages .q-stepper__step-inner { padding: 0 12px 8px; }
.text { flex: 1; color: var(--ink); line-height: 1.45; }
.note { color: var(--soft); padding: 48px 0; text-align: center; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); gap: 12px;
  width: 100%; }
.look { min-width: 0; }
.frame { position: relative; margin-top: 4px; }
.picture { display: block; width: 100%; max-height: 78vh; object-fit: contain; border-radius: 6px; }
.frame svg { position: absolute; inset: 0; width: 100%; height: 100%; }
.frame rect { fill: transparent; stroke-width: 3; vector-effect: non-scaling-stroke; cursor: pointer;
  filter: drop-shadow(0 0 2px #000); }
"""
