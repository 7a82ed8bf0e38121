"""Test-time augmentation: views, the way back, and merging."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.ops import batched_nms
from torchvision.transforms.v2 import functional as TF

from detection.batch import Batch, pad_images, pad_objects
from detection.inference.tta import TestTimeAugmentation, mirror, rescale
from detection.models import zoo
from detection.models.two_stage import FasterRCNN


def make_batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    pictures = [torch.randint(0, 256, (3, *size), generator=generator).to(torch.uint8) for size in ((60, 90), (96, 50))]
    images, sizes = pad_images(pictures)
    none = pad_objects([torch.zeros(0, 4)] * 2, [torch.zeros(0, dtype=torch.int64)] * 2)
    return Batch(images, sizes, *none, original_sizes=sizes * 2)


@pytest.fixture(scope="module")
def model() -> FasterRCNN:
    torch.manual_seed(0)
    model = zoo.maskrcnn_efficientnet_lite0_fpn(num_classes=4, box_score_thresh=0.0, box_detections_per_img=20)
    return model.eval()


def test_a_view_is_the_picture_scaled_or_mirrored() -> None:
    batch = make_batch()
    for i, (h, w) in enumerate(batch.image_sizes.tolist()):
        picture = batch.images[i, :, :h, :w]
        mirrored = mirror(batch).images[i]
        assert torch.equal(mirrored[:, :h, :w], picture.flip(2)) and not mirrored[:, h:].any()
        assert not mirrored[:, :, w:].any()
        for scale in (0.5, 1.5):
            view = rescale(batch, scale)
            new = [int(h * scale), int(w * scale)]
            assert view.image_sizes[i].tolist() == new and not any(s % 32 for s in view.images.shape[2:])
            wanted = TF.resize(picture, new, antialias=scale < 1)
            found = view.images[i, :, : new[0], : new[1]]
            assert (found.int() - wanted.int()).abs().max() <= 1
    assert rescale(batch, 1.0) is batch


@torch.no_grad()
def test_one_plain_view_is_the_detector_itself(model: FasterRCNN) -> None:
    plain = model.run(make_batch(), False, True)[1]
    augmented = TestTimeAugmentation(model, hflip=False).run(make_batch(), False, True)[1]
    for a, b in zip(augmented, plain, strict=True):
        assert len(b["scores"]) == 20 and all(torch.equal(a[name], b[name]) for name in b)


@torch.no_grad()
def test_a_picture_and_its_mirror_image_have_mirrored_detections(model: FasterRCNN) -> None:
    """The same two views, in the other order: what is found must be the same things, mirrored, masks included."""
    batch, augmented = make_batch(), TestTimeAugmentation(model)
    found, again = (augmented.run(b, False, True)[1] for b in (batch, mirror(batch)))
    for a, b, (_, width) in zip(found, again, batch.original_sizes.tolist(), strict=True):
        torch.testing.assert_close(a["scores"], b["scores"])
        assert len(a["scores"]) == 20
        back = b["boxes"][:, [2, 1, 0, 3]] * torch.tensor([-1, 1, -1, 1]) + torch.tensor([width, 0, width, 0])
        torch.testing.assert_close(a["boxes"], back, atol=1e-2, rtol=0)
        torch.testing.assert_close(a["masks"], b["masks"].flip(-1), atol=1e-3, rtol=0)


@torch.no_grad()
def test_views_are_merged_by_nms(model: FasterRCNN) -> None:
    batch = make_batch()
    views = [model.run(rescale(batch, scale), False, True)[1] for scale in (1.0, 1.4)]
    found = TestTimeAugmentation(model, (1.0, 1.4), hflip=False).run(batch, False, True)[1]
    for i, merged in enumerate(found):
        joined: dict[str, Tensor] = {name: torch.cat([view[i][name] for view in views]) for name in views[0][i]}
        keep = batched_nms(joined["boxes"], joined["scores"], joined["labels"], 0.5)[:20]
        torch.testing.assert_close(merged["boxes"], joined["boxes"][keep])
        assert torch.equal(merged["labels"], joined["labels"][keep])
        assert len(keep) > 0 and merged["boxes"].shape[0] == len(keep)
