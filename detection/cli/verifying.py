"""The command `verify`: the certificate of a converted or exported file, computed again."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from detection.certificates.certificate import (
    CertificateError,
    Measured,
    checksum,
    pictures_of,
    read,
    rows_of,
    versions,
)
from detection.certificates.certificate_page import shown
from detection.certificates.differences import Row
from detection.certificates.making import Job, accuracy, measure
from detection.cli.certifying import AP_TOLERANCE
from detection.cli.flags import TRUST, take_trust
from detection.cli.output import set_up_output
from detection.cli.run_data import labelled_folder, labelled_images
from detection.cli.wording import Flags
from detection.data.spectral import PixelFormat
from detection.errors import complaint

DESCRIPTION = """Computes the certificate of a converted or exported file again, and says whether it still holds.

  detection verify detector.onnx
  detection verify d2.safetensors --source model_final.pkl

It needs what the file was made of. The exit code is 0 where all is within the certificate's tolerances, 1 where
something is not, 2 where it can't be repeated.
"""


def main(flags: Sequence[str]) -> int | str | None:
    """Run the command with its flags; returns the sentence on what went wrong, if anything did."""
    flags, trust = take_trust(flags)
    parser = Flags("detection verify", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE", help="that `detection convert` or `detection export` wrote")
    parser.add_argument("--source", type=Path, help="what it was made of, if that has moved")
    parser.add_argument("--images", type=Path, help="folder of the certificate's images, if it has moved")
    parser.add_argument("--data", type=Path, help="folder of the labelled data, if it has moved")
    parser.add_argument(TRUST, nargs="+", help="packages whose parts the detector may use: their code runs")
    given = parser.parse_args(flags)
    set_up_output()
    found: list[str] = []
    try:
        sentence = complaint(lambda: found.extend(verify(given, trust)))
    except (CertificateError, ImportError) as error:
        sentence = f"error: {error}"
    if sentence is not None:  # nothing could be said of the file
        print(sentence, file=sys.stderr)
        return 2
    return f"error: {'; '.join(found)}" if found else None


def verify(given: argparse.Namespace, trust: Sequence[str]) -> list[str]:
    """Compare anew and print it; what does not hold, a sentence each.

    Raises:
        CertificateError: it can't be repeated.
    """
    file: Path = given.file
    if not file.is_file():
        raise FileNotFoundError(f"no file at {file}")
    content, wrong = read(file)
    source = _source(content, file, given.source)
    if checksum(file) != content["file"]["sha256"]:
        wrong.append(f"{file} is not the file that its certificate is of: something in it was changed")
    if checksum(source) != content["source"]["sha256"]:
        wrong.append(f"{source} is not what the certificate names as its source: it was changed, or is another")
    job = Job(content["made"], file, source, content["settings"], trust)
    form = job.form()
    folder = file.parent
    if given.images is not None:
        content["images"] |= {"folder": str(given.images.resolve())}
    measured = measure(job, pictures_of(content, folder, form))
    rows = rows_of(content)
    _print(rows, measured, content)
    wrong += broken(rows, measured)
    wrong += _accuracy(job, content, given.data, form)
    if not wrong:
        print(f"{file.name} holds: {measured.reference}")
    return wrong


def broken(old: Sequence[Row], measured: Measured) -> list[str]:
    """The stages that are beyond the tolerances which the certificate states, a sentence each."""
    told = {row.stage: row for row in old}
    sentences = []
    for row in measured.rows:
        limit = told[row.stage].tolerance if row.stage in told else row.tolerance
        if limit is not None and not (row.difference is not None and row.difference <= limit):
            sentences.append(
                f"{row.stage} differ by {shown(row.difference)}{' ' + row.unit if row.unit else ''}, where the "
                f"certificate allows {shown(limit)} ({row.where})"
            )
    return sentences


def _source(content: Mapping[str, Any], file: Path, given: Path | None) -> Path:
    """What the file was made of: as named, where the certificate says, or beside it."""
    told = content["source"]
    places = [given] if given else [file.parent / str(told["path"]), file.parent / str(told["name"])]
    for place in places:
        if place.is_file():
            return place
    raise CertificateError(
        f"{told['name']}, which {file.name} was made of, is not at {places[0]}: name it, --source PATH/{told['name']}"
    )


def _print(old: Sequence[Row], measured: Measured, content: Mapping[str, Any]) -> None:
    """What the certificate says beside what comes out now."""
    now = {row.stage: row for row in measured.rows}
    then = {row.stage: row for row in old}
    figures = (Column(name, justify="right") for name in ("certificate", "now", "allowed"))
    table = Table("stage", *figures, box=None, padding=(0, 1, 0, 0))
    for stage in dict.fromkeys([*then, *now]):
        limit = then.get(stage, now.get(stage))
        allowed = "stated only" if limit is None or limit.tolerance is None else shown(limit.tolerance)
        known = shown(then[stage].difference) if stage in then else "-"
        table.add_row(stage, known, shown(now[stage].difference) if stage in now else "not repeated", allowed)
    print(f"{content['file']['name']} against {content['reference']}, of {content['date']}; now {measured.reference}")
    Console().print(table)
    changed = {k: (v, versions().get(k, "not installed")) for k, v in content["versions"].items()}
    told = [f"{name} {old} then, {new} now" for name, (old, new) in changed.items() if old != new]
    if told:
        print(f"versions: {'; '.join(told)}")
    if measured.replaced:
        print(f"{measured.replaced}.")


def _accuracy(job: Job, content: Mapping[str, Any], data: Path | None, form: PixelFormat) -> list[str]:
    """Measure the AP again, where the certificate has one; what does not hold."""
    told = content.get("accuracy")
    if not told:
        return []
    if told.get("split"):
        labelled = labelled_images(job.source, list(job.trust), data, told["split"])
    else:
        folder = data or job.file.parent / str(told.get("path"))
        if not folder.is_dir():
            print(f"the AP is not measured again: {told['data']} is not at {folder} (--data)")
            return []
        labelled = labelled_folder(folder, job.own, form)
    found = accuracy(job, labelled, told["data"])
    both = [f"{now['file']:.4f} of the file, {now['lost']:+.4f} lost" for now in (found, told)]
    print(f"AP on {found['images']} images of {told['data']}: {both[0]}; {both[1]} then")
    limit = told.get("tolerance", AP_TOLERANCE)
    return [] if found["lost"] <= limit else [f"the file loses {found['lost']:.4f} AP, where {limit:g} is allowed"]
