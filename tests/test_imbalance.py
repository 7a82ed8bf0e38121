"""Losses of long tails against their papers' formulas, written out row by row, and alone or on two processes."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from detection.imbalance import EqualizationLoss, FederatedLoss, SeesawLoss, SigmoidFocalLoss, sums_of
from detection.interop.detectron2 import to_detectron2
from detection.interop.torchvision import to_torchvision
from detection.losses import class_loss_of_rows
from detection.models.compose import cascade_rcnn, faster_rcnn
from detection.models.family.tail_predictor import TailPredictor
from detection.models.roi_heads import FastRCNNPredictor, TwoFCHead
from detection.models.zoo import fasterrcnn_resnet_fpn
from detection.recipes import rebuild
from detection.training.module import DetectionModule
from detection.weights import CheckpointError
from tests import tail_steps
from tests.tail_steps import LOSSES, ROWS, K, as_one_of_two, run, step
from tests.test_hard_and_weighted import Maps, batch


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def seesaw_by_hand(z: np.ndarray, y: np.ndarray, seen: np.ndarray, p: float = 0.8, q: float = 2.0) -> np.ndarray:
    """One row after the other, by the equations of the paper; column 0 is the objectness."""
    losses = []
    for row, label in zip(z.astype(np.float64), y.tolist(), strict=True):
        loss = -math.log(sigmoid(row[0]) if label == 0 else 1 - sigmoid(row[0]))
        if label:
            share = np.exp(row[1:]) / np.exp(row[1:]).sum()
            below = 0.0
            for j in range(1, K):
                n_i, n_j = max(seen[label], 1), max(seen[j], 1)
                m = 1.0 if n_i <= n_j else (n_j / n_i) ** p
                s_i, s_j = max(share[label - 1], 1e-2), share[j - 1]
                c = 1.0 if s_j <= s_i else (s_j / s_i) ** q
                below += (1.0 if j == label else m * c) * math.exp(row[j])
            loss -= math.log(math.exp(row[label]) / below)
        losses.append(loss)
    return np.array(losses)


def test_seesaw_by_its_equations() -> None:
    loss, seen = SeesawLoss(), np.zeros(K)
    for seed in range(4):
        logits, labels, _ = step(seed)
        seen += np.bincount(labels.numpy(), minlength=K)
        found = loss(logits, labels)
        np.testing.assert_allclose(found, seesaw_by_hand(logits.numpy(), labels.numpy(), seen), rtol=2e-5)
        assert loss.sums[0].tolist() == seen.tolist()
    assert seen[5] and seen[1] > 3 * seen[5]  # so that there was something to mitigate


def test_seesaw_with_one_factor_alone() -> None:
    logits, labels, _ = step(0)
    seen = np.bincount(labels.numpy(), minlength=K)
    for p, q in ((0.8, 0.0), (0.0, 2.0)):
        expected = seesaw_by_hand(logits.numpy(), labels.numpy(), seen, p, q)
        np.testing.assert_allclose(SeesawLoss(p, q)(logits, labels), expected, rtol=2e-5)


def test_seesaw_without_factors_is_cross_entropy() -> None:
    logits, labels, _ = step(1)
    found = SeesawLoss(p=0, q=0)(logits, labels)
    joint = torch.cat((logits[:, :1], logits[:, 1:].log_softmax(1)), 1)  # whose softmax the probabilities are
    torch.testing.assert_close(found, F.cross_entropy(joint, labels, reduction="none"))
    torch.testing.assert_close(SeesawLoss().probabilities(logits), joint.softmax(1))


def test_seesaw_of_two_classes_by_hand() -> None:
    """Class 1 has 16 regions and class 2 has one: (1/16)^0.5 = 1/4, and the scores are 0.8 and 0.2, so (4)^1 or 1."""
    loss = SeesawLoss(p=0.5, q=1.0)
    loss.fit(torch.zeros(1, 3))
    loss.sums[0, 1] = 15
    logits = torch.tensor([[0.0, math.log(4), 0], [0, math.log(4), 0]])
    found = loss(logits, torch.tensor([1, 2]))
    expected = torch.tensor([math.log(1 + 0.25 * 0.25), math.log(1 + 4 * 4)]) + math.log(2)
    torch.testing.assert_close(found, expected)


def test_the_push_on_a_rare_class_is_less() -> None:
    """The gradient of a wrong class is its share of the denominator, so M = 16^-0.8 makes a rare one's that smaller."""
    loss = SeesawLoss(q=0.0)
    loss.fit(torch.zeros(1, 3))
    loss.sums[0] = torch.tensor([0.0, 15, 1])
    logits = torch.zeros(1, 3, requires_grad=True)
    loss(logits, torch.tensor([1])).backward()
    m = 16**-0.8
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad[0, 1:], torch.tensor([-m / (1 + m), m / (1 + m)]))


def test_equalization_by_its_equations() -> None:
    """Row by row and class by class, with gradients as autograd finds them in the place of a formula."""
    loss, pulled, pushed = EqualizationLoss(), np.zeros(K), np.zeros(K)
    weights = []
    for seed in range(5):
        logits, labels, valid = step(seed)
        logits.requires_grad_()
        expected = np.zeros(ROWS)
        found = loss(logits, labels, valid)
        (gradient,) = torch.autograd.grad(found[valid].sum(), logits)
        g = pulled / np.maximum(pushed, 1e-300) if seed else np.full(K, np.inf)
        r = 1 / (1 + np.exp(-12 * (g - 0.8)))
        r[0] = 1
        for i, label in enumerate(labels.tolist()):
            for j in range(K):
                p = sigmoid(logits.detach().double().numpy()[i, j])
                expected[i] += -(1 + 4 * (1 - r[j])) * math.log(p) if j == label else -r[j] * math.log(1 - p)
                if j == label:
                    pulled[j] += abs(gradient[i, j])
                else:
                    pushed[j] += abs(gradient[i, j])
        np.testing.assert_allclose(found.detach(), expected, rtol=1e-4)
        np.testing.assert_allclose(loss.sums, np.stack((pulled, pushed)), rtol=1e-4)
        weights.append(r)
    assert (weights[0] == 1).all() and weights[-1][2:].max() < 0.95  # rare classes are pushed more than pulled


@pytest.mark.parametrize(("pulled", "f"), [(1.0, 0.916827), (0.8, 0.5), (0.0, 6.7724e-5)])
def test_weights_of_equalization_by_hand(pulled: float, f: float) -> None:
    """f(1) = 1 / (1 + e^-2.4), f(0.8) = 1/2, f(0) = 1 / (1 + e^9.6); logits of 0 have a loss of log 2 each."""
    loss = EqualizationLoss()
    loss.fit(torch.zeros(1, 3))
    loss.sums[:, 1:] = torch.tensor([[pulled], [1.0]])
    logits = torch.zeros((2, 3), requires_grad=True)
    found = loss(logits, torch.tensor([0, 2]))
    torch.testing.assert_close(found, math.log(2) * torch.tensor([1 + 2 * f, 1 + f + 1 + 4 * (1 - f)]))
    found.sum().backward()
    expected = 0.5 * torch.tensor([[-1, f, f], [1, f, -(1 + 4 * (1 - f))]])
    torch.testing.assert_close(logits.grad, expected, rtol=1e-5, atol=1e-8)


def test_chances_of_equalization_are_those_of_an_object_too() -> None:
    logits = torch.tensor([0.25, 0.8, 0.5]).logit()
    torch.testing.assert_close(EqualizationLoss().probabilities(logits), torch.tensor([0.25, 0.6, 0.375]))


def test_federated_loss_of_all_classes_is_binary_cross_entropy() -> None:
    logits, labels, _ = step(0)
    expected = [
        sum(-math.log(sigmoid(z if j == y else -z)) for j, z in enumerate(row[1:], start=1))
        for row, y in zip(logits.double().numpy(), labels.tolist(), strict=True)
    ]
    torch.testing.assert_close(FederatedLoss(K - 1)(logits, labels), torch.tensor(expected, dtype=torch.float32))
    with torch.no_grad():  # where hard examples are looked for, nothing is left to chance
        torch.testing.assert_close(FederatedLoss(1)(logits, labels), torch.tensor(expected, dtype=torch.float32))


def test_federated_loss_leaves_other_classes_alone() -> None:
    torch.manual_seed(0)
    loss, labels = FederatedLoss(3, [1, 1, 1, 0, 1]), torch.tensor([0, 2, 0, 2])
    drawn = set()
    for _ in range(30):
        logits = torch.randn((4, K), requires_grad=True)
        found = loss(logits, labels)
        found.sum().backward()
        assert logits.grad is not None
        counts = logits.grad.abs().amax(dim=0) > 0
        assert counts.sum() == 3 and counts[2] and not counts[0] and not counts[4]
        kept = logits.detach()[:, counts]
        targets = F.one_hot(labels, K)[:, counts].float()
        expected = F.binary_cross_entropy_with_logits(kept, targets, reduction="none").sum(dim=1)
        torch.testing.assert_close(found.detach(), expected)
        drawn.add(tuple(counts.nonzero().flatten().tolist()))
    assert drawn == {(1, 2, 3), (1, 2, 5), (2, 3, 5)}
    many = torch.arange(1, K)
    assert FederatedLoss(2).draw(F.one_hot(many, K).amax(0)[1:].float()).all()  # those of the batch count, however many


def test_classes_are_drawn_by_the_power_of_their_frequency() -> None:
    """Two of four without replacement, by weights 1, 2, 3 and 4: the probabilities are sums over both orders."""
    torch.manual_seed(0)
    loss, tries = FederatedLoss(2, [1, 4, 9, 16]), 4000
    found = torch.stack([loss.draw(torch.zeros(4)) for _ in range(tries)]).float().mean(dim=0)
    odds = np.arange(1.0, 5) / 10
    expected = [odds[i] + sum(odds[j] * odds[i] / (1 - odds[j]) for j in range(4) if j != i) for i in range(4)]
    assert found.sum() == 2
    np.testing.assert_allclose(found, expected, atol=4 * 0.5 / math.sqrt(tries))


def test_frequencies_of_other_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="4 frequencies for 5 classes, background not included"):
        FederatedLoss(3, [1, 2, 3, 4])(*step(0)[:2])


def test_sigmoid_focal_loss_by_its_equation() -> None:
    logits, labels, _ = step(0)
    expected = []
    for row, label in zip(logits.double().numpy(), labels.tolist(), strict=True):
        terms = 0.0
        for j in range(1, K):
            p_t, alpha_t = (sigmoid(row[j]), 0.25) if j == label else (1 - sigmoid(row[j]), 0.75)
            terms -= alpha_t * (1 - p_t) ** 2 * math.log(p_t)
        expected.append(3 * terms)
    found = SigmoidFocalLoss(weight=3.0)(logits, labels)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_what_nobody_looked_for_has_no_part_in_background(name: str) -> None:
    """In the third row of the background and the second class nothing is learned of it; the others stay as they are."""
    torch.manual_seed(0)
    logits = torch.randn((2, 3, K), requires_grad=True)
    labels, valid = torch.tensor([[0, 1, 3], [0, 2, 0]]), torch.ones((2, 3), dtype=torch.bool)
    labelled = torch.ones((2, K - 1), dtype=torch.bool)
    labelled[1, 3] = False
    build = LOSSES[name] if name != "federated" else lambda: FederatedLoss(K)
    found = class_loss_of_rows(build(), logits, labels, valid, labelled)
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    plain = class_loss_of_rows(build(), logits, labels, valid, None)
    (whole,) = torch.autograd.grad(plain.sum(), logits)
    unknown = torch.zeros_like(gradient, dtype=torch.bool)
    unknown[1, [0, 2], 4] = True
    assert gradient[unknown].abs().max() < 1e-9
    torch.testing.assert_close(gradient[~unknown], whole[~unknown])
    if name != "seesaw":  # whose background says nothing of single classes
        assert whole[unknown].min() > 1e-4


def rcnn(name: str, build: Any = None, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "box_batch_size_per_image": 16,
        "rpn_post_nms_top_n_test": 50,
        "min_size": 64,
        "max_size": 64,
    }
    options |= {"box_head": partial(TwoFCHead, out_channels=32)}
    loss = FederatedLoss(2) if name == "federated" else LOSSES[name]()
    build = build or partial(faster_rcnn, Maps())
    return build(num_classes=3, class_loss=loss, **(options | kwargs))


def test_detections_have_the_probabilities_of_the_loss() -> None:
    """Of the same logits, a sigmoid's scores of a class don't depend on the other."""
    model = rcnn("focal", box_score_thresh=0.0, box_nms_thresh=1.0).eval()
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.weight.zero_()
        model.roi_heads.box_predictor.cls_score.bias.copy_(torch.tensor([5.0, 1.0, -1.0]))
        found = model([torch.rand(3, 64, 64)])[0]
    for label, logit in ((1, 1.0), (2, -1.0)):
        scores = found["scores"][found["labels"] == label]
        assert len(scores) > 5
        torch.testing.assert_close(scores, torch.full_like(scores, sigmoid(logit)))


@pytest.mark.parametrize("mean_of_logits", [False, True])
def test_stages_of_a_cascade_are_read_alike(mean_of_logits: bool) -> None:
    predictor = partial(FastRCNNPredictor, class_agnostic=True)
    model = rcnn(
        "equalization",
        partial(cascade_rcnn, Maps()),
        box_predictor=predictor,
        mean_of_logits=mean_of_logits,
        box_score_thresh=0.0,
    ).eval()
    with torch.no_grad():
        for i, stage in enumerate(model.roi_heads.stages):
            stage.box_predictor.cls_score.weight.zero_()
            stage.box_predictor.cls_score.bias.copy_(torch.tensor([-1.0, float(i), -9.0]))
        found = model([torch.rand(3, 64, 64)])[0]
    logits = np.array([0.0, 1, 2])
    chance = sigmoid(logits.mean()) if mean_of_logits else sigmoid(logits).mean()
    assert abs(found["scores"][found["labels"] == 1] - chance * (1 - sigmoid(-1.0))).max() < 1e-6


@pytest.mark.parametrize("name", LOSSES)
def test_losses_stay_in_float32_and_count_in_training_alone(name: str) -> None:
    model = rcnn(name).train()
    given = batch()
    with torch.autocast("cpu", torch.bfloat16):
        losses, _ = model.run(given, with_losses=True, with_detections=False)
    assert losses["loss_classifier"].dtype == torch.float32
    losses["loss_classifier"].backward()
    assert model.roi_heads.box_predictor.cls_score.weight.grad.abs().sum() > 0
    sums = getattr(model.roi_heads.class_loss, "sums", None)
    if sums is not None:
        counted = sums.clone()
        assert counted.sum() > 0
        with torch.no_grad():
            model.run(given, with_losses=True, with_detections=False)
        model.eval().run(given, with_losses=True, with_detections=False)
        assert torch.equal(sums, counted)


def test_sums_keep_their_precision_and_are_no_weights() -> None:
    model = rcnn("seesaw")
    loss = model.roi_heads.class_loss
    loss.sums[0, 1] = 257.0
    model.bfloat16()
    assert loss.sums.dtype == torch.float32 and loss.sums[0, 1] == 257
    assert not [name for name in model.state_dict() if "class_loss" in name]


def test_stages_of_a_cascade_count_by_themselves() -> None:
    predictor = partial(FastRCNNPredictor, class_agnostic=True)
    model = rcnn("seesaw", partial(cascade_rcnn, Maps()), box_predictor=predictor).train()
    model.run(batch(), with_losses=True, with_detections=False)
    sums = list(sums_of(model).values())
    assert len(sums) == 3 and all(1 <= s[0, 1:].sum() <= 2 * 16 for s in sums)


@pytest.mark.parametrize("name", ["seesaw", "equalization"])
def test_training_that_goes_on_has_the_same_sums(name: str, tmp_path: Path) -> None:
    """Two steps, and two more from the checkpoint, are four; all proposals are in the sample.

    Only their order is drawn, and with it that of sums, so the last bits.
    """

    def fit(steps: int, begun: Path | None = None) -> L.Trainer:
        everything = {"box_batch_size_per_image": 10**6, "rpn_batch_size_per_image": 10**6}
        full = {"box_positive_fraction": 1.0, "rpn_positive_fraction": 1.0}
        module = DetectionModule(rcnn(name, rpn_post_nms_top_n_train=20, **everything, **full), ["a", "b"])
        module.images_per_batch, module.schedule = 2, lambda step, total_steps: 1.0
        quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        trainer = L.Trainer(max_steps=steps, accelerator="cpu", **dict.fromkeys(quiet, False))
        torch.manual_seed(0)
        batches = torch.utils.data.DataLoader([batch()] * steps, batch_size=None)
        trainer.fit(module, batches, ckpt_path=begun, weights_only=True)
        return trainer

    first = fit(2)
    first.save_checkpoint(tmp_path / "half.ckpt")
    again, whole = fit(4, tmp_path / "half.ckpt").lightning_module, fit(4).lightning_module
    losses = [m.detector.roi_heads.class_loss for m in (first.lightning_module, again, whole)]
    assert 0 < losses[0].sums.sum() < losses[2].sums.sum()
    torch.testing.assert_close(losses[1].sums, losses[2].sums, rtol=1e-6, atol=0)
    fresh = rcnn(name)
    read = DetectionModule.load_from_checkpoint(tmp_path / "half.ckpt", detector=fresh, class_names=["a", "b"])
    assert torch.equal(read.detector.roi_heads.class_loss.sums, losses[0].sums)
    assert type(rebuild(losses[0].recipe)) is type(losses[0])


def test_sums_of_other_classes_begin_anew() -> None:
    loss = SeesawLoss()
    loss(*step(0)[:2])
    loss(torch.zeros(2, 3), torch.tensor([1, 0]))
    assert loss.sums.tolist() == [[1, 1, 0]]


def test_predictor_of_long_tails() -> None:
    torch.manual_seed(0)
    predictor = TailPredictor(16, 5, prior=0.01, temperature=20.0)
    features = torch.randn(7, 16)
    logits, deltas = predictor(features)
    assert deltas.shape == (7, 20)
    weight = predictor.cls_score.weight.detach()
    cosine = nn.CosineSimilarity(dim=-1)(features[:, None], weight[None])
    bias = torch.tensor([0.0] + [math.log(0.01 / 0.99)] * 4)
    torch.testing.assert_close(logits, 20 * cosine + bias)
    assert predictor.state_dict().keys() == FastRCNNPredictor(16, 5).state_dict().keys()
    plain = TailPredictor(16, 5)
    torch.testing.assert_close(plain(features)[0], F.linear(features, plain.cls_score.weight, plain.cls_score.bias))


@pytest.mark.parametrize(
    ("parts", "named"),
    [({"class_loss": SigmoidFocalLoss()}, "SigmoidFocalLoss has scores of its own"),
     ({"box_predictor": partial(TailPredictor, temperature=20.0)}, "cls_score is CosineLinear, which")],
)  # fmt: skip
@pytest.mark.parametrize("write", [to_torchvision, to_detectron2])
def test_other_libraries_do_not_get_what_they_would_read_otherwise(
    write: Any, parts: dict[str, Any], named: str
) -> None:
    with torch.device("meta"):
        model = fasterrcnn_resnet_fpn(backbone_name="resnet50", num_classes=3, **parts)
    with pytest.raises(CheckpointError, match=f"{named}.*detect something else"):
        write(model)


@pytest.mark.slow
def test_two_processes_equal_one_with_all_rows(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    alone = {name: run(name, None) for name in LOSSES}
    second = subprocess.Popen([sys.executable, tail_steps.__file__, str(tmp_path)], env=environment)
    both = [as_one_of_two(0, tmp_path)]
    assert second.wait(300) == 0
    both.append(torch.load(tmp_path / "1.pt", weights_only=True))
    for name, one in alone.items():
        losses = (both[0][name]["losses"] + both[1][name]["losses"]) / 2
        torch.testing.assert_close(losses, one["losses"], rtol=1e-5, atol=1e-6)
        gradients = torch.stack([both[i % 2][name]["gradients"][:, i // 2] for i in range(ROWS)], dim=1)
        torch.testing.assert_close(gradients / 2, one["gradients"], rtol=1e-4, atol=1e-8)
        if name in ("seesaw", "equalization"):
            assert torch.equal(both[0][name]["sums"], both[1][name]["sums"])
            exact = {"rtol": 0.0, "atol": 0.0} if name == "seesaw" else {"rtol": 1e-5, "atol": 0.0}
            torch.testing.assert_close(both[0][name]["sums"], one["sums"], **exact)
