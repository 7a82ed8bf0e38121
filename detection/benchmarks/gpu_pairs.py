"""Ours beside torchvision's, with the same weights and images, ready to be timed in turns.

Shape shorthand:
    B: images     N: objects of an image     H, W: sides of an image
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torchvision.models import detection as reference
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FrozenBatchNorm2d

from detection.batch import Batch, pad_images, pad_masks, pad_objects
from detection.benchmarks.gpu import Precision
from detection.benchmarks.gpu_sizes import Kind, Sizes
from detection.benchmarks.speed import OBJECTS, Mode, wait
from detection.mask_grid import TorchvisionMaskGrid
from detection.models import zoo
from detection.models.compose import COCO_CATEGORIES, mask_branch
from detection.models.fast import accelerate
from detection.models.two_stage import TwoStageDetector

Step = Callable[[], Any]
Row = dict[str, Any]

WARM_UP = 2  # steps that are thrown away: kernels are chosen in them, and memory is asked for
HEAVY = ("convolution", "convolution_backward", "addmm", "mm", "bmm")  # what `Recorder` notes down
MASK_SIDE = 112  # cells of a stored mask, as the data pipeline makes them
# Standard deviations of what the last layers give, as of trained networks: else no region scores, or all do.
SPREAD = {"cls_logits": 2.0, "cls_score": 0.7, "bbox_pred": 0.2, "mask_fcn_logits": 1.5}


class Pair:
    """One detector of the family, ours and torchvision's, with the same weights.

    Each gets what it would in use: torchvision a list of float images; ours a uint8 `Batch`, its quick form and, in
    training, the fused optimiser. In bf16 both run under PyTorch's autocast, as in torchvision's training script;
    float32 is as PyTorch begins, with TF32 in convolutions alone.

    Args:
        kind: of the detector. torchvision has no Cascade R-CNN: `theirs` is None.
        sizes: for its backbone and its images.
        device: where.
        **options: arguments that both builders know.
    """

    def __init__(self, kind: Kind, sizes: Sizes, device: str, **options: Any) -> None:
        torch.manual_seed(0)
        self.kind, self.sizes, self.device = kind, sizes, device
        sides = {"min_size": min(sizes.height, sizes.width), "max_size": max(sizes.height, sizes.width)}
        options = {"num_classes": COCO_CATEGORIES, **sides, **sizes.options, **options}
        self.ours = build_ours(kind, sizes.backbone, options).to(device)
        self.theirs = build_theirs(kind, sizes.backbone, options)
        calibrate(self.ours, self.draw(2)[0])
        if self.theirs is not None:
            self.theirs.load_state_dict(self.ours.state_dict())
            self.theirs.to(device)

    def draw(self, count: int) -> tuple[Batch, list[Tensor], list[dict[str, Tensor]]]:
        """So many images of the sizes for both, see `draw`."""
        sides = [(self.sizes.height, self.sizes.width)] * count
        return draw(sides, self.ours.num_classes, self.device, self.kind == "mask")

    def quick(self, mode: Mode) -> TwoStageDetector:
        """Ours in its quick form for training, or for inference; a copy."""
        return accelerate(deepcopy(self.ours), self.device) if mode == "train" else self.ours.for_inference()

    def steps(
        self, mode: Mode, precision: Precision, count: int, forms: Mapping[str, TwoStageDetector] | None = None
    ) -> dict[str, Step]:
        """A training step, or inference, of each, ready to be called.

        Args:
            mode: which of them.
            precision: of convolutions and linear layers.
            count: images.
            forms: of ours; default: `ours`, the quick one.
        """
        batch, floats, targets = self.draw(count)
        calls: dict[str, tuple[nn.Module, Step]] = {}
        if self.theirs is not None:
            theirs = partial(self.theirs, floats, targets) if mode == "train" else partial(self.theirs, floats)
            calls["torchvision"] = self.theirs, theirs
        for name, form in ({"ours": self.quick(mode)} if forms is None else forms).items():
            calls[name] = form, partial(_run, form, batch, mode)
        make = _train_step if mode == "train" else _inference
        return {n: make(model, in_precision(call, precision, self.device)) for n, (model, call) in calls.items()}


def build_ours(kind: Kind, backbone: Any, options: Mapping[str, Any]) -> TwoStageDetector:
    """A detector of ours with random weights; frozen normalisation and three stages that train, but for v2."""
    if kind == "v2":
        return zoo.fasterrcnn_resnet50_fpn_v2(**options)
    frozen: dict[str, Any] = {"backbone_name": backbone, "norm": "frozen", "trainable_backbone_layers": 3}
    if kind == "cascade":
        return zoo.cascadercnn_resnet_fpn(**frozen, **options)
    masks = mask_branch(None, None, None, TorchvisionMaskGrid()) if kind == "mask" else {}
    return zoo.fasterrcnn_resnet_fpn(**frozen, **masks, **options)


def build_theirs(kind: Kind, backbone: str, options: Mapping[str, Any]) -> nn.Module | None:
    """The same of torchvision."""
    if kind == "cascade":
        return None
    if kind == "v2":
        theirs: nn.Module = reference.fasterrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None, **options)
        return theirs
    trunk = resnet_fpn_backbone(backbone_name=backbone, weights=None, trainable_layers=3)
    build = reference.MaskRCNN if kind == "mask" else reference.FasterRCNN
    theirs = build(trunk, **options)
    return theirs


@torch.no_grad()
def calibrate(model: TwoStageDetector, batch: Batch) -> None:
    """Give random weights features as large as trained ones, scores of all heights, and boxes that move.

    Others make proposals without area, and so no work. In one pass over the images each normalisation gets the
    statistics of what reaches it, and each of the last layers is scaled to `SPREAD`. Residual branches are damped, as
    training leaves them: at full strength 50 random layers make a rounding error 1,000 times larger.
    """

    def fit_norm(norm: Any, given: tuple[Tensor, ...]) -> None:
        norm.running_mean.copy_(given[0].mean(dim=(0, 2, 3)))
        norm.running_var.copy_(given[0].var(dim=(0, 2, 3)))

    def spread(layer: Any, given: Any, output: Tensor) -> Tensor | None:
        if layer in done:
            return None
        done.add(layer)
        values = output.transpose(0, 1).flatten(1)  # (outputs, everything else)
        scale = wanted[layer] / values.std(dim=1).clamp(min=1e-6)
        layer.bias.copy_((layer.bias - values.mean(dim=1)) * scale)
        layer.weight.mul_(scale.view(-1, *[1] * (layer.weight.ndim - 1)))
        again: Tensor = layer.forward(*given)
        return again

    done: set[nn.Module] = set()
    wanted = {m: SPREAD[n.rpartition(".")[2]] for n, m in model.named_modules() if n.rpartition(".")[2] in SPREAD}
    for block in model.modules():
        if isinstance(block, Bottleneck | BasicBlock):
            last: Any = block.bn3 if isinstance(block, Bottleneck) else block.bn2
            last.weight.fill_(0.1)
    norms = [module for module in model.modules() if isinstance(module, FrozenBatchNorm2d | nn.BatchNorm2d)]
    handles = [norm.register_forward_pre_hook(fit_norm) for norm in norms]
    handles += [layer.register_forward_hook(spread) for layer in wanted]
    model.eval().run(batch, with_losses=False, with_detections=True)
    for handle in handles:
        handle.remove()


def draw(
    sides: Sequence[tuple[int, int]], classes: int, device: str, with_masks: bool = False
) -> tuple[Batch, list[Tensor], list[dict[str, Tensor]]]:
    """Images of noise with boxes, as ours takes them and as torchvision does.

    Args:
        sides: `(height, width)` of each image.
        classes: with background.
        device: of everything.
        with_masks: the masks fill their boxes.

    Returns:
        the batch; `(3, H, W)` float images in [0, 1]; and targets.
    """
    generator = torch.Generator(device).manual_seed(0)
    any_of = partial(torch.rand, generator=generator, device=device)
    images, boxes, labels, masks = [], [], [], []
    for height, width in sides:
        pixels = (3, height, width)
        images.append(torch.randint(0, 256, pixels, dtype=torch.uint8, generator=generator, device=device))
        size = torch.tensor([width, height], device=device)
        corner = (any_of(OBJECTS, 2) * 0.75 * size).floor()
        far = torch.minimum(corner + 4 + (any_of(OBJECTS, 2) ** 2 * 0.6 * size).floor(), size)
        boxes.append(torch.cat((corner, far), dim=1))
        labels.append(torch.randint(1, classes, (OBJECTS,), generator=generator, device=device))
        x, y = torch.arange(width, device=device), torch.arange(height, device=device)
        columns = (x >= corner[:, :1]) & (x < far[:, :1])
        rows = (y >= corner[:, 1:]) & (y < far[:, 1:])
        masks.append((rows[:, :, None] & columns[:, None]).byte() if with_masks else rows.new_zeros(0))
    padded, image_sizes = pad_images(images)
    image_sizes = image_sizes.to(device)
    stored: dict[str, Any] = {}
    if with_masks:
        full = [torch.full((OBJECTS, MASK_SIDE, MASK_SIDE), 255, dtype=torch.uint8, device=device) for _ in images]
        stored = dict(zip(("gt_masks", "gt_mask_windows"), pad_masks(full, boxes, OBJECTS), strict=True))
    batch = Batch(padded, image_sizes, *pad_objects(boxes, labels), original_sizes=image_sizes, **stored)
    targets = [{"boxes": b, "labels": n} | ({"masks": m} if with_masks else {})
               for b, n, m in zip(boxes, labels, masks, strict=True)]  # fmt: skip
    return batch, [image.float() / 255 for image in images], targets


def in_precision(call: Step, precision: Precision, device: str) -> Step:
    """The call, under autocast where it is to run in half precision."""

    def cast() -> Any:
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bfloat16"):
            return call()

    return cast


def _run(model: TwoStageDetector, batch: Batch, mode: Mode) -> Any:
    losses, detections = model.run(batch, with_losses=mode == "train", with_detections=mode == "infer")
    return losses if mode == "train" else detections


def _train_step(model: nn.Module, losses: Step) -> Step:
    parameters = [p for p in model.train().parameters() if p.requires_grad]
    fused = isinstance(model, TwoStageDetector)
    optimizer = SGD(parameters, lr=1e-5, momentum=0.9, weight_decay=1e-4, fused=fused)

    def step() -> None:
        model.train()  # where the same model detects in another turn
        optimizer.zero_grad()
        torch.stack(list(losses().values())).sum().backward()
        optimizer.step()

    return step


def _inference(model: nn.Module, detect: Step) -> Step:
    def step() -> Any:
        model.eval()
        with torch.inference_mode():
            return detect()

    return step


def compare(pair: Pair, mode: Mode, precision: Precision, count: int, until: float,
            forms: Mapping[str, TwoStageDetector] | None = None) -> Row:  # fmt: skip
    """Milliseconds of each in turns, ours over torchvision's (below 1: ours is faster), and the memory of each.

    Arguments as of `Pair.steps`. Where so many images don't fit into memory, it is half of them: `batch` says how many,
    `asked` how many were wanted.
    """

    def measure(images: int) -> Row:
        times, peaks = take_turns(pair.steps(mode, precision, images, forms), pair.sizes.rounds, pair.device, until)
        row: Row = {"rounds": min(map(len, times.values()))}
        for name, seconds in times.items():
            row[f"{name}_ms"] = 1000 * median(seconds)
            row[f"{name}_spread"] = (max(seconds) - min(seconds)) / median(seconds)
            row[f"{name}_peak_mb"] = peaks[name]
        if "torchvision" in times and "ours" in times:
            row["ratio"] = median(times["ours"]) / median(times["torchvision"])
        return row

    return {"detector": pair.kind, "mode": mode, "precision": precision} | halving(count, measure)


def halving(asked: int, measure: Callable[[int], Row]) -> Row:
    """What is measured with so many images, or with the half, the quarter, ... that fits into memory.

    Raises:
        torch.OutOfMemoryError: not even one does.
    """
    count = asked
    while True:
        try:
            return {"batch": count, "asked": asked, **measure(count)}
        except torch.OutOfMemoryError:
            if count == 1:
                raise
        # Only here has the error, and what its frames held, gone.
        gc.collect()
        torch.cuda.empty_cache()
        count //= 2


def take_turns(
    steps: Mapping[str, Step], rounds: int, device: str, until: float
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of each step, taking turns, and the MiB that it had at most beside what lay there before.

    Args:
        steps: by name.
        rounds: timed ones, if the time is enough for all; two are always taken, where so many are wanted.
        device: to wait for.
        until: `time.monotonic()` after which no other round is begun.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    peaks = dict.fromkeys(steps, 0.0)
    for turn in range(rounds + min(WARM_UP, rounds)):
        if turn >= WARM_UP + 2 and time.monotonic() > until:
            break
        for name, step in steps.items():
            with peak_memory(device) as peak:
                wait(device)
                started = time.perf_counter()
                step()
                wait(device)
                seconds = time.perf_counter() - started
            peaks[name] = max(peaks[name], *peak)
            if turn >= min(WARM_UP, rounds):
                times[name].append(seconds)
    return times, peaks


@contextmanager
def peak_memory(device: str) -> Iterator[list[float]]:
    """A list that holds the MiB which the block had at most beside what lay there before; 0 on the CPU."""
    found = [0.0]
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    yield found
    if on_gpu:
        found[0] = (torch.cuda.max_memory_allocated() - before) / 2**20


class Recorder(TorchDispatchMode):
    """Notes down the convolutions and the products of matrices, forward and backward, with the shapes they have."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in HEAVY:
            self.calls.append((func, *tree_map(_described, (args, kwargs or {}))))
        return func(*args, **(kwargs or {}))

    def replay(self) -> Callable[[], None]:
        """The same operations on other numbers; tensors of the same shape and layout are one."""
        made: dict[Any, Tensor] = {}

        def tensor(value: Any) -> Any:
            if not isinstance(value, _Described):
                return value
            if value not in made:
                shape, strides, dtype, device = value
                last = sum((side - 1) * stride for side, stride in zip(shape, strides, strict=True))
                numbers = torch.randn(max(0, last) + 1, dtype=dtype, device=device)
                made[value] = numbers.as_strided(shape, strides)  # a gradient of a sum is one number, expanded
            return made[value]

        calls = [
            (func, *tree_map(tensor, both, is_leaf=lambda v: isinstance(v, _Described))) for func, *both in self.calls
        ]

        def run() -> None:
            for func, args, kwargs in calls:
                func(*args, **kwargs)

        return run


class _Described(tuple[Any, ...]):
    """Shape, strides, type and device of a tensor."""

    __slots__ = ()


def _described(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return _Described((tuple(value.shape), value.stride(), value.dtype, value.device))
