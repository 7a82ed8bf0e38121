"""`DetectionDataModule`: from the name of a data set to loaders of `Batch`."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal, Self

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from numpy.typing import NDArray
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

from detection.batch import Id
from detection.data import scenes
from detection.data.augment import Transform, eval_transform, train_transform
from detection.data.channels import check_format
from detection.data.data_settings import check_settings
from detection.data.dataset import DetectionDataset, Sample, collate
from detection.data.finding import Stage
from detection.data.pipeline import Step, check_key_points, check_steps, moving, recipe_of
from detection.data.proposals import ProposalCache, ProposalSource
from detection.data.reading import check_split, describe, recipe_of_reader, splits_of
from detection.data.records import DataError, Index
from detection.data.samplers import TrainBatchSampler, rank_and_world
from detection.data.skeletons import Skeleton
from detection.data.source import Source
from detection.data.spectral import PixelFormat
from detection.data.splitting import Split, check_division
from detection.data.tiled import TileView, describe_tiles
from detection.data.train_loader import TrainLoader
from detection.data.workers import check_shared_memory, init_worker
from detection.parts import Reader
from detection.recipes import rebuild
from detection.trust import RecipeError, trusting

log = logging.getLogger(__name__)


class DetectionDataModule(L.LightningDataModule):
    """Train, validation and test loaders of a data set on disk, or of the scenes that this package draws itself.

    Args:
        root: folder of the data set; None takes the scenes, in the user's cache.
        format: how the annotations are written, where there is no `reader`; None finds out. `scenes` draws them into
            `root`.
        train_split, val_split, test_split: name of the split, or for COCO its annotation file, relative to `root`; for
            VOC also several folders in `root`, as in `VOC2007:trainval+VOC2012:trainval`. None finds it. Where there is
            no validation split, images of the training split are set aside, see `detection.data.splitting`; without
            `test` the validation split is the test.
        train_images, val_images, test_images: COCO only: folder of the split's images, relative to `root`; "" finds it.
        val_fraction: share of the images that is set aside where there is no validation split.
        fold: "2/5" validates on the second of five parts of the training split, and trains on the others; without
            `val_split`.
        classes: foreground classes in the order of their labels; None takes all of the training split.
        batch_size: images a batch, on each device.
        num_workers: loader processes on each device; 0 loads in the main process.
        min_size: short side in pixels; a list draws one for each training image and evaluates at the largest.
        max_size: cap of the long side in pixels.
        augmentations: albumentations transforms of training images, with their boxes and masks, in order; flips and
            resizing come after them.
        min_visibility: training objects of which augmentations and jitter leave less than this share of their box are
            dropped.
        hflip, vflip, photometric: probability of each, see `train_transform`.
        scale_jitter: large-scale jitter's range of factors, e.g. `[0.1, 2.0]`; off when None.
        scale_jitter_size: side of the square that the jitter fills, in pixels; None is `max_size`.
        mosaic: probability of training on a mosaic of four images.
        copy_paste: probability of pasting objects of another image onto a training image; needs `masks`.
        group_by_aspect: batch wide images with wide, high with high.
        size_divisible: padded sides are multiples of this many pixels. The default is the detector's own, as a rule 32,
            the coarsest stride; a large one (224 for 800 x 1333) leaves a handful of shapes for `model.compile`, at the
            price of padding. Of a detector with 1, evaluation has one image a batch, as none is padded then.
        repeat_threshold: show images of classes rarer than this fraction of images more often; 0 is off.
        with_difficult: train on objects marked difficult too.
        keep_empty: train on images without objects too. Evaluation always has them.
        masks: read instance masks.
        labelled: a YAML file, relative to `root`, that says which classes were labelled in which images, see
            `detection.data.federated.label_by_file`; None for all classes in all images, or as the annotations say.
        proposals: give each image the proposals of this source, for detectors that learn none (Fast R-CNN, R-CNN).
        max_unreadable: training images, on each device, that may become unreadable during a run and are replaced by
            others, with a warning; one more is an error. In evaluation the first is.
        seed: of the order and the augmentation; None is that of `seed_everything`, else 0.
        channels: of the images. With 3 channels of 8 bits, whatever can be is made RGB: grey repeated, transparency
            dropped. With any other number all files must have it, see `detection.data.spectral`.
        keypoints: read key points, of COCO's `keypoints` and YOLO's `kpt_shape`.
        keypoint_pairs: left and right partners among the key points, which change places in a mirror, by name or by
            position from 0 on; None takes those that the data says or its names show. `[]`: there are none.
        keypoint_sigmas: how far annotators scatter, one a key point, for OKS AP; None takes COCO's for COCO's 17
            points, else .05 for each.
        depth: bits of a channel. 16 are kept as they are, and all files must have them.
        timeout: seconds after which loaders' processes that bring no batch are an error; 0 waits for ever.
        reader: reads a split in the place of `format`: a callable of your own, see `docs/settings.md`.
        tile: side in pixels of the tiles of which training images consist, for large images; evaluation then looks at
            the whole images in such tiles. None takes images whole. See `detection.data.tiled`.
        tile_overlap: of neighbouring tiles, at least, as a share of their side.
        tile_visibility: of an object that no tile shows whole, the share of what the best tile shows that another must
            show to teach it.
        empty_tiles: share of the tiles without objects that an epoch shows, drawn anew in each.

    Attributes:
        tiles: what these four say, or None.
        source: where the records come from.
        predict_split: the split that `trainer.predict` goes through; `"test"` unless it is set.
    """

    def __init__(
        self,
        root: str | None = None,
        format: Literal["scenes", "coco", "voc", "yolo"] | None = None,
        train_split: str | None = None,
        val_split: str | None = None,
        test_split: str | None = None,
        train_images: str = "",
        val_images: str = "",
        test_images: str = "",
        classes: list[str] | None = None,
        batch_size: int = 8,
        num_workers: int = 2,
        min_size: int | list[int] = 160,
        max_size: int = 320,
        augmentations: list[Step] | None = None,
        min_visibility: float = 0.0,
        hflip: float = 0.5,
        vflip: float = 0.0,
        photometric: float = 0.0,
        scale_jitter: tuple[float, float] | None = None,
        scale_jitter_size: int | None = None,
        mosaic: float = 0.0,
        copy_paste: float = 0.0,
        group_by_aspect: bool = True,
        size_divisible: int | None = None,
        repeat_threshold: float = 0.0,
        with_difficult: bool = False,
        keep_empty: bool = True,
        masks: bool = False,
        proposals: ProposalSource | None = None,
        max_unreadable: int = 10,
        seed: int | None = None,
        timeout: int = 50,
        reader: Reader | None = None,
        val_fraction: float = 0.2,
        fold: str | None = None,
        labelled: str | None = None,
        channels: int = 3,
        depth: Literal[8, 16] = 8,
        keypoints: bool = False,
        keypoint_pairs: list[tuple[int | str, int | str]] | None = None,
        keypoint_sigmas: list[float] | None = None,
        tile: int | None = None,
        tile_overlap: float = 0.2,
        tile_visibility: float = 0.3,
        empty_tiles: float = 1.0,
    ) -> None:
        check_settings(locals())
        super().__init__()
        self.tiles = None if tile is None else TileView(tile, tile_overlap, tile_visibility)
        check_division(val_fraction, fold, val_split)
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed  # where Lightning keeps its own
        # Plain values, as a checkpoint and the command line have them, stand in for the part itself.
        self.proposals: ProposalSource | None = rebuild(proposals) if isinstance(proposals, Mapping) else proposals
        proposals = getattr(proposals, "recipe", proposals)
        self.augmentations: list[Step] = rebuild(augmentations or [])
        check_steps(self.augmentations)
        if keypoints:
            check_key_points(self.augmentations)
        if proposals and (names := moving(self.augmentations)):
            raise ValueError(
                f"proposals would no longer fit after {names[0]}: leave it out, or use hflip and scale_jitter"
            )
        augmentations = [recipe_of(step) for step in self.augmentations]
        self.reader: Reader | None = rebuild(reader) if isinstance(reader, Mapping) else reader
        reader = recipe_of_reader(self.reader)
        self.save_hyperparameters()
        self.form = PixelFormat(channels, depth)
        self.source = Source(self.hparams, self.reader)
        check_format(self.form, self.augmentations, photometric, self.proposals, self.source.draws_scenes)
        self.predict_split: Stage = "test"
        self._datasets: dict[Stage, DetectionDataset] = {}
        self._points: tuple[str, ...] = ()  # names of the key points, once a split is read

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: Any, trust: Iterable[str] = (), **options: Any
    ) -> Self:
        """The data of a checkpoint's training; nothing but plain values is unpickled.

        Args:
            checkpoint_path: of the file.
            trust: packages whose parts it may use besides this one's.
            **options: Lightning's, and arguments of this class that take the place of those in the file.

        Raises:
            RecipeError: the file names parts of a package that is not trusted, or is not there.
        """
        try:
            with trusting(trust):
                return super().load_from_checkpoint(checkpoint_path, **{"weights_only": True} | options)
        except RecipeError as error:
            raise RecipeError(f"{checkpoint_path}: {error}") from error

    @property
    def class_names(self) -> list[str]:
        """Foreground classes in the order of their labels; unless `classes` names them, the training split is read."""
        return list(self.source.classes())

    @property
    def category_ids(self) -> list[Id | None]:
        """The training file's id of each class. Another split's may differ, see `DetectionDataset.category_ids`."""
        return list((self._datasets.get("train") or self.source.train_list()).category_ids)

    @property
    def frequencies(self) -> tuple[str, ...] | None:
        """LVIS's group of each class, `"r"`, `"c"` or `"f"`, or None where no split that was set up has them."""
        return next((data.frequencies for data in self._datasets.values() if data.frequencies), None)

    @property
    def skeleton(self) -> Skeleton | None:
        """What is known of the key points, or None where no split that was set up has them."""
        return next((data.skeleton for data in self._datasets.values() if data.skeleton), None)

    def prepare_data(self) -> None:
        """Draw the embedded scenes and compute proposals, whichever do not lie in their cache; make the split."""
        if self.source.draws_scenes:
            if self.hparams["root"] is not None:
                scenes.check_folder(self.source.root)
            scenes.draw(self.source.root)
        self.made_split()
        if self.proposals is not None and self.trainer is not None:
            # Here, while other ranks wait without a time limit; without a trainer `setup` does it.
            stage = self.trainer.state.fn
            for split in self._needed(stage.value if stage else "fit"):
                self._prepare_proposals(self.read(split), split)

    def _prepare_proposals(self, index: Index, split: Stage) -> ProposalCache | None:
        """The proposals of a split, complete; None where none are wanted."""
        if self.proposals is None:
            return None
        self.proposals.prepare(index, split, num_workers=self.hparams["num_workers"], worker_init_fn=init_worker)
        return self.proposals.open(index, split)

    def setup(self, stage: str) -> None:
        """Read and check the splits that the stage needs; raises `DataError` before anything trains."""
        if self.source.divides and self.trainer is not None and self.trainer.world_size > 1:
            self.source.made = self.trainer.strategy.broadcast(self.source.made)  # the first process has made it
        for split in self._needed(stage):
            if split not in self._datasets:
                self._datasets[split] = self._dataset(split)
        self.source.forget()

    def read(self, split: Stage) -> Index:
        """The records of a split; labels point into the classes of the training split, once that is read."""
        return self.source.read(split)

    def made_split(self) -> Split | None:
        """Which images train and which validate, where that was not given but made; at first it takes its time."""
        return self.source.made_split()

    def as_tiles(self, index: Index) -> tuple[Index, str]:
        """Training records as they are trained on, and what there is to say: their tiles, where `tile` is set."""
        if self.tiles is None:
            return index, ""
        tiles, sizes = self.tiles.index(index), self.hparams["min_size"]
        shown = self.hparams["empty_tiles"], sizes if isinstance(sizes, int) else max(sizes)
        return tiles, describe_tiles(self.tiles, index, tiles, *shown)

    def state_dict(self) -> dict[str, Any]:
        """The split that was made, or that none was, which a resumed run and an evaluation have to know."""
        return self.source.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the split of a checkpoint, whatever images have come since."""
        if self.source.load_state_dict(state_dict):
            self._datasets = {split: self._dataset(split) for split in self._datasets}

    def _dataset(self, split: Stage) -> DetectionDataset:
        hp = self.hparams
        self.source.classes()  # whose order is that of all splits
        index = self.read(split)
        check_split(index, split, hp["with_difficult"])
        if (points := index.skeleton) is not None:
            self._points = self._points or points.names
            if points.names != self._points:
                raise DataError(
                    f"{index.root}: the {split} split has the key points {', '.join(points.names)}, but another has "
                    f"{', '.join(self._points)}: give all splits the same"
                )
        if split == "train" and not hp["keep_empty"]:
            index = replace(index, records=[record for record in index.records if len(record.labels)])
        sizes = [hp["min_size"]] if isinstance(hp["min_size"], int) else list(hp["min_size"])
        if split == "train" and not self._overfits:
            jitter, square = hp["scale_jitter"], hp["scale_jitter_size"]
            longest = square if jitter and square else hp["max_size"]
            chances = (hp["hflip"], hp["vflip"], hp["photometric"])
            extra: tuple[Any, ...] = (self.augmentations, hp["min_visibility"], self.form, self._swap(index))
            transform = train_transform(sizes, longest, *chances, jitter, *extra)
        else:
            transform = eval_transform(max(sizes), hp["max_size"])
        rank_zero_info(describe(index, split))
        if split == "train" and self.tiles is not None:
            index, told = self.as_tiles(index)
            rank_zero_info(f"train: {told}")
        check_shared_memory(hp, max(sizes))
        proposals, names = self._prepare_proposals(index, split), ("mosaic", "copy_paste", "max_unreadable")
        training = {name: hp[name] for name in names if split == "train" and not self._overfits}
        training |= {} if split == "train" else {"tiles": self.tiles}
        return DetectionDataset(index, transform, hp["with_difficult"], proposals=proposals, form=self.form, **training)

    def _swap(self, index: Index) -> NDArray[np.int64] | None:
        """What becomes of the key points in a mirror; a DataError where that is not known, but there are mirrors."""
        skeleton = index.skeleton
        if skeleton is not None and skeleton.pairs is None and (self.hparams["hflip"] or self.hparams["vflip"]):
            raise DataError(
                f"{index.root}: in a mirror left key points become right ones, but which are partners is not known "
                f"({', '.join(skeleton.names)}): name them with data.keypoint_pairs ([] where there are none), or set "
                "data.hflip and data.vflip to 0"
            )
        return None if skeleton is None else skeleton.flip

    def train_dataloader(self) -> TrainLoader:
        """Shuffled batches for this rank, see `TrainBatchSampler`."""
        return TrainLoader(self._datasets["train"], self._train_batches(), **self._loading())

    @property
    def _overfits(self) -> bool:
        """Whether a few batches are to be learned by heart: then without augmentation, and validated on themselves."""
        return getattr(self.trainer, "overfit_batches", 0) > 0

    def _needed(self, stage: str) -> tuple[Stage, ...]:
        """What a stage needs: no validation split where none is wanted, or training images take its place."""
        if stage == "fit" and (self._overfits or getattr(self.trainer, "limit_val_batches", None) == 0):
            return ("train",)
        return splits_of(stage, self.predict_split)

    def _train_batches(self) -> TrainBatchSampler:
        hp, store = self.hparams, self._datasets["train"].store
        options = (hp["batch_size"], hp["seed"], hp["group_by_aspect"], hp["repeat_threshold"])
        return TrainBatchSampler(store, *options, self._overfits, hp["empty_tiles"] if self.tiles else 1.0)

    def val_dataloader(self) -> DataLoader[Sample]:
        if self._overfits:  # Lightning takes as many batches of it as of the training loader
            return DataLoader(self._datasets["train"], batch_sampler=list(self._train_batches()), **self._loading())
        return self._eval_loader("val")

    def test_dataloader(self) -> DataLoader[Sample]:
        return self._eval_loader("test")

    def predict_dataloader(self) -> DataLoader[Sample]:
        return self._eval_loader(self.predict_split)

    def _eval_loader(self, split: Stage) -> DataLoader[Sample]:
        """Every image of the split, in order. Of W ranks, rank r has images r, r + W, ...; up to W - 1 images are
        repeated so that all ranks run equally many steps (a rank less would hang in DDP's buffer broadcast), and the
        metric counts an image once. An image in tiles is a batch of its own.
        """
        dataset = self._datasets[split]
        rank, world = rank_and_world()
        sampler: Any = range(len(dataset))
        if world > 1:
            sampler = DistributedSampler(dataset, world, rank, shuffle=False)
        count = 1 if self._divisor == 1 or self.tiles else self.hparams["batch_size"]
        batches = BatchSampler(sampler, count, drop_last=False)
        return DataLoader(dataset, batch_sampler=batches, **self._loading())

    @property
    def _divisor(self) -> int:
        """What the sides of images are padded to multiples of: as told, else as the detector wants it."""
        told: int | None = self.hparams["size_divisible"]
        return int(getattr(self._detectors, "size_divisible", 32)) if told is None else told

    @property
    def _detectors(self) -> Any:
        """The transform of the detector that is trained or evaluated, if there is one."""
        module = getattr(self.trainer, "lightning_module", None)
        return getattr(getattr(module, "detector", None), "transform", None)

    def _loading(self) -> dict[str, Any]:
        for dataset in self._datasets.values():  # as the detector resizes images itself
            if isinstance(dataset.transform, Transform):
                dataset.transform.take_resizing(getattr(self._detectors, "resizing", "torchvision"))
        workers = self.hparams["num_workers"]
        stack = partial(collate, divisor=self._divisor)
        options: dict[str, Any] = {"num_workers": workers, "collate_fn": stack, "pin_memory": torch.cuda.is_available()}
        # Seeds come with the keys; from torch's own generator a loader would take a number that a resumed run lacks.
        options["generator"] = torch.Generator()
        if workers:
            options |= {
                "worker_init_fn": init_worker,
                "persistent_workers": True,
                "timeout": self.hparams["timeout"],
            }
        return options
