"""Detection in files, from one end to the other: pictures in, annotated pictures, COCO JSON and CSV out."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import distributed as dist

from detection.batch import Id
from detection.data.headers import LARGEST
from detection.inference.detections import Detections
from detection.inference.detector import Detector, check_batch_size
from detection.inference.ensemble import Ensemble
from detection.inference.films import Film
from detection.inference.sources import ANNOTATED, RESULTS, Images, Listed, Pixels, Video
from detection.inference.tiles import Tiles
from detection.inference.tracks import Tracks
from detection.visualize import Names

DRAWN = 8000  # pixels of the longer side of the picture of an image beyond LARGEST
WRITTEN = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".bmp")  # kinds of pictures that every viewer shows
COLUMNS = ("image", "class", "score", "x1", "y1", "x2", "y2")


@dataclass
class Summary:
    """What a run of `predict` did.

    Attributes:
        images: how many images or frames were looked at.
        counts: detections of each class.
        problems: one line for each file that could not be read.
        left_out: detections of each class that the source's COCO file lacks, which are in no JSON.
        notes: one line for what was read in part or in another way, or is not a picture that is read.
        folder: where the results are.
    """

    folder: Path
    images: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def predict(
    detector: Detector | Ensemble,
    source: Images | Video,
    folder: Path,
    score_thresh: float = 0.5,
    classes: Sequence[str] | None = None,
    batch_size: int = 8,
    tiles: Tiles | None = None,
    limit: int | None = None,
    pictures: bool = True,
    labels: Names = "auto",
    line_width: int | None = None,
    shared: bool = False,
    tracks: Tracks | None = None,
) -> Summary:
    """Detect in all of a source; Ctrl-C ends it early, with whole files.

    Writes `predictions.json`, a COCO data set whose annotations have scores (and are a COCO results list),
    `predictions.csv`, a line a detection, and pictures: images under their names in `annotated`, a video as one.
    For the images of a COCO file the ids are those of that file, and `detections_bbox.json` (and `_segm`) are written,
    which the official evaluator and its servers take.

    Args:
        detector: finds.
        source: of images or frames.
        folder: to write to; made if absent.
        score_thresh: detections below it are left out.
        classes: those wanted; None for all.
        batch_size: images (or tiles) a batch.
        tiles: look at each image in tiles. One of more than `LARGEST` pixels is looked at in tiles of the detector's
            `min_size` where none are given.
        limit: stop after so many images.
        pictures: whether pictures are wanted.
        labels, line_width: of the pictures, as `Detections.draw` takes them.
        shared: whether every process of `torch.distributed` calls this, to look at a share of the image files. Each
            writes its pictures; the first writes the results, which are those of one process, and gives their summary.
        tracks: new ones, to give objects ids over the frames of a video, or over images in the order of their names.

    Raises:
        ValueError: frames are to be shared, the processes see different numbers of files, or `batch_size` is less
            than 1.
    """
    check_batch_size(batch_size)
    if shared and tracks is not None:
        raise ValueError("objects are followed from frame to frame, so that all frames stay on one device")
    folder.mkdir(parents=True, exist_ok=True)
    writer = _writer(folder, source) if pictures else None
    part = _share(source, batch_size, limit) if shared else source
    files, seen, notes, stopped = (
        _Files(folder, detector, source, not shared or dist.get_rank() == 0, tracks is not None),
        list[_Found](),
        list[str](),
        list[str](),
    )
    with _bar() as bar, files:
        task = bar.add_task("detecting", total=min(len(part), limit or len(part)) or limit)
        count = 0
        try:
            for name, pixels, found in _detect(detector, islice(part, limit), batch_size, tiles, notes):
                found = (found if tracks is None else tracks(found)).above(score_thresh)
                found = found.of(classes) if classes is not None else found
                if shared:
                    seen.append((name, found))
                else:
                    files.add(name, found)
                if writer is not None:
                    side = DRAWN if _is_huge(pixels) else None
                    writer.write(name, found.draw(pixels, side, labels, line_width))
                count += 1
                bar.advance(task)
        except KeyboardInterrupt:
            stopped = [f"interrupted after {count} images"]
        finally:
            if writer is not None:
                notes += writer.close()
        problems, notes = [*stopped, *part.problems], [*notes, *part.notes]
        if shared:
            assert isinstance(source, Images)
            seen, problems, notes = _gather(seen, problems, notes, source)
            for name, found in seen:
                files.add(name, found)
    files.summary.problems, files.summary.notes = problems, notes
    return files.summary


_Found = tuple[str, Detections]  # the name of an image, and what is in it


def _share(source: Images | Video, batch_size: int, limit: int | None) -> Images:
    if not isinstance(source, Images):
        raise ValueError(f"{source.name}: frames come one after the other, so they stay on one device")
    return source.share(dist.get_rank(), dist.get_world_size(), batch_size, limit)


def _gather(
    seen: list[_Found], problems: list[str], notes: list[str], source: Images
) -> tuple[list[_Found], list[str], list[str]]:
    """What all processes have seen, in the order of the source, on the first of them; its own share on each other."""
    first, count = dist.get_rank() == 0, dist.get_world_size()
    parts: list[Any] | None = [None] * count if first else None
    dist.gather_object((seen, problems, notes, len(source)), parts, dst=0)
    if parts is None:
        return [], problems, notes
    shares, all_problems, all_notes, counts = zip(*parts, strict=True)
    if len(set(counts)) > 1:
        raise ValueError(f"the processes see {', '.join(map(str, counts))} images: give all of them the same files")
    place = {source.name_of(path): i for i, path in enumerate(source.paths)}
    merged = sorted((found for share in shares for found in share), key=lambda found: place[found[0]])
    return merged, [*chain(*all_problems)], [*chain(*all_notes)]


class _Files:
    """The results on disk: CSV as it comes, JSON in the end, and their summary.

    Args:
        folder: to write to.
        detector: whose classes are counted.
        source: of the images.
        writes: false leaves the files to another process.
        with_ids: whether the table has a column for the ids of a film.
    """

    def __init__(
        self, folder: Path, detector: Detector | Ensemble, source: Images | Video, writes: bool, with_ids: bool
    ) -> None:
        self.summary, self.writes, self._columns = Summary(folder), writes, (*COLUMNS, *["id"] * with_ids)
        self.source = source if isinstance(source, Listed) else None
        listing, names = (self.source.listing if self.source else None), detector.class_names
        self.category_ids = listing.category_ids(names) if listing else list(detector.category_ids)
        self.own = dict(zip(names, self.category_ids, strict=True))
        named = listing.categories.items() if listing else zip(self.category_ids, names, strict=True)
        self.document: dict[str, Any] = {"images": [], "annotations": []}
        self.document["categories"] = [{"id": number, "name": name} for number, name in named]

    def __enter__(self) -> None:
        if self.writes:
            self.file = (self.summary.folder / RESULTS[1]).open("w", newline="")
            self.table = csv.writer(self.file)
            self.table.writerow(self._columns)

    def add(self, name: str, found: Detections) -> None:
        """Write an image, and count what is in it."""
        _record(self.document, name, found, self.category_ids, self.source.ids[name] if self.source else None)
        self.table.writerows(_rows(name, found))
        self.summary.images += 1
        for kind in found.names:
            self.summary.counts[kind] = self.summary.counts.get(kind, 0) + 1
            if self.own[kind] is None:
                self.summary.left_out[kind] = self.summary.left_out.get(kind, 0) + 1

    def __exit__(self, *_: object) -> None:
        if self.writes:
            self.file.close()
            (self.summary.folder / RESULTS[0]).write_text(json.dumps(self.document, allow_nan=False))
            if self.source:
                _write_results(self.summary.folder, self.document["annotations"])


def _bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))


def _detect(
    detector: Detector | Ensemble,
    images: Iterable[tuple[str, Pixels]],
    batch_size: int,
    tiles: Tiles | None,
    notes: list[str],
) -> Iterator[tuple[str, Pixels, Detections]]:
    for in_tiles, group in groupby(images, lambda pair: tiles is not None or _is_huge(pair[1])):
        while batch := list(islice(group, 1 if in_tiles else batch_size)):
            if in_tiles:
                chosen = tiles or Tiles(detector.min_size)
                found = [detect_tiled(detector, pixels, chosen, batch_size) for _, pixels in batch]
            else:
                found = detector.predict([pixels for _, pixels in batch], batch_size)
            if in_tiles and tiles is None:
                size = " x ".join(map(str, found[0].size))
                how = f"looked at in tiles of {chosen.size} (--tile sets it), drawn with {DRAWN} pixels"
                notes.append(f"{batch[0][0]}: {size} pixels (height x width), {how}")
            yield from ((name, pixels, one) for (name, pixels), one in zip(batch, found, strict=True))


def _is_huge(pixels: Pixels) -> bool:
    return pixels.shape[0] * pixels.shape[1] > LARGEST


def detect_tiled(detector: Detector | Ensemble, pixels: Pixels, tiles: Tiles, batch_size: int = 8) -> Detections:
    """Detections of an image `(H, W, 3)` looked at in tiles, `batch_size` of them at a time."""
    check_batch_size(batch_size)
    height, width = pixels.shape[:2]
    windows = tiles.windows(height, width)
    parts: list[Detections] = []
    for i in range(0, len(windows), batch_size):  # each batch is copied
        batch = windows[i : i + batch_size]
        parts += detector.predict([pixels[y1:y2, x1:x2] for x1, y1, x2, y2 in batch], batch_size)
    return parts[0] if len(parts) == 1 else tiles.merge(parts, windows, (height, width))


def as_coco(name: str, found: Detections, category_ids: Sequence[Id | None]) -> dict[str, Any]:
    """One image as `predictions.json` of `predict` has it: a COCO data set whose annotations have scores.

    Args:
        name: of the image's file.
        found: in it.
        category_ids: one for each of the detector's classes.
    """
    named = zip(category_ids, found.class_names, strict=True)
    document: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": kind} for i, kind in named],
    }
    _record(document, name, found, category_ids)
    return document


def _record(
    document: dict[str, Any],
    name: str,
    found: Detections,
    category_ids: Sequence[Id | None],
    image_ids: Sequence[Id] | None = None,
) -> None:
    """Add an image under its ids, or counted through."""
    for number in image_ids or (len(document["images"]) + 1,):
        entry = {"id": number, "file_name": name, "width": found.size[1], "height": found.size[0]}
        document["images"].append(entry)
        for detection in found.to_coco(number, category_ids):
            detection |= {"id": len(document["annotations"]) + 1, "iscrowd": 0}
            detection["area"] = detection["bbox"][2] * detection["bbox"][3]
            document["annotations"].append(detection)


def _write_results(folder: Path, detections: list[dict[str, Any]]) -> None:
    """COCO results of boxes, masks and key points, each alone: beside a box, the area of a mask would be the box's."""
    for kind, key in (("bbox", "bbox"), ("segm", "segmentation"), ("keypoints", "keypoints")):
        if kind == "bbox" or any(key in entry for entry in detections):
            keys = ("image_id", "category_id", key, "score")
            rows = [{name: entry[name] for name in keys} for entry in detections]
            (folder / f"detections_{kind}.json").write_text(json.dumps(rows, allow_nan=False))


def _rows(name: str, found: Detections) -> Iterator[list[Any]]:
    ids = [[]] * len(found) if found.ids is None else [[own if own > 0 else ""] for own in found.ids.tolist()]
    for kind, score, box, own in zip(found.names, found.scores, found.boxes, ids, strict=True):
        yield [name, kind, f"{score:.4f}", *(f"{value:.2f}" for value in box), *own]


class _Pictures:
    """Annotated images, each under the name of its original, with .png behind where few viewers know its kind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, name: str, picture: Image.Image) -> None:
        path = self.folder / (name if name.lower().endswith(WRITTEN) else f"{name}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, quality=90)

    def close(self) -> list[str]:
        """Nothing is open, and there is nothing to say."""
        return []


def _writer(folder: Path, source: Images | Video) -> _Pictures | Film:
    if isinstance(source, Images):
        return _Pictures(folder / ANNOTATED)
    return Film(folder / f"{Path(source.name).stem}_annotated.mp4", source.fps)
