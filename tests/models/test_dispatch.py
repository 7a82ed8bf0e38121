"""From the batch's arrival to the gradients nothing waits for values of tensors, non-maximum suppression apart.

Such operations stop an accelerator's queue, and their results have shapes that no compiler can know.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from detection.batch import Batch
from detection.losses import GIoULoss
from detection.models import fast, roi_heads, zoo
from detection.models.fast.fast_pooling import GatherPooler
from detection.models.fast.sparse_rpn import SparseRPN
from detection.models.pooling import RoIPooler
from detection.models.rpn import RegionProposalNetwork
from detection.models.two_stage import FasterRCNN
from detection.parts import FeatureMaps, Proposals

DATA_DEPENDENT = {
    "_local_scalar_dense",  # .item(), .tolist(), bool(), int(), float()
    "nonzero",
    "nonzero_numpy",
    "argwhere",
    "masked_select",
    "masked_scatter",
    "unique_dim",
    "_unique",
    "_unique2",
    "unique_consecutive",
    "bincount",
    "equal",
    "is_nonzero",
    "_is_all_true",
    "_is_any_true",
    "histc",
    "nms",
}


class Watch(TorchDispatchMode):
    """Counts all operations, and apart from them those whose run or result's shape depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self.dependent: Counter[str] = Counter()
        self.allowed = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.seen[name] += 1
        boolean_index = name.startswith(("index", "_index", "_unsafe_index")) and any(
            isinstance(leaf, Tensor) and leaf.dtype in (torch.bool, torch.uint8) for leaf in tree_iter(args[1:2])
        )
        values_as_sizes = name == "repeat_interleave" and isinstance(args[0] if len(args) == 1 else args[1], Tensor)
        if not self.allowed and (name in DATA_DEPENDENT or boolean_index or values_as_sizes):
            self.dependent[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def watching(model: FasterRCNN) -> Iterator[Watch]:
    """Watch everything but NMS, wherever the model calls it."""
    watch = Watch()
    to_list, to_numpy = Tensor.tolist, Tensor.numpy

    def allowing(nms: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allowed(*args: Any) -> Tensor:
            watch.allowed = True
            try:
                return nms(*args)
            finally:
                watch.allowed = False

        return allowed

    def spied(read: Callable[..., Any], name: str) -> Callable[..., Any]:
        """On the CPU these two read the memory without any operation that could be watched."""

        def count(*args: Any, **kwargs: Any) -> Any:
            if not watch.allowed:
                watch.dependent[name] += 1
            return read(*args, **kwargs)

        return count

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "tolist", spied(to_list, "tolist"))
        patch.setattr(Tensor, "numpy", spied(to_numpy, "numpy"))
        for part in model.modules():
            if hasattr(part, "nms"):
                patch.setattr(part, "nms", allowing(part.nms))
        with watch:
            yield watch


def make_batch(objects: bool = True) -> Batch:
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand((2, 3, 2), generator=generator) * 40
    gt_boxes = torch.cat((corner, corner + 10 + torch.rand((2, 3, 2), generator=generator) * 20), dim=-1)
    gt_valid = torch.tensor([[True, True, False], [True, False, False]]) & objects
    return Batch(
        images=torch.randint(0, 256, (2, 3, 64, 96), generator=generator, dtype=torch.uint8),
        image_sizes=torch.tensor([[64, 90], [60, 96]]),
        gt_boxes=gt_boxes * gt_valid[..., None],
        gt_labels=torch.tensor([[1, 2, 0], [3, 0, 0]]) * gt_valid,
        gt_valid=gt_valid,
        original_sizes=torch.tensor([[128, 180], [120, 192]]),
        gt_masks=torch.randint(0, 256, (2, 3, 14, 14), generator=generator, dtype=torch.uint8),
        gt_mask_windows=gt_boxes * gt_valid[..., None],
    )


OPTIONS = {"num_classes": 4, "rpn_post_nms_top_n_train": 30, "box_batch_size_per_image": 16}
BUILDERS: dict[str, Callable[[], FasterRCNN]] = {
    "resnet": lambda: zoo.fasterrcnn_resnet_fpn(norm="frozen", **OPTIONS),
    "mobilenet": lambda: zoo.fasterrcnn_mobilenet_v3_large_320_fpn(**OPTIONS),
    "lite0": lambda: zoo.fasterrcnn_efficientnet_lite0_fpn(weights_backbone=None, **OPTIONS),
    "mask": lambda: zoo.maskrcnn_efficientnet_lite0_fpn(weights_backbone=None, box_loss=GIoULoss(), **OPTIONS),
    "cascade": lambda: zoo.cascadercnn_efficientnet_lite0_fpn(weights_backbone=None, masks=True, **OPTIONS),
}


@pytest.mark.parametrize(
    ("builder", "form", "objects"),
    [
        ("resnet", "gather", True),
        ("resnet", "accelerator", False),
        ("resnet", "plain", True),
        ("mobilenet", "accelerator", True),
        ("mobilenet", "gather", False),
        ("lite0", "gather", True),
        ("mask", "accelerator", True),
        ("mask", "gather", False),
        ("mask", "plain", True),
        ("cascade", "accelerator", True),
        ("cascade", "plain", True),
    ],
)
def test_a_training_step_depends_on_no_value(
    builder: str, form: str, objects: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = BUILDERS[builder]().train()
    # On the CPU places that nothing fills are counted, and so read, to leave them out: that is not looked at here.
    monkeypatch.setattr(fast, "ON_CPU", {RoIPooler: GatherPooler, RegionProposalNetwork: SparseRPN})
    if form != "plain":
        fast.accelerate(model, "cpu" if form == "gather" else "cuda")
    with watching(model) as watch:
        losses, detections = model.run(make_batch(objects), with_losses=True, with_detections=False)
        torch.stack(list(losses.values())).sum().backward()
    assert not watch.dependent, f"data-dependent operations: {dict(watch.dependent)}"
    assert detections == [] and len(losses) == {"mask": 5, "cascade": 9}.get(builder, 4)
    # The watch saw the whole of it: convolutions both ways, pooling, and NMS where it is allowed.
    assert watch.seen["convolution"] > 20 and watch.seen["convolution_backward"] > 20
    assert watch.seen["nms"] > 0
    pooling = ["_embedding_bag_forward_only", "_embedding_bag"] if form == "gather" else ["roi_align"]
    assert any(watch.seen[name] for name in pooling)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


class Peek(torch.autograd.Function):
    """An identity whose backward looks at a value."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        float(grad.sum())
        return grad


SPIES: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "item": (lambda x: x.sum().item(), "_local_scalar_dense"),
    "bool": (lambda x: bool(x.any()), "_local_scalar_dense"),
    "tolist": (lambda x: x[0, :2].tolist(), "tolist"),
    "numpy": (lambda x: x.numpy(), "numpy"),
    "nonzero": (lambda x: x.nonzero(), "nonzero"),
    "where": (lambda x: torch.where(x > 0), "nonzero"),
    "boolean index": (lambda x: x[x > 0], "index"),
    "boolean assignment": (lambda x: x.detach().clone().__setitem__(x > 0, torch.ones(1)), "index_put_"),
    "masked_select": (lambda x: x.masked_select(x > 0), "masked_select"),
    "unique": (lambda x: x.unique(), "_unique2"),
    "bincount": (lambda x: x[0].long().clamp(min=0).bincount(), "bincount"),
    "repeats": (lambda x: x[0].repeat_interleave(torch.ones(x.shape[1], dtype=torch.int64)), "repeat_interleave"),
}


@pytest.fixture(scope="module")
def small() -> FasterRCNN:
    return BUILDERS["mobilenet"]().train()


@pytest.mark.parametrize("spy", SPIES)
def test_the_watch_notices(spy: str, small: FasterRCNN, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small
    look, name = SPIES[spy]
    sample = model.roi_heads.sample

    def spoilt(features: FeatureMaps, proposals: Proposals, batch: Batch) -> roi_heads.RoISample:
        look(proposals.scores)
        return sample(features, proposals, batch)

    monkeypatch.setattr(model.roi_heads, "sample", spoilt)
    with watching(model) as watch:
        model.run(make_batch(), with_losses=True, with_detections=False)
    assert watch.dependent[name] > 0


def test_the_watch_notices_what_the_backward_pass_does(small: FasterRCNN) -> None:
    with watching(small) as watch:
        losses, _ = small.run(make_batch(), with_losses=True, with_detections=False)
        assert not watch.dependent
        Peek.apply(torch.stack(list(losses.values())).sum()).backward()
    assert watch.dependent == {"_local_scalar_dense": 1}
