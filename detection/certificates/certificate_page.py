"""The page of a certificate: one HTML file that needs nothing from anywhere else."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from detection.certificates.certificate import rows_of
from detection.certificates.differences import Row
from detection.certificates.seen import Picture
from detection.data.spectral import false_colour
from detection.evaluation.page import PAGE, STYLE
from detection.evaluation.report import section

SIDE = 420  # pixels of the longer side of a picture
OWN_STYLE = """
p.verdict { font-size: 1.15rem; margin: 0; overflow-wrap: anywhere; }
p.verdict.broken { border-left: 4px solid #d1442f; padding-left: .8rem; }
p.note + p.verdict { margin-top: -.6rem; }
header h1 { overflow-wrap: anywhere; }
td.stage { text-align: left; white-space: normal; }
td.stage small { display: block; color: var(--soft); overflow-wrap: anywhere; }
.stages thead th { position: static; color: var(--soft); }
@media (max-width: 560px) {
  .stages :is(th, td):last-child { display: none; }
  .stages :is(th, td) { padding: .38rem .25rem; }
}
tr.broken td { color: #d1442f; font-weight: 600; }
.meter { display: inline-block; width: 5.5rem; height: .55rem; border-radius: 3px; background: var(--line); }
.meter i { display: block; height: 100%; border-radius: 3px; background: var(--accent); }
.meter.broken i { background: #d1442f; }
.tile.broken { background: #b53a27; border-color: #b53a27; color: #fff; }
.tile.broken span { color: #ffe3de; }
table.facts td { text-align: left; white-space: normal; overflow-wrap: anywhere; vertical-align: top; }
table.facts td:first-child { color: var(--soft); white-space: nowrap; width: 1%; }
code { font-size: .88em; overflow-wrap: anywhere; }
.images { display: grid; align-items: start; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(220px, 100%), 1fr)); }
.images figure { margin: 0; border: 1px solid var(--line); border-radius: 10px; overflow: hidden; }
.images img { display: block; width: 100%; }
.images figcaption { padding: .5rem .8rem; font-size: .85rem; color: var(--soft); }
"""
MADE = {
    "import": "converted from {source}",
    "take": "written for another library from {source}",
    "export": "exported from {source}",
}
STAGES_NOTE = (
    "The largest difference over all images. A full bar is the tolerance, and a tenth of its length a factor of ten. "
    "Stages that one side does not show are left out."
)
IMAGES_NOTE = {
    True: "Scenes that this project draws from a seed, so everybody has the same.",
    False: "Of the folder that was named.",
}


def write_page(path: Path, content: Mapping[str, Any], pictures: Sequence[Picture]) -> None:
    """Write the page.

    Args:
        path: of the `.html`.
        content: the certificate.
        pictures: its images, which the page shows.
    """
    path.write_text(_render(content, pictures), encoding="utf-8")


def shown(value: float | None) -> str:
    """A difference in words: two digits, or that there is none."""
    if value is None:
        return "not comparable"
    return "0" if value == 0 else f"{value:.0f}" if value >= 1 and value == int(value) else f"{value:.2g}"


def verdict(content: Mapping[str, Any]) -> str:
    """Whether the file is what it was made of, in a sentence."""
    rows, name = rows_of(content), content["file"]["name"]
    broken = [row.stage for row in rows if not row.holds]
    against = content["reference"]
    if broken:
        return f"{name} differs from {against} in {', '.join(broken)}."
    accuracy = content["accuracy"]
    if accuracy and not accuracy["lost"] <= accuracy["tolerance"]:
        return f"{name} loses {accuracy['lost']:.4f} AP against {against}."
    judged = any(row.tolerance is not None for row in rows)
    agrees = "agrees within the tolerances with" if judged else "differs as stated, with nothing judged, from"
    none = "" if content["detections"] else " Nothing was detected on these images, so no boxes were compared."
    return f"{name} {agrees} {against}.{none}"


def _render(content: Mapping[str, Any], pictures: Sequence[Picture]) -> str:
    rows, file, source = rows_of(content), content["file"], content["source"]
    facts = {"made": MADE[content["made"]].format(source=source["name"]), "on": content["date"]}
    images = content["images"]
    body = [
        f'<div class="tiles">{_tiles(content, rows)}</div>',
        section("Verdict", "", _verdict(content)),
        section("Stages", STAGES_NOTE, _stages(rows)),
        section("Accuracy", "", _accuracy(content["accuracy"])) if content["accuracy"] else "",
        section("Images", IMAGES_NOTE["drawn" in images], _gallery(images["pictures"], pictures)),
        section("Files", "Checksums are of all but the certificate itself.", _files(content)),
        section("Versions", "", _facts({**content["versions"], "platform": content["platform"]})),
        section(
            "Repeat it", "", f"<p><code>detection verify {escape(file['name'])}</code> computes all this again.</p>"
        ),
    ]
    return PAGE.format(
        title=f"Certificate of {escape(file['name'])}",
        facts=" &nbsp;·&nbsp; ".join(f"{escape(key)} <b>{escape(value)}</b>" for key, value in facts.items()),
        style=STYLE + OWN_STYLE,
        script="",
        body="\n".join(body),
        footer="A certificate states what was measured. It is not signed: whoever can change the file can change it.",
    )


def _tiles(content: Mapping[str, Any], rows: Sequence[Row]) -> str:
    by_stage = {row.stage: row for row in rows}
    holds = content["holds"]
    tiles = [
        ("first" if holds else "broken", "agrees" if holds else "differs", f"from {content['reference']}"[5 * holds :])
    ]
    if holds:
        tiles[0] = ("first", "agrees", f"with {content['reference']}")
    wanted = {"boxes": "pixels, of boxes", "scores": "of scores", "masks": "of masks"}
    wanted |= {"key points": "pixels, of key points", "gradients": "of gradients"}
    for stage, text in wanted.items():
        if stage in by_stage:
            tiles.append(("", shown(by_stage[stage].difference), text))
    tiles.append(("", str(content["detections"]), f"detections on {len(content['images']['pictures'])} images"))
    if content["accuracy"]:
        tiles.append(("", f"{content['accuracy']['lost']:+.4f}", "AP lost"))
    return "".join(
        f'<div class="tile {css}"><b>{value}</b><span>{escape(text)}</span></div>' for css, value, text in tiles
    )


def _verdict(content: Mapping[str, Any]) -> str:
    css = "" if content["holds"] else " broken"
    told = f'<p class="verdict{css}">{escape(verdict(content))}</p>'
    return told + (f"<p>{escape(content['replaced'])}.</p>" if content["replaced"] else "")


def _stages(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        unit = " px" if row.unit == "pixels" else ""
        allowed = "stated only" if row.tolerance is None else f"{shown(row.tolerance)}{unit}"
        told = ", ".join(escape(part) for part in (row.where, row.note) if part and row.difference != 0)
        lines.append(
            f'<tr{"" if row.holds else " class=broken"}><td class="stage">{escape(row.stage)}<small>{told}</small></td>'
            f"<td>{shown(row.difference)}{unit}</td><td>{allowed}</td><td>{_meter(row)}</td></tr>"
        )
    head = '<th class="text">stage</th><th>difference</th><th>allowed</th><th></th>'
    return f'<table class="stages"><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>'


def _meter(row: Row) -> str:
    """The share of the tolerance, on a scale of ten powers of ten."""
    if row.tolerance is None or row.difference is None:
        return ""
    share = 0.0
    if row.difference > 0:
        share = float(np.clip(1 + np.log10(row.difference / max(row.tolerance, 1e-12)) / 10, 0, 1))
    css = "meter" if row.holds else "meter broken"
    return f'<span class="{css}"><i style="width:{share:.0%}"></i></span>'


def _accuracy(found: Mapping[str, Any]) -> str:
    return _facts(
        {
            f"AP on {found['images']} images of {found['data']}": f"{found['file']:.4f} of the file, "
            f"{found['reference']:.4f} of the other, {found['lost']:+.4f} lost (at most {found['tolerance']:g} may be)"
        }
    )


def _files(content: Mapping[str, Any]) -> str:
    settings = {name: value for name, value in content["settings"].items() if value not in (None, False, "")}
    told = ", ".join(f"{name} {value}" for name, value in settings.items()) or "the defaults"
    return _facts(
        {
            "file": f"{content['file']['name']}, SHA-256 {content['file']['sha256']}",
            "made of": f"{content['source']['path']}, SHA-256 {content['source']['sha256']}",
            "settings": told,
            "compared with": content["reference"],
        }
    )


def _facts(values: Mapping[str, Any]) -> str:
    lines = "".join(f"<tr><td>{escape(str(k))}</td><td>{escape(str(v))}</td></tr>" for k, v in values.items())
    return f'<table class="facts"><tbody>{lines}</tbody></table>'


def _gallery(told: Sequence[Mapping[str, Any]], pictures: Sequence[Picture]) -> str:
    cells = []
    for entry, picture in zip(told, pictures, strict=True):
        name, size = escape(entry["name"]), f"{entry['width']} x {entry['height']}"
        cells.append(
            f'<figure><img alt="{name}" src="{_thumbnail(picture)}"><figcaption><b>{name}</b>, {size}<br>'
            f"<code>{entry['sha256'][:16]}</code></figcaption></figure>"
        )
    return f'<div class="images">{"".join(cells)}</div>'


def _thumbnail(picture: Picture) -> str:
    pixels = false_colour(picture.pixels)
    scale = min(1.0, SIDE / max(pixels.shape[:2]))
    size = (max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale)))
    small = cv2.cvtColor(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2BGR)
    data = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 85])[1].tobytes()
    return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"
