"""Where the records of a data set come from: its folder and layout, its splits, and its classes, each read once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from detection.data import scenes
from detection.data.checks import choose_classes
from detection.data.finding import Layout, Stage, find
from detection.data.reading import check_split, draws_scenes, read_split
from detection.data.records import Index
from detection.data.splitting import Split, keep, kept, split_of
from detection.data.tree import role_of
from detection.parts import Reader


class Source:
    """A data set as its settings describe it. Nothing is read before it is asked for.

    Args:
        settings: of the data, as `DetectionDataModule` takes them; the same object is asked each time.
        reader: the user's own; None reads the format of the settings.

    Attributes:
        made: the split that was made where the data set has none, once `made_split` was asked for it.
    """

    def __init__(self, settings: Mapping[str, Any], reader: Reader | None) -> None:
        self.made: Split | None = None
        self._settings, self._reader = settings, reader
        self._train: Index | None = None
        self._known: tuple[str, ...] | None = None
        self._divided: bool | None = None
        self._layout: Layout | None = None

    @property
    def draws_scenes(self) -> bool:
        """Whether the data are the scenes that this package draws."""
        return self._reader is None and draws_scenes(self._settings)

    @property
    def root(self) -> Path:
        """Folder of the data set."""
        root = self._settings["root"]
        return scenes.default_folder() if root is None else Path(root).expanduser()

    def layout(self) -> Layout:
        """The data set below the root, found and said at the first call; raises `DataError` where there is none."""
        if self._layout is None:
            self._layout = find(self.root, self._settings["format"])
            rank_zero_info(f"{self.root}: {self._layout}")
            for other in self._layout.others:
                rank_zero_info(f"  also there, not read: {other}; data.format or another root chooses it")
        return self._layout

    def classes(self) -> tuple[str, ...]:
        """Foreground classes in the order of their labels, which is that of all splits."""
        if self._known is None:
            if self.draws_scenes:
                self._known = scenes.CLASSES
            elif (classes := self._settings["classes"]) is not None:  # what evaluates needs no training split
                self._known = choose_classes(classes, classes, "data")
            else:
                self._known = self.train_list().classes
        return self._known

    def read(self, split: Stage) -> Index:
        """The records of a split; labels point into the classes of the training split, once that is read."""
        if split != "train" and (self._has(split) if split == "test" else not self.divides):
            return self._read(split)
        index, made = self.train_list(), self.made_split()
        return index if made is None else made.apply(index)[split != "train"]

    def train_list(self) -> Index:
        """The training split before images are set aside; kept until `forget`."""
        if self._train is None:
            self._train = self._read("train")
        return self._train

    def forget(self) -> None:
        """Free the records of the training split."""
        self._train = None

    def _read(self, split: Stage) -> Index:
        known = None if split == "train" else self._known  # of training, all that `classes` names must be there
        return read_split(self._settings, self.root, split, known, self._reader, self.layout)

    def _has(self, split: Stage) -> bool:
        """Whether the data set has images for validation, or for the test, that are not among those to train on."""
        settings, train = self._settings, self._settings["train_split"] or ""
        if split == "test" and settings["test_split"] is not None:
            return True
        if settings["fold"] is not None and split == "val":
            return False
        if settings["val_split"] is not None or self.draws_scenes or self._reader is not None:
            return True
        if ":" in train:  # of several folders, each with its lists
            return False
        found = self.layout().stage(split)
        trains = role_of(train) in ("trainval", "val") and found is not None and role_of(found.name) == "val"
        return found is not None and not trains

    @property
    def divides(self) -> bool:
        """Whether images of the training split are set aside; what a checkpoint says of it stays."""
        if self._divided is None:
            self._divided = not self._has("val")
        return self._divided

    def made_split(self) -> Split | None:
        """Which images train and which validate, where that was not given but made; at first it takes its time."""
        if self.divides and self.made is None:
            index = self.train_list()
            check_split(index, "train")
            self.made = split_of(index, self._settings)
        return self.made

    def state_dict(self) -> dict[str, Any]:
        """The split that was made, or that none was, which a resumed run and an evaluation have to know."""
        return {} if self._divided is None else keep(self.made, self._settings)

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Go on with the split of a checkpoint, whatever images have come since; whether that changes the split."""
        if not state:
            return False
        before, self.made = self.made, kept(state, self._settings)
        self._divided = self.made is not None
        return before != self.made
