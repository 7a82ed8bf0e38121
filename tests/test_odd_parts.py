"""Parts that are written otherwise than ours get in, and out again with the same numbers."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim.lr_scheduler import CyclicLR, LRScheduler, OneCycleLR
from torch.utils.data import DataLoader
from torchvision.ops import FrozenBatchNorm2d

from detection import fasterrcnn_efficientnet_lite0_fpn
from detection.anchors import AnchorGenerator
from detection.errors import SettingsError
from detection.fitting import PartError
from detection.interop import load_detector, save_detector
from detection.interop.export import ExportError, trace
from detection.interop.files import take_weights
from detection.losses import classification_loss
from detection.models.fast.folding import fold_frozen_norms
from detection.models.pooling import RoIPooler
from detection.models.roi_heads import FastRCNNPredictor, TwoFCHead
from detection.recipes import describe, rebuild
from detection.training.checkpoints import WholeFiles
from detection.training.module import DetectionModule
from detection.trust import EVERYTHING
from detection.weights import adapt_classes

IMAGES = list(torch.rand(2, 3, 64, 80, generator=torch.Generator().manual_seed(0)))
SIZES = [[16.0], [32.0], [48.0], [64.0], [96.0]]
LAYERS = {"conv5_mask": 256, "mask_fcn_logits": 64}
PACKAGE = __name__.partition(".")[0]


def build(**parts: Any) -> Any:
    sizes = {"num_classes": 3, "fpn_channels": 16, "min_size": 64, "max_size": 96, "box_score_thresh": 0.0}
    torch.manual_seed(0)
    return fasterrcnn_efficientnet_lite0_fpn(weights_backbone=None, **sizes, **parts).eval()


def through_a_file(detector: Any, folder: Path) -> Any:
    save_detector(folder / "own.safetensors", detector, ["a", "b"])
    loaded = load_detector(folder / "own.safetensors", trust=(PACKAGE,)).eval()
    for one, other in zip(detector(IMAGES), loaded(IMAGES), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    return loaded


class ConvNamedHead(nn.Module):
    """Its tensors have names that torchvision's had in older files."""

    def __init__(self, in_channels: int, num_anchors: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, in_channels, 3, padding=1)
        self.scores, self.deltas = nn.Conv2d(in_channels, num_anchors, 1), nn.Conv2d(in_channels, 4 * num_anchors, 1)

    def forward(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        seen = [self.conv(m).relu() for m in maps]
        return [self.scores(m) for m in seen], [self.deltas(m) for m in seen]


class Predictor(nn.Module):
    """Layers of other names than ours."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.classes, self.boxes = nn.Linear(in_channels, num_classes), nn.Linear(in_channels, 4 * num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.classes(x), self.boxes(x)


class Sharpened(FastRCNNPredictor):
    """A dictionary by label among its arguments."""

    def __init__(self, in_channels: int, num_classes: int, factors: dict[int, float] | None = None) -> None:
        super().__init__(in_channels, num_classes)
        self._factors = factors or {}

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits, deltas = super().forward(x)
        return logits * logits.new_tensor([self._factors.get(i, 1.0) for i in range(logits.shape[1])]), deltas


class Spectral(TwoFCHead):
    """A parametrised layer, each of which has a class of its own."""

    def __init__(self, in_channels: int, output_size: int) -> None:
        super().__init__(in_channels, output_size, 32)
        self.fc6 = spectral_norm(self.fc6)


class HandsOn(TwoFCHead):
    """Says nothing of its arguments."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


class Shifted(AnchorGenerator):
    def __init__(self, sizes: list[list[float]], shift: float = 6.0) -> None:
        super().__init__(sizes)
        self.shift = shift

    def forward(self, *given: Any) -> list[Tensor]:
        return [anchors + self.shift for anchors in super().forward(*given)]


class Wrapped(nn.Module):
    """No subclass of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = AnchorGenerator(SIZES)

    def num_anchors_per_location(self) -> list[int]:
        return self.inner.num_anchors_per_location()

    def forward(self, *given: Any) -> list[Tensor]:
        found: list[Tensor] = self.inner(*given)
        return found


class Miscounted(AnchorGenerator):
    """Lays another number of anchors than it says."""

    def __init__(self, factor: float) -> None:
        super().__init__(SIZES)
        self.factor = factor

    def forward(self, *given: Any) -> list[Tensor]:
        return [torch.cat([anchors, anchors])[: int(self.factor * len(anchors))] for anchors in super().forward(*given)]


class Doubled(RoIPooler):
    def pool(self, *given: Any) -> Tensor:
        return 2 * super().pool(*given)


class Counting(nn.Module):
    """Keeps what it has seen, in no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.mean = 0, 0.0

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        self.step += 1
        self.mean = logits.detach().mean(dim=0)  # type: ignore[assignment]
        return classification_loss(logits, labels)


def focal(gamma: float = 2.0) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        log_probability = logits.log_softmax(1).gather(1, labels[:, None])[:, 0]
        return -((1 - log_probability.exp()) ** gamma) * log_probability

    return loss


@dataclass(frozen=True)
class FrozenLoss:
    gamma: float = 2.0

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        return focal(self.gamma)(logits, labels)


@pytest.mark.parametrize(
    "parts",
    [
        {"rpn_head": ConvNamedHead},
        {"box_predictor": Predictor},
        {"box_predictor": partial(Sharpened, factors={1: 30.0, 2: 0.5})},
        {"box_head": Spectral},
    ],
    ids=lambda parts: next(iter(parts)),
)
def test_a_file_makes_it_again(parts: dict[str, Any], tmp_path: Path) -> None:
    through_a_file(build(**parts), tmp_path)


def test_classes_of_the_same_name_keep_the_rows_of_a_predictor_with_other_names(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved = build(box_predictor=Predictor)
    saved.roi_heads.box_predictor.classes.bias.data = torch.tensor([0.0, 1.0, 2.0])
    saved.roi_heads.box_predictor.boxes.bias.data = torch.arange(12.0)
    save_detector(tmp_path / "own.safetensors", saved, ["a", "b"])
    for names, wanted in ((["b", "a"], [0.0, 2.0, 1.0]), (["a", "b"], [0.0, 1.0, 2.0])):
        new = build(box_predictor=Predictor)
        with caplog.at_level(logging.INFO):
            take_weights(new, tmp_path / "own.safetensors", names)
        predictor = new.roi_heads.box_predictor
        assert predictor.classes.bias.tolist() == wanted
        assert predictor.boxes.bias.tolist() == [4 * label + i for label in wanted for i in range(4)]
    assert "box_predictor.classes.bias is taken for the last layer of a predictor" in caplog.text
    new = build(box_predictor=Predictor)
    fresh = new.roi_heads.box_predictor.classes.bias.tolist()
    take_weights(new, tmp_path / "own.safetensors", ["x", "y"])
    assert new.roi_heads.box_predictor.classes.bias.tolist() == [0.0, *fresh[1:]]


def test_layers_that_happen_to_have_as_many_rows_as_classes_are_left_alone() -> None:
    """Our mask predictor's hidden layer has 256 channels, four for each of 64 classes."""
    names = [f"class {i}" for i in range(63)]
    state = {f"roi_heads.mask_predictor.{layer}.bias": torch.rand(n) for layer, n in LAYERS.items()}
    fresh = {name: torch.zeros_like(value) for name, value in state.items()}
    adapted = adapt_classes(state, fresh, names, names[::-1])
    hidden, last = state
    assert torch.equal(adapted[hidden], state[hidden]) and adapted[last][1] == state[last][-1]


@pytest.mark.parametrize("value", [{1: 3.0, 2: [0.5]}, {1: {2: "a"}}, {"1": 3.0}, {None: 1, True: 2}])
def test_dictionaries_keep_the_type_of_their_keys(value: Any) -> None:
    again = rebuild(describe(value))
    assert again == value and list(map(type, again)) == list(map(type, value))


@pytest.mark.parametrize("given", [{"gamma": 3.0}, {}])
@pytest.mark.parametrize("maker", ["focal", "FrozenLoss"])
def test_losses_that_a_function_or_a_frozen_dataclass_makes_have_a_recipe(maker: str, given: dict[str, float]) -> None:
    recipe = {"class_path": f"{__name__}.{maker}", "init_args": given}
    loss = rebuild(recipe, (EVERYTHING,))
    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
    assert torch.equal(rebuild(describe(loss), (PACKAGE,))(logits, labels), loss(logits, labels))
    assert describe(build(class_loss=loss)) is not NotImplemented


def test_a_class_that_hands_its_arguments_on_is_a_factory() -> None:
    factory = rebuild({"class_path": f"{__name__}.HandsOn", "init_args": {"out_channels": 32}}, (EVERYTHING,))
    assert isinstance(build(box_head=factory).roi_heads.box_head, HandsOn)


@pytest.mark.parametrize(
    "parts",
    [{"rpn_anchor_generator": Shifted(SIZES)}, {"rpn_anchor_generator": Wrapped()}, {"box_roi_pool": Doubled()}],
    ids=["Shifted", "Wrapped", "Doubled"],
)
def test_a_graph_keeps_what_a_subclass_does_otherwise(parts: dict[str, Any]) -> None:
    detector = build(**parts)
    program, _ = trace(detector)
    levels = [(255 * image).round().to(torch.uint8) for image in IMAGES]
    boxes, _, scores, counts = program.module()(torch.stack(levels))
    for i, wanted in enumerate(detector([image.float() / 255 for image in levels])):
        assert counts[i] == len(wanted["boxes"]) > 20
        torch.testing.assert_close(boxes[i, : counts[i]], wanted["boxes"])
        torch.testing.assert_close(scores[i, : counts[i]], wanted["scores"])


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_anchors_that_are_not_as_many_as_was_said_are_named(factor: float) -> None:
    with pytest.raises(PartError, match=r"rpn_anchor_generator: Miscounted gave anchors \(\d+, 4\) in the place of"):
        build(rpn_anchor_generator=Miscounted(factor))


def test_nms_of_ones_own_is_in_no_graph() -> None:
    detector = build()
    detector.roi_heads.nms = lambda boxes, scores, groups, iou_thresh: scores.argsort(descending=True)
    with pytest.raises(ExportError, match="nms of the detector is a function of your own"):
        trace(detector)


def test_what_a_part_has_seen_is_no_change_of_the_detector(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    detector = build(class_loss=rebuild({"class_path": f"{__name__}.Counting"}, (EVERYTHING,)))
    target = {"boxes": torch.tensor([[5.0, 5, 40, 40]]), "labels": torch.tensor([1])}
    detector.train()(IMAGES, [target] * 2)
    through_a_file(detector.eval(), tmp_path)
    # Once in the trial of the part, once in training.
    assert "class_loss.step is 2 now, which no file keeps: register it as a buffer if it matters" in caplog.text


class Standardised(nn.Conv2d):
    """Convolves by another weight than its own."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


@pytest.mark.parametrize("conv", [Standardised(3, 4, 3, bias=False), spectral_norm(nn.Conv2d(3, 4, 3, bias=False))])
def test_a_convolution_that_does_more_is_not_folded(conv: nn.Module) -> None:
    norm = FrozenBatchNorm2d(4)
    norm.running_var.uniform_(0.5, 2.0)
    network, image = nn.Sequential(conv, norm).eval(), torch.randn(1, 3, 9, 9)
    wanted = network(image)
    fold_frozen_norms(network, image)
    assert network[0] is conv and torch.equal(network(image), wanted)


class Keeps(L.Callback):
    def __init__(self, value: Any) -> None:
        self.value, self.loaded = value, None

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.loaded = state_dict["value"]


class GoesBad(Keeps):
    def on_train_end(self, *_: Any) -> None:
        self.value = deque([1])


class Rates(L.Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []
        self.momentum: list[float] = []

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        group = trainer.optimizers[0].param_groups[0]
        self.seen.append(group["lr"])
        self.momentum.append(group["momentum"])


def list_of_pairs(samples: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(zip(*samples, strict=True))


def train(
    folder: Path, steps: int, callbacks: Sequence[L.Callback], resume: Path | None = None, **options: Any
) -> Path:
    """A training of some steps, and its checkpoint."""
    target = {"boxes": torch.tensor([[5.0, 5, 30, 40]]), "labels": torch.tensor([1])}
    loader = DataLoader([(IMAGES[0], target)] * 2, batch_size=1, collate_fn=list_of_pairs)
    module = DetectionModule(build().train(), ["a", "b"], lr=0.016, **options)
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"enable_checkpointing": False, "accelerator": "cpu", "plugins": [WholeFiles()]}
    trainer = L.Trainer(max_steps=steps, callbacks=list(callbacks), **quiet)
    trainer.fit(module, loader, ckpt_path=resume, weights_only=True)
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


def test_numbers_of_numpy_in_a_callback_are_kept(tmp_path: Path) -> None:
    file = train(tmp_path, 1, [Keeps({np.int64(3): np.float64(0.5), "whole": np.arange(3).sum()})])
    assert torch.load(file, weights_only=True)["callbacks"]["Keeps"] == {"value": {3: 0.5, "whole": 3}}
    again = Keeps(None)
    train(tmp_path, 2, [again], resume=file)
    assert again.loaded == {3: 0.5, "whole": 3}


def test_a_callback_that_no_file_can_hold_is_refused_before_training(tmp_path: Path) -> None:
    rates = Rates()
    with pytest.raises(SettingsError, match=r"callbacks\.Keeps\.value is a deque: checkpoints hold tensors and plain"):
        train(tmp_path, 1, [Keeps(deque([1])), rates])
    assert not rates.seen


def test_a_state_that_goes_bad_costs_no_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = torch.load(train(tmp_path, 1, [GoesBad(0), Keeps(7)]), weights_only=True)
    assert content["callbacks"] == {"Keeps": {"value": 7}} and content["optimizer_states"]
    assert "callbacks.GoesBad.value is a deque, and is left out of the checkpoint" in caplog.text


@pytest.mark.parametrize(
    "schedule",
    [
        partial(CyclicLR, base_lr=0.001, max_lr=0.01, step_size_up=4, cycle_momentum=False),
        partial(OneCycleLR, max_lr=0.01, total_steps=8),
    ],
    ids=["CyclicLR", "OneCycleLR"],
)
def test_schedules_that_set_rates_themselves_go_on(schedule: Callable[..., LRScheduler], tmp_path: Path) -> None:
    whole, first, rest = Rates(), Rates(), Rates()
    options = {"schedule": schedule, "optimizer": partial(torch.optim.SGD, momentum=0.9)}
    train(tmp_path, 6, [whole], **options)
    file = train(tmp_path, 3, [first], **options)
    train(tmp_path, 6, [rest], resume=file, **options)
    assert first.seen + rest.seen == whole.seen and first.momentum + rest.momentum == whole.momentum
    assert len(set(whole.seen)) > 3
