"""Large images as tiles: no object is lost, pixels and boxes agree, and what is taught is what prediction keeps."""

from __future__ import annotations

import itertools
import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_api

from detection.batch import Batch
from detection.data import images, samplers
from detection.data.augment import eval_transform
from detection.data.coco import read_coco
from detection.data.datamodule import DetectionDataModule
from detection.data.dataset import DetectionDataset, collate, to_rle
from detection.data.records import DataError, Index, Record
from detection.data.samplers import TrainBatchSampler
from detection.data.store import RecordStore
from detection.data.tiled import TileView, areas, clip, describe_tiles
from detection.data.voc import read_voc
from detection.tiling import merge_tiles
from detection.training.tile_batches import run_in_parts
from tests.inference.blobs import NAMES, Blobs, scene

HEIGHT, WIDTH = 230, 370


def apart(rng: np.random.Generator, count: int, largest: int) -> list[tuple[int, int, int, int, int]]:
    """Rectangles as `scene` takes them, with three dark pixels between any two."""
    taken, found = np.zeros((HEIGHT, WIDTH), bool), []
    for _ in range(count):
        w, h = rng.integers(4, largest, 2)
        x, y = rng.integers(0, WIDTH - min(w, WIDTH - 1)), rng.integers(0, HEIGHT - min(h, HEIGHT - 1))
        x2, y2 = min(x + w, WIDTH), min(y + h, HEIGHT)
        if not taken[max(0, y - 3) : y2 + 3, max(0, x - 3) : x2 + 3].any():
            taken[y:y2, x:x2] = True
            found.append((int(rng.choice([0, 2])), int(x), int(y), int(x2), int(y2)))
    return found


def record(rectangles: list[tuple[int, int, int, int, int]], name: str = "a.png", number: int = 1) -> Record:
    boxes, labels = [r[1:] for r in rectangles], [1 if r[0] == 0 else 2 for r in rectangles]
    return Record.of(number, name, (HEIGHT, WIDTH), np.array(boxes).reshape(-1, 4), labels)


def index_of(folder: Path, *sets: list[tuple[int, int, int, int, int]]) -> Index:
    """Drawn images on disk."""
    for i, rectangles in enumerate(sets):
        Image.fromarray(scene(HEIGHT, WIDTH, *rectangles)).save(folder / f"{i}.png")
    return Index(folder, NAMES, (1, 2), [record(r, f"{i}.png", i + 1) for i, r in enumerate(sets)])


@pytest.mark.parametrize("seed", range(8))
def test_what_is_taught_is_what_prediction_keeps(seed):
    """A detector that finds all that it was taught finds each object of the image once and whole.

    If it finds what it was not taught as well, which is neither object nor background, nothing changes.
    """
    rng = np.random.default_rng(seed)
    own = record(apart(rng, 60, (30, 90, 200, 400)[seed % 4]))
    view = TileView(100, 0.25, min_visibility=0.0)
    tiles, windows = view.record(own), view.windows(HEIGHT, WIDTH)
    shown, every = ([_found(tile, k) for tile in tiles] for k in (True, False))
    for parts in (shown, every):
        merged = merge_tiles(parts, windows, (HEIGHT, WIDTH))
        rows = sorted(
            [*box, label] for box, label in zip(merged["boxes"].tolist(), merged["labels"].tolist(), strict=True)
        )
        assert rows == sorted([*box, label] for box, label in zip(own.boxes.tolist(), own.labels.tolist(), strict=True))
    if seed % 4 == 0:  # all fit the overlap: what is taught is whole
        kept = [box for tile in tiles for box in (tile.boxes + _corner(tile))[~tile.iscrowd].tolist()]
        assert set(map(tuple, kept)) == set(map(tuple, own.boxes.tolist()))
        assert sum(int(tile.iscrowd.sum()) for tile in tiles) > 0


def _corner(tile: Record) -> Any:
    assert tile.window is not None
    return np.array(tile.window[:2] * 2, np.float32)


def _found(tile: Record, taught_alone: bool) -> dict[str, Any]:
    kept = ~tile.iscrowd if taught_alone else np.ones_like(tile.iscrowd)
    return {
        "boxes": tile.boxes[kept],
        "labels": tile.labels[kept],
        "scores": np.ones(kept.sum(), np.float32),
        "masks": None,
    }


def test_every_object_is_taught_and_small_parts_are_not():
    own = record([(0, 10, 10, 360, 60), (0, 130, 140, 225, 160), (2, 95, 105, 103, 115)])
    view = TileView(100, 0.2, min_visibility=0.5)
    windows = np.array(view.windows(HEIGHT, WIDTH), np.float32)
    parts = clip(own.boxes, windows)
    taught = view.taught(own.boxes, parts, windows, (HEIGHT, WIDTH))
    assert taught.any(axis=0).all()
    share = areas(parts) / areas(parts).max(axis=0)
    assert (share[taught] >= 0.5).all() and ((share > 0) & ~taught).any()
    # the last is whole in one tile, and nearly so in its neighbour, where it is ignored all the same
    assert taught[:, 2].sum() == 1 and 0.5 < np.sort(share[:, 2])[-2] < 1


def test_tiles_show_the_pixels_of_their_objects(tmp_path):
    rng = np.random.default_rng(0)
    sets = [apart(rng, 40, 120), apart(rng, 40, 40), []]
    view = TileView(100, 0.2)
    tiles = view.index(index_of(tmp_path, *sets))
    data = DetectionDataset(tiles, eval_transform(100, 100))
    seen: dict[int, set[tuple[float, ...]]] = {0: set(), 1: set()}
    for i in range(len(data)):
        sample, tile = data[i, 0], tiles.records[i]
        whole = scene(HEIGHT, WIDTH, *sets[int(tile.file_name[0])])
        x, y = tile.window[:2]
        assert np.array_equal(sample.pixels, whole[y : y + 100, x : x + 100])
        expected = Blobs()._find(sample.pixels)  # which knows no annotation
        boxes = torch.cat([sample.boxes, sample.ignored])
        assert sorted(boxes.tolist()) == sorted(expected.boxes.tolist())
        for box in sample.boxes.tolist():
            seen[int(tile.file_name[0])].add((box[0] + x, box[1] + y, box[2] + x, box[3] + y))
    for number, rectangles in enumerate(sets[:2]):
        small = {tuple(map(float, r[1:])) for r in rectangles if max(r[3] - r[1], r[4] - r[2]) <= 16}
        assert small and small <= seen[number]  # whole, as they fit the overlap
    assert len({r.image_id for r in tiles.records}) == len(tiles.records) == 3 * len(view.windows(HEIGHT, WIDTH))


def test_masks_are_cut_to_the_pixel():
    polygon = [20.0, 20.0, 180.3, 40.7, 150.0, 90.0, 60.0, 170.2]
    ring = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    ring[100:200, 200:330], ring[120:180, 220:310] = 1, 0
    own = record([(0, 18, 20, 182, 172), (2, 200, 100, 330, 200), (0, 300, 5, 320, 15)])
    own.segments = [[polygon], {"size": [HEIGHT, WIDTH], "counts": mask_api.encode(ring)["counts"].decode()}, None]
    whole = [mask_api.decode(to_rle(s, b, HEIGHT, WIDTH)) for s, b in zip(own.segments, own.boxes, strict=True)]
    view = TileView(60, 0.2, min_visibility=0.0)
    visible = Counter[int]()
    for tile, (x1, y1, x2, y2) in zip(view.record(own), view.windows(HEIGHT, WIDTH), strict=True):
        for number, segment, box in zip(tile.annotation_ids.tolist(), tile.segments, tile.boxes, strict=True):
            part = whole[number][y1:y2, x1:x2]
            visible[number] += 1
            assert np.array_equal(mask_api.decode(to_rle(segment, box, tile.height, tile.width)), part)
            rows, columns = part.any(axis=1).nonzero()[0], part.any(axis=0).nonzero()[0]
            around = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
            slack = np.abs(box - around).max()
            assert slack <= (2 if number == 0 else 0)  # as far from the mask as the whole box is from the whole mask
        inside = {n for n in range(3) if whole[n][y1:y2, x1:x2].any()}
        assert inside == set(tile.annotation_ids.tolist())  # a hole shows nothing of its ring
    assert visible[2] >= 1 and visible[1] > 4


def test_images_that_fit_stay_themselves_and_key_points_are_refused():
    own = record([(0, 10, 10, 60, 60)])
    assert TileView(400).record(own) == [own]

    own.keypoints = np.zeros((1, 17, 3), np.float32)
    with pytest.raises(DataError, match=r"a\.png: key points can't be cut into tiles"):
        TileView(100).record(own)


def tile_store(tmp_path: Path, count: int = 6) -> RecordStore:
    sets = [apart(np.random.default_rng(i), 5, 30) for i in range(count)]
    return RecordStore(TileView(100, 0.2).index(index_of(tmp_path, *sets)).records)


def test_whole_images_are_evaluated_with_the_masks_of_their_tiles(tmp_path):
    index = index_of(tmp_path, [(0, 30, 30, 300, 60), (2, 200, 100, 230, 130)])
    index.records[0].segments = [[[30.0, 30, 300, 30, 300, 60, 30, 60]], [[200.0, 100, 230, 100, 230, 130]]]
    view = TileView(100)
    data = DetectionDataset(index, eval_transform(100, 100), tiles=view)
    batch = collate([data[0]])
    whole = data[0].target
    assert (
        data[0].masks is None
        and len(batch) == len(view.windows(HEIGHT, WIDTH))
        and batch.targets[0].masks == whole.masks
    )
    assert len(batch.gt_masks) == len(batch) and (batch.gt_masks.sum((2, 3)) > 0)[batch.gt_valid].all()
    seen = np.zeros((HEIGHT, WIDTH), bool)
    for sample, (x, y) in zip(data[0].tiles, data[0].corners, strict=True):
        for mask, (x1, y1, x2, y2) in zip(sample.masks, sample.windows.round().int().tolist(), strict=True):
            shown = cv2.resize(mask.numpy(), (x2 - x1, y2 - y1), interpolation=cv2.INTER_AREA) >= 128
            seen[y + y1 : y + y2, x + x1 : x + x2] |= shown
    laid = np.any([mask_api.decode(mask) for mask in whole.masks], axis=0)
    assert (seen == laid).mean() > 0.998  # but for the rounding of the triangle's edge


def ranks_of(
    sampler: TrainBatchSampler, world: int, monkeypatch: pytest.MonkeyPatch
) -> list[list[list[tuple[int, int]]]]:
    ranks = []
    for rank in range(world):
        monkeypatch.setattr(samplers, "rank_and_world", lambda rank=rank: (rank, world))
        ranks.append(list(sampler))
    return ranks


def test_epochs_show_each_tile_once_file_by_file(tmp_path, monkeypatch):
    store = tile_store(tmp_path)
    monkeypatch.setattr(samplers, "KEPT_PIXELS", 4 * HEIGHT * WIDTH)  # then two files come together
    sampler = TrainBatchSampler(store, 3)
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        (own,) = ranks_of(sampler, 1, monkeypatch)
        two = ranks_of(sampler, 2, monkeypatch)
        drawn = [i for batch in own for i, _ in batch]
        assert Counter(drawn) - Counter(drawn[len(store) :]) == Counter(range(len(store)))  # and the padding
        together = [batch for pair in zip(*two, strict=True) for batch in pair]
        assert together[: len(own)] == own  # seeds too
        monkeypatch.setattr(samplers, "rank_and_world", lambda: (0, 1))
        sampler.load_state_dict({"epoch": epoch, "start_batch": 4})
        assert list(sampler) == own[4:]
        files = store.files[drawn[: len(store)]].tolist()
        runs = [len({*files[i : i + 2 * len(store) // 6]}) for i in range(0, len(store), 2 * len(store) // 6)]
        assert max(runs) <= 2  # of two files the tiles are mixed ...
        assert len(list(itertools.groupby(files))) > 12  # ... and not one after the other
        orders.append(drawn)
    assert orders[0] != orders[1] != orders[2]


def test_files_are_decoded_once_for_all_their_tiles(tmp_path, monkeypatch):
    sets = [apart(np.random.default_rng(i), 5, 30) for i in range(6)]
    data = DetectionDataset(TileView(100, 0.2).index(index_of(tmp_path, *sets)), eval_transform(100, 100))
    decoded = list[str]()
    read = images.read_image
    monkeypatch.setattr(images, "read_image", lambda path, *a, **k: (decoded.append(path.name), read(path, *a, **k))[1])
    for module in (images, samplers):
        monkeypatch.setattr(module, "KEPT_PIXELS", 4 * HEIGHT * WIDTH)
    for batch in TrainBatchSampler(data.store, 5):  # without padding
        for key in batch:
            data[key]
    assert sorted(decoded) == [f"{i}.png" for i in range(6)]
    first, kept = data[0, 0].pixels, data._recent._kept[tmp_path / "0.png"].copy()
    first[:] = 0  # a sample is a copy
    assert np.array_equal(data._recent._kept[tmp_path / "0.png"], kept)


def test_empty_tiles_come_by_share_and_change_with_the_epoch(tmp_path, monkeypatch):
    store = tile_store(tmp_path)
    filled = samplers.has_objects(store)
    assert 0 < filled.sum() < len(store)
    monkeypatch.setattr(samplers, "rank_and_world", lambda: (0, 1))
    for share in (0.0, 0.5, 1.0):
        sampler, seen = TrainBatchSampler(store, 1, empty_share=share), list[set[int]]()
        for epoch in range(12):
            sampler.set_epoch(epoch)
            drawn = [i for batch in sampler for i, _ in batch]
            assert len(drawn) == len(set(drawn)) and set(filled.nonzero().flatten().tolist()) <= set(drawn)
            empty = {i for i in drawn if not filled[i]}
            assert abs(len(empty) - share * int((~filled).sum())) <= 1
            seen.append(empty)
        assert len(set.union(*seen)) == (0 if not share else int((~filled).sum()))


def coco(folder: Path, *sets: list[tuple[int, int, int, int, int]]) -> Path:
    """The same data in COCO's format, for training and validation alike."""
    index = index_of(folder, *sets)
    document: dict[str, Any] = {"images": [], "annotations": []}
    document["categories"] = [{"id": i, "name": name} for i, name in enumerate(NAMES, 1)]
    for own in index.records:
        document["images"].append({"id": own.image_id, "file_name": own.file_name, "width": WIDTH, "height": HEIGHT})
        for (x1, y1, x2, y2), label in zip(own.boxes.tolist(), own.labels.tolist(), strict=True):
            entry = {
                "id": len(document["annotations"]) + 1,
                "image_id": own.image_id,
                "category_id": label,
                "iscrowd": 0,
            }
            document["annotations"].append(entry | {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)})
    (folder / "a.json").write_text(json.dumps(document))
    return folder


def module_of(folder: Path, **settings: Any) -> DetectionDataModule:
    given = {"format": "coco", "train_split": "a.json", "val_split": "a.json", "num_workers": 0, "batch_size": 4}
    given |= {"min_size": 100, "max_size": 100, "hflip": 0.0, "tile": 100}
    data = DetectionDataModule(str(folder), **given | settings)
    data.prepare_data()
    data.setup("fit")
    return data


@pytest.mark.parametrize("workers", [0, 1])
def test_the_data_module_trains_on_tiles_and_validates_whole_images(tmp_path, caplog, workers):
    sets = [apart(np.random.default_rng(i), 12, 150) for i in range(2)]
    caplog.set_level(logging.INFO)
    data = module_of(coco(tmp_path, *sets), empty_tiles=0.5, num_workers=workers)
    count = len(TileView(100).windows(HEIGHT, WIDTH))
    assert f"train: 2 images are {2 * count} tiles of 100 pixels, overlap 0.2: " in caplog.text
    assert "an epoch shows 50%" in caplog.text and "resized" not in caplog.text
    batch = next(iter(data.train_dataloader()))
    assert batch.images.shape[2:] == (128, 128) and batch.tile_corners is None
    assert all("@" in str(target.image_id) for target in batch.targets)
    for number, batch in enumerate(data.val_dataloader()):
        (target,) = batch.targets
        assert (
            target.image_id == number + 1 and target.size == (HEIGHT, WIDTH) and len(target.boxes) == len(sets[number])
        )
        assert len(batch) == count == len(batch.tile_corners)
        losses, (found,) = run_in_parts(_blobs, batch, with_losses=True)
        order = np.lexsort(found["boxes"].numpy().T)
        assert (
            found["boxes"].numpy()[order].tolist() == target.boxes.numpy()[np.lexsort(target.boxes.numpy().T)].tolist()
        )
        assert losses["tiles"].item() == pytest.approx(sum(range(count)) / count)


def _blobs(batch: Batch, with_losses: bool) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Stands for a detector that sees the tiles of a batch, at most eight."""
    assert len(batch) <= 8 and batch.gt_boxes.shape[0] == len(batch)
    sizes = batch.image_sizes.tolist()
    pixels = [image[:, :h, :w].permute(1, 2, 0).numpy() for image, (h, w) in zip(batch.images, sizes, strict=True)]
    found = [Blobs()._find(np.ascontiguousarray(image)) for image in pixels]
    names = ("boxes", "labels", "scores")
    detections: list[dict[str, Any]] = [{n: torch.from_numpy(getattr(one, n)) for n in names} for one in found]
    corners = batch.tile_corners.tolist()
    place = [(TileView(100).windows(HEIGHT, WIDTH)).index((x, y, x + 100, y + 100)) for x, y in corners]
    return {"tiles": torch.tensor(place).float().mean()}, detections


def test_settings_that_do_not_go_together_are_refused(tmp_path):
    for name, value in {"mosaic": 0.5, "copy_paste": 0.5, "keypoints": True}.items():
        with pytest.raises(ValueError, match="tiles go with neither proposals, mosaics, copy_paste nor key points"):
            DetectionDataModule(str(tmp_path), tile=100, **{name: value})
    with pytest.raises(ValueError, match="tiles of 0 pixels"):
        DetectionDataModule(str(tmp_path), tile=0)
    with pytest.raises(ValueError, match=r"data\.empty_tiles is 2"):
        DetectionDataModule(str(tmp_path), tile=100, empty_tiles=2.0)


def test_counts_of_tiles_are_told(tmp_path):
    index = index_of(tmp_path, [(0, 10, 10, 20, 20), (2, 100, 30, 270, 50)], [])
    view = TileView(100, 0.2)
    tiles = view.index(index)
    told = describe_tiles(view, index, tiles, 0.25, 160)
    shown = [tile.boxes[~tile.iscrowd] for tile in tiles.records]
    parts = sum(int(((b[:, 2] - b[:, 0]) > 15).sum()) for b in shown)  # of the long one
    assert told.startswith(
        f"2 images are {len(tiles.records)} tiles of 100 pixels, overlap 0.2: {sum(map(bool, map(len, shown)))} with"
    )
    assert f"2 objects are seen {sum(map(len, shown))} times, {parts} of them in part" in told
    assert "an epoch shows 25%" in told and told.endswith("resized to 160 pixels (data.min_size 100 keeps the scale)")
    assert collate([DetectionDataset(tiles, eval_transform(100, 100))[0, 0]]).gt_valid.sum() == len(shown[0])


@pytest.mark.parametrize(("name", "size"), [("deepforest", 200), ("nuts", 400)])
def test_real_objects_are_all_taught_and_their_masks_cut_right(shared_data, name, size):
    """Aerial pictures with hundreds of trees (XML), and nuts with polygons (COCO)."""
    if name == "nuts":
        index = read_coco(shared_data / name, "trainval.json", "images", None, masks=True)
    else:
        index = read_voc(shared_data / name, None, None, False, "", "")
    view = TileView(size, 0.2)
    assert index.records
    for whole in index.records:
        tiles, (height, width) = view.record(whole), (whole.height, whole.width)
        windows = view.windows(height, width)
        taught = Counter(int(i) for tile in tiles for i in tile.annotation_ids[~tile.iscrowd])
        assert set(taught) == set(whole.annotation_ids.tolist()) and max(taught.values()) <= len(windows)
        laid = [
            mask_api.decode(to_rle(segment, box, height, width)).astype(np.uint8)
            for segment, box in zip(whole.segments or [], whole.boxes, strict=False)
        ]
        for tile, (x1, y1, x2, y2) in zip(tiles, windows, strict=True):
            assert (tile.boxes >= 0).all() and (tile.boxes[:, [2, 3]] <= [x2 - x1, y2 - y1]).all()
            rows = [whole.annotation_ids.tolist().index(i) for i in tile.annotation_ids]
            clipped = clip(whole.boxes[rows], np.array([[x1, y1, x2, y2]], np.float32))[0] - [x1, y1, x1, y1]
            inside = (tile.boxes[:, :2] >= clipped[:, :2]) & (tile.boxes[:, 2:] <= clipped[:, 2:])
            assert inside.all() and (whole.segments is not None or np.array_equal(tile.boxes, clipped))
            for row, segment in zip(rows, tile.segments or [], strict=False):
                assert np.array_equal(mask_api.decode(segment), laid[row][y1:y2, x1:x2])
