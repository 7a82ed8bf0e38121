"""Presets go behind any configuration; to overfit is to learn a few batches by heart and be judged on them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from detection.cli.configuration import CONFIGS, PRESETS, expand
from detection.cli.fit import main
from detection.data import scenes
from detection.data.datamodule import DetectionDataModule


@pytest.mark.parametrize("preset", ["debug", "overfit", "profile"])
def test_preset_changes_what_it_names_and_nothing_else(preset: str, capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for flags in ([], ["--config", preset]):
        with pytest.raises(SystemExit):
            main(["--config", "bccd", *flags, "--print_config"])
        printed.append(yaml.safe_load(capsys.readouterr().out))
    plain, changed = printed
    written = yaml.safe_load((PRESETS / f"{preset}.yaml").read_text())
    for section in ("trainer", "data", "model"):
        for key in plain[section] | changed[section]:
            if key in written.get(section, {}):
                assert key in ("callbacks", "profiler") or changed[section][key] == written[section][key], key
            else:
                assert changed[section].get(key) == plain[section].get(key), key


def test_preset_alone_is_that_of_the_quickstart() -> None:
    quickstart, overfit = str(CONFIGS / "quickstart.yaml"), str(PRESETS / "overfit.yaml")
    assert expand(["--config", "overfit"]) == ["--config", quickstart, "--config", overfit]
    assert expand(["--config=overfit"]) == ["--config", quickstart, f"--config={overfit}"]
    assert expand(["-c", "bccd", "-c", "overfit"]) == ["-c", str(CONFIGS / "bccd.yaml"), "-c", overfit]


def test_what_is_overfitted_is_not_augmented_and_is_validated_itself(tmp_path: Path) -> None:
    root = scenes.draw(tmp_path, train=8, val=3)
    splits = {f"{split}_split": file for split, (file, _) in scenes.SPLITS.items()}
    images = {f"{split}_images": folder for split, (_, folder) in scenes.SPLITS.items()}
    options = {"batch_size": 4, "num_workers": 0, "min_size": [64, 96], "hflip": 1.0, "mosaic": 1.0}
    data = DetectionDataModule(str(root), "coco", **splits, **images, **options)  # type: ignore[arg-type]
    data.trainer = SimpleNamespace(overfit_batches=1)  # type: ignore[assignment]
    data.setup("fit")
    train, again, val = (
        next(iter(loader)) for loader in (data.train_dataloader(), data.train_dataloader(), data.val_dataloader())
    )
    assert torch.equal(train.images, again.images) and torch.equal(train.images, val.images)
    assert min(train.image_sizes[0].tolist()) == 96  # the size of evaluation
    scale = train.image_sizes[0, 1] / train.original_sizes[0, 1]
    kept = train.gt_boxes[0][train.gt_valid[0]]
    torch.testing.assert_close(kept, train.targets[0].boxes * scale, atol=0.6, rtol=0)  # not mirrored
