"""What an accelerator would run, on tensors that have its device but no values: who waits, who copies, who mixes devices.

A fake tensor of device `cuda` needs no GPU. Whatever reads a value, or lets two devices meet, is seen as it would be
seen there. Non-maximum suppression and what is cut from its result have sizes that the host has to wait for; they are
replaced, and counted by themselves. The autograd engine can't run without a driver, so the backward pass runs on
fake tensors of the device `meta`, which counts as an accelerator as much.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from detection.batch import Batch
from detection.models import roi_heads, rpn
from detection.models.fast import accelerate
from detection.models.roi_heads import RoIHeads
from detection.models.two_stage import TwoStageDetector
from detection.training.module import DetectionModule
from tests.models.fast.test_accelerated import DETECTORS, make, make_batch
from tests.models.test_dispatch import DATA_DEPENDENT

COPIES = {"_to_copy", "copy_"}


class Host(TorchDispatchMode):
    """Notes whatever makes the host wait for the device, and operations whose tensors lie on two devices.

    Attributes:
        seen: all operations by name.
        launched: those that do more than look at a tensor's memory in another shape.
        reads: values that the host reads, and results whose shape follows from values.
        uploads: copies of the host's memory that it waits for, as it does for all but those that say otherwise.
        mixed: operations on tensors of several devices, and to the host.
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
        name = func.overloadpacket.__name__
        if func.namespace != "prim":
            self._note(name, func, args, kwargs)
        return func(*args, **kwargs)

    def _note(self, name: str, func: Any, args: Any, kwargs: Any) -> None:
        self.seen[name] += 1
        aliases = [r.alias_info for r in func._schema.returns]
        self.launched += not (aliases and all(a is not None and not a.is_write for a in aliases))
        devices = {t.device.type for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        wanted = torch.device(kwargs.get("device") or self.device).type
        boolean_index = name.startswith(("index", "_index", "_unsafe_index")) and any(
            isinstance(t, Tensor) and t.dtype in (torch.bool, torch.uint8) for t in tree_iter(args[1:2])
        )
        values_as_sizes = name == "repeat_interleave" and isinstance(args[0] if len(args) == 1 else args[1], Tensor)
        if name in DATA_DEPENDENT or boolean_index or values_as_sizes:
            self.reads[name] += 1
        elif name in COPIES and devices | {wanted} == {"cpu", self.device}:
            blocks = not (kwargs.get("non_blocking") or (name == "copy_" and any(args[2:3])))
            to_host = devices == {self.device}
            (self.mixed if to_host else self.uploads)[name] += blocks
        elif len(devices) > 1:
            self.mixed[name] += 1
        elif name == "index_put_" and args[2].ndim == 0:  # a Python number becomes a tensor of the host
            self.uploads[name] += 1

    @property
    def waits(self) -> dict[str, int]:
        return dict(+(self.reads + self.uploads + self.mixed))


def fake(tensor: Tensor, device: str) -> Tensor:
    """Same shape and layout, but no values, on another device."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


def move(model: nn.Module, device: str) -> None:
    """Exchange parameters and buffers for fake ones, those that several modules share for the same."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    there = fake(tensor, device)
                    made[id(tensor)] = nn.Parameter(there, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else there
                tensors[name] = made[id(tensor)]
    model._held = list(made.values())


def arrange(batch: Batch) -> Batch:
    """The batch with fake tensors in the place of its real ones, still on the host."""
    return batch._map(lambda tensor: fake(tensor, "cpu"))


@contextmanager
def without_nms() -> Iterator[None]:
    def keep(boxes: Tensor, scores: Tensor, groups: Tensor, iou_thresh: float) -> Tensor:
        return torch.arange(len(boxes) // 2, device=boxes.device)

    def cut(self: RoIHeads, boxes: Tensor, scores: Tensor, usable: Tensor) -> Any:
        found = {"boxes": boxes.flatten(1, 2), "labels": usable.flatten(1).long(), "scores": scores.flatten(1)}
        return [{name: rows[i, :5] for name, rows in found.items()} for i in range(len(usable))]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rpn, "grouped_nms", keep)
        patch.setattr(RoIHeads, "nms_per_class", cut)
        yield


def observe(name, form, mode, device="cuda"):
    model = make(name)
    if form == "quick":
        accelerate(model, device)
    training = mode == "training"
    model.train(training)
    given, hosts = make_batch(0), []
    with FakeTensorMode(allow_non_fake_inputs=True), without_nms():
        move(model, device)
        for _ in range(2):
            with Host(device) as host, torch.set_grad_enabled(training):
                batch = arrange(given).to(device)
                losses, found = model.run(batch, with_losses=training, with_detections=not training)
                total = torch.stack(list(losses.values())).sum() if training else None
                if training and device == "meta":
                    total.backward()
            hosts.append(host)
    return hosts
