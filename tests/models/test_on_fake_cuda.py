"""What an accelerator would run, on tensors that have its device but no values: who waits, who copies, who mixes.

A fake tensor of the device `cuda` needs no GPU. Whatever reads a value, or lets two devices meet, is seen as it would
be seen there. NMS gives as many boxes as there are, which the host has to wait for; so it is replaced, with what is cut
from its result, and counted apart. So is the enlarging of heatmaps, each to the size of its box. The engine of autograd
can't run without a driver, so the backward pass is watched on fake tensors of the device `meta`, which is no host
either.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from detection.anchors import AnchorGenerator
from detection.batch import Batch
from detection.boxes import BoxCoder, grouped_nms, nms_apart
from detection.imbalance import EqualizationLoss, FederatedLoss, SeesawLoss, SigmoidFocalLoss
from detection.losses import CIoULoss, FocalLoss
from detection.matching import HardExampleSampler, IoUBalancedSampler
from detection.models import fast
from detection.models.family import keypoints
from detection.models.fast import accelerate
from detection.models.fast.fast_pooling import GatherPooler
from detection.models.pooling import RoIPool, RoIPooler
from detection.models.roi_heads import RoIHeads
from detection.models.two_stage import TwoStageDetector
from detection.training.module import DetectionModule
from tests.models.fast.test_accelerated import DETECTORS, make, make_batch
from tests.models.test_dispatch import DATA_DEPENDENT, watching

# What PyTorch says it can't do twice alike on an accelerator, of `torch.use_deterministic_algorithms`; and torchvision.
REFUSED = {
    "_adaptive_avg_pool2d_backward",
    "adaptive_max_pool2d_backward",
    "upsample_bilinear2d_backward",
    "upsample_bicubic2d_backward",
    "reflection_pad2d_backward",
    "nll_loss2d_forward",
    "put_",
    "histc",
    "median",
    "grid_sampler_2d_backward",
    "_embedding_bag_dense_backward",
    "_roi_align_backward",
    "_roi_pool_backward",
}


class Host(TorchDispatchMode):
    """Notes what makes the host wait for a device, and operations whose tensors lie on two.

    Attributes:
        seen: all operations.
        launched: those that do more than look at memory in another shape.
        reads: values that the host reads, and results whose shape follows from values.
        uploads: copies of the host's memory for which it waits.
        mixed: operations on tensors of both devices, and copies to the host.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.seen: Counter[str] = Counter()
        self.launched = 0
        self.reads: Counter[str] = Counter()
        self.uploads: Counter[str] = Counter()
        self.mixed: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace != "prim":
            self._note(func, args, kwargs)
        return func(*args, **kwargs)

    def _note(self, func: Any, args: Any, kwargs: Any) -> None:
        name = func.overloadpacket.__name__
        self.seen[name] += 1
        aliases = [returned.alias_info for returned in func._schema.returns]
        self.launched += not (aliases and all(alias is not None and not alias.is_write for alias in aliases))
        devices = {t.device.type for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        boolean_index = name.startswith(("index", "_index", "_unsafe_index")) and any(
            isinstance(t, Tensor) and t.dtype in (torch.bool, torch.uint8) for t in tree_iter(args[1:2])
        )
        values_as_sizes = name == "repeat_interleave" and isinstance(args[0] if len(args) == 1 else args[1], Tensor)
        if name in DATA_DEPENDENT or boolean_index or values_as_sizes:
            self.reads[name] += 1
        elif name == "_to_copy":
            goal = torch.device(kwargs.get("device") or next(iter(devices))).type
            if devices == {"cpu"} and goal == self.device and not kwargs.get("non_blocking"):
                self.uploads[name] += 1
            if devices == {self.device} and goal == "cpu":
                self.mixed[name] += 1
        elif len(devices) > 1:
            self.mixed[name] += 1
        elif name.startswith("index_put") and args[2].ndim == 0:  # on a device a Python number is copied there first
            self.uploads[name] += 1

    @property
    def waits(self) -> dict[str, int]:
        """How often the host waits, by operation."""
        return dict(self.reads + self.uploads + self.mixed)


def fake(tensor: Tensor, device: str) -> Tensor:
    """The same shape and layout on another device, without values."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


def move(model: nn.Module, device: str) -> None:
    """Exchange parameters and buffers for fake ones; one that several modules share stays one."""
    made: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor not in made:
                    there = fake(tensor, device)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[tensor] = nn.Parameter(there, tensor.requires_grad) if is_parameter else there
                tensors[name] = None if tensor is None else made[tensor]  # type: ignore[assignment]


@contextmanager
def without_nms(model: nn.Module) -> Iterator[None]:
    """NMS keeps half of the boxes, and of each image five are detections. Heatmaps are not laid on their boxes."""

    def keep(boxes: Tensor, *_: Any) -> Tensor:
        return torch.arange(len(boxes) // 2, device=boxes.device)

    def cut(self: RoIHeads, boxes: Tensor, scores: Tensor, usable: Tensor) -> list[dict[str, Tensor]]:
        found = {"boxes": boxes.flatten(1, 2), "labels": usable.flatten(1).long(), "scores": scores.flatten(1)}
        return [{name: rows[i, :5] for name, rows in found.items()} for i in range(len(usable))]

    def locate(heatmaps: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        return boxes[:, None, :3].expand(-1, heatmaps.shape[1], -1), heatmaps.amax(dim=(2, 3))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RoIHeads, "nms_per_class", cut)
        patch.setattr(keypoints, "locate_keypoints", locate)
        for part in model.modules():
            if hasattr(part, "nms"):
                patch.setattr(part, "nms", keep)
        yield


def observe(
    model: TwoStageDetector,
    training: bool,
    device: str = "cuda",
    backward: bool = False,
    batches: tuple[Batch, ...] = (make_batch(0),) * 2,
) -> list[Host]:
    """Steps of the module, or detections, one after the other."""
    module = DetectionModule(model, ["a", "b", "c"]).train(training)
    hosts = []
    with FakeTensorMode(allow_non_fake_inputs=True), without_nms(model), pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "log", lambda *_, **__: None)
        patch.setattr(module, "log_dict", lambda *_, **__: None)
        move(model, device)
        for given in batches:
            there = given._map(lambda tensor: fake(tensor, "cpu"))
            with Host(device) as host, torch.set_grad_enabled(training):
                batch = there.to(device)
                assert batch.images.device.type == device
                if training:
                    loss = module.training_step(batch, 0)
                    assert loss.device.type == device and not loss.ndim
                    if backward:
                        loss.backward()
                else:
                    found = module.detector.run(batch, with_losses=False, with_detections=True)[1]
                    assert all(values.device.type == device for d in found for values in d.values())
            hosts.append(host)
    return hosts


FORMS = ("plain", "quick", "quick, deterministic")


# Of key points the last form alone, which has the most rules; the others are rehearsed.
CASES = [
    pytest.param(name, form, marks=[pytest.mark.rehearsal] * (name == "Keypoint R-CNN" and form != FORMS[-1]))
    for name in DETECTORS
    for form in FORMS
]


def formed(name: str, form: str, device: str = "cuda") -> TwoStageDetector:
    model = make(name)
    if form != "plain":
        forms = fast.ON_ACCELERATOR if form == "quick" else {**fast.ON_ACCELERATOR, **fast.REPEATABLE}
        accelerate(model, device, forms)
    return model


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize(("name", "form"), CASES)
def test_the_host_waits_for_nothing_after_the_first_step(name: str, form: str, training: bool) -> None:
    first, second = observe(formed(name, form), training)
    assert second.waits == {}
    # The first copies the anchors of a cell, a tensor a level, and what the poolers and the RPN know of the levels.
    assert not first.reads and not first.mixed and set(first.uploads) <= {"_to_copy"}
    assert first.uploads["_to_copy"] <= 9
    assert second.seen["convolution"] > 15 and second.launched > 150


@pytest.mark.parametrize(("name", "form"), CASES)
def test_the_backward_pass_waits_for_nothing(name: str, form: str) -> None:
    (host,) = observe(formed(name, form, "meta"), True, "meta", backward=True, batches=(make_batch(0),))
    assert not host.reads and not host.mixed and host.uploads["_to_copy"] <= 9  # the first step's, as above
    assert host.seen["convolution_backward"] > 10
    refused = REFUSED & set(host.seen)
    if form == "quick, deterministic":
        assert not refused
    elif name != "R-CNN":  # its regions are cut from the image, which has no gradient
        assert refused  # so the search would find it


@pytest.mark.parametrize("form", FORMS)
def test_images_of_a_new_size_bring_new_anchors_but_no_wait(form: str) -> None:
    """The tables of the quick forms alone, one a part, which hold the sizes of the maps."""
    small = make_batch(0)
    large = replace(small, images=torch.zeros((2, 3, 128, 160), dtype=torch.uint8))
    _, other, again = observe(formed("Faster R-CNN", form), True, batches=(small, large, large))
    assert sum(other.uploads.values()) == (0 if form == "plain" else 2)
    assert set(other.waits) <= {"_to_copy"} and again.waits == {}


def test_other_parts_wait_for_nothing_either() -> None:
    model = make("Faster R-CNN")
    heads = model.roi_heads
    heads.box_loss, heads.class_loss, heads.sampler = CIoULoss(), FocalLoss(), HardExampleSampler(32)
    heads.box_coder = BoxCoder((10.0, 5.0, 2.0, 1.0))
    heads.box_roi_pool = RoIPool()
    assert observe(model, True)[1].waits == {}
    model = make("Faster R-CNN")
    model.roi_heads.box_roi_pool = RoIPooler(sampling_ratio=0)
    model.rpn.sampler, model.roi_heads.sampler = IoUBalancedSampler(32, max_iou=0.3), IoUBalancedSampler(32)
    model.roi_heads.class_loss = EqualizationLoss()
    assert observe(accelerate(model, "cuda"), True)[1].waits == {}


@pytest.mark.parametrize("part", [SeesawLoss, EqualizationLoss, lambda: FederatedLoss(2, [1, 2, 3]), SigmoidFocalLoss])
def test_losses_of_long_tails_wait_for_nothing(part: Callable[[], Any]) -> None:
    """But for their sums and settings, which are brought along once."""
    loss = part()
    if isinstance(loss, nn.Module):
        loss(torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64))
    with FakeTensorMode(allow_non_fake_inputs=True):
        if isinstance(loss, nn.Module):
            move(loss, "cuda")
        for step in range(2):
            logits = torch.empty((64, 4), device="cuda", requires_grad=True)
            labels, valid = (torch.empty(64, dtype=kind, device="cuda") for kind in (torch.int64, torch.bool))
            with Host("cuda") as host:
                extra = (valid,) if getattr(loss, "wants_valid", False) else ()
                assert loss(logits, labels, *extra).device.type == "cuda"
                assert loss.probabilities(logits).device.type == "cuda"
            assert host.launched > 5 and not host.reads and not host.mixed
            assert sum(host.uploads.values()) <= (1 - step)


class Spoilt(RoIPooler):
    """Looks at a value, or brings one, in a way that `spoil` says."""

    spoil: Callable[[Tensor], object]

    def forward(self, features: Any, boxes: Tensor) -> Tensor:
        type(self).spoil(boxes)
        return super().forward(features, boxes)


def write_number(boxes: Tensor) -> None:
    boxes.clone()[torch.zeros(1, dtype=torch.int64, device=boxes.device)] = 1.0


SPOILS: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "tensor": (lambda boxes: torch.tensor([1.0, 2.0], device=boxes.device), "_to_copy"),
    "new_tensor": (lambda boxes: boxes.new_tensor([1.0]), "_to_copy"),
    "list as index": (lambda boxes: boxes[..., [1, 0, 3, 2]], "_to_copy"),
    "tensor of the host": (lambda boxes: boxes * torch.ones(()), "mul"),
    "number in place of a slice": (lambda boxes: boxes.clone()[..., 2:].__setitem__(0, 1.0), "fill_"),
    "number at an index": (write_number, "index_put_"),
    "to the host": (lambda boxes: boxes.cpu(), "_to_copy"),
}


@pytest.mark.parametrize("spoil", SPOILS)
def test_it_is_noticed_when_somebody_waits(spoil: str) -> None:
    spoils, name = SPOILS[spoil]
    kind = type("Pooler", (Spoilt,), {"spoil": staticmethod(spoils)})
    model = make("Faster R-CNN")
    model.roi_heads.box_roi_pool = kind()
    assert observe(model, True)[1].waits == {name: 1}


def test_what_is_cut_from_nms_costs_two_reads() -> None:
    """Where the usable boxes are, and how many each image keeps; not some for each image or class."""
    heads = make("Faster R-CNN").roi_heads
    heads.nms = lambda boxes, *_: torch.arange(len(boxes))
    shape = (5, 20, 3)
    with watching(make("Faster R-CNN")) as watch:
        found = heads.nms_per_class(torch.rand((*shape, 4)), torch.rand(shape), torch.rand(shape) > 0.5)
    assert watch.dependent == {"nonzero": 1, "tolist": 1} and len(found) == 5


def test_the_plain_forms_take_nms_group_by_group_and_an_accelerator_in_one_call() -> None:
    model = make("Cascade R-CNN")
    parts = [part for part in model.modules() if hasattr(part, "nms")]
    assert len(parts) == 4 and all(part.nms is grouped_nms for part in parts)
    assert all(part.nms is grouped_nms for part in accelerate(model, "cpu").modules() if hasattr(part, "nms"))
    assert all(part.nms is nms_apart for part in accelerate(model, "cuda").modules() if hasattr(part, "nms"))


def test_a_measurement_can_choose_each_form() -> None:
    chosen = {plain: quick for plain, quick in fast.ON_ACCELERATOR.items() if plain not in fast.NORMS}  # it folds all
    for left_out in chosen:
        forms = {plain: quick for plain, quick in chosen.items() if plain is not left_out}
        model = accelerate(make("Faster R-CNN"), "cuda", forms)
        found = {type(part) for part in model.modules()} | {model.rpn.nms}
        assert left_out in found
        assert set(forms.values()) <= found


def test_deterministic_algorithms_choose_the_gathered_pooling() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        assert fast.forms_for("cuda")[RoIPooler] is GatherPooler and fast.forms_for("cpu") is fast.ON_CPU
    finally:
        torch.use_deterministic_algorithms(False)
    assert fast.forms_for("cuda") is fast.ON_ACCELERATOR


def test_anchors_are_laid_on_the_device() -> None:
    generator = AnchorGenerator(((8,), (16,)))
    with FakeTensorMode(allow_non_fake_inputs=True):
        for shapes in (((3, 4), (2, 2)), ((5, 6), (3, 3))):
            with Host("cuda") as host:
                anchors = generator(shapes, (4, 8), (32, 32), torch.device("cuda"))
            assert all(level.device.type == "cuda" for level in anchors)
            assert sum(host.uploads.values()) == (2 if shapes[0] == (3, 4) else 0) and not host.mixed
