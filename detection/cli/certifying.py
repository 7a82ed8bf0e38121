"""Writing a certificate, for the commands that make a file: what was asked for on the command line, put into a job."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from detection.certificates.certificate import CertificateError, path_of, relative, write
from detection.certificates.certificate_page import verdict, write_page
from detection.certificates.making import AP_TOLERANCE, Job, accuracy, measure
from detection.certificates.seen import COUNT, SEED, Picture, drawn
from detection.cli.run_data import labelled_folder
from detection.data.records import DataError
from detection.data.spectral import PixelFormat
from detection.inference.sources import Images, open_source
from detection.interop.parity import Accuracy

MOST = 5  # images of a folder


def certify(
    job: Job, images: str | None = None, data: Path | None = None, known: dict[str, Any] | None = None
) -> dict[str, Any] | None:
    """Compare, and write `FILE.certificate.json`, `FILE.certificate.html`, and the JSON into the file.

    Args:
        job: what was made of what.
        images: image, folder or pattern to compare on; drawn scenes by default.
        data: labelled data set, whose validation split says how much AP is lost.
        known: the AP that was measured already, see `certificate_making.accuracy`.

    Returns:
        the certificate; None where nothing can be compared, which is said.
    """
    form, size = job.form(), job.settings.get("size")
    told: dict[str, Any]
    if images is None:
        pictures, told = drawn(form, COUNT, SEED, size), {"drawn": SEED}
    else:
        folder, pictures = named(images, form, size)
        told = {"folder": relative(folder, job.file.parent)}
    try:
        measured = measure(job, pictures)
    except CertificateError as error:
        print(f"no certificate: {error}", file=sys.stderr)
        return None
    if data is not None:
        known = accuracy(job, labelled_folder(data, job.own, form), data.name)
        known["path"] = relative(data, job.file.parent)
    if known is not None:
        known["tolerance"] = job.settings.get("ap_tolerance", AP_TOLERANCE)
    content = write(job.file, job.source, job.made, job.settings, measured, pictures, told, known)
    page = path_of(job.file).with_suffix(".html")
    write_page(page, content, pictures)
    print(verdict(content), file=sys.stdout if content["holds"] else sys.stderr)
    if measured.replaced:
        print(f"{measured.replaced}.")
    print(f"certificate: {page}")
    return content


def named(source: str, form: PixelFormat, size: Sequence[int] | None = None) -> tuple[Path, list[Picture]]:
    """The first `MOST` images of a folder or pattern, and the folder that their names are relative to.

    Args:
        source: image, folder or pattern.
        form: of the pixels.
        size: height and width that they must have, where the file takes no other.

    Raises:
        DataError: there is none.
    """
    found = open_source(source, form)
    if not isinstance(found, Images):
        raise DataError(f"--images {source}: give images, not a video")
    fitting = (Picture(name, pixels) for name, pixels in found if size is None or list(pixels.shape[:2]) == list(size))
    pictures = list(islice(fitting, MOST))
    if not pictures:
        raise DataError(f"--images {source}: there is no image that can be used")
    return found.root, pictures


def of_split(found: Accuracy | None, split: str | None) -> dict[str, Any] | None:
    """The AP that `detection export` has measured, as a certificate has it; its tolerance is the job's."""
    if found is None:
        return None
    values = {"images": found.images, "file": found.file, "reference": found.model, "lost": found.lost}
    return {"data": f"{split} of the run", "split": split, **values}
