"""Class losses for long tails: where few classes have most of the objects, and many have next to none.

Shape shorthand:
    R: sampled regions of the whole batch     K: classes with background, which is column 0
    z: logits     y: the true class of a region     C = K - 1 classes of objects
None of these is one softmax over K columns, so each says in `probabilities` how its logits are read, and its docstring
what it does with column 0, the background's. In images where not every class was looked for, the others have no part in
the loss of background; an objectness branch takes it for background all the same. Where a loss keeps sums of each
class, they are of all processes, and a run's checkpoints have them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from detection.losses import sum_over_ranks
from detection.recipes import recorded


@recorded
class SigmoidFocalLoss:
    """The focal loss of one sigmoid a class (Lin et al. 2017, RetinaNet, equation 5), summed over classes.

    -alpha_t (1 - p_t)^gamma log p_t, with alpha_t = alpha for the true class and 1 - alpha for the others. Column 0 is
    not used. The heads divide the sum by the number of sampled regions, where RetinaNet has that of the foreground.

    Args:
        alpha, gamma: the paper's.
        weight: factor on the loss.
    """

    def __init__(self, alpha: float = 0.25, gamma: float = 2.0, weight: float = 1.0) -> None:
        self.alpha, self.gamma, self.weight = alpha, gamma, weight

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits `(R, K)`, labels `(R,)` -> `(R,)`."""
        targets = one_hot(labels, logits)
        return self.weight * sigmoid_focal_loss(logits[:, 1:], targets[:, 1:], self.alpha, self.gamma).sum(dim=1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Logits `(..., K)` -> `(..., K)`."""
        return logits.sigmoid()


@recorded
class FederatedLoss(nn.Module):
    """Binary cross-entropy of some classes alone: those of the batch, and others that are drawn (Zhou et al. 2021).

    "Probabilistic two-stage detection"; Detectron2's `USE_FED_LOSS`. A rare class is a wrong answer for
    nearly every region; here it is one only in the steps that draw it. The classes are those of the foreground of all
    processes; the first process draws for all. Column 0 is not used. Where no gradient is wanted, all classes count.

    Args:
        num_classes: how many classes count, those of the batch included, which always do. Detectron2 counts the
            background as one of them.
        frequencies: of each of the C classes, e.g. the number of images that it is in; None for the same of all.
        power: classes are drawn in proportion to frequency^power.
    """

    odds: Tensor

    def __init__(self, num_classes: int = 50, frequencies: Sequence[float] | None = None, power: float = 0.5) -> None:
        super().__init__()
        self.num_classes, self.power = num_classes, power
        odds = None if frequencies is None else torch.tensor([float(n) ** power if n else 0.0 for n in frequencies])
        self.register_buffer("odds", odds, persistent=False)  # a setting, not learned

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits `(R, K)`, labels `(R,)` -> `(R,)`.

        Raises:
            ValueError: there are not as many frequencies as classes.
        """
        if self.odds is not None and len(self.odds) != logits.shape[1] - 1:
            raise ValueError(f"{len(self.odds)} frequencies for {logits.shape[1] - 1} classes, background not included")
        targets = one_hot(labels, logits)[:, 1:]
        losses = F.binary_cross_entropy_with_logits(logits[:, 1:], targets, reduction="none")
        if not torch.is_grad_enabled():
            return losses.sum(dim=1)
        return torch.where(self.draw(targets.amax(dim=0)), losses, 0.0).sum(dim=1)

    def draw(self, present: Tensor) -> Tensor:
        """Which classes count, bool `(C,)`, from 1.0 for those that the batch has and 0.0 for the others, `(C,)`."""
        waits = torch.empty_like(present).exponential_()
        if distributed.is_available() and distributed.is_initialized():
            first = distributed.get_rank() == 0
            present, waits = sum_over_ranks(torch.stack((present, waits if first else 0 * waits)))
            present = present.clamp(max=1)
        # Who comes first of those who come at these rates: a draw without replacement, and the host waits for nothing.
        waits = waits if self.odds is None else torch.where(self.odds > 0, waits / self.odds, torch.inf)
        waits = torch.where(present > 0, torch.inf, waits)
        place = waits.argsort().argsort()
        return (present > 0) | ((place < self.num_classes - present.sum()) & (waits < torch.inf))

    def probabilities(self, logits: Tensor) -> Tensor:
        """Logits `(..., K)` -> `(..., K)`."""
        return logits.sigmoid()


class ClassSums(nn.Module):
    """Base of losses that keep sums of each class since training began.

    They are a state of the training, as that of the optimiser: a run's checkpoints have them, weights do not.

    Attributes:
        sums: `(rows, K)` float32, of all processes. They begin anew where a detector gets other classes.
    """

    def __init__(self, rows: int) -> None:
        super().__init__()
        # No buffer: in a detector of bfloat16 a sum would stop growing at 256.
        self.sums = torch.zeros((rows, 0))  # classes are known when there are logits

    def fit(self, logits: Tensor) -> None:
        """Bring the sums to the classes and the device of logits `(R, K)`."""
        if self.sums.shape[1] != logits.shape[1]:
            self.sums = torch.zeros((len(self.sums), logits.shape[1]), device=logits.device)
        self.sums = self.sums.to(logits.device)

    def add(self, new: Tensor) -> None:
        """Add `(rows, K)` of each process."""
        self.sums += sum_over_ranks(new)

    def counts(self) -> bool:
        """Whether what is seen now counts: in training, but not where hard examples are looked for."""
        return self.training and torch.is_grad_enabled()


def sums_of(detector: nn.Module) -> dict[str, Tensor]:
    """The sums of a detector's losses, by name, on the CPU."""
    return {name: part.sums.cpu() for name, part in detector.named_modules() if isinstance(part, ClassSums)}


def take_sums(detector: nn.Module, sums: Mapping[str, Tensor]) -> None:
    """Go on with what `sums_of` gave; a loss without any begins anew."""
    for name, part in detector.named_modules():
        if isinstance(part, ClassSums) and name in sums:
            part.sums = sums[name].clone()


@recorded
class SeesawLoss(ClassSums):
    """Cross-entropy in which frequent classes don't push rare ones down (Wang et al. 2021).

    -log(e^z_y / (sum_j S_yj e^z_j)), S_yy = 1 and S_yj = M_yj C_yj, over the foreground and the C classes of objects.
    M_yj = min(1, (N_j / N_y)^p) with N the regions of each class so far, those of this step included; C_yj =
    max(1, (s_j / s_y)^q) with s the softmax, a constant of the optimisation.

    Column 0 is the paper's objectness branch: the logit of "background" against "any object", with binary
    cross-entropy over all regions. A class has the probability of an object times its softmax among the classes.

    Args:
        p: of mitigation; 0 is without.
        q: of compensation; 0 is without.
    """

    LEAST = 1e-2  # s_y is at least this in C, as the authors have it

    def __init__(self, p: float = 0.8, q: float = 2.0) -> None:
        super().__init__(rows=1)
        self.p, self.q = p, q

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits `(R, K)`, labels `(R,)` -> `(R,)`."""
        self.fit(logits)
        if self.counts():
            self.add(one_hot(labels, logits).sum(dim=0, keepdim=True))
        background = labels == 0
        own = (labels - 1).clamp(min=0)
        classes, objects = logits[:, 1:], logits[:, 0]
        with torch.no_grad():
            seen = self.sums[0, 1:].clamp(min=1).log()
            mitigation = self.p * (seen - seen[own, None]).clamp(max=0)
            scores = classes.log_softmax(dim=1)
            best = scores.gather(1, own[:, None]).clamp(min=math.log(self.LEAST))
            compensation = self.q * (scores - best).clamp(min=0)
        of_class = F.cross_entropy(classes + mitigation + compensation, own, reduction="none")
        of_object = F.binary_cross_entropy_with_logits(objects, background.to(objects.dtype), reduction="none")
        return of_object + torch.where(background, 0.0, of_class)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Logits `(..., K)` -> `(..., K)`, which sum to 1."""
        background = logits[..., :1].sigmoid()
        return torch.cat((background, (1 - background) * logits[..., 1:].softmax(dim=-1)), dim=-1)


@recorded
class EqualizationLoss(ClassSums):
    """Equalization loss v2 (Tan et al. 2021): each class gets as much gradient from itself as from others.

    Binary cross-entropy of one sigmoid a class, in which the true class has weight q_j = 1 + alpha (1 - f(g_j)), and a
    wrong one r_j = f(g_j), with f(x) = 1 / (1 + e^(-gamma (x - mu))). g_j is the sum of weighted gradients that pulled
    class j up so far, by the sum of those that pushed it down; both weights are 1 in the first step.

    Column 0 is the paper's objectness branch, as the authors have it: a sigmoid of the background with weights of 1. A
    class has its own probability times that of no background.

    Args:
        gamma, mu, alpha: see above.
    """

    wants_valid = True

    def __init__(self, gamma: float = 12.0, mu: float = 0.8, alpha: float = 4.0) -> None:
        super().__init__(rows=2)
        self.gamma, self.mu, self.alpha = gamma, mu, alpha

    def forward(self, logits: Tensor, labels: Tensor, valid: Tensor | None = None) -> Tensor:
        """Logits `(R, K)`, labels `(R,)` -> `(R,)`.

        Args:
            logits, labels: of all rows.
            valid: `(R,)` bool: the others are padding, and pull and push nothing.
        """
        self.fit(logits)
        targets = one_hot(labels, logits)
        pulled, pushed = self.sums
        ratio = torch.where(pushed > 0, pulled / pushed, torch.inf)
        wrong = F.pad((self.gamma * (ratio - self.mu)).sigmoid()[1:], (1, 0), value=1.0)
        weights = torch.where(targets > 0, 1 + self.alpha * (1 - wrong), wrong)
        if self.counts():
            self.add(self._gradients(logits, targets, weights, valid))
        return (weights * F.binary_cross_entropy_with_logits(logits, targets, reduction="none")).sum(dim=1)

    @staticmethod
    @torch.no_grad()
    def _gradients(logits: Tensor, targets: Tensor, weights: Tensor, valid: Tensor | None) -> Tensor:
        """What pulls each class up, and what pushes it down, `(2, K)`."""
        size = weights * (logits.sigmoid() - targets).abs()
        if valid is not None:
            size = torch.where(valid[:, None], size, 0.0)
        return torch.stack(((size * targets).sum(dim=0), (size * (1 - targets)).sum(dim=0)))

    def probabilities(self, logits: Tensor) -> Tensor:
        """Logits `(..., K)` -> `(..., K)`."""
        chances = logits.sigmoid()
        return torch.cat((chances[..., :1], chances[..., 1:] * (1 - chances[..., :1])), dim=-1)


def one_hot(labels: Tensor, logits: Tensor) -> Tensor:
    """1.0 in the column of each label `(R,)`, 0.0 elsewhere, as logits `(R, K)`."""
    return (labels[:, None] == torch.arange(logits.shape[1], device=labels.device)).to(logits.dtype)
