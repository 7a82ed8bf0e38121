"""What images teach that do not say everything: classes that were not looked for, and ignore regions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detection.anchors import AnchorGenerator
from detection.batch import Batch, Target, pad_objects
from detection.evaluation.mean_ap import MeanAP
from detection.losses import ClassWeights, FocalLoss, classification_loss, merge_unlabelled
from detection.matching import Matcher, spare_ignored
from detection.models.compose import cascade_rcnn, faster_rcnn
from detection.models.fast import accelerate
from detection.models.pooling import RoIPooler
from detection.models.roi_heads import TwoFCHead
from detection.models.two_stage import TwoStageDetector
from detection.training.loaders import as_batch

CLASSES, SIDE, UNLABELLED = 6, 64, [0, 3]


def rows(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits `(2, 5, 4)` that want a gradient, labels `(2, 5)`, and what is labelled `(2, 3)`: not 2; not 1 and 3."""
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn((2, 5, 4), generator=generator)).requires_grad_()
    labels = torch.tensor([[0, 1, 2, 3, 0], [0, 0, 3, 2, 1]])
    return logits, labels, torch.tensor([[True, False, True], [False, True, False]])


def test_background_is_none_of_the_classes_looked_for() -> None:
    logits, labels, labelled = rows()
    loss = classification_loss(merge_unlabelled(logits, labels, labelled).flatten(0, 1), labels.flatten()).view(2, 5)
    p = logits.double().softmax(dim=-1)
    wanted = -p.gather(2, labels[..., None])[..., 0].log()
    wanted[0, [0, 4]] = -(p[0, [0, 4]][:, [0, 2]].sum(dim=1)).log()
    wanted[1, [0, 1]] = -(p[1, [0, 1]][:, [0, 1, 3]].sum(dim=1)).log()
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-6)
    gradient = torch.autograd.grad(loss.sum(), logits)[0]
    expected = torch.autograd.grad(wanted.sum(), logits)[0]
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    # Gradient descent lowers no class that nobody looked for, but those that were.
    assert (gradient[0, 0, [0, 2]] < 0).all() and (gradient[0, 0, [1, 3]] > 0).all()
    assert (gradient[1, 0, [0, 1, 3]] < 0).all() and gradient[1, 0, 2] > 0
    assert (gradient[0, 1, [0, 2, 3]] > 0).all()  # but an object of one class is of no other


def test_where_all_is_labelled_the_logits_stay_bit_for_bit() -> None:
    logits, labels, labelled = rows()
    assert torch.equal(merge_unlabelled(logits, labels, torch.ones_like(labelled)), logits)
    assert merge_unlabelled(logits, labels, None) is logits


def sigmoid_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """A sigmoid of each class, none of the background, as the losses of long-tailed sets have it."""
    targets = F.one_hot(labels, logits.shape[1]).float()
    return F.binary_cross_entropy_with_logits(logits[:, 1:], targets[:, 1:], reduction="none").sum(dim=1)


@pytest.mark.parametrize(
    "loss",
    [
        FocalLoss(gamma=2.0),
        FocalLoss(gamma=0.5),
        ClassWeights([1.0, 2.0, 3.0, 4.0]),
        nn.CrossEntropyLoss(reduction="none", label_smoothing=0.1),
        sigmoid_loss,
        nn.MultiMarginLoss(reduction="none"),
    ],
    ids=["focal", "focal below 1", "weights", "smoothed", "sigmoid", "margin"],
)  # fmt: skip
def test_any_loss_leaves_what_nobody_looked_for_alone(loss: Any) -> None:
    """Losses by the contract know nothing of it: losses of the softmax, of a sigmoid of each class, and others."""
    logits, labels, labelled = rows()
    value = loss(merge_unlabelled(logits, labels, labelled).flatten(0, 1), labels.flatten())
    gradient = torch.autograd.grad(value.sum(), logits)[0]
    assert value.isfinite().all() and value.abs().max() < 50 and gradient.isfinite().all()
    unknown = F.pad(~labelled, (1, 0))[:, None] & (labels == 0)[..., None]
    # They move with the background, not against it; smoothed labels raise or lower both.
    assert (gradient * gradient[..., :1])[unknown].min() >= 0
    plain = torch.autograd.grad(loss(logits.flatten(0, 1), labels.flatten()).sum(), logits)[0]
    assert (plain[unknown] > 0).any()  # or there would be nothing to leave alone


def test_background_inside_an_ignore_region_trains_nothing() -> None:
    gt = torch.tensor([[[0.0, 0, 10, 10]]])
    boxes = torch.tensor([[0.0, 0, 10, 10], [40, 40, 50, 50], [45, 40, 65, 50], [46, 40, 66, 50], [80, 80, 90, 90]])
    matched = Matcher(0.5, 0.5)(gt.expand(2, 1, 4), torch.ones((2, 1), dtype=torch.bool), boxes)
    ignored = torch.tensor([[[30.0, 30, 55, 70], [0, 0, 20, 20]], [[0, 0, 0, 0], [0, 0, 0, 0]]])
    assert spare_ignored(matched, boxes, ignored).tolist() == [[0, -2, -2, -1, -1], [0, -1, -1, -1, -1]]
    own = boxes.expand(2, 5, 4)
    assert torch.equal(spare_ignored(matched, own, ignored), spare_ignored(matched, boxes, ignored))
    empty = torch.zeros((1, 1, 4))
    assert spare_ignored(torch.tensor([[-1]]), empty, ignored[:1]).tolist() == [[-1]]


class Maps(nn.Sequential):
    strides, out_channels = (8,), 64

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for width, wide, stride in ((3, 16, 2), (16, 32, 2), (32, 64, 2), (64, 64, 1)):
            layers += [nn.Conv2d(width, wide, 3, stride, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU()]
        super().__init__(*layers)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"0": super().forward(images)}


def tiny(build: Any = faster_rcnn, **kwargs: Any) -> TwoStageDetector:
    numbers = {
        f"rpn_{kind}_nms_top_n_{mode}": n for kind, n in (("pre", 100), ("post", 40)) for mode in ("train", "test")
    }
    anchors = AnchorGenerator(sizes=((12, 20),), aspect_ratios=((1.0,),))
    return build(
        Maps(), CLASSES + 1, min_size=SIDE, max_size=SIDE, rpn_anchor_generator=anchors, box_roi_pool=RoIPooler(5),
        box_batch_size_per_image=16, rpn_batch_size_per_image=32, **numbers, **kwargs,
    )  # fmt: skip


Drawn = tuple[Tensor, Tensor, Tensor]


def draw(rng: np.random.Generator, old: bool) -> Drawn:
    """An image `(3, 64, 64)` uint8 with discs, squares and crosses, bright (1 to 3) or dark (4 to 6).

    Those of the old camera are reddish, the others bluish, as merged sets look different.
    """
    tint = np.array([40, 0, -40]).reshape(3, 1, 1) * (1 if old else -1)
    image = rng.uniform(100, 150, (3, 1, 1)) + tint + rng.normal(0, 12, (3, SIDE, SIDE))
    v, u = np.mgrid[:SIDE, :SIDE]
    boxes: list[tuple[int, ...]] = []
    labels = []
    for _ in range(rng.integers(1, 4)):
        r = int(rng.integers(6, 12))
        x, y = rng.integers(r, SIDE - r, 2).tolist()
        if any(abs(2 * x - a - c) < 2 * r + c - a and abs(2 * y - b - d) < 2 * r + d - b for a, b, c, d in boxes):
            continue
        kind = int(rng.integers(CLASSES))
        across, down = abs(u - x), abs(v - y)
        square, cross = np.maximum(across, down) < r, np.minimum(across, down) < r / 3
        form = [np.hypot(across, down) < r, square, square & cross][kind % 3]
        image[:, form] = (image.mean((1, 2)) + (1 if kind < 3 else -1) * rng.uniform(40, 90, 3))[:, None]
        boxes.append((x - r, y - r, x + r, y + r))
        labels.append(kind + 1)
    pixels = torch.from_numpy(image.clip(0, 255).astype(np.uint8))
    return pixels, torch.tensor(boxes).float().reshape(-1, 4), torch.tensor(labels, dtype=torch.int64)


def drawn(count: int, seed: int) -> list[Drawn]:
    """Images of the old camera and of the new one in turn."""
    rng = np.random.default_rng(seed)
    return [draw(rng, old=i % 2 == 0) for i in range(count)]


def batch_of(items: list[Drawn], labelled: Tensor | None = None) -> Batch:
    images, boxes, labels = zip(*items, strict=True)
    sizes = torch.tensor([[SIDE, SIDE]] * len(items))
    return Batch(torch.stack(images), sizes, *pad_objects(boxes, labels), original_sizes=sizes, labelled=labelled)


@pytest.mark.parametrize("build", [faster_rcnn, cascade_rcnn])
@pytest.mark.parametrize("fast", [False, True])
def test_training_where_all_is_labelled_is_the_same_bit_for_bit(build: Any, fast: bool) -> None:
    batch = batch_of(drawn(2, 0))
    everything = torch.ones((2, CLASSES), dtype=torch.bool)
    torch.manual_seed(0)
    model = tiny(build).train()
    model = accelerate(model, "cpu") if fast else model
    results = []
    for given in (batch, replace(batch, labelled=everything), replace(batch, labelled=~everything)):
        torch.manual_seed(1)
        model.zero_grad()
        losses = model(given)
        torch.stack(list(losses.values())).sum().backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        results.append((losses, gradients))
    (plain, known, unknown) = results
    assert all(torch.equal(plain[0][name], known[0][name]) for name in plain[0])
    assert all(torch.equal(a, b) for a, b in zip(plain[1], known[1], strict=True))
    assert all(torch.equal(plain[0][name], unknown[0][name]) for name in plain[0] if name.startswith("loss_box"))
    for name in plain[0]:
        assert "classifier" not in name or unknown[0][name] < plain[0][name]
    assert all(gradient.isfinite().all() for gradient in unknown[1])


def test_loaders_of_others_bring_crowds_and_the_classes_looked_for() -> None:
    model = tiny()
    image = torch.zeros((3, 32, 32), dtype=torch.uint8)
    target = {"boxes": torch.tensor([[1.0, 1, 9, 9], [10, 10, 20, 30]]), "labels": torch.tensor([1, 2])}
    given = [target | {"iscrowd": torch.tensor([0, 1]), "checked": torch.tensor([1, 1, 0, 0, 0, 0])}, target]
    batch = as_batch(([image, image], given), model, range(2), trains=True)
    assert batch.gt_ignored.tolist() == [[[20.0, 20.0, 40.0, 60.0]], [[0.0] * 4]]  # doubled
    assert batch.labelled.tolist() == [[True, True, False, False, False, False], [True] * 6]
    assert batch.targets[0].checked.sum() == 2 and batch.targets[1].checked is None
    plain = as_batch(([image], [target]), model, range(1), trains=True)
    assert plain.gt_ignored is None and plain.labelled is None
    with pytest.raises(ValueError, match=r"image 0: checked is \(4,\), not one of each class, \(6,\)"):
        as_batch(([image], [target | {"checked": torch.ones(4)}]), model, range(1), trains=True)


def trained(with_mask: bool, seed: int = 1, steps: int = 400) -> tuple[float, float]:
    """AP after training on images of two cameras, the old one's without annotations of a third of the classes (discs).

    Returns:
        AP of all classes, and that of discs in new images of the old camera.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    items, flags = drawn(400, 1000 + seed), torch.ones((400, CLASSES), dtype=torch.bool)
    for i in range(0, len(items), 2):
        flags[i, UNLABELLED] = False
        image, boxes, labels = items[i]
        kept = flags[i][labels - 1]
        items[i] = image, boxes[kept], labels[kept]
    model = accelerate(tiny(box_head=TwoFCHead(64, 5, 96)), "cpu").train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, (step + 1) / 50) * (1 - step / steps)
        picked = rng.permutation(len(items))[:8]
        losses = model(batch_of([items[i] for i in picked], flags[picked] if with_mask else None))
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
    shown = drawn(200, 7)
    found, truth = model.predict([row[0] for row in shown]), [_target(i, *row) for i, row in enumerate(shown)]
    metric, of_old = (MeanAP([str(k) for k in range(CLASSES)]) for _ in range(2))
    metric.update(found, truth)
    of_old.update(found[::2], truth[::2])
    of_old.compute()
    return metric.compute()["map"], float(np.mean([of_old.per_class()[str(k)] for k in UNLABELLED]))


def _target(number: int, image: Tensor, boxes: Tensor, labels: Tensor) -> Target:
    none = torch.zeros(len(labels), dtype=torch.bool)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
    return Target(number, f"{number}.png", (SIDE, SIDE), boxes, labels, areas, none, none)


@pytest.mark.rehearsal
def test_classes_that_one_camera_lacks_are_learned_from_the_other() -> None:
    """Without the mask the heads learn that the old camera sees no discs."""
    (without, without_discs), (with_mask, with_discs) = trained(with_mask=False), trained(with_mask=True)
    print(f"AP {100 * without:.1f} -> {100 * with_mask:.1f}, discs {100 * without_discs:.1f} -> {100 * with_discs:.1f}")
    assert with_discs > without_discs + 0.05
    assert with_mask > without + 0.02
