"""The looks and the behaviour of the gallery: its controls, its style, and its script, which needs nothing else."""

from __future__ import annotations

CONTROLS = """
<div class="controls">
<label>class <select name="class"><option value="">all</option></select></label>
<label>size <select name="size"><option value="">all</option></select></label>
<label>score at least <input name="score" type="range" min="0" max="1" step="0.01"> <output></output></label>
<label>file <input name="file" type="search" placeholder="part of its name"></label>
<label>first <select name="sort"></select></label>
<label><input name="found" type="checkbox">found objects too</label>
<label><input name="rest" type="checkbox">other boxes, faint</label>{compared}
</div>
<div class="kinds"></div>
<div class="chips"></div>
<p class="note count" aria-live="polite"></p>
<div class="gallery"></div>
<div class="pages"><button type="button">previous</button><span></span><button type="button">next</button></div>
<dialog><div class="heading"><b></b><span></span></div><div class="place"></div><p></p></dialog>
"""
COMPARED = '<label><input name="differ" type="checkbox">only images where they differ</label>'

STYLE = """
.controls input[type=search] { width: 10rem; }
.controls select, .controls input[type=search] { font: inherit; color: inherit; background: var(--ground);
  border: 1px solid var(--line); border-radius: 6px; padding: .15rem .35rem; max-width: 12rem; }
.kinds, .chips { display: flex; flex-wrap: wrap; gap: .4rem; margin-bottom: .7rem; font-size: .85rem; }
.kinds button, .chips button, .pages button, .heading button { font: inherit; color: inherit; cursor: pointer;
  background: none; border: 1px solid var(--line); border-radius: 99px; padding: .15rem .7rem; }
.kinds button:hover, .chips button:hover, .pages button:hover { background: var(--hover); }
.kinds button[aria-pressed=true], .chips button { border-color: var(--accent); }
.kinds b { font-weight: 600; font-variant-numeric: tabular-nums; margin-left: .4em; }
.chips button { overflow-wrap: anywhere; text-align: left; }
.chips button::after { content: " \\00D7"; color: var(--accent); }
.gallery { display: grid; align-items: start; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(var(--least, 250px), 100%), 1fr)); }
.pages { display: flex; gap: 1rem; align-items: center; margin-top: 1rem; font-size: .9rem; }
.pages[hidden] { display: none; }
.pages button:disabled { opacity: .4; cursor: default; }
figure { margin: 0; border: 1px solid var(--line); border-radius: 10px; overflow: hidden; background: #10151d; }
figure .frames { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(200px, 100%), 1fr)); gap: 2px; }
.frame { position: relative; cursor: zoom-in; aspect-ratio: var(--ratio); background: #222b38; }
.frame:focus-visible { outline: 2px solid var(--accent); outline-offset: -2px; }
.frame img, .frame svg { position: absolute; inset: 0; display: block; width: 100%; height: 100%; }
.frame i { position: absolute; top: .3rem; left: .3rem; padding: 0 .5rem; border-radius: 5px; background: #10151dcc;
  color: #fff; font: 600 .8rem/1.5 system-ui, sans-serif; z-index: 1; max-width: 90%; overflow: hidden;
  text-overflow: ellipsis; white-space: nowrap; }
.frame rect, .frame path { fill: transparent; stroke: var(--colour); stroke-width: 2; vector-effect: non-scaling-stroke;
  fill-rule: evenodd; }
.frame .object { stroke-dasharray: 6 4; }
.frame .faint { stroke-width: 1; stroke-opacity: .45; }
.frame rect:hover, .frame path:hover { fill: var(--colour); fill-opacity: .25; }
figcaption { padding: .5rem .8rem; background: var(--card); font-size: .85rem; color: var(--soft); }
figcaption b { color: var(--ink); overflow-wrap: anywhere; }
dialog { border: 0; padding: 0; background: #10151d; color: #e4eaf1; width: fit-content; max-width: 96vw;
  max-height: 96vh; font-size: .9rem; }
dialog::backdrop { background: rgba(0, 0, 0, .7); }
dialog .place .frame { width: min(94vw, 78vh * var(--ratio)); cursor: zoom-out; }
dialog .heading { display: flex; flex-wrap: wrap; justify-content: space-between; gap: .4rem 1rem; padding: .5rem .8rem;
  max-width: 94vw; }
dialog .heading b { overflow-wrap: anywhere; }
dialog .heading span { display: flex; flex-wrap: wrap; gap: .4rem; }
dialog p { margin: 0; padding: .5rem .8rem; color: #9aa8b8; width: 0; min-width: 100%; }
"""

SCRIPT = r"""
const gallery = document.querySelector("#gallery-data"), data = JSON.parse(gallery.textContent);
const one = selector => document.querySelector("#images " + selector);
const chunks = [...document.querySelectorAll("script.pictures")], opened = new Map();
const FOUND = 7, LOST = 8, MISSED = 9;  // kinds of objects, behind those of detections
const two = data.layers.length > 1, PAGE = 24, none = data.classes.length;
const SORTS = {
  ...(two ? { changed: "changed most", a: `better: ${data.layers[0]}`, b: `better: ${data.layers[1]}`,
    runs: "changed most, all runs" } : {}),
  worst: "most mistakes", most: "most selected boxes", file: "by name",
};
const START = { class: "", mistake: "", cell: "", size: "", file: "", differ: "", score: "0.3", found: "", rest: "1",
  sort: Object.keys(SORTS)[0], page: "1" };
let hash = location.hash, state, wanted, chosen = [], totals = [], at = 0, side = 0;

// The address says what is shown, so that a filter can be linked and the back button works.
function read() {
  state = { ...START, ...Object.fromEntries(new URLSearchParams(hash.slice(1))) };
  if (!(state.score >= 0 && state.score <= 1)) state.score = START.score;
  if (!(state.sort in SORTS)) state.sort = START.sort;
  const [is, as] = state.cell.split(",").map(Number), shown = data.shown.find(shown => shown.name === state.mistake);
  wanted = { label: data.classes.indexOf(state.class), size: data.sizes.indexOf(state.size),
    cell: is * (none + 1) + as, kinds: state.mistake && (shown?.kinds ?? []), least: Math.round(1000 * state.score),
    boxes: state.class || state.size || state.cell || state.mistake };
}
function go(query, replace) {
  hash = "#" + query;
  try {
    history[replace ? "replaceState" : "pushState"](null, "", hash);
  } catch { /* a page in a frame may have no address of its own */ }
  show();
}
function change(changes, replace) {
  const next = { ...state, page: "1", ...changes };
  go(new URLSearchParams(Object.entries(next).filter(([key, value]) => value !== START[key])), replace);
}

// visit(numbers, i, kind, cell, score) for each object and each detection of a layer; cells count row by row.
function eachBox(image, layer, visit) {
  const { boxes, objects: known } = image.layers[layer], objects = image.objects, { least } = wanted;
  for (let i = 0, k = 0; i < objects.length; i += 6, k += 3) {
    const kind = known[k] >= least ? FOUND : known[k + 1] >= least ? LOST : MISSED;
    visit(objects, i, kind, known[k + 2] ? objects[i + 4] * (none + 1) + none : -1, 1000);
  }
  for (let i = 0; i < boxes.length; i += 9)
    if (boxes[i + 6] >= least)
      visit(boxes, i, boxes[i + 7], boxes[i + 8] < 0 ? -1 : boxes[i + 8] * (none + 1) + boxes[i + 4], boxes[i + 6]);
}
const fits = (numbers, i, cell) => (!state.class || numbers[i + 4] === wanted.label)
  && (!state.size || numbers[i + 5] === wanted.size) && (!state.cell || cell === wanted.cell);
const asked = kind => !state.mistake || wanted.kinds.includes(kind);

// What of an image the filters select, of each detector.
function weigh(image, layer) {
  const seen = { objects: 0, detections: 0, kinds: new Array(10).fill(0), weight: 0, signs: [] };
  eachBox(image, layer, (numbers, i, kind, cell, score) => {
    if (!fits(numbers, i, cell)) return;
    seen.kinds[kind]++;
    if (!asked(kind)) return;
    seen[kind < FOUND ? "detections" : "objects"]++;
    if (kind > 0 && kind < 6 || kind > FOUND) seen.weight += score / 1000;
    if (state.differ) seen.signs.push(kind < FOUND ? `${kind} ${numbers[i + 4]}` : `object ${i} ${kind === FOUND}`);
  });
  seen.signs = seen.signs.sort().join();
  return seen;
}
function select() {
  const text = state.file.toLowerCase();
  chosen = [];
  totals = data.layers.map(() => new Array(10).fill(0));
  data.images.forEach((image, place) => {
    if (!image.file.toLowerCase().includes(text)) return;
    const seen = data.layers.map((_, layer) => weigh(image, layer));
    seen.forEach((own, layer) => own.kinds.forEach((count, kind) => totals[layer][kind] += count));
    if (wanted.boxes && seen.every(({ objects, detections }) => !objects && !detections)) return;
    if (state.differ && two && seen[0].signs === seen[1].signs) return;
    chosen.push({ image, place, seen, gain: two ? seen[1].weight - seen[0].weight : 0 });
  });
  const sum = (entry, key) => entry.seen.reduce((total, own) => total + own[key], 0);
  const orders = {
    worst: (a, b) => sum(b, "weight") - sum(a, "weight"), file: (a, b) => a.image.file.localeCompare(b.image.file),
    most: (a, b) => sum(b, "objects") + sum(b, "detections") - sum(a, "objects") - sum(a, "detections"),
    changed: (a, b) => Math.abs(b.gain) - Math.abs(a.gain), a: (a, b) => b.gain - a.gain, b: (a, b) => a.gain - b.gain,
    runs: (a, b) => Math.abs(b.image.change) - Math.abs(a.image.change),
  };
  chosen.sort(orders[state.sort]);
}

function make(name, attributes = {}, ...children) {
  const svg = ["svg", "rect", "path", "title"].includes(name);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes))
    if (typeof value === "function") node.addEventListener(key, value); else node.setAttribute(key, value);
  node.append(...children);
  return node;
}
const named = (numbers, i, kind) => data.classes[numbers[i + 4]]
  + (kind < FOUND ? ` ${(numbers[i + 6] / 1000).toFixed(2)}` : "") + ` (${data.kinds[kind]})`;
function draw(svg, image, layer) {
  const own = image.layers[layer];
  eachBox(image, layer, (numbers, i, kind, cell) => {
    const chosen = fits(numbers, i, cell) && asked(kind), object = kind >= FOUND;
    if (!(chosen || state.rest) || kind === FOUND && !state.found) return;
    const outline = object ? image.outlines?.[i / 6] : own.outlines?.[i / 9];
    const [x, y, width, height] = numbers.slice(i, i + 4);
    svg.append(make(outline ? "path" : "rect", {
      class: (object ? "object" : "") + (chosen ? "" : " faint"), style: `--colour:${data.colours[kind]}`,
      ...(outline ? { d: outline } : { x, y, width, height }),
    }, make("title", {}, named(numbers, i, kind))));
  });
}

// A picture gets its pixels when it comes near, so that those that nobody looks at are never unpacked.
function source(place) {
  if (gallery.dataset.folder) return `${gallery.dataset.folder}/${String(place).padStart(6, "0")}.webp`;
  const size = Number(gallery.dataset.chunk), number = Math.floor(place / size);
  if (!opened.has(number)) opened.set(number, chunks[number].textContent.split("\n"));
  return "data:image/webp;base64," + opened.get(number)[place % size];
}
const near = new IntersectionObserver(seen => seen.forEach(({ isIntersecting, target }) => {
  if (!isIntersecting) return;
  near.unobserve(target);
  target.src = source(Number(target.dataset.place));
}), { rootMargin: "400px" });
function frame(number, layer, open) {
  const { image, place } = chosen[number], [width, height] = image.size;
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none" });
  const box = make("div", { class: "frame", tabindex: 0, style: `--ratio:${width / height}`, click: open,
    keydown: event => event.key === "Enter" && open() });
  if (gallery.dataset.chunk || gallery.dataset.folder) {
    const picture = make("img", { alt: image.file, loading: "lazy", decoding: "async", "data-place": place });
    box.append(picture);
    near.observe(picture);
  }
  draw(svg, image, layer);
  box.append(svg, ...(two ? [make("i", {}, data.layers[layer])] : []));
  return box;
}
const counted = (number, word) => `${number} ${word}${number === 1 ? "" : "s"}`;
function about({ image, seen, gain }) {
  const boxes = seen.map(own => `${counted(own.objects, "object")} and ${counted(own.detections, "detection")}`);
  const better = data.layers[gain > 0 ? 0 : 1];
  return `image ${image.id}, ` + (!two ? `${boxes[0]}, mistakes weigh ${seen[0].weight.toFixed(1)}`
    : `${gain ? `mistakes weigh ${Math.abs(gain).toFixed(1)} less with ${better}` : "mistakes weigh the same"}`);
}
function figure(number) {
  const frames = data.layers.map((_, layer) => frame(number, layer, () => enlarge(number, layer)));
  return make("figure", { "data-image": chosen[number].place }, make("div", { class: "frames" }, ...frames),
    make("figcaption", {}, make("b", {}, chosen[number].image.file), make("br"), about(chosen[number])));
}

const large = one("dialog");
function enlarge(number, layer) {
  if (number < 0 || number >= chosen.length) return;
  [at, side] = [number, layer];
  const entry = chosen[number], texts = [];
  eachBox(entry.image, layer, (numbers, i, kind, cell) =>
    fits(numbers, i, cell) && asked(kind) && kind !== FOUND && texts.push(named(numbers, i, kind)));
  one("dialog b").textContent = `${number + 1} of ${chosen.length}: ${entry.image.file}`;
  const button = (text, click, disabled) =>
    make("button", { type: "button", click, ...(disabled && { disabled }) }, text);
  one("dialog span").replaceChildren(button("previous", () => enlarge(at - 1, side), !number),
    ...(two ? [button(`show ${data.layers[1 - layer]}`, () => enlarge(at, 1 - side))] : []),
    button("next", () => enlarge(at + 1, side), number + 1 === chosen.length), button("close", () => large.close()));
  one("dialog .place").replaceChildren(frame(number, layer, () => large.close()));
  const more = texts.splice(40).length;
  one("dialog p").textContent = texts.join(", ") + (more ? `, and ${more} more` : "");
  if (!large.open) large.showModal();
}
large.addEventListener("keydown", event => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (step) enlarge(at + step, side);
  if (two && event.key === " " && !event.target.closest("button")) { event.preventDefault(); enlarge(at, 1 - side); }
});
large.addEventListener("click", event => event.target === large && large.close());

function chips() {
  const [is, as] = state.cell.split(",").map(Number), say = { class: state.class, mistake: state.mistake,
    cell: `${data.classes[is] ?? "background"} as ${data.classes[as] ?? "undetected"} at score 0.5`,
    size: state.size, file: `name has ${state.file}`, differ: "where they differ",
    score: `score ${state.score} and more` };
  const set = Object.keys(say).filter(key => state[key] !== START[key]);
  return set.map(key => make("button", { type: "button", title: "remove this filter", "data-filter": key,
    click: () => change({ [key]: START[key] }) }, `${key === "class" || key === "size" ? key + " " : ""}${say[key]}`));
}
function kinds() {
  return data.shown.map(({ name, kinds, colour }) => {
    const numbers = totals.map(own => kinds.reduce((sum, kind) => sum + own[kind], 0));
    const dot = make("span", { class: "dot", style: `--colour:${colour}` }), on = state.mistake === name;
    return make("button", { type: "button", "aria-pressed": on, click: () => change({ mistake: on ? "" : name }) },
      dot, name, make("b", {}, numbers.join(" | ")));
  });
}
function show() {
  read();
  select();
  const pages = Math.max(1, Math.ceil(chosen.length / PAGE));
  const page = Math.min(pages, Math.max(1, parseInt(state.page) || 1));
  for (const input of document.querySelectorAll("#images .controls [name]"))
    if (input.type === "checkbox") input.checked = Boolean(state[input.name]); else input.value = state[input.name];
  one("output").textContent = Number(state.score).toFixed(2);
  one(".kinds").replaceChildren(...kinds());
  one(".chips").replaceChildren(...chips());
  const count = (layer, key) => chosen.reduce((total, { seen }) => total + seen[layer][key], 0);
  const sum = key => data.layers.map((_, layer) => count(layer, key)).join(" | ");
  one(".count").textContent = `${sum("objects")} objects and ${sum("detections")} detections in ${chosen.length} of `
    + counted(data.images.length, "image") + (two ? ` (${data.layers.join(" | ")})` : "");
  near.disconnect();
  const first = (page - 1) * PAGE, last = Math.min(chosen.length, first + PAGE);
  one(".gallery").replaceChildren(...Array.from({ length: last - first }, (_, number) => figure(first + number)));
  one(".pages").hidden = pages === 1;
  one(".pages span").textContent = `${first + 1} to ${last} of ${chosen.length}`;
  const [back, on] = document.querySelectorAll("#images .pages button");
  [back.disabled, on.disabled] = [page === 1, page === pages];
  [back.onclick, on.onclick] = [-1, 1].map(step => () => { change({ page: String(page + step) }); toGallery(); });
}
const toGallery = () => document.querySelector("#images").scrollIntoView({ block: "start" });

data.classes.forEach(name => one("[name=class]").append(make("option", { value: name }, name)));
data.sizes.forEach(name => one("[name=size]").append(make("option", { value: name }, name)));
Object.entries(SORTS).forEach(([value, name]) => one("[name=sort]").append(make("option", { value }, name)));
one(".gallery").style.setProperty("--least", two ? "440px" : "250px");
for (const input of document.querySelectorAll("#images .controls [name]")) {
  const moves = input.type === "range" || input.type === "search";  // leaves no trail of steps to go back through
  const value = () => input.type === "checkbox" ? (input.checked ? "1" : "") : input.value;
  input.addEventListener(moves ? "input" : "change", () => change({ [input.name]: value() }, moves));
}
document.addEventListener("click", event => {
  const href = event.target.closest("a")?.getAttribute("href") ?? "";
  if (!href.startsWith("#") || !href.includes("=") || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  go(href.slice(1));
  toGallery();
});
addEventListener("popstate", () => {
  if (location.hash && !location.hash.includes("=")) return;  // a section of the page
  hash = location.hash;
  show();
});
show();
if (hash.includes("=")) toGallery();
"""
