"""The whole detector: what it takes, what it gives, and how it bears bad input, empty images and diverged weights."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from detection.batch import Batch, check_batch, pad_objects
from detection.models import zoo
from detection.models.two_stage import FasterRCNN

LOSSES = ["loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"]


@pytest.fixture(scope="module")
def built() -> FasterRCNN:
    torch.manual_seed(0)
    model = zoo.fasterrcnn_resnet_fpn(
        num_classes=4, min_size=64, max_size=96, box_score_thresh=0.0, box_batch_size_per_image=32
    )
    with torch.no_grad():  # scores that differ
        model.roi_heads.box_predictor.cls_score.weight.mul_(20)
    return model


@pytest.fixture
def model(built: FasterRCNN) -> FasterRCNN:
    return copy.deepcopy(built)


def make_images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand((3, *size), generator=generator) for size in ((80, 120), (130, 90))]


def make_targets() -> list[dict[str, Tensor]]:
    return [
        {"boxes": torch.tensor([[10.0, 10, 60, 50], [30, 30, 110, 75]]), "labels": torch.tensor([1, 3])},
        {"boxes": torch.tensor([[5.0, 20, 80, 120]]), "labels": torch.tensor([2])},
    ]


def make_batch(counts: tuple[int, int] = (2, 1)) -> Batch:
    boxes = [torch.tensor([[5.0, 5, 40, 40], [30, 20, 80, 60]])[:n] for n in counts]
    labels = [torch.tensor([1, 3])[:n] for n in counts]
    generator = torch.Generator().manual_seed(0)
    return Batch(
        torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8, generator=generator),
        torch.tensor([[64, 90], [60, 96]]),
        *pad_objects(boxes, labels),
        original_sizes=torch.tensor([[128, 180], [30, 48]]),
    )


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


def test_training_gives_losses_and_every_parameter_a_gradient(model: FasterRCNN) -> None:
    losses = model.train()(make_images(), make_targets())
    assert sorted(losses) == sorted(LOSSES)
    assert all(loss.isfinite() and loss > 0 and loss.ndim == 0 for loss in losses.values())
    total(losses).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_evaluation_gives_detections_in_pixels_of_the_images(model: FasterRCNN) -> None:
    images = make_images()
    with torch.no_grad():
        detections = model.eval()(images)
    assert len(detections) == 2
    for image, found in zip(images, detections, strict=True):
        boxes, scores = found["boxes"], found["scores"]
        assert set(found) == {"boxes", "labels", "scores"} and 0 < len(scores) <= 100
        assert (scores[1:] <= scores[:-1]).all() and ((found["labels"] >= 1) & (found["labels"] <= 3)).all()
        assert (boxes >= 0).all() and (boxes[:, 2:] > boxes[:, :2]).all()
        limit = torch.tensor([image.shape[2], image.shape[1]])
        assert (boxes[:, 2:] <= limit + 1e-3).all() and (boxes.amax(dim=0)[2:] > 0.8 * limit).all()


def test_training_without_targets_raises(model: FasterRCNN) -> None:
    with pytest.raises(ValueError, match="targets are needed in training"):
        model.train()(make_images())


def test_a_batch_is_taken_as_it_is(model: FasterRCNN) -> None:
    batch = make_batch()
    losses = model.train()(batch)
    assert sorted(losses) == sorted(LOSSES)
    with torch.no_grad():
        detections = model.eval()(batch)
    limits = batch.original_sizes[:, [1, 0]]
    for found, limit in zip(detections, limits, strict=True):
        assert (found["boxes"][:, 2:] <= limit + 1e-3).all() and (found["boxes"].amax(dim=0)[2:] > 0.8 * limit).all()


def test_a_list_and_a_batch_agree(model: FasterRCNN) -> None:
    images = [torch.rand((3, 64, 96), generator=torch.Generator().manual_seed(i)) for i in range(2)]
    sizes = torch.tensor([[64, 96]] * 2)
    batch = Batch(torch.stack(images), sizes, *pad_objects([], []), original_sizes=sizes)
    with torch.no_grad():
        for a, b in zip(model.eval()(images), model(batch), strict=True):
            assert all(torch.equal(a[name], b[name]) for name in a)


def test_validation_gives_losses_and_detections_at_once_and_changes_no_statistics(model: FasterRCNN) -> None:
    before = {name: value.clone() for name, value in model.eval().state_dict().items()}
    torch.manual_seed(1)
    with torch.no_grad():
        losses, detections = model.run(make_batch(), with_losses=True, with_detections=True)
        torch.manual_seed(1)
        alone, nothing = model.run(make_batch(), with_losses=True, with_detections=False)
        none, same = model.run(make_batch(), with_losses=False, with_detections=True)
    assert nothing == [] and none == {} and losses == alone and sorted(losses) == sorted(LOSSES)
    # Without losses the images go through one after the other, which rounds differently.
    for a, b in zip(detections, same, strict=True):
        assert torch.equal(a["labels"], b["labels"])
        torch.testing.assert_close(a["boxes"], b["boxes"], rtol=0, atol=1e-3)
        torch.testing.assert_close(a["scores"], b["scores"], rtol=0, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_predict_leaves_the_mode_as_it_was(model: FasterRCNN) -> None:
    images = make_images()
    expected = model.eval()(images)
    for mode in (True, False):
        found = model.train(mode).predict(images)
        assert model.training == mode and not found[0]["boxes"].requires_grad
        assert torch.equal(found[0]["scores"], expected[0]["scores"])
    with pytest.raises(ValueError, match="is empty"):
        model.train().predict([])
    assert model.training


def test_bytes_and_floats_give_the_same_detections(model: FasterRCNN) -> None:
    pixels = [(image * 255).round().to(torch.uint8) for image in make_images()]
    with torch.no_grad():
        a, b = model.eval()(pixels), model([image / 255 for image in pixels])
    torch.testing.assert_close(a[0]["scores"], b[0]["scores"])


@pytest.mark.parametrize(
    ("images", "targets", "message"),
    [
        ([], [], "the list of images is empty"),
        ([torch.full((3, 80, 120), 200.0)], None, r"image 0 reaches 200: float images must be in \[0, 1\]"),
        ([torch.zeros(80, 120)], None, r"image 0 must be a \(3, h, w\) tensor"),
        (None, [{"boxes": [[1.0, 1, 5, 5]], "labels": [0]}], "image 0, box 0 has a label outside 1 to 3.*label 0"),
        (None, [{"boxes": [[1.0, 1, 5, 5]], "labels": [4]}], "image 0, box 0 has a label outside 1 to 3.*label 4"),
        (None, [{"boxes": [[1.0, 1, 5, 1]], "labels": [1]}], "image 0, box 0 has no positive width and height"),
        (None, [{"boxes": [[5.0, 1, 1, 5]], "labels": [1]}], "image 0, box 0 has no positive width and height"),
        (None, [{"boxes": [[1.0, 1, float("nan"), 5]], "labels": [1]}], "image 0, box 0 is not finite"),
        (None, [{"boxes": [[1.0, 1, 500, 5]], "labels": [1]}], "image 0, box 0 lies outside the image of 120 x 80"),
        (None, [], "1 images but 0 targets"),
    ],
)
def test_bad_input_is_named(model: FasterRCNN, images: Any, targets: Any, message: str) -> None:
    images = make_images()[:1] if images is None else images
    given = targets and [{name: torch.tensor(value) for name, value in target.items()} for target in targets]
    with pytest.raises(ValueError, match=message):
        model.train()(images, [] if given is None else given)


BAD_OBJECTS: list[tuple[list[float], int, str]] = [
    ([5, 5, 40, 40], 0, "has a label outside 1 to 3: box .*, label 0"),
    ([5, 5, 40, 40], 4, "has a label outside 1 to 3: box .*, label 4"),
    ([5, 5, 5, 40], 1, r"has no positive width and height: box \[5\.0, 5\.0, 5\.0, 40\.0\], label 1"),
    ([40, 5, 5, 40], 1, "has no positive width and height"),
    ([5, 5, float("nan"), 40], 1, "is not finite"),
    ([5, 5, float("inf"), 40], 1, "is not finite"),
    ([5, 5, 95, 40], 1, "lies outside its image"),
    ([-5, 5, 40, 40], 1, "lies outside its image"),
    ([5, 5, 40, 70], 1, "lies outside its image"),
]


@pytest.mark.parametrize(("box", "label", "message"), BAD_OBJECTS)
def test_a_bad_batch_is_named(box: list[float], label: int, message: str) -> None:
    batch = make_batch((2, 2))
    check_batch(batch, 4)
    batch.gt_boxes[0, 1], batch.gt_labels[0, 1] = torch.tensor(box), label
    with pytest.raises(ValueError, match=f"image 0: object 1 {message}"):
        check_batch(batch, 4)
    batch.gt_valid[0, 1] = False  # padding may hold anything
    check_batch(batch, 4)


@pytest.mark.parametrize("counts", [(0, 0), (1, 0)])
def test_images_without_objects_train(model: FasterRCNN, counts: tuple[int, int]) -> None:
    losses = model.train()(make_batch(counts))
    assert all(loss.isfinite() and loss.requires_grad for loss in losses.values())
    assert losses["loss_objectness"] > 0 and losses["loss_classifier"] > 0
    if counts == (0, 0):
        assert losses["loss_rpn_box_reg"] == 0 and losses["loss_box_reg"] == 0
    total(losses).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_targets_without_objects_train(model: FasterRCNN) -> None:
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    losses = model.train()(make_images(), [empty, empty])
    assert losses["loss_rpn_box_reg"] == 0 and losses["loss_box_reg"] == 0 and total(losses).isfinite()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["backbone.body.conv1.weight", "rpn.head.bbox_pred.bias", "rpn.head.cls_logits.bias"])
def test_diverged_weights_give_no_detections(model: FasterRCNN, part: str, bad: float) -> None:
    with torch.no_grad():
        model.get_parameter(part).fill_(bad)
        detections = model.eval()(make_images())
    assert all(found["boxes"].isfinite().all() and found["scores"].isfinite().all() for found in detections)
    if bad != bad:
        assert [len(found["scores"]) for found in detections] == [0, 0]
    # Training says by its loss what has happened, and does not crash.
    losses = model.train()(make_images(), make_targets())
    assert not total(losses).isfinite()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["cls_score", "bbox_pred"])
def test_a_diverged_predictor_gives_no_detections(model: FasterRCNN, part: str, bad: float) -> None:
    with torch.no_grad():
        getattr(model.roi_heads.box_predictor, part).weight.fill_(bad)
        detections = model.eval()(make_images())
    assert [len(found["scores"]) for found in detections] == [0, 0]


def test_half_precision_keeps_boxes_scores_and_losses_in_float32(model: FasterRCNN) -> None:
    model.roi_heads.score_thresh = 0.05
    batch = make_batch()
    model.eval()
    results = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            results.append(model.run(batch, with_losses=True, with_detections=True))
    (exact, _), (half, detections) = results
    for found in detections:
        assert found["boxes"].dtype == found["scores"].dtype == torch.float32 and len(found["scores"]) > 0
        assert found["boxes"].isfinite().all()
        # Rounded to bfloat16, all coordinates above 64 would be multiples of a half.
        assert (found["boxes"] != found["boxes"].bfloat16().float()).any()
    for name, loss in half.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, exact[name], rtol=0.1, atol=0.02)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.train()(batch)
    total(losses).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_images_of_a_batch_do_not_touch_each_other(model: FasterRCNN) -> None:
    batch = make_batch()
    other = replace(batch, images=torch.stack((batch.images[0], 255 - batch.images[1])))
    with torch.no_grad():
        a, b = model.eval()(batch), model(other)
    torch.testing.assert_close(a[0]["boxes"], b[0]["boxes"])
    assert not torch.equal(a[1]["scores"], b[1]["scores"])


def test_a_few_steps_lower_the_loss(model: FasterRCNN) -> None:
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9)
    batch, values = make_batch(), []
    for _ in range(12):
        loss = total(model.train()(batch))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        values.append(float(loss.detach()))
    assert sum(values[-3:]) < 0.8 * sum(values[:3])
