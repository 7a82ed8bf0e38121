"""Proposals that were computed before training: Selective Search's or somebody else's, kept on disk for each image.

They lie in one file an image, in pixels of the image file, and travel with the image through augmentation as its boxes
do. A file holds a digest of the image that it was made for, and its folder the settings: what doesn't fit is an error.

Shape shorthand:
    P: proposals of an image
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from torch.utils.data import DataLoader, Dataset

from detection.batch import Id
from detection.data.images import read_image
from detection.data.records import DataError, Index, Record
from detection.data.scenes import default_folder
from detection.recipes import recorded
from detection.selective_search import SelectiveSearch

Floats = NDArray[np.float32]
Split = Literal["train", "val", "test"]
MARK = "settings.json"


class ProposalCache:
    """A folder of proposals, all made with the same settings.

    Args:
        folder: under which those of each setting have a folder of their own.
        root: of the images.
        settings: what the proposals depend on besides the image, in plain values.

    Raises:
        DataError: the folder holds proposals of other settings, or can't be made.
    """

    def __init__(self, folder: Path, root: Path, settings: Mapping[str, Any]) -> None:
        mark = json.dumps(settings, sort_keys=True, indent=1)
        self.root = root
        self.folder = folder / hashlib.sha256(mark.encode()).hexdigest()[:16]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / MARK).is_file():
                _write_atomically(self.folder / MARK, mark.encode())
        except OSError as error:
            raise DataError(f"{self.folder}: no folder for proposals ({error}); name another `folder`") from error
        if (self.folder / MARK).read_text() != mark:
            raise DataError(
                f"{self.folder / MARK}: the proposals in this folder were made with other settings; delete the folder"
            )

    def path(self, record: Record) -> Path:
        """The file of an image, named by a digest: a name from a data set could lead anywhere."""
        return self.folder / f"{hashlib.sha256(record.file_name.encode()).hexdigest()}.npz"

    def missing(self, records: Sequence[Record]) -> list[Record]:
        """Those that have no proposals yet."""
        present = set(os.listdir(self.folder))
        return [record for record in records if self.path(record).name not in present]

    def write(self, record: Record, boxes: Floats) -> None:
        """Keep boxes `(P, 4)` xyxy in pixels of the image file, best first. A reader sees the whole file or none."""
        with tempfile.TemporaryFile() as file:
            np.savez(file, boxes=boxes.astype(np.float32), image=np.frombuffer(self._digest(record), np.uint8))
            file.seek(0)
            _write_atomically(self.path(record), file.read())

    def read(self, record: Record) -> Floats:
        """Boxes `(P, 4)` float32 xyxy in pixels of the image file, best first.

        Raises:
            DataError: there are none, they are damaged, or the image has changed since they were made.
        """
        path, where = self.path(record), f"the proposals for {self.root / record.file_name} ({self.path(record)})"
        try:
            with np.load(path, allow_pickle=False) as content:
                boxes, made_for = content["boxes"], content["image"].tobytes()
        except FileNotFoundError as error:
            raise DataError(f"{where} are missing; the data module's prepare_data or setup computes them") from error
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"{where} can't be read ({error}); delete the file to have it made again") from error
        limit = np.array([record.width, record.height] * 2, np.float32)
        usable = boxes.dtype == np.float32 and boxes.ndim == 2 and boxes.shape[1] == 4
        if not usable or not ((boxes >= 0).all() and (boxes <= limit).all()):
            raise DataError(f"{where} are no boxes inside the image; delete the file to have it made again")
        if made_for != self._digest(record):
            raise DataError(f"{where} were made for another image of that name; delete the file to have it made again")
        return np.asarray(boxes)

    def _digest(self, record: Record) -> bytes:
        path = self.root / record.file_name
        try:
            return hashlib.blake2b(path.read_bytes(), digest_size=16).digest()
        except OSError as error:
            raise DataError(f"{path}: the image can't be read ({error}); restore the file") from error


def _write_atomically(path: Path, content: bytes) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".part-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(name).chmod(0o644)  # mkstemp makes it private
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _open(folder: str | None, index: Index, settings: dict[str, Any]) -> ProposalCache:
    if folder is not None:
        return ProposalCache(Path(folder).expanduser(), index.root, settings)
    # The user's cache is shared by all data sets, in which images may have the same names.
    return ProposalCache(default_folder() / "proposals", index.root, settings | {"root": str(index.root.resolve())})


@recorded
class SearchedProposals:
    """Selective Search on every image of a data set, once: the first run computes, all others read.

    Args:
        search: with its settings; None takes its defaults.
        folder: of the files, for this data set alone; None for a folder in the user's cache.
    """

    def __init__(self, search: SelectiveSearch | None = None, folder: str | None = None) -> None:
        self.search = search or SelectiveSearch()
        self.folder = folder

    def open(self, index: Index, split: Split) -> ProposalCache:
        """The files of a split, which `prepare` has completed."""
        return _open(self.folder, index, self.search.settings)

    def prepare(self, index: Index, split: Split, **loading: Any) -> None:
        """Compute what is missing, with a progress bar.

        Args:
            index: the images.
            split: its name, for the log.
            **loading: of the DataLoader whose workers compute: `num_workers`, `worker_init_fn`.

        Raises:
            DataError: an image can't be read, or scikit-image is not installed.
        """
        cache = self.open(index, split)
        missing = cache.missing(index.records)
        if missing:
            rank_zero_info(f"{split}: Selective Search on {len(missing)} images, to be kept in {cache.folder}")
            loader = DataLoader(_Search(self.search, cache, missing), batch_size=None, **loading)
            for problem in _shown(loader, len(missing), f"proposals of {split}"):
                if problem:
                    raise DataError(problem)


class _Search(Dataset[str]):
    """Computes and writes the proposals of an image when it is asked for, and gives back what went wrong, or nothing.

    An error that leaves a worker would arrive as a page of traceback.
    """

    def __init__(self, search: SelectiveSearch, cache: ProposalCache, records: Sequence[Record]) -> None:
        self.search, self.cache, self.records = search, cache, records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> str:
        record = self.records[i]
        try:
            image = read_image(self.cache.root / record.file_name, (record.height, record.width))
            self.cache.write(record, self.search(image))
        except (DataError, ImportError, OSError) as error:
            return str(error)
        return ""


def _shown(items: Iterable[Any], total: int, label: str) -> Iterator[Any]:
    """A bar on a terminal, else a line for each tenth."""
    if Console().is_terminal:
        yield from track(items, label, total)
        return
    for done, item in enumerate(items, start=1):
        yield item
        if done * 10 // total > (done - 1) * 10 // total:
            rank_zero_info(f"{label}: {done} of {total} images")


@recorded
class ProposalFiles:
    """Proposals from files in COCO's format for results: `[{"image_id", "bbox": [x, y, w, h], "score"}, ...]`.

    Each file is taken apart once, into a file for each image. An image that it does not name has no proposals.

    Args:
        train, val, test: file of each split; `test` None is that of the validation split.
        max_proposals: how many of the best of an image are kept.
        folder: of the files that are made, for this data set alone; None for a folder in the user's cache.
    """

    def __init__(
        self, train: str, val: str, test: str | None = None, max_proposals: int = 2000, folder: str | None = None
    ) -> None:
        self.files: dict[Split, Path] = {"train": Path(train), "val": Path(val), "test": Path(test or val)}
        self.max_proposals, self.folder = max_proposals, folder

    def open(self, index: Index, split: Split) -> ProposalCache:
        """The files of a split, which `prepare` has completed."""
        path = self.files[split]
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"{path}: the proposals of {split} can't be read ({error}); correct the path") from error
        settings = {"method": "file", "sha256": digest, "max_proposals": self.max_proposals}
        return _open(self.folder, index, settings)

    def prepare(self, index: Index, split: Split, **loading: Any) -> None:
        """Take the file of the split apart, unless that was done.

        Raises:
            DataError: the file is not in the format, or names none of the images.
        """
        cache = self.open(index, split)
        missing = cache.missing(index.records)
        if not missing:
            return
        boxes, ends = read_results(self.files[split], [record.image_id for record in missing])
        if not len(boxes):
            raise DataError(f"{self.files[split]}: no proposal for any image of {split}; is it another split's file?")
        rank_zero_info(f"{split}: {len(boxes)} proposals for {len(missing)} images, to be kept in {cache.folder}")
        for record, start, end in zip(missing, ends[:-1], ends[1:], strict=True):
            own = boxes[start:end].clip(0, np.array([record.width, record.height] * 2, np.float32))
            own = own[(own[:, 2:] > own[:, :2]).all(axis=1)]
            cache.write(record, own[: self.max_proposals])


def read_results(path: Path, image_ids: Sequence[Id]) -> tuple[Floats, list[int]]:
    """The boxes of a results file by image, best first.

    Args:
        path: a list of `{"image_id", "bbox": [x, y, w, h], "score"}`; without scores the order counts.
        image_ids: which images are wanted.

    Returns:
        boxes `(sum of P, 4)` float32 xyxy, and where those of each image begin, with the end of the last.

    Raises:
        DataError: naming the file and the first entry that is wrong.
    """
    try:
        entries = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a readable JSON file ({error}); export the proposals again") from error
    if not isinstance(entries, list):
        raise DataError(f"{path}: a list of proposals is expected, not {type(entries).__name__}")
    place = {image_id: i for i, image_id in enumerate(image_ids)}
    rows = []
    for number, entry in enumerate(entries):
        try:
            image = place.get(entry["image_id"])
            x, y, w, h = map(float, entry["bbox"])
            score = float(entry.get("score", 0))
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise DataError(
                f'{path}: entry {number} is not {{"image_id", "bbox": [x, y, w, h], "score"}}: {entry!r:.120}'
            ) from error
        if not np.isfinite((x, y, w, h, score)).all():
            raise DataError(f"{path}: entry {number} is not finite: {entry!r:.120}; leave it out")
        if image is not None:
            rows.append((image, -score, x, y, x + w, y + h))
    table = np.array(rows, np.float64).reshape(-1, 6)
    table = table[np.lexsort((table[:, 1], table[:, 0]))]
    ends = np.searchsorted(table[:, 0], np.arange(len(image_ids) + 1))
    return table[:, 2:].astype(np.float32), ends.tolist()


ProposalSource: TypeAlias = SearchedProposals | ProposalFiles
