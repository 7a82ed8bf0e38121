"""From records to batches: targets, the data set over the records, and the collate function.

Shape shorthand:
    N: objects of one image     B: images of a batch
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from faster_coco_eval.core import mask as rle
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from detection.batch import Batch, Target, pad_keypoints, pad_masks, pad_objects
from detection.data import shared
from detection.data.augment import Augmented
from detection.data.federated import labelled
from detection.data.images import RecentImages, read_image
from detection.data.mixing import IGNORED, Picture, copy_paste, mosaic
from detection.data.proposals import ProposalCache
from detection.data.records import DataError, Index, Record
from detection.data.spectral import RGB, PixelFormat, Pixels
from detection.data.store import RecordStore
from detection.resizing import Resizing, resize_into

if TYPE_CHECKING:
    from detection.data.tiled import TileView

ImageTransform = Callable[..., Augmented]


def to_rle(segment: Any, box: NDArray[np.float32], height: int, width: int) -> dict[str, Any]:
    """A segment of a `Record` as a compressed COCO RLE; without a segment, the box filled."""
    if segment is None:
        x1, y1, x2, y2 = map(float, box)
        segment = [[x1, y1, x2, y1, x2, y2, x1, y2]]
    if isinstance(segment, list):
        merged: dict[str, Any] = rle.merge(rle.frPyObjects(segment, height, width))
    elif isinstance(segment["counts"], list):
        merged = rle.frPyObjects(segment, height, width)
    else:
        merged = segment
    counts = merged["counts"]
    return {"size": list(merged["size"]), "counts": counts.encode() if isinstance(counts, str) else counts}


def make_target(record: Record) -> Target:
    """The evaluation target of a record: everything in it, in original pixels, copied out of the buffers."""
    masks = None
    if record.segments is not None:
        pairs = zip(record.segments, record.boxes, strict=True)
        masks = [to_rle(segment, box, record.height, record.width) for segment, box in pairs]
    return Target(
        image_id=record.image_id,
        file_name=record.file_name,
        size=(record.height, record.width),
        boxes=torch.tensor(record.boxes),
        labels=torch.tensor(record.labels),
        areas=torch.tensor(record.areas),
        iscrowd=torch.tensor(record.iscrowd),
        difficult=torch.tensor(record.difficult),
        masks=masks,
        checked=None if record.checked is None else torch.tensor(record.checked),
        partial=None if record.partial is None else torch.tensor(record.partial),
        keypoints=None if record.keypoints is None else torch.tensor(record.keypoints),
    )


class Sample(NamedTuple):
    """One image of a batch to be.

    Attributes:
        pixels: `(h, w, C)` uint8 or uint16, which `collate` resizes straight into the batch.
        size: `(height, width)` it will have there.
        boxes: `(N, 4)` float32 xyxy in the pixels of the resized image; only objects to train on.
        labels: `(N,)` int64.
        target: the original ground truth, for evaluation.
        masks, windows: `(N, m, m)` uint8 and `(N, 4)` float32 as `Augmented` has them, when read with masks.
        proposals: `(P, 4)` float32 xyxy in the pixels of the resized image, best first, when the data set has them.
        ignored: `(I, 4)` float32 xyxy likewise, the regions in which background is not taught.
        labelled: `(C,)` bool, see `Batch`, or None for all classes.
        dropped: how many objects the augmentation left nothing of.
        unreadable: the errors of images in whose place others were drawn.
        resizing: how `pixels` are resized, see `detection.resizing`.
        keypoints: `(N, k, 3)` float32 in the pixels of the resized image and visibility, when read with key points.
        tiles: the image as tiles, where it is to be evaluated in them.
        corners: `(x, y)` of each in the image.
    """

    pixels: Pixels
    size: tuple[int, int]
    boxes: Tensor
    labels: Tensor
    target: Target
    masks: Tensor | None = None
    windows: Tensor | None = None
    proposals: Tensor | None = None
    ignored: Tensor | None = None
    labelled: Tensor | None = None
    dropped: int = 0
    unreadable: tuple[str, ...] = ()
    resizing: Resizing = "torchvision"
    keypoints: Tensor | None = None
    tiles: tuple[Sample, ...] = ()
    corners: tuple[tuple[int, int], ...] = ()

    @property
    def image(self) -> Tensor:
        """The resized image `(C, *size)`, of the type of `pixels`."""
        planes = np.empty((self.pixels.shape[2], *self.size), self.pixels.dtype)
        resize_into(self.pixels, planes, self.resizing)
        return torch.from_numpy(planes)


class DetectionDataset(Dataset[Sample]):
    """The images of an index, decoded and transformed.

    Args:
        index: what a reader returned. Its records are copied into a `RecordStore`.
        transform: `train_transform(...)` or `eval_transform(...)`.
        with_difficult: also train on objects marked difficult. Crowds are never trained on, nor is the background in
            them.
        mosaic: probability of a mosaic of the image and three random others.
        proposals: where the proposals of the images lie. They go with neither mosaics nor masks nor key points.
        copy_paste: probability of pasting objects of a random other image onto the image, see `augment.copy_paste`.
        max_unreadable: how many images that can't be read are replaced by others in one sample before it is an error.
            The seed draws the others. 0, the default, is for evaluation, whose figures would silently change.
        form: channels and depth of the images.
        tiles: in which whole images are to be looked at: samples then have them, for evaluation. To train on tiles,
            give `TileView.index(...)` as the index.

    A key is an index, or `(index, seed)` as the batch samplers of this package give it: then every random choice
    follows from the seed, in whatever worker it is made. A plain index draws its seed from torch's generator, which a
    DataLoader seeds differently for every worker and epoch.
    """

    def __init__(
        self,
        index: Index,
        transform: ImageTransform,
        with_difficult: bool = False,
        mosaic: float = 0.0,
        proposals: ProposalCache | None = None,
        copy_paste: float = 0.0,
        max_unreadable: int = 0,
        form: PixelFormat = RGB,
        tiles: TileView | None = None,
    ) -> None:
        if copy_paste and all(segment is None for record in index.records for segment in record.segments or ()):
            raise DataError(f"{index.root}: copy_paste needs masks, but no object has one; read them or leave it out")
        if proposals is not None and (
            mosaic or index.skeleton or any(record.segments is not None for record in index.records)
        ):
            raise DataError("proposals go with neither mosaics nor masks nor key points: leave those out")
        self.root = index.root
        self.classes = index.classes
        self.category_ids = index.category_ids
        self.frequencies = index.frequencies
        self.skeleton = index.skeleton
        self.transform = transform
        self.with_difficult = with_difficult
        self.mosaic = mosaic
        self.proposals = proposals
        self.copy_paste = copy_paste
        self.max_unreadable = max_unreadable
        self.form = form
        self.tiles = tiles
        self.store = RecordStore(index.records)
        self._recent = RecentImages()

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        """Decode and transform one image.

        Raises:
            DataError: an image can't be read and `max_unreadable` others could not either, or the transform does not
                take it; names the file.
        """
        i, seed = key if isinstance(key, tuple) else (key, int(torch.randint(2**62, ())))
        rng, unreadable = random.Random(seed), list[str]()
        record, picture = self._load(i, rng, unreadable)
        if self.mosaic and rng.random() < self.mosaic:
            others = [self._load(rng.randrange(len(self)), rng, unreadable)[1] for _ in range(3)]
            picture = mosaic([picture, *others], rng)
        if self.copy_paste and rng.random() < self.copy_paste:
            picture = copy_paste(picture, self._load(rng.randrange(len(self)), rng, unreadable)[1], rng)
        sample = self._sample(record, picture, seed, unreadable)
        if self.tiles is None:
            return sample
        parts = self.tiles.record(record)
        corners = [(0, 0) if part.window is None else part.window[:2] for part in parts]
        cut = [picture.image[y : y + p.height, x : x + p.width] for p, (x, y) in zip(parts, corners, strict=True)]
        shown = [self._sample(p, self._picture(p, c), seed) for p, c in zip(parts, cut, strict=True)]
        return sample._replace(tiles=tuple(shown), corners=tuple(corners))

    def _sample(self, record: Record, picture: Picture, seed: int, unreadable: Sequence[str] = ()) -> Sample:
        """A picture transformed."""
        boxes = picture.boxes
        if self.proposals is not None:  # behind the objects, so that they move with the image as those do
            boxes = np.concatenate((boxes, self.proposals.read(record)))
        try:
            out = self.transform(picture.image, boxes, picture.masks, seed=seed, keypoints=picture.keypoints)
        except DataError as error:
            raise DataError(f"{self.root / record.file_name}: {error}") from error
        # Behind the picture's own come proposals, which have the label -1 here.
        labels = np.append(picture.labels, np.full(len(boxes) - len(picture.labels), -1))[out.kept]
        own = labels > 0
        return Sample(
            pixels=out.image,
            size=out.size,
            boxes=torch.from_numpy(out.boxes[own]),
            labels=torch.from_numpy(labels[own]),
            target=make_target(record),
            masks=None if out.masks is None else torch.from_numpy(out.masks[own]),
            windows=None if out.windows is None else torch.from_numpy(out.windows[own]),
            proposals=None if self.proposals is None else torch.from_numpy(out.boxes[labels < 0]),
            ignored=torch.from_numpy(out.boxes[labels == IGNORED]),
            labelled=None if picture.labelled is None else torch.from_numpy(picture.labelled),
            dropped=int((picture.labels > 0).sum() - own.sum()),
            unreadable=tuple(unreadable),
            resizing=out.resizing,
            keypoints=None if out.keypoints is None else torch.from_numpy(out.keypoints[own]),
        )

    def _load(self, i: int, rng: random.Random, unreadable: list[str]) -> tuple[Record, Picture]:
        """Image i, or another that `rng` draws where it can't be read, with its objects to train on."""
        while True:
            record = self.store[i]
            try:
                image = self._read(record)
                break
            except DataError as error:
                if len(unreadable) >= self.max_unreadable:
                    raise
                unreadable.append(str(error))
                i = rng.randrange(len(self))
        return record, self._picture(record, image, with_masks=self.tiles is None)  # large images have large masks

    def _read(self, record: Record) -> Pixels:
        """The image of a record; of a tile a copy of its window."""
        path = self.root / record.file_name
        if record.window is None:
            return read_image(path, (record.height, record.width), form=self.form)
        x, y, *size = record.window
        whole = self._recent(path, (size[0], size[1]), self.form)
        return whole[y : y + record.height, x : x + record.width].copy()

    def _picture(self, record: Record, image: Pixels, with_masks: bool = True) -> Picture:
        """An image with its objects to train on."""
        kept = np.ones_like(record.difficult) if self.with_difficult else record.iscrowd | ~record.difficult
        masks = None if record.segments is None or not with_masks else _decode(record, kept)
        labels = np.where(record.iscrowd, IGNORED, record.labels)[kept]
        known = None if record.checked is None and record.partial is None else labelled(record)
        points = None if record.keypoints is None else record.keypoints[kept]
        return Picture(image, record.boxes[kept], labels, masks, known, points)


def _decode(record: Record, chosen: NDArray[np.bool_]) -> NDArray[np.uint8]:
    masks = np.zeros((int(chosen.sum()), record.height, record.width), np.uint8)
    for slot, j in zip(masks, np.flatnonzero(chosen), strict=True):
        slot[:] = rle.decode(to_rle((record.segments or [])[j], record.boxes[j], record.height, record.width))
    return masks


def collate(samples: Sequence[Sample], divisor: int = 32) -> Batch:
    """Samples to a `Batch`, images padded to a multiple of `divisor`; in a worker straight into shared memory.

    A sample that has tiles is a batch of its own, of these tiles.
    """
    if samples[0].tiles:
        (whole,) = samples
        corners = torch.tensor(whole.corners, dtype=torch.int64)
        return replace(collate(whole.tiles, divisor), targets=(whole.target,), tile_corners=corners)
    sizes = [sample.size for sample in samples]
    height, width = (-(-max(side) // divisor) * divisor for side in zip(*sizes, strict=True))
    pixels = samples[0].pixels
    dtype = torch.uint16 if pixels.dtype == np.uint16 else torch.uint8
    images = shared.empty((len(samples), pixels.shape[2], height, width), dtype)
    for slot, sample, (h, w) in zip(images.numpy(), samples, sizes, strict=True):
        resize_into(sample.pixels, slot[:, :h, :w], sample.resizing)
        slot[:, h:], slot[:, :h, w:] = 0, 0
    gt_boxes, gt_labels, gt_valid = pad_objects([s.boxes for s in samples], [s.labels for s in samples])
    masks = [s.masks for s in samples if s.masks is not None]
    windows = [s.windows for s in samples if s.windows is not None]
    gt_masks, gt_windows = pad_masks(masks, windows, gt_valid.shape[1]) if masks else (None, None)
    points = [s.keypoints for s in samples if s.keypoints is not None]
    gt_keypoints = pad_keypoints(points, gt_valid.shape[1]) if points else None
    proposals, proposals_valid = None, None
    found = [s.proposals for s in samples if s.proposals is not None]
    if found:
        proposals, _, proposals_valid = pad_objects(found, [torch.zeros(len(p), dtype=torch.int64) for p in found])
    ignored = [s.boxes.new_zeros((0, 4)) if s.ignored is None else s.ignored for s in samples]
    regions = pad_objects(ignored, [torch.zeros(len(r), dtype=torch.int64) for r in ignored])[0]
    known = [s.labelled for s in samples if s.labelled is not None]
    every = [torch.ones_like(known[0]) if s.labelled is None else s.labelled for s in samples] if known else []
    return Batch(
        images=images,
        image_sizes=torch.tensor(sizes, dtype=torch.int64),
        gt_boxes=gt_boxes,
        gt_labels=gt_labels,
        gt_valid=gt_valid,
        original_sizes=torch.tensor([sample.target.size for sample in samples], dtype=torch.int64),
        targets=tuple(sample.target for sample in samples),
        gt_masks=gt_masks,
        gt_mask_windows=gt_windows,
        gt_keypoints=gt_keypoints,
        proposals=proposals,
        proposals_valid=proposals_valid,
        gt_ignored=regions if any(map(len, ignored)) else None,
        labelled=torch.stack(every) if every else None,
        objects_given=sum(len(sample.boxes) + sample.dropped for sample in samples),
        objects_dropped=sum(sample.dropped for sample in samples),
        unreadable=tuple(message for sample in samples for message in sample.unreadable),
    )
