"""Compiled or with activations computed again, the module learns and saves the same."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import Precision
from torch import Tensor, nn

from detection.batch import Batch, pad_objects
from detection.benchmarks.peers import TorchvisionDetector
from detection.inference.tta import TestTimeAugmentation
from detection.models.backbones import Backbone, resnet_fpn
from detection.models.compose import mask_rcnn
from detection.models.fast.fast_pooling import GatherPooler
from detection.models.fast.sparse_rpn import SparseRPN
from detection.models.rcnn import whole_image
from detection.models.roi_heads import TwoFCHead
from detection.training.compiling import checkpoint_activations, compile_parts
from detection.training.module import DetectionModule

Values = dict[str, Tensor]


def make_module(**options: Any) -> DetectionModule:
    torch.manual_seed(0)
    backbone = resnet_fpn("resnet18", norm="frozen", trainable_layers=5, out_channels=16)
    counts = {f"rpn_{when}_nms_top_n_{mode}": 20 for when in ("pre", "post") for mode in ("train", "test")}
    detector = mask_rcnn(backbone, num_classes=3, box_head=TwoFCHead(16, 7, 32), box_batch_size_per_image=8, **counts)
    return DetectionModule(detector, ["a", "b"], **options).train()


def make_batch(count: int, height: int, width: int) -> Batch:
    generator = torch.Generator().manual_seed(height)
    boxes = [torch.tensor([[5.0, 5, 60, 70], [30, 20, 90, 100]])] * count
    objects = pad_objects(boxes, [torch.tensor([1, 2])] * count)
    images = torch.randint(0, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)
    masks = torch.randint(0, 256, (count, 2, 14, 14), generator=generator, dtype=torch.uint8)
    sizes = torch.tensor([[height, width]] * count)
    return Batch(images, sizes, *objects, sizes, gt_masks=masks, gt_mask_windows=objects[0])


def learn(module: DetectionModule, batch: Batch) -> tuple[Values, Values]:
    """Losses and gradients."""
    torch.manual_seed(1)
    module.zero_grad()
    losses, _ = module.train().detector.run(batch, with_losses=True, with_detections=False)
    torch.stack(list(losses.values())).sum().backward()
    return losses, {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


@torch.no_grad()
def detect(module: DetectionModule, batch: Batch) -> Values:
    _, detections = module.eval().detector.run(batch, with_losses=False, with_detections=True)
    return detections[0]


def assert_same(compiled: DetectionModule, plain: DetectionModule, batch: Batch) -> None:
    found, wanted = learn(compiled, batch), learn(plain, batch)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert wanted[1]["detector.backbone.body.conv1.weight"].abs().sum() > 0
    torch.testing.assert_close(detect(compiled, batch), detect(plain, batch), rtol=1e-4, atol=1e-3)


@pytest.mark.slow
def test_compiled_parts_give_the_same_from_a_handful_of_graphs() -> None:
    graphs: list[str] = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled, plain = make_module(), make_module()
    names = list(compiled.state_dict())
    compile_parts(compiled.detector, backend=count)
    assert list(compiled.state_dict()) == names
    for size in [(2, 128, 192), (3, 192, 128)]:
        assert_same(compiled, plain, make_batch(*size))
    before = len(graphs)
    for size in [(2, 256, 192), (3, 192, 320), (2, 128, 256)]:
        detect(compiled, make_batch(*size))
        learn(compiled, make_batch(*size))
    assert 2 * 6 <= before <= 3 * 6  # each of six parts for learning and for detecting
    assert len(graphs) == before


def test_only_training_compiles_and_the_checkpoint_is_plain(tmp_path: Path) -> None:
    module = make_module(compile=True)
    strategy = SimpleNamespace(root_device=torch.device("cpu"), precision_plugin=Precision())
    module.trainer = SimpleNamespace(datamodule=None, strategy=strategy, callbacks=[])  # type: ignore[assignment]
    for stage, compiles in (("validate", False), ("test", False), ("fit", True)):
        module.setup(stage)
        assert (module.detector.backbone._compiled_call_impl is not None) == compiles, stage
    assert list(module.state_dict()) == list(make_module().state_dict())


def test_setup_takes_the_quick_forms_wherever_the_detector_is() -> None:
    """Inside another, and not in others' detectors, which have parts of their own."""
    strategy = SimpleNamespace(root_device=torch.device("cpu"), precision_plugin=Precision())
    for fast in (True, False):
        module = make_module(fast=fast)
        inner = module.detector
        module.detector = TestTimeAugmentation(inner)  # type: ignore[assignment]
        module.trainer = SimpleNamespace(datamodule=None, strategy=strategy, callbacks=[])  # type: ignore[assignment]
        module.setup("test")
        assert (type(inner.rpn) is SparseRPN) == fast
    strategy.root_device = torch.device("cuda")
    for fast in (True, False):  # what torchvision refuses to repeat is exchanged in either case
        module = make_module(fast=fast)
        module.trainer = SimpleNamespace(datamodule=None, strategy=strategy, callbacks=[])  # type: ignore[assignment]
        torch.use_deterministic_algorithms(True)
        try:
            module.setup("test")
        finally:
            torch.use_deterministic_algorithms(False)
        assert type(module.detector.roi_heads.box_roi_pool) is GatherPooler
        assert (type(module.detector.rpn) is SparseRPN) == fast
    peer = TorchvisionDetector(resnet_fpn("resnet18", out_channels=16), 3)
    module = DetectionModule(peer, ["a", "b"])  # type: ignore[arg-type]
    module.trainer = SimpleNamespace(datamodule=None, strategy=strategy, callbacks=[])  # type: ignore[assignment]
    kinds = [type(m) for m in peer.modules()]
    module.setup("fit")
    assert [type(m) for m in peer.modules()] == kinds


def test_checkpointing_keeps_losses_and_gradients() -> None:
    again, plain = make_module(grad_checkpointing=True), make_module()
    batch, kept = make_batch(2, 128, 128), dict[bool, int]()
    results = []
    for module in (again, plain):
        saved: list[int] = []

        def note(tensor: Tensor, saved: list[int] = saved) -> Tensor:
            saved.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            results.append(learn(module, batch))
        kept[module is again] = sum(saved)
    torch.testing.assert_close(results[0], results[1])
    assert kept[True] < 0.8 * kept[False]


class Flat(nn.Module):
    """A timm network that keeps all it computes says so by an assertion."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        assert not enable, "gradient checkpointing not supported"


@pytest.mark.parametrize("backbone", [whole_image(), Backbone(Flat(), [8], (16,), None)])
def test_a_network_that_can_not_checkpoint_is_refused(backbone: Backbone) -> None:
    detector: Any = type("Detector", (), {"backbone": backbone})
    with pytest.raises(ValueError, match=r"(WholeImage|Flat) can't compute .* leave model.grad_checkpointing out"):
        checkpoint_activations(detector)


def test_checkpoints_name_each_code_that_trained() -> None:
    module = make_module()
    for code, expected in (("a", "a"), ("a", "a"), ("b+", "a, then b+"), ("c", "a, then b+, then c")):
        checkpoint: dict[str, Any] = {}
        module._code = code
        module.on_save_checkpoint(checkpoint)
        assert checkpoint["code"] == expected
        module._code_before = expected
